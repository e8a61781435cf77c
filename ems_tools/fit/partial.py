"""Steps for image to image: runs that begin inside the noise range, from a picture with fresh noise on it.

A host can begin such a run at any level. Steps are fitted for a few beginnings, in closed loop as all others (`steps`); what
lies between two of them is made of both (`sampler.fitted.between`). The pictures are the model's own, solved finely; the noise
on them is of no other use.

For every number of steps one spacing is chosen for all beginnings, on few noises: only steps that are alike can be mixed.
Coefficients are fitted on all noises, and kept where, on noise and pictures that took no part, the 95 % interval of their error
over that of what hosts do without them lies below 1. What a row says of itself is its error over that of the best of a panel:
this sampler without a file on the steps that hosts take then, on Karras and on other steps, and UniPC.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ...sampler import FittedSteps, unfitted_from
from ..estimate.job import Evaluating, Job, JobState, Meter, Progress
from ..estimate.source import Source
from ..file.layout import fitted_row, fitted_values
from ..file.rows import FittedRow, insane
from ..trajectory import Runner, Trajectories, few_steps, kept_trajectories, pictures_of
from .formulas import OWN, formula_steps
from .judge import Rivals, averages, ratio_of
from .plan import FitPlan
from .run import JUDGE_NOISE, snapping
from .spacing import Range, Spacing
from .steps import closed_loop, rounded

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["beginnings", "evaluations_of_partial", "fine_grid", "fit_partial"]

BEGINNINGS = (-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0)
"""Lambdas: sigma 55, 20, 7.4, 2.7, 1, 0.37 and 0.14, in units of what a latent's elements are like, about 1."""
NOISIER, CLEANER = 0.4, 1.8
"""How far in lambda a beginning lies from the ends of the noise range, at least."""
SPACINGS = (Spacing("vp", 2.0, 1.0), Spacing("vp", 2.0, 0.25), Spacing("sigma", 7.0, 1.0), Spacing("lambda", 1.0, 1.5))
SEARCH, INTERVALS, GRADED = 2, 22, 1.5
"""Noises that spacings are compared on, and of the fine solution the steps, and the power of i / n in which they grow."""
_WITHOUT = f"{OWN} on the steps that hosts take then"
"""What hosts do where a file has no row."""


@dataclass(frozen=True)
class _Begun:
    """Runs from one beginning: the model, the noises to fit and to judge on, and their fine solutions."""

    runner: Runner
    span: Range
    snap: Callable[[Sequence[float]], list[float]]
    noises: Sequence[int]
    held_out: Sequence[int]
    teacher: Trajectories
    truth: Trajectories
    without: Callable[[int], list[float]]

    def lambdas(self, spacing: Spacing, steps: int) -> list[float]:
        """Where a spacing evaluates; [] where the host's levels are too coarse for it."""
        found = self.snap([round(v, 6) for v in spacing.lambdas(steps, self.span)])
        return found if len(found) == steps else []


def beginnings(job: Job) -> list[float]:
    """The lambdas at which runs of this model are begun."""
    low, high = job.lambdas[0] + NOISIER, job.lambdas[-1] - CLEANER
    return [v for v in BEGINNINGS if low <= v <= high]


def fine_grid(first: float, last: float, intervals: int = INTERVALS) -> list[float]:
    """The grid of a fine solution from lambda `first`: its first steps are the shortest.

    It begins at order 1, and here D changes at once, as it does not at the noisy end: with a uniform grid of 24 steps the
    error of fits of 8 and 10 steps was up to 3.4 times as large (benchmarks/image.py on waves, changed so).
    """
    u = torch.linspace(0, 1, intervals + 1, dtype=torch.float64) ** GRADED
    return (first + (last - first) * u).tolist()


def fit_partial(
    source: Source,
    job: Job,
    guidance: float,
    plan: FitPlan,
    state: JobState,
    *,
    progress: Callable[[Progress], None] = lambda p: None,
    **options: Unpack[Evaluating],
) -> list[FittedRow]:
    """Rows for image to image at one guidance scale, where they win; see the module. Everything as in `run.fit_steps`."""
    if not plan.partial:
        return []
    name = f"{guidance:g}"
    known: dict[str, list[Any]] = state.facts.setdefault("partial", {}).setdefault(name, {})
    meter = Meter(progress, "partial", evaluations_of_partial(plan, job, 1), f"image to image at guidance {name}", state)
    runner = Runner(job, source.models[guidance], tick=meter.tick, **options)
    steps, judge_on = sorted(n for n in set(plan.steps) if n > 1), range(JUDGE_NOISE, JUDGE_NOISE + plan.held_out)
    if all(f"{first} {n}" in known for first in beginnings(job) for n in steps):
        return [fitted_row(values) for values in known.values() if values]
    pictures = _pictures(runner, state, name, [*range(plan.noises), *judge_on])
    begun = {v: _begun(runner, source, v, plan, state, pictures, name) for v in beginnings(job)}
    for n in steps:
        spacing = _spacing(list(begun.values()), state, name, n)
        for first, runs in begun.items():
            if f"{first} {n}" not in known:
                row = _row(runs, guidance, n, spacing, plan.panel_noises)
                known[f"{first} {n}"] = [] if row is None else fitted_values(row)
                state.save()
    return [fitted_row(values) for values in known.values() if values]


def evaluations_of_partial(plan: FitPlan, job: Job, scales: int) -> int:
    """Denoiser evaluations of `fit_partial` at most, for this many guidance scales."""
    if not plan.partial:
        return 0
    samples, steps = plan.noises + plan.held_out, [n for n in set(plan.steps) if n > 1]
    few = min(plan.panel_noises, plan.held_out)
    search = len(SPACINGS) * min(SEARCH, plan.noises)
    run = search + plan.noises + 4 * few + (plan.held_out - few) + 2 * plan.held_out
    each = samples * (_intervals(steps) + 1) + run * sum(steps)
    return scales * (samples * len(job.lambdas) + len(beginnings(job)) * each)


def _intervals(steps: Sequence[int]) -> int:
    """Of a fine solution that runs of so many steps are measured by."""
    return max(INTERVALS, 2 * max(steps, default=0))


def _pictures(runner: Runner, state: JobState, name: str, samples: Sequence[int]) -> dict[int, torch.Tensor]:
    """By sample, what a fine solution makes of its noise, [C, ...]; kept in the job's state."""
    key = f"partial.{name}.pictures"
    if key not in state.tensors:
        state.tensors[key] = pictures_of(runner, samples)
        state.save()
    return dict(zip(samples, state.tensors[key]))


def _begun(
    runner: Runner, source: Source, first: float, plan: FitPlan, state: JobState, pictures: dict[int, torch.Tensor], name: str
) -> _Begun:
    """What runs from lambda `first` need; fine solutions are kept in the job's state."""
    job, snap = runner.job, snapping(source.levels, runner.job)
    grid = snap(fine_grid(first, job.lambdas[-1], _intervals(plan.steps)))
    inside = replace(job, lambdas=tuple(grid), seed=job.seed + 1, start=1.0)
    runner = replace(runner, job=inside, pictures=pictures)
    noises, held_out = range(plan.noises), range(JUDGE_NOISE, JUDGE_NOISE + plan.held_out)
    teacher, truth = (
        kept_trajectories(runner, state, f"partial.{name}.{first}.{what}", samples)
        for what, samples in (("fit", noises), ("judge", held_out))
    )
    span, without = Range.of(inside.lambdas, source.schedule), _without_file(source, job, first)
    return _Begun(runner, span, snap, noises, held_out, teacher, truth, without)


def _without_file(source: Source, job: Job, first: float) -> Callable[[int], list[float]]:
    """Lambdas of n evaluations from lambda `first` where a host has no fitted ones."""
    level = job.space.level_of(torch.tensor(first, dtype=torch.float64)).item()
    return lambda n: job.space.lambda_of(unfitted_from(source.schedule, level, n)[:-1]).tolist()


def _spacing(begun: Sequence[_Begun], state: JobState, name: str, steps: int) -> Spacing:
    """The spacing with the lowest error on noises left out, over all beginnings."""

    def score(spacing: Spacing) -> float:
        total = 0.0
        for runs in begun:
            few, lambdas = min(SEARCH, len(runs.noises)), runs.lambdas(spacing, steps)
            found = closed_loop(runs.runner, runs.noises[:few], runs.teacher.part(few), lambdas) if lambdas else None
            total += found[1] if found else math.inf
        return total

    scores = {v: state.kept("partial_runs", name, f"{steps} {v.name}", lambda v=v: min(score(v), 1e30)) for v in SPACINGS}  # type: ignore[misc]
    return min(SPACINGS, key=lambda v: scores[v])


def _row(begun: _Begun, guidance: float, steps: int, spacing: Spacing, panel_noises: int) -> FittedRow | None:
    """The row of so many steps from this beginning; None where the fit is not surely better than the run without it."""
    lambdas = begun.lambdas(spacing, steps)
    if not lambdas:
        return None
    fitted, _ = closed_loop(begun.runner, begun.noises, begun.teacher, lambdas)
    rivals = _rivals(begun, steps, guidance)
    if insane(fitted) or _WITHOUT not in rivals:
        return None
    name, theirs = Rivals(rivals, panel_noises).winner(begun.runner, begun.held_out, begun.truth)
    errors = lambda v: begun.truth.errors(few_steps(begun.runner, begun.held_out, v))  # noqa: E731
    mine, without = errors(fitted), theirs if name == _WITHOUT else errors(rivals[_WITHOUT])
    if ratio_of(mine, without)[2] >= 1:  # two rows of mnist at guidance 4, 0.68 and 0.83 there, lost on other classes
        return None
    ratio = ratio_of(mine, theirs)
    return FittedRow(guidance, steps, fitted.lambdas, fitted, averages(mine), averages(theirs), name, ratio, len(mine))


def _rivals(begun: _Begun, steps: int, guidance: float) -> dict[str, FittedSteps]:
    """What a user would otherwise take from there, by name."""
    tried = (("Karras", "sigma", 7.0, OWN), ("quadratic VP time", "vp", 2.0, OWN), ("Karras", "sigma", 7.0, "UniPC 2"))
    own = begun.snap(begun.without(steps))
    found = {_WITHOUT: rounded(formula_steps(tuple(own), math.inf, OWN, guidance))} if len(own) == steps else {}
    for title, kind, power, formula in tried:
        lambdas = begun.lambdas(Spacing(kind, power, 0.0), steps)
        again = formula == OWN and _WITHOUT in found and found[_WITHOUT].matches([*lambdas, math.inf])
        if lambdas and not again:
            found[f"{formula} on {title}"] = rounded(formula_steps(tuple(lambdas), math.inf, formula, guidance))
    return found
