"""Guided sampling in fewer passes of the network: what leaving out unconditional passes is worth, on the networks of the zoo.

    python benchmarks/passes.py [--only NAME ...] [--final] [--guidance 2 4 7.5] [--passes 8 10 12 16] [--noises 32]

A guided step costs two passes. For each budget of passes `pass_steps` chooses which steps make the unconditional one, on the
noises and classes of a fit, and is judged there against the file's steps of half that number, all guided: the fit, or the best
known formula of its panel. Only where it is better by its whole interval a file should hold it ("used"). The table is made on
other noises and classes, by the mean squared distance to the converged solution: the error over that of the file's guided
steps, geometric means with bootstrap 95 % intervals. Passes are counted at the network.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import OUT, bootstrap_ratio
from pass_steps import Pair, PassSteps, best_passes, run_passes
from torch import Tensor
from zoo import NETWORKS, Loaded, load

from dpm_solver_v3.ems_tools.compute import EFFORTS, job_for
from dpm_solver_v3.ems_tools.estimate.job import JobState
from dpm_solver_v3.ems_tools.estimate.source import Source
from dpm_solver_v3.ems_tools.fit.judge import ratio_of
from dpm_solver_v3.ems_tools.fit.run import JUDGE_NOISE, fit_steps
from dpm_solver_v3.ems_tools.fit.spacing import Range
from dpm_solver_v3.ems_tools.trajectory import Runner, few_steps, teach
from dpm_solver_v3.sampler import FittedSteps

FITTED_ON, CHECKED_ON = 16, 16


class Fits:
    """What is fitted to one network at one guidance scale, on its noises and classes of fitting."""

    def __init__(self, network: Loaded, guidance: float, budgets: Sequence[int]) -> None:
        entry, classes = network.entry, network.entry.classes_of("fit")
        model = network.denoiser(guidance, classes)
        source = Source({guidance: model}, entry.shape, entry.schedule, {})
        job = job_for(source, EFFORTS["standard"])
        plan = replace(EFFORTS["quick"].fit, steps=tuple(p // 2 for p in budgets), noises=FITTED_ON, held_out=CHECKED_ON)
        rows = fit_steps(source, job, guidance, plan, JobState(), batch=32)
        self.guided: dict[int, FittedSteps] = {2 * row.steps: row.coefficients for row in rows if row.coefficients}
        self.pair = Pair(Runner(job, network.denoiser(1.0, classes), batch=32), Runner(job, model, batch=32), guidance)
        self.samples, self.checked = range(FITTED_ON), range(JUDGE_NOISE, JUDGE_NOISE + CHECKED_ON)
        self.teacher, self.truth = (teach(self.pair.guided, ids) for ids in (self.samples, self.checked))
        self.span = Range.of(job.lambdas, entry.schedule)

    def passes(self, budget: int) -> tuple[PassSteps | None, float, bool]:
        """The best steps at this budget, what a file would say of them, and whether it would hold them."""
        at = lambda spacing, n: [round(v, 6) for v in spacing.lambdas(n, self.span, self.teacher)]  # noqa: E731
        found = best_passes(self.pair, self.samples, self.teacher, at, budget)
        if found is None:
            return None, 1.0, False
        mine = self.truth.errors(run_passes(self.pair, self.checked, found))
        theirs = self.truth.errors(few_steps(self.pair.guided, self.checked, self.guided[budget]))
        ratio = ratio_of(mine, theirs)
        return found, ratio[0], ratio[2] < 1


class Judge:
    """Other noises and classes of the same network, and what counts its passes."""

    def __init__(self, network: Loaded, guidance: float, noises: int) -> None:
        entry, classes = network.entry, network.entry.classes_of("judge")
        model = network.denoiser(guidance, classes)
        source = Source({guidance: model}, entry.shape, entry.schedule, {})
        job = job_for(source, replace(EFFORTS["standard"], intervals=120), seed=5)
        self.pair = Pair(Runner(job, network.denoiser(1.0, classes), batch=64), Runner(job, model, batch=64), guidance)
        self.ids, self.network = range(noises), network.network
        self.truth = teach(self.pair.guided, self.ids)

    def errors(self, steps: FittedSteps) -> Tensor:
        """Squared errors [K] of guided steps."""
        return self._errors(few_steps(self.pair.guided, self.ids, steps))

    def passes(self, steps: PassSteps) -> tuple[Tensor, float]:
        """Squared errors [K], and the passes that were made for a sample.

        The pair takes u from a guided evaluation, which repeats the conditional pass: that repetition is not counted.
        """
        seen = [0]
        hook = self.network.register_forward_hook(lambda module, args, out: seen.__setitem__(0, seen[0] + len(args[0])))
        end = run_passes(self.pair, self.ids, steps)
        hook.remove()
        return self._errors(end), seen[0] / len(self.ids) - sum(steps.guided)

    def _errors(self, end: Tensor) -> Tensor:
        return self.truth.errors(end).nan_to_num(nan=1e30).clamp(1e-30, 1e30)


def cell(fits: Fits, judge: Judge, budget: int) -> dict[str, Any]:
    """One line of the table, as a record."""
    steps, says, used = fits.passes(budget)
    if steps is None:
        return {"pattern": "none", "passes": budget, "says": 1.0, "used": False, "ratio": [1.0] * 3}
    mine, passes = judge.passes(steps)
    if passes > budget:
        raise AssertionError(f"{passes} passes were made, the budget is {budget}")
    ratio = bootstrap_ratio(mine, judge.errors(fits.guided[budget]))["geometric_mean"]
    pattern = "".join("G" if both else "c" for both in steps.guided)
    return {"pattern": pattern, "passes": passes, "says": says, "used": used, "ratio": ratio}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--final", action="store_true", help="the three networks that took no part in development")
    parser.add_argument("--only", nargs="+", choices=sorted(NETWORKS), help="these networks")
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0, 4.0, 7.5], help="these scales")
    parser.add_argument("--passes", type=int, nargs="+", default=[8, 10, 12, 16], help="budgets")
    parser.add_argument("--noises", type=int, default=32, help="noises to judge on")
    parser.add_argument("--json", type=Path, default=OUT / "passes.json", help="where the numbers go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    split = "final" if args.final else "development"
    cells = []
    for name in args.only or [n for n, e in NETWORKS.items() if e.split == split and e.classes]:
        network = load(name)
        for guidance in args.guidance:
            fits, judge = Fits(network, guidance, args.passes), Judge(network, guidance, args.noises)
            for budget in args.passes:
                found = {"network": name, "guidance": guidance, "budget": budget, **cell(fits, judge, budget)}
                cells.append(found)
                print(_line(found), flush=True)
                args.json.write_text(json.dumps(cells, indent=1), encoding="utf-8")
    values = {"always": [c["ratio"][0] for c in cells], "where used": [c["ratio"][0] if c["used"] else 1.0 for c in cells]}
    for title, ratios in values.items():
        print(
            f"{title}: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} cells"
        )


def _line(c: dict[str, Any]) -> str:
    value, low, high = c["ratio"]
    what = f"{c['network']}, guidance {c['guidance']:g}, {c['budget']} passes ({c['passes']:g} counted), {c['pattern']}"
    return f"{what}: {value:.2f} [{low:.2f}, {high:.2f}], says {c['says']:.2f}, {'used' if c['used'] else 'not used'}"


if __name__ == "__main__":
    main()
