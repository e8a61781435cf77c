"""Guided sampling in fewer passes of the network: what leaving out unconditional passes is worth, on the networks of the zoo.

    python benchmarks/passes.py [--only NAME ...] [--final] [--guidance 2 4 7.5] [--passes 8 10 12 16] [--effort standard]

A guided step costs two passes. A file is fitted as a user would, on the network's classes to fit on, with steps in fewer
passes. The table is made on other noises and classes, by the mean squared distance to the converged solution: the error of what
the file offers at so many passes over that of its guided steps of half that number (the fit, or the best known formula of its
panel), and over that of the best of these and of the best rival of half that number of steps (as `zoo.py` chooses it: every
library sampler on every schedule, on noises of the choice's own). Geometric means with bootstrap 95 % intervals. Where the file
holds no row, guided steps were better on its own noise, and are what it offers. Passes are counted at the network.
"""

from __future__ import annotations

import argparse
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
from zoo.bench import QUICK, Bench

from dpm_solver_v3.ems_tools.compute import EFFORTS, PASSES, job_for
from dpm_solver_v3.ems_tools.estimate.job import JobState
from dpm_solver_v3.ems_tools.estimate.source import Source
from dpm_solver_v3.ems_tools.file.rows import FittedRow
from dpm_solver_v3.ems_tools.fit.run import fit_passes, fit_steps
from dpm_solver_v3.ems_tools.trajectory import Pair, Runner, few_steps, teach
from dpm_solver_v3.sampler import FittedSteps

CHECK = 5
"""Seed of the noises that the table is made on."""


def source_of(network: Loaded, guidance: float, part: str) -> Source:
    """The network at this scale, on the classes to fit on or to judge on."""
    entry, classes = network.entry, network.entry.classes_of(part)
    guided, conditional = (network.denoiser(g, classes) for g in (guidance, 1.0))
    return Source({guidance: guided}, entry.shape, entry.schedule, {}, conditional=conditional)


def fitted(network: Loaded, guidance: float, effort: str, steps: tuple[int, ...]) -> tuple[list[FittedRow], list[FittedRow]]:
    """Guided rows and rows of fewer passes, as a file holds them."""
    source = source_of(network, guidance, "fit")
    job, state = job_for(source, EFFORTS[effort]), JobState()
    plan = replace(EFFORTS[effort].fit, steps=steps, passes=PASSES)
    rows = fit_steps(source, job, guidance, plan, state, batch=32)
    return rows, fit_passes(source, job, guidance, plan, state, rows, batch=32)


class Judge:
    """Other noises and classes of the same network, what counts its passes, and the rivals of every number of steps."""

    def __init__(self, network: Loaded, guidance: float, noises: int) -> None:
        source = source_of(network, guidance, "judge")
        job = job_for(source, replace(EFFORTS["standard"], intervals=120), seed=CHECK)
        assert source.conditional is not None
        self.pair = Pair(Runner(job, source.conditional, batch=64), Runner(job, source.models[guidance], batch=64))
        self.ids, self.network = range(noises), network.network
        self.truth = teach(self.pair.guided, self.ids)
        self.rivals = Bench(network, guidance, QUICK)

    def guided(self, steps: FittedSteps) -> Tensor:
        """Squared errors [K] of guided steps."""
        return self._errors(few_steps(self.pair.guided, self.ids, steps))

    def rival(self, steps: int) -> tuple[str, Tensor]:
        """Name and squared errors [K] of the best rival of so many guided steps."""
        name, schedule, sigmas = self.rivals.chosen_rival(steps)
        start = self.pair.start(self.ids, -math.log(sigmas[0].item()))
        end = RIVALS[name](self.rivals.denoiser(self.ids), start, sigmas)
        return f"{name} on {schedule}", self._errors(end)

    def passes(self, steps: FittedSteps) -> tuple[Tensor, float]:
        """Squared errors [K] of steps in fewer passes, and the passes that were made for a sample.

        The pair takes D from a guided evaluation, which repeats the conditional pass: that repetition is not counted.
        """
        seen = [0]
        hook = self.network.register_forward_hook(lambda module, args, out: seen.__setitem__(0, seen[0] + len(args[0])))
        end = few_steps(self.pair, self.ids, steps)
        hook.remove()
        return self._errors(end), seen[0] / len(self.ids) - sum(steps.guided)

    def _errors(self, end: Tensor) -> Tensor:
        return self.truth.errors(end).nan_to_num(nan=1e30).clamp(1e-30, 1e30)


def cell(judge: Judge, guided: FittedRow, row: FittedRow | None) -> dict[str, Any]:
    """One line of the table, as a record."""
    passes = 2 * guided.steps
    assert guided.coefficients is not None
    whole = judge.guided(guided.coefficients)
    mine, found = whole, {"pattern": "none", "counted": passes, "says": [1.0] * 3}
    if row is not None and row.coefficients is not None:
        mine, counted = judge.passes(row.coefficients)
        if counted != passes:
            raise AssertionError(f"{counted} passes were made, not {passes}")
        pattern = "".join("G" if both else "c" for both in row.coefficients.guided)
        found = {"pattern": pattern, "counted": counted, "says": row.ratio}
    name, theirs = judge.rival(guided.steps)
    best = min(whole, theirs, key=lambda errors: geometric_mean(errors).item())
    over = {what: bootstrap_ratio(mine, errors)["geometric_mean"] for what, errors in (("ratio", whole), ("best", best))}
    return {**found, **over, "rival": name if best is theirs else "guided steps"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--final", action="store_true", help="the three networks that took no part in development")
    parser.add_argument("--only", nargs="+", choices=sorted(NETWORKS), help="these networks")
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0, 4.0, 7.5], help="these scales")
    parser.add_argument("--passes", type=int, nargs="+", default=[8, 10, 12, 16], help="even numbers of passes")
    parser.add_argument("--effort", choices=sorted(EFFORTS), default="standard", help="of the fit")
    parser.add_argument("--noises", type=int, default=32, help="noises to judge on")
    parser.add_argument("--json", type=Path, default=OUT / "passes.json", help="where the numbers go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    split = "final" if args.final else "development"
    cells = []
    for name in args.only or [n for n, e in NETWORKS.items() if e.split == split and e.classes]:
        network = load(name)
        for guidance in args.guidance:
            guided, fewer = fitted(network, guidance, args.effort, tuple(p // 2 for p in args.passes))
            judge = Judge(network, guidance, args.noises)
            found = {row.passes: row for row in fewer}
            for row in guided:
                passes = 2 * row.steps
                record = {"network": name, "guidance": guidance, "passes": passes}
                cells.append({**record, **cell(judge, row, found.get(passes))})
                print(_line(cells[-1]), flush=True)
                args.json.write_text(json.dumps(cells, indent=1), encoding="utf-8")
    for what, key in (("guided steps", "ratio"), ("the best of these and of the best rival", "best")):
        ratios = [c[key][0] for c in cells]
        print(
            f"over {what}: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} cells"
        )


def _line(c: dict[str, Any]) -> str:
    what = f"{c['network']}, guidance {c['guidance']:g}, {c['passes']} passes ({c['counted']:g} counted), {c['pattern']}"
    ratio, best, says = (f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in (c["ratio"], c["best"], c["says"]))
    return f"{what}: {ratio}, of the best ({c['rival']}) {best}, says {says}"


if __name__ == "__main__":
    main()
