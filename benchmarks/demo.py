"""The demo: the embedded model sampled by DPM-Solver-v3 and by the samplers people use, as a table and two pictures.

    python install.py --demo          (or, in its environment, python benchmarks/demo.py)
    python benchmarks/demo.py --shown-guidance 2 --shown-steps 5 6 8

Prints the error of every sampler against the converged solution from the same start noise, with the same number of
denoiser evaluations on the same steps, and writes `samples.png`, `errors.png` and `demo.json` into out/.

`samples.png` shows the same noise in 5 steps of the best built-in sampler (of the samplers and schedules in `PANEL` the pair
with the smallest error on other noise), in 5 of ours, and converged. Beside a picture is its distance from the converged one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import OUT, SCHEDULES, Problem, geometric_mean, per_sample_error
from rivals import RIVALS, Denoiser, Rival
from torch import Tensor
from tqdm import tqdm

from dpm_solver_v3.ems_tools.embedded import CLASSES
from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.reader import load_ems_file
from dpm_solver_v3.sampler import EMS, sample_dpm_solver_v3

STEPS = (5, 6, 8, 10)
GUIDANCES = (1.0, 4.0)
SEED, CHOICE_SEED = 7, 19
SHOWN_STEPS, SHOWN_GUIDANCE = (6, 5), 1.0
SHOWN_CLASSES = ("Flags", "People & Body", "Smileys & Emotion", "Travel & Places")
PANEL = [
    (sampler, schedule)
    for sampler in ("dpmpp_2m", "dpmpp_3m_diffusers", "unipc_bh2_2", "unipc_bh2_3", "deis_2", "deis_3", "sa_solver_3")
    for schedule in ("karras", "karras_to_zero", "uniform_lambda", "uniform_time", "uniform_time_to_zero", "quadratic_time")
]
SHIPPED = Path(__file__).resolve().parents[1] / "stats" / "embedded-emoji.ems.safetensors"
COLOURS = {
    "dpmpp_2m": "tab:gray",
    "UniPC": "tab:blue",
    "v3 without EMS": "tab:orange",
    "v3 with EMS": "tab:red",
    "v3 fitted": "tab:green",
}


def samplers(ems: EMS | None, fitted: Tensor | None, guidance: float) -> dict[str, Rival]:
    """The samplers of the demo by the name they are shown under; `fitted` is a schedule that replaces the common one."""

    def v3(statistics: EMS | None, own: Tensor | None = None) -> Rival:
        def run(denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
            chosen = sigmas if own is None else own
            x = x * (chosen[0] / sigmas[0]).item()  # noise times the first sigma, as hosts begin
            return sample_dpm_solver_v3(denoiser, x, chosen, ems=statistics, guidance=guidance, disable=True)

        return run

    chosen = {"dpmpp_2m": RIVALS["dpmpp_2m"], "UniPC": RIVALS["unipc_bh2_2"], "v3 without EMS": v3(None)}
    if ems is not None:
        chosen["v3 with EMS"] = v3(ems)
        if fitted is not None:
            chosen["v3 fitted"] = v3(ems, fitted)
    return chosen


Errors = dict[str, dict[int, Tensor]]


def run(problem: Problem, file: EMSFile | None, schedule: str, noises: int) -> dict[float, Errors]:
    """guidance -> {sampler: {steps: per-noise errors}}."""
    samples, out = range(noises), {}
    total = len(GUIDANCES) * (1 + len(STEPS))
    with tqdm(total=total, unit="run", desc="demo") as bar:
        for guidance in GUIDANCES:
            bar.set_description(f"guidance {guidance:g}: converged solution")
            reference = problem.reference(samples, guidance)
            bar.update()
            denoiser, start = problem.denoiser(samples, guidance), problem.start(samples)
            errors: Errors = {}
            for steps in STEPS:
                sigmas = SCHEDULES[schedule](steps)
                bar.set_description(f"guidance {guidance:g}: {steps} steps")
                ems = file.at(guidance) if file else None
                fitted = file.fitted_sigmas(steps, guidance).float() if file and file.meta.fitted else None
                for name, sampler in samplers(ems, fitted, guidance).items():
                    x = sampler(denoiser, start, sigmas)
                    errors.setdefault(name, {})[steps] = per_sample_error(x, reference.end_of(sigmas, "clean"))
                bar.update()
            out[guidance] = errors
    return out


def print_table(results: dict[float, Errors], schedule: str, noises: int) -> None:
    """The errors, a row per sampler and guidance."""
    print(f"\nMean squared error against the converged solution from the same noise, geometric mean of {noises} noises,")
    print(f"steps: {schedule}, but for those fitted. One denoiser evaluation a step.\n")
    print("| guidance | sampler | " + " | ".join(f"{n} steps" for n in STEPS) + " |")
    print("| --- " * (2 + len(STEPS)) + "|")
    for guidance, errors in results.items():
        for name, by_steps in errors.items():
            cells = " | ".join(f"{geometric_mean(by_steps[n]).item():.5f}" for n in STEPS)
            print(f"| {guidance:g} | {name} | {cells} |")


@dataclass(frozen=True)
class Shown:
    """Pictures [classes, 3, 32, 32] of one number of steps, and each sampler's error over all noises.

    `built_in` says which sampler and schedule were the best of `PANEL` on other noise.
    """

    steps: int
    built_in: str
    pictures: dict[str, Tensor]
    errors: dict[str, float]


def shown(file: EMSFile, noises: int, reference_steps: int, guidance: float, counts: Sequence[int]) -> Iterator[Shown]:
    """The best built-in sampler, ours and the converged pictures at this guidance scale, for each of these step counts."""
    choice, problem = Problem(CHOICE_SEED, reference_steps), Problem(SEED, reference_steps)
    samples = range(noises)
    converged = problem.reference(samples, guidance).clean
    keep = [CLASSES.index(name) for name in SHOWN_CLASSES]
    ems = file.at(guidance)
    for steps in counts:
        sampler, schedule = _best_of_panel(choice, steps, guidance)
        sigmas = SCHEDULES[schedule](steps)
        fitted = file.fitted_sigmas(steps, guidance).float()
        denoiser = problem.denoiser(samples, guidance)
        found = {
            "best built-in": RIVALS[sampler](denoiser, problem.start(samples, sigmas[0].item()), sigmas),
            "DPM-Solver-v3": sample_dpm_solver_v3(
                denoiser, problem.start(samples, fitted[0].item()), fitted, ems=ems, disable=True
            ),
        }
        errors = {name: geometric_mean(per_sample_error(x, converged)).item() for name, x in found.items()}
        pictures = {name: x[keep] for name, x in {**found, "converged": converged}.items()}
        yield Shown(steps, f"{sampler} on {schedule}", pictures, errors)


def _best_of_panel(problem: Problem, steps: int, guidance: float) -> tuple[str, str]:
    """The sampler and schedule with the smallest error on nine noises that are not shown."""
    samples = range(len(CLASSES))
    reference = problem.reference(samples, guidance).clean
    denoiser = problem.denoiser(samples, guidance)

    def error(pair: tuple[str, str]) -> float:
        sigmas = SCHEDULES[pair[1]](steps)
        x = RIVALS[pair[0]](denoiser, problem.start(samples, sigmas[0].item()), sigmas)
        return geometric_mean(per_sample_error(x, reference)).nan_to_num(nan=math.inf).item()

    return min(tqdm(PANEL, unit="run", desc=f"best built-in sampler, {steps} steps"), key=error)


def draw_samples(shown: Shown, path: Path) -> None:
    """A row per noise: the best built-in sampler's picture, its distance from the converged one, the same of ours, the goal."""
    from matplotlib.figure import Figure

    target, theirs, ours = shown.pictures["converged"], shown.errors["best built-in"], shown.errors["DPM-Solver-v3"]
    titles = {
        "best built-in": f"best built-in sampler, {shown.steps} steps\nmean error {theirs:.4f}",
        "DPM-Solver-v3": f"this project, {shown.steps} steps\nmean error {ours:.4f}: {100 * (1 - ours / theirs):.0f} % less",
        "converged": "the goal:\n200 steps",
    }
    figure = Figure(figsize=(11, 9.3), layout="constrained")
    parts = figure.subfigures(1, 3, width_ratios=[2, 2, 1])
    for part, (name, title) in zip(parts, titles.items(), strict=True):
        part.suptitle(title, fontsize=15, fontweight="bold" if name == "DPM-Solver-v3" else "normal")
        x = shown.pictures[name]
        distance = (x - target).abs().mean(1)
        axes = part.subplots(len(x), 1 if name == "converged" else 2, squeeze=False)
        for row, picture, error in zip(axes, x, distance, strict=True):
            row[0].imshow(((picture.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy(), interpolation="bicubic")
            if name != "converged":
                row[1].imshow(error.numpy(), cmap="inferno", vmin=0, vmax=0.35, interpolation="bicubic")
            for axis in row:
                axis.set(xticks=[], yticks=[])
        for axis, caption in zip(axes[0], ("picture", "what is wrong in it"), strict=False):
            axis.set_title(caption, fontsize=12)
    figure.savefig(path, dpi=100)


def draw_errors(results: dict[float, Errors], path: Path) -> None:
    """Error over steps, a panel per guidance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.9), layout="constrained")
    for axis, (guidance, errors) in zip(figure.subplots(1, len(results), sharey=True), results.items(), strict=True):
        for name, by_steps in errors.items():
            values = [geometric_mean(by_steps[n]).item() for n in STEPS]
            axis.semilogy(STEPS, values, "o-", label=name, color=COLOURS[name])
        axis.set(title=f"guidance {guidance:g}", xlabel="denoiser evaluations", xticks=STEPS)
        axis.grid(True, which="both", alpha=0.3)
    figure.axes[0].set_ylabel("mean squared error")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noises", type=int, default=18, help="start noises (18: two of each class)")
    parser.add_argument("--schedule", choices=sorted(SCHEDULES), default="uniform_lambda", help="the steps of all samplers")
    parser.add_argument("--reference-steps", type=int, default=200, help="steps of the converged solution")
    parser.add_argument("--shown-guidance", type=float, default=SHOWN_GUIDANCE, help="scale of the pictures, one of the file's")
    parser.add_argument("--shown-steps", type=int, nargs="+", default=SHOWN_STEPS, help="steps compared there, the first drawn")
    args = parser.parse_args()
    if args.noises < len(CLASSES):
        parser.error(f"at least {len(CLASSES)} noises, one of each class")
    file = load_ems_file(SHIPPED)
    results = run(Problem(SEED, args.reference_steps), file, args.schedule, args.noises)
    OUT.mkdir(exist_ok=True)
    print_table(results, args.schedule, args.noises)
    columns = list(shown(file, args.noises, args.reference_steps, args.shown_guidance, args.shown_steps))
    print(f"\nGuidance {args.shown_guidance:g}, each at its best schedule (chosen on other noise):")
    for column in columns:
        ours, theirs = column.errors["DPM-Solver-v3"], column.errors["best built-in"]
        print(f"{column.steps} steps: {column.built_in} {theirs:.5f}, v3 fitted {ours:.5f}, ratio {ours / theirs:.2f}")
    draw_samples(columns[0], OUT / "samples.png")
    draw_errors(results, OUT / "errors.png")
    numbers = {
        str(g): {name: {n: geometric_mean(e).item() for n, e in t.items()} for name, t in errors.items()}
        for g, errors in results.items()
    }
    (OUT / "demo.json").write_text(json.dumps(numbers, indent=1))
    print(f"\nPictures: {OUT / 'samples.png'} and {OUT / 'errors.png'}")


if __name__ == "__main__":
    main()
