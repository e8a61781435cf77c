"""The fit against every rival on every schedule, on the networks of the zoo.

    python benchmarks/zoo_train.py --data FOLDER         # once, see zoo/data.py
    python benchmarks/zoo.py [--quick] [--only NAME ...] [--guidance 1 4] [--effort quick standard] [--json out/zoo.json]
    python benchmarks/zoo.py --ablation

Files are computed as a user would, on half of the classes where a network has many; judged are other noise and the other
classes. The rival is the best of k-diffusion's and diffusers' samplers on the best of some twenty schedules, chosen on noise
of its own. A cell is the geometric mean over noises of our squared error over the rival's, with its bootstrap 95 % interval;
"says" is what the file itself states (against the panel that it tried). --quick takes two step counts, few noises and the
cheap networks. --ablation takes each ingredient of the fit away in turn.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import bootstrap_ratio, geometric_mean
from zoo import NETWORKS, load
from zoo.bench import QUICK, Bench, Size, fit

from dpm_solver_v3.ems_tools.compute import EFFORTS, Effort, job_for
from dpm_solver_v3.ems_tools.estimate.source import Source
from dpm_solver_v3.ems_tools.file.rows import FittedRow
from dpm_solver_v3.ems_tools.fit import steps as fit_steps_module
from dpm_solver_v3.ems_tools.fit.formulas import formula_steps
from dpm_solver_v3.ems_tools.fit.spacing import Range, Spacing
from dpm_solver_v3.sampler import FittedSteps

OUT = Path(__file__).resolve().parents[1] / "out"


def table(
    names: Sequence[str], guidances: Sequence[float], efforts: Sequence[str], size: Size, out: Path, classes: int = 0
) -> None:
    """Print one line a network, guidance scale and effort, and the summary."""
    cells: list[dict[str, Any]] = []
    for name in names:
        network = load(name)
        for guidance in [g for g in network.entry.guidances if not guidances or g in guidances]:
            bench = Bench(network, guidance, size)
            rivals = {n: bench.best_rival(n) for n in size.steps}
            for effort in efforts:
                rows, count, whole, inside = fit(network, guidance, EFFORTS[effort], (), classes)
                mine = [r for r in rows if r.steps in size.steps]
                line = []
                for row in mine:
                    rival, theirs = rivals[row.steps]
                    assert row.coefficients is not None
                    ratio = bootstrap_ratio(bench.fitted_errors(row.coefficients), theirs)["geometric_mean"]
                    cells.append({"network": name, "split": network.entry.split, "guidance": guidance, "effort": effort})
                    cells[-1].update({"steps": row.steps, "ratio": ratio, "says": row.ratio, "rival": rival})
                    cells[-1].update({"panel": row.fixed_schedule, "evaluations": count})
                    line.append(f"{row.steps}: {ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}] says {row.ratio[0]:.2f}")
                own = f"{count} evaluations, own time {100 * (whole - inside) / inside:.0f} %"
                print(f"{name}, {guidance:g}, {effort} ({own}): " + "; ".join(line), flush=True)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(cells, indent=1))
    for split in ("development", "final"):
        for effort in efforts:
            ratios = sorted(c["ratio"][0] for c in cells if c["split"] == split and c["effort"] == effort)
            if ratios:
                above, middle = sum(r > 1.05 for r in ratios), ratios[len(ratios) // 2]
                worst = f"worst {ratios[-1]:.2f}, {above} of {len(ratios)} above 1.05"
                print(f"{split}, {effort}: median {middle:.2f}, {worst}; {_honesty(cells, split, effort)}")


def _honesty(cells: Sequence[dict[str, Any]], split: str, effort: str) -> str:
    """How often what the file says and what was measured lie in each other's interval, and the one over the other."""
    mine = [(c["says"], c["ratio"]) for c in cells if c["split"] == split and c["effort"] == effort]
    said = sum(ratio[1] <= says[0] <= ratio[2] for says, ratio in mine)
    measured = sum(says[1] <= ratio[0] <= says[2] for says, ratio in mine)
    share = math.exp(sum(math.log(says[0] / ratio[0]) for says, ratio in mine) / len(mine))
    return (
        f"{said} of {len(mine)} rows say a ratio in the measured interval, {measured} an interval that holds the measured one; "
        f"on average they say {share:.2f} of it"
    )


def ablation(names: Sequence[str], size: Size) -> None:
    """The median over cells of the error over the whole fit's, with one ingredient taken away."""
    effort = EFFORTS["quick"]
    changes: dict[str, tuple[Effort, Callable[[], None], Callable[[], None]]] = {
        "no choice of spacing": (replace(effort, fit=replace(effort.fit, spacings=1)), _nothing, _nothing),
        "no ridge (the weakest alone)": (effort, lambda: _ridges((0.003,)), lambda: _ridges((0.003, 0.03, 0.3, 3.0))),
        "strong ridge alone": (effort, lambda: _ridges((3.0,)), lambda: _ridges((0.003, 0.03, 0.3, 3.0))),
        "half the noises": (replace(effort, fit=replace(effort.fit, noises=effort.fit.noises // 2)), _nothing, _nothing),
        "no turning of the lambdas": (replace(effort, fit=replace(effort.fit, turns=0)), _nothing, _nothing),
    }
    ratios: dict[str, list[float]] = {what: [] for what in (*changes, "the second-order formula on the same spacing")}
    for name in names:
        network = load(name)
        for guidance in network.entry.guidances[::2]:
            bench = Bench(network, guidance, size)
            whole = {r.steps: r for r in fit(network, guidance, effort, size.steps)[0]}
            base = {n: geometric_mean(bench.fitted_errors(_own(r))).item() for n, r in whole.items()}
            for what, (other, before, after) in changes.items():
                before()
                rows = fit(network, guidance, other, size.steps)[0]
                after()
                ratios[what] += [geometric_mean(bench.fitted_errors(_own(r))).item() / base[r.steps] for r in rows]
            for n, row in whole.items():
                plain = formula_steps(row.lambdas, -math.log(bench.low), "DPM-Solver++ 2M")
                error = geometric_mean(bench.fitted_errors(plain)).item()
                ratios["the second-order formula on the same spacing"].append(error / base[n])
    for what, values in ratios.items():
        values.sort()
        print(f"{what}: median {values[len(values) // 2]:.2f}, from {values[0]:.2f} to {values[-1]:.2f}")


def _own(row: FittedRow) -> FittedSteps:
    assert row.coefficients is not None
    return row.coefficients


def _ridges(values: tuple[float, ...]) -> None:
    fit_steps_module.RIDGES = values


def _nothing() -> None:
    return None


def spacings(names: Sequence[str], size: Size) -> None:
    """What coefficients fitted on each candidate spacing reach, over the best rival: the figures behind `fit.spacing`."""
    from dpm_solver_v3.ems_tools.fit.spacing import CANDIDATES
    from dpm_solver_v3.ems_tools.trajectory import Runner, teach

    for name in names:
        network = load(name)
        for guidance in network.entry.guidances:
            bench = Bench(network, guidance, size)
            model = network.denoiser(guidance, network.entry.classes_of("fit"))
            source = Source({guidance: model}, network.entry.shape, network.entry.schedule, {})
            job = job_for(source, EFFORTS["quick"])
            runner = Runner(job, model, batch=32)
            teacher, span = teach(runner, range(10)), Range.of(job.lambdas, network.entry.schedule)
            for n in size.steps:
                rival, theirs = bench.best_rival(n)
                found = []
                for spacing in CANDIDATES:
                    steps, _ = fit_steps_module.closed_loop(runner, range(10), teacher, spacing.lambdas(n, span, teacher))
                    ratio = bootstrap_ratio(bench.fitted_errors(steps), theirs)["geometric_mean"][0]
                    found.append(f"{_words(spacing)} {ratio:.2f}")
                print(f"{name}, {guidance:g}, {n} steps, over {rival}: " + ", ".join(found), flush=True)


def _words(spacing: Spacing) -> str:
    return f"{spacing.name}{' late' if spacing.first else ''}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two step counts, few noises, the cheap networks of development")
    parser.add_argument("--final", action="store_true", help="the three networks that took no part in development")
    parser.add_argument("--only", nargs="+", choices=sorted(NETWORKS), help="these networks")
    parser.add_argument("--guidance", type=float, nargs="+", default=[], help="these scales")
    parser.add_argument("--effort", nargs="+", choices=sorted(EFFORTS), default=["quick", "standard"])
    parser.add_argument("--steps", type=int, nargs="+", help="step counts")
    parser.add_argument("--noises", type=int, help="noises to judge on")
    parser.add_argument("--classes", type=int, default=0, help="fit on so many classes only, as with one prompt")
    parser.add_argument("--ablation", action="store_true", help="take each ingredient away in turn")
    parser.add_argument("--spacings", action="store_true", help="fit on every candidate spacing")
    parser.add_argument("--json", type=Path, default=OUT / "zoo.json", help="where the numbers go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = QUICK if args.quick or args.ablation or args.spacings else Size()
    size = replace(size, steps=tuple(args.steps or size.steps), noises=args.noises or size.noises)
    split = "final" if args.final else "development"
    cheap = ["digits", "galaxies", "mnist"]
    names = args.only or (cheap if args.quick and not args.final else [n for n, e in NETWORKS.items() if e.split == split])
    if args.ablation:
        ablation(names, size)
    elif args.spacings:
        spacings(names, size)
    else:
        table(names, args.guidance, args.effort, size, args.json, args.classes)


if __name__ == "__main__":
    main()
