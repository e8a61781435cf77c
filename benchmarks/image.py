"""Image to image: what steps fitted for it are worth, on the networks of the zoo.

    python benchmarks/image.py [--only NAME ...] [--final] [--guidance 1 4] [--denoise 0.3 0.5 0.75] [--steps 5 8]

A run begins where a host begins it at this denoise: at the last n + 1 levels of n / denoise steps in the model's time (Karras
steps for networks that know sigma only), from a picture of the network with fresh noise on it. A file is fitted as a user
would, on the classes to fit on. The table is made on other noises and classes, by the mean squared distance to the converged
solution from the same start: the error with the file over that of the best rival. Where the file holds no steps for a run,
those are taken that it would be without. Rivals are the library samplers of `rivals.py` and this one without a file, each on
seven schedules from the same beginning to 0, the best one chosen on other noises. Geometric means with bootstrap 95 %
intervals.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import OUT, bootstrap_ratio, geometric_mean
from rivals import RIVALS
from torch import Tensor
from zoo import NETWORKS, Loaded, load
from zoo.bench import SKIPPED

from dpm_solver_v3.ems_tools.compute import EFFORTS, job_for, plan_for
from dpm_solver_v3.ems_tools.estimate.job import JobState, uniform_grid
from dpm_solver_v3.ems_tools.estimate.source import Source
from dpm_solver_v3.ems_tools.file.rows import FittedRow
from dpm_solver_v3.ems_tools.fit.partial import fine_grid, fit_partial
from dpm_solver_v3.ems_tools.fit.spacing import Range, Spacing
from dpm_solver_v3.ems_tools.trajectory import Runner, Trajectories, few_steps, pictures_of, teach
from dpm_solver_v3.sampler import EDM, karras, sample_dpm_solver_v3, unfitted_from, uniform_time
from dpm_solver_v3.sampler.fitted import between

OURS, HOSTS = "this sampler without a file", "the steps that hosts take then"
SCHEDULES = {
    "karras": Spacing("sigma", 7.0, 0.0),
    "lambda": Spacing("lambda", 1.0, 0.0),
    "vp": Spacing("vp", 1.0, 0.0),
    "vp quadratic": Spacing("vp", 2.0, 0.0),
    "flow": Spacing("flow", 1.0, 0.0),
    "own": Spacing("model", 1.0, 0.0),
}
CHOICE, FIRST = 8, 9_000
"""Noises that a rival is chosen on, and the number of the first one of these and of those to judge on."""


def fitted(network: Loaded, guidance: float, effort: str, steps: tuple[int, ...]) -> list[FittedRow]:
    """Rows for image to image, as a file holds them."""
    entry = network.entry
    source = Source({guidance: network.denoiser(guidance, entry.classes_of("fit"))}, entry.shape, entry.schedule, {})
    job, state = job_for(source, EFFORTS[effort], steps=steps), JobState()
    plan = plan_for(source, EFFORTS[effort], steps, image_to_image=True).fit
    assert plan is not None
    return fit_partial(source, job, guidance, plan, state, batch=32)


class Judge:
    """Pictures of the network, fresh noise, and the runs from one level: other noises and classes than the fit's."""

    def __init__(self, network: Loaded, guidance: float, noises: int) -> None:
        entry = network.entry
        self.network, self.guidance, self.ids = network, guidance, list(range(FIRST, FIRST + CHOICE + noises))
        self.denoiser: Any = network.denoiser(guidance, entry.classes_of("judge"))
        source = Source({guidance: self.denoiser}, entry.shape, entry.schedule, {})
        self.job = replace(
            job_for(source, EFFORTS["quick"], seed=6), lambdas=uniform_grid(network.ends[1], network.ends[0], 80)
        )
        ends = pictures_of(Runner(self.job, self.denoiser, batch=64), self.ids)
        self.pictures = dict(zip(self.ids, ends, strict=True))

    def begin(self, top: float) -> tuple[Runner, Trajectories]:
        """Runs from sigma `top`, and their converged solutions."""
        grid = fine_grid(-math.log(top), -math.log(self.network.ends[1]), 120)
        job = replace(self.job, lambdas=tuple(grid), seed=self.job.seed + 1)
        runner = Runner(job, self.denoiser, batch=64, pictures=self.pictures)
        return runner, teach(runner, self.ids)

    def rivals(self, runner: Runner, truth: Trajectories, steps: int) -> tuple[str, Tensor, Tensor]:
        """The rival that is best on the noises of its choice: name and squared errors [K]; and those of ours without a file."""
        model, first = self.denoiser.for_samples(self.ids), runner.job.lambdas[0]
        start, span = runner.start(self.ids, first), Range.of(runner.job.lambdas, self.network.entry.schedule)
        options: dict[str, Any] = {"disable": True, "guidance": self.guidance}
        names = {name: run for name, run in RIVALS.items() if name not in SKIPPED}
        found: dict[str, Tensor] = {}
        levels = {
            title: torch.tensor([*(math.exp(-v) for v in spacing.lambdas(steps, span)), 0.0], dtype=torch.float64)
            for title, spacing in SCHEDULES.items()
        }
        levels[HOSTS] = unfitted_from(self.network.entry.schedule, math.exp(-first), steps)
        for title, sigmas in levels.items():
            ours = sample_dpm_solver_v3(model, start, sigmas, **options)
            found[f"{OURS} on {title}"] = _errors(truth, ours)
            for name, run in names.items():
                try:
                    found[f"{name} on {title}"] = _errors(truth, run(model, start, sigmas))
                except (ArithmeticError, ValueError, RuntimeError, IndexError):
                    continue
        best = min(found, key=lambda v: geometric_mean(found[v][:CHOICE]).item())
        return best, found[best][CHOICE:], found[f"{OURS} on {HOSTS}"][CHOICE:]


def _errors(truth: Trajectories, end: Tensor) -> Tensor:
    return truth.errors(end).nan_to_num(nan=1e30).clamp(1e-30, 1e30)


def beginning(network: Loaded, denoise: float, steps: int) -> float:
    """The sigma at which a host begins."""
    schedule = network.entry.schedule
    make = karras if isinstance(schedule, EDM) else uniform_time
    level = make(schedule, int(steps / denoise), to_zero=True)[-steps - 1]
    return float((-schedule.space.lambda_of(level)).exp())


def cells(network: Loaded, guidance: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The table's lines for one network and guidance scale, printed as they come."""
    rows = fitted(network, guidance, args.effort, tuple(args.steps))
    known = [row.coefficients for row in rows if row.coefficients is not None]
    judge, found = Judge(network, guidance, args.noises), []
    for denoise, steps in itertools.product(args.denoise, args.steps):
        top = beginning(network, denoise, steps)
        runner, truth = judge.begin(top)
        name, theirs, without = judge.rivals(runner, truth, steps)
        offered = between(known, runner.job.lambdas[0], steps)
        mine = without if offered is None else _errors(truth, few_steps(runner, judge.ids, offered))[CHOICE:]
        ratio, own = (bootstrap_ratio(mine, errors)["geometric_mean"] for errors in (theirs, without))
        place = {"network": network.name, "guidance": guidance, "denoise": denoise, "steps": steps, "sigma": top}
        found.append({**place, "fitted": offered is not None, "ratio": ratio, "without": own, "rival": name})
        value, low, high = ratio
        what = "fitted" if offered else "none"
        where = f"{network.name}, guidance {guidance:g}, denoise {denoise:g} (sigma {top:.3g}), {steps} steps, {what}"
        print(f"{where}: {value:.2f} [{low:.2f}, {high:.2f}] of {name}, {own[0]:.2f} of the run without a file", flush=True)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--final", action="store_true", help="the three networks that took no part in development")
    parser.add_argument("--only", nargs="+", choices=sorted(NETWORKS), help="these networks")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--denoise", type=float, nargs="+", default=[0.3, 0.5, 0.75])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8])
    parser.add_argument("--effort", choices=sorted(EFFORTS), default="quick", help="of the fit")
    parser.add_argument("--noises", type=int, default=16, help="noises to judge on")
    parser.add_argument("--json", type=Path, default=OUT / "image.json", help="where the numbers go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    split = "final" if args.final else "development"
    table: list[dict[str, Any]] = []
    for name in args.only or [n for n, e in NETWORKS.items() if e.split == split]:
        network = load(name)
        for guidance in args.guidance if network.entry.classes else [1.0]:
            table += cells(network, guidance, args)
            args.json.write_text(json.dumps(table, indent=1), encoding="utf-8")
    for what, key in (("the best rival", "ratio"), ("the run without a file", "without")):
        ratios = sorted(c[key][0] for c in table)
        above = sum(r > 1.02 for r in ratios)
        middle = statistics.median(ratios)
        print(f"over {what}: median {middle:.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}, {above} of {len(ratios)} above 1.02")


if __name__ == "__main__":
    main()
