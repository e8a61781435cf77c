"""The demo: the embedded model sampled by DPM-Solver-v3 and by the samplers people use, as a table and two pictures.

    python install.py --demo          (or, in its environment, python benchmarks/demo.py)

Prints the error of every sampler against the converged solution from the same start noise, with the same number of
denoiser evaluations on the same steps, and writes `samples.png`, `errors.png` and `demo.json` into out/.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import OUT, SCHEDULES, Problem, geometric_mean, per_sample_error
from rivals import RIVALS, Rival
from torch import Tensor, nn
from tqdm import tqdm

from dpm_solver_v3.ems_tools.embedded import CLASSES
from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.reader import load_ems_file
from dpm_solver_v3.sampler import EMS, sample_dpm_solver_v3

STEPS = (5, 6, 8, 10)
GUIDANCES = (1.0, 4.0)
SHOWN_STEPS = 6
SEED = 7
SHIPPED = Path(__file__).resolve().parents[1] / "stats" / "embedded-emoji.ems.safetensors"
COLOURS = {
    "dpmpp_2m": "tab:gray",
    "UniPC": "tab:blue",
    "v3 without EMS": "tab:orange",
    "v3 with EMS": "tab:red",
    "v3 fitted": "tab:green",
}


def samplers(ems: EMS | None, fitted: Tensor | None) -> dict[str, Rival]:
    """The samplers of the demo by the name they are shown under; `fitted` is a schedule that replaces the common one."""

    def v3(statistics: EMS | None, own: Tensor | None = None) -> Rival:
        def run(denoiser: nn.Module, x: Tensor, sigmas: Tensor) -> Tensor:
            chosen = sigmas if own is None else own
            x = x * (chosen[0] / sigmas[0]).item()  # noise times the first sigma, as hosts begin
            return sample_dpm_solver_v3(denoiser, x, chosen, ems=statistics, disable=True)

        return run

    chosen = {"dpmpp_2m": RIVALS["dpmpp_2m"], "UniPC": RIVALS["unipc_bh2_2"], "v3 without EMS": v3(None)}
    if ems is not None:
        chosen["v3 with EMS"] = v3(ems)
        if fitted is not None:
            chosen["v3 fitted"] = v3(ems, fitted)
    return chosen


def run(problem: Problem, file: EMSFile | None, schedule: str, noises: int) -> dict[float, dict]:
    """guidance -> {"errors": {sampler: {steps: per-noise errors}}, "pictures": {sampler: [9, 3, 32, 32]}}."""
    samples, out = range(noises), {}
    total = len(GUIDANCES) * (1 + len(STEPS))
    with tqdm(total=total, unit="run", desc="demo") as bar:
        for guidance in GUIDANCES:
            bar.set_description(f"guidance {guidance:g}: converged solution")
            reference = problem.reference(samples, guidance)
            bar.update()
            denoiser, start = problem.denoiser(samples, guidance), problem.start(samples)
            errors: dict[str, dict[int, Tensor]] = {}
            pictures = {}
            for steps in STEPS:
                sigmas = SCHEDULES[schedule](steps)
                bar.set_description(f"guidance {guidance:g}: {steps} steps")
                ems = file.at(guidance) if file else None
                fitted = file.fitted_sigmas(steps, guidance).float() if file and file.meta.fitted else None
                for name, sampler in samplers(ems, fitted).items():
                    x = sampler(denoiser, start, sigmas)
                    errors.setdefault(name, {})[steps] = per_sample_error(x, reference.end_of(sigmas, "clean"))
                    if steps == SHOWN_STEPS:
                        pictures[name] = x[: len(CLASSES)]
                bar.update()
            pictures["converged"] = reference.clean[: len(CLASSES)]
            out[guidance] = {"errors": errors, "pictures": pictures}
    return out


def print_table(results: dict[float, dict], schedule: str, noises: int) -> None:
    """The errors, a row per sampler and guidance."""
    print(f"\nMean squared error against the converged solution from the same noise, geometric mean of {noises} noises,")
    print(f"steps: {schedule}, but for those fitted. One denoiser evaluation a step.\n")
    print("| guidance | sampler | " + " | ".join(f"{n} steps" for n in STEPS) + " |")
    print("| --- " * (2 + len(STEPS)) + "|")
    for guidance, result in results.items():
        for name, by_steps in result["errors"].items():
            cells = " | ".join(f"{geometric_mean(by_steps[n]).item():.5f}" for n in STEPS)
            print(f"| {guidance:g} | {name} | {cells} |")


def draw_samples(results: dict[float, dict], path: Path) -> None:
    """A grid: rows are samplers at `SHOWN_STEPS` steps per guidance, columns are classes."""
    from matplotlib.figure import Figure

    rows = [(g, name, x) for g, r in results.items() for name, x in r["pictures"].items()]
    figure = Figure(figsize=(11, 1.12 * len(rows) + 0.6), layout="constrained")
    axes = figure.subplots(len(rows), 1)
    for axis, (guidance, name, x) in zip(axes, rows, strict=True):
        strip = ((x.clamp(-1, 1) + 1) / 2).permute(2, 0, 3, 1).reshape(32, -1, 3)
        axis.imshow(strip.numpy(), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        steps = "many steps" if name == "converged" else f"{SHOWN_STEPS} steps"
        axis.set_ylabel(f"{name}\n{steps}\nguidance {guidance:g}", rotation=0, ha="right", va="center", fontsize=8)
    axes[0].set_title("The same noise, sampled by each: " + ", ".join(CLASSES), fontsize=9)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def draw_errors(results: dict[float, dict], path: Path) -> None:
    """Error over steps, a panel per guidance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, (guidance, result) in zip(figure.subplots(1, len(results), sharey=True), results.items(), strict=True):
        for name, by_steps in result["errors"].items():
            values = [geometric_mean(by_steps[n]).item() for n in STEPS]
            axis.semilogy(STEPS, values, "o-", label=name, color=COLOURS[name])
        axis.set(title=f"guidance {guidance:g}", xlabel="denoiser evaluations", xticks=STEPS)
        axis.grid(True, which="both", alpha=0.3)
    figure.axes[0].set_ylabel("mean squared error")
    figure.axes[-1].legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noises", type=int, default=18, help="start noises (18: two of each class)")
    parser.add_argument("--schedule", choices=sorted(SCHEDULES), default="uniform_lambda", help="the steps of all samplers")
    parser.add_argument("--reference-steps", type=int, default=200, help="steps of the converged solution")
    args = parser.parse_args()
    if args.noises < len(CLASSES):
        parser.error(f"at least {len(CLASSES)} noises, one of each class")
    problem = Problem(SEED, args.reference_steps)
    results = run(problem, load_ems_file(SHIPPED) if SHIPPED.is_file() else None, args.schedule, args.noises)
    OUT.mkdir(exist_ok=True)
    print_table(results, args.schedule, args.noises)
    draw_samples(results, OUT / "samples.png")
    draw_errors(results, OUT / "errors.png")
    numbers = {
        str(g): {name: {n: geometric_mean(e).item() for n, e in t.items()} for name, t in r["errors"].items()}
        for g, r in results.items()
    }
    (OUT / "demo.json").write_text(json.dumps(numbers, indent=1))
    print(f"\nPictures: {OUT / 'samples.png'} and {OUT / 'errors.png'}")


if __name__ == "__main__":
    main()
