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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import bootstrap_ratio, geometric_mean
from entrants import host_schedules
from rivals import RIVALS
from torch import Tensor
from zoo import NETWORKS, Loaded, load

from dpm_solver_v3.ems_tools.compute import EFFORTS, Effort, evaluations, job_for, plan_for
from dpm_solver_v3.ems_tools.estimate.job import JobState
from dpm_solver_v3.ems_tools.estimate.run import estimate_moments
from dpm_solver_v3.ems_tools.estimate.source import Source
from dpm_solver_v3.ems_tools.file.rows import FittedRow
from dpm_solver_v3.ems_tools.fit import run as fit_run
from dpm_solver_v3.ems_tools.fit import steps as fit_steps_module
from dpm_solver_v3.ems_tools.fit.panel import formula_steps
from dpm_solver_v3.ems_tools.fit.spacing import Range, Spacing
from dpm_solver_v3.sampler import EDM as SigmaTime
from dpm_solver_v3.sampler import (
    EMS,
    FittedSteps,
    Recommendation,
    karras,
    quadratic_time,
    sample_dpm_solver_v3,
    uniform_lambda,
    uniform_time,
)
from dpm_solver_v3.sampler import VPContinuous as VPTime

OUT = Path(__file__).resolve().parents[1] / "out"
SKIPPED = ("dpmpp_2m_diffusers", "dpmpp_2m_heun_diffusers", "lms")
"""Rivals that another one equals, or that are hopeless at few steps."""
FINE = 160
"""Steps of a converged solution down to sigma_min; from there on 24 more to sigma 0.002."""


@dataclass(frozen=True)
class Size:
    """How much is measured: step counts, noises to judge on, noises to choose the rival on (first on all, then on the best)."""

    steps: tuple[int, ...] = (4, 5, 6, 8, 10)
    noises: int = 24
    first: int = 3
    selection: int = 16
    finalists: int = 20


QUICK = Size((5, 8), 12, 2, 8, 12)


class Bench:
    """One network at one guidance scale: noises, converged solutions, errors of samplers."""

    def __init__(self, network: Loaded, guidance: float, size: Size) -> None:
        self.network, self.guidance, self.size = network, guidance, size
        self.high, self.low = network.ends
        self.judged = list(range(1000, 1000 + size.noises))
        self.chosen_on = list(range(500, 500 + size.selection))
        self.clean = {k: x for ids in (self.judged, self.chosen_on) for k, x in zip(ids, self._solve(ids), strict=True)}

    def denoiser(self, samples: Sequence[int], part: str = "judge") -> torch.nn.Module:
        """D for these samples; sample k has the class k mod n of those that are judged."""
        classes = self.network.entry.classes_of(part)
        return self.network.denoiser(self.guidance, [classes[k % len(classes)] for k in samples])

    def noise(self, samples: Sequence[int]) -> Tensor:
        """Unit start noise."""
        seeds = [70_000_133 + k for k in samples]
        shape = self.network.entry.shape
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def _solve(self, samples: list[int]) -> Tensor:
        lam = torch.linspace(-math.log(self.high), -math.log(self.low), FINE + 1, dtype=torch.float64)
        tail = torch.logspace(math.log10(self.low), math.log10(0.002), 25, dtype=torch.float64)[1:]
        sigmas = torch.cat([(-lam).exp(), tail if self.low > 0.004 else lam[:0], lam.new_zeros(1)])
        options: dict[str, Any] = {"order": 3, "corrector": "none", "lower_order_final": False, "disable": True}
        return sample_dpm_solver_v3(self.denoiser(samples), self.noise(samples) * self.high, sigmas, **options)

    def errors(self, samples: Sequence[int], sampler: Callable[[Any, Tensor, Tensor], Tensor], sigmas: Tensor) -> Tensor:
        """Squared errors [K]; infinite where a sampler cannot follow the schedule."""
        start = self.noise(samples) * sigmas[0].item()
        try:
            x = sampler(self.denoiser(samples), start, sigmas)
        except (ArithmeticError, ValueError, RuntimeError, IndexError):
            x = torch.full_like(start, math.nan)
        clean = torch.stack([self.clean[k] for k in samples])
        return (x.double() - clean.double()).square().flatten(1).mean(1).nan_to_num(nan=1e30).clamp(max=1e30)

    def schedules(self) -> dict[str, Callable[[int], Tensor]]:
        """Those of the model's own time, of VP time, flow time and sigma, to sigma_min and to 0, and the hosts'."""
        own, both = self.network.entry.schedule, SigmaTime(self.low, self.high)
        inverse = lambda s: math.sqrt(0.01 + 39.8 * math.log1p(s * s)) - 0.1  # noqa: E731
        vp = VPTime(time_min=inverse(self.low) / 19.9, time_max=inverse(self.high) / 19.9)
        found: dict[str, Callable[[int], Tensor]] = {}
        kinds = (("uniform", uniform_time), ("quadratic", quadratic_time))
        for time_name, schedule in (("own", own), ("vp", vp), ("flow", _Flow(self.low, self.high))):
            for name, kind in kinds:
                for zero in (False, True):
                    found[f"{time_name} {name}{' 0' if zero else ''}"] = _made(kind, schedule, zero)
        for name, kind in (("lambda", uniform_lambda), ("karras", karras)):
            for zero in (False, True):
                found[f"{name}{' 0' if zero else ''}"] = _made(kind, both, zero)
        hosts = host_schedules(own)
        return {**found, **{name: hosts[name] for name in ("sgm_uniform", "beta", "kl_optimal")}}

    def best_rival(self, steps: int) -> tuple[str, Tensor]:
        """Name and errors on the judged noises of the rival that is best on the noises of its choice."""
        scores: dict[tuple[str, str], Tensor] = {}
        made = {name: make(steps) for name, make in self.schedules().items()}
        usable = {name: s for name, s in made.items() if len(s) == steps + 1 and bool((s.diff() < 0).all())}
        size, names = self.size, [name for name in RIVALS if name not in SKIPPED]
        first, rest = self.chosen_on[: size.first], self.chosen_on[size.first :]
        for schedule, sigmas in usable.items():
            for name in names:
                scores[name, schedule] = self.errors(first, RIVALS[name], sigmas)
        ranked = sorted(scores, key=lambda k: geometric_mean(scores[k]).item())[: size.finalists]
        for key in ranked:
            scores[key] = torch.cat([scores[key], self.errors(rest, RIVALS[key[0]], usable[key[1]])])
        name, schedule = min(ranked, key=lambda k: geometric_mean(scores[k]).item())
        return f"{name} on {schedule}", self.errors(self.judged, RIVALS[name], usable[schedule])

    def fitted_errors(self, steps: FittedSteps) -> Tensor:
        """Errors of the sampler with fitted steps."""
        ems = replace(EMS.degenerate(1), recommendation=Recommendation((), (steps,)))
        sigmas = torch.tensor([*(math.exp(-v) for v in steps.lambdas), 0.0], dtype=torch.float64)
        run = lambda model, x, s: sample_dpm_solver_v3(model, x, s, ems=ems, disable=True)  # noqa: E731
        return self.errors(self.judged, run, sigmas)


@dataclass(frozen=True)
class _Flow:
    """Flow time between two sigmas, in sigma space."""

    low: float
    high: float
    space = SigmaTime.space

    @property
    def time_min(self) -> float:
        """Where sigma is lowest."""
        return self.low / (1 + self.low)

    @property
    def time_max(self) -> float:
        """Where sigma is highest."""
        return self.high / (1 + self.high)

    def level_at(self, time: Tensor) -> Tensor:
        """Sigma at `time`."""
        t = time.to(torch.float64)
        return t / (1 - t)


def _made(kind: Callable[..., Tensor], schedule: Any, zero: bool) -> Callable[[int], Tensor]:
    return lambda n: kind(schedule, n, to_zero=zero)


def fit(network: Loaded, guidance: float, effort: Effort, steps: tuple[int, ...]) -> tuple[list[FittedRow], int, float, float]:
    """Rows, evaluations counted, and seconds in all and in the network."""
    entry, spent = network.entry, [0.0, 0.0]

    class Counted(torch.nn.Module):
        def __init__(self, denoiser: Any) -> None:
            super().__init__()
            self.denoiser = denoiser

        def for_samples(self, samples: list[int]) -> Counted:
            return Counted(self.denoiser.for_samples(samples))

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            began = time.perf_counter()
            out: Tensor = self.denoiser(x, sigma)
            spent[0], spent[1] = spent[0] + len(x), spent[1] + time.perf_counter() - began
            return out

    model = Counted(network.denoiser(guidance, entry.classes_of("fit")))
    source = Source({guidance: model}, entry.shape, entry.schedule, {})
    job, plan, state = job_for(source, effort), plan_for(source, effort, steps), JobState()
    assert plan.fit is not None
    began = time.perf_counter()
    estimate_moments(source.models, job, state, batch=32, keep=plan.fit.noises)
    rows = fit_run.fit_steps(model, job, guidance, plan.fit, state, schedule=entry.schedule, batch=32)
    planned = evaluations(job, replace(plan, schedules={}))
    if spent[0] > planned:
        raise AssertionError(f"{spent[0]} evaluations, announced were {planned}")
    return rows, int(spent[0]), time.perf_counter() - began, spent[1]


def table(names: Sequence[str], guidances: Sequence[float], efforts: Sequence[str], size: Size, out: Path) -> None:
    """Print one line a network, guidance scale and effort, and the summary."""
    cells: list[dict[str, Any]] = []
    for name in names:
        network = load(name)
        for guidance in [g for g in network.entry.guidances if not guidances or g in guidances]:
            bench = Bench(network, guidance, size)
            rivals = {n: bench.best_rival(n) for n in size.steps}
            for effort in efforts:
                rows, count, whole, inside = fit(network, guidance, EFFORTS[effort], ())
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
                print(f"{split}, {effort}: median {middle:.2f}, {worst}")


def ablation(names: Sequence[str], size: Size) -> None:
    """The median over cells of the error over the whole fit's, with one ingredient taken away."""
    effort = EFFORTS["quick"]
    changes: dict[str, tuple[Effort, Callable[[], None], Callable[[], None]]] = {
        "no choice of spacing": (replace(effort, fit=replace(effort.fit, spacings=1)), _nothing, _nothing),
        "no ridge (the weakest alone)": (effort, lambda: _ridges((0.003,)), lambda: _ridges((0.003, 0.03, 0.3, 3.0))),
        "strong ridge alone": (effort, lambda: _ridges((3.0,)), lambda: _ridges((0.003, 0.03, 0.3, 3.0))),
        "half the noises": (replace(effort, fit=replace(effort.fit, noises=5)), _nothing, _nothing),
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
                plain = formula_steps(row.lambdas, -math.log(bench.low), "order 2")
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
        table(names, args.guidance, args.effort, size, args.json)


if __name__ == "__main__":
    main()
