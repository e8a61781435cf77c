"""Which spacing to fit on, and which formula on which schedule a fit has to beat: both found by real runs on few noises.

What was tried is kept in the job's state run by run, so that a cancelled job goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, TypeVar

from ...sampler import FittedSteps
from ..estimate.job import JobState
from ..file.rows import insane
from ..trajectory import Runner, Trajectories, few_steps
from .panel import Entrant
from .plan import KEPT, FitPlan
from .spacing import CANDIDATES, LATE, Range, Spacing
from .steps import closed_loop, objective

__all__ = ["Bench", "best_spacing", "fit_on", "follows", "likely_entrants"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Bench:
    """What the parts of a fit at one guidance scale share.

    Args:
        runner: the model.
        samples, teacher: noises to fit on and their trajectories.
        span: where evaluations may lie.
        snap: moves lambdas to the host's own levels.
        state: of the job; scores are kept there under `name`.
    """

    runner: Runner
    plan: FitPlan
    samples: Sequence[int]
    teacher: Trajectories
    span: Range
    snap: Callable[[Sequence[float]], list[float]]
    state: JobState
    name: str

    def kept(self, key: str, value: Callable[[], _T]) -> _T:
        """The value under `key` in the state, computed and saved if it is not there."""
        return self.state.kept("fit_runs", self.name, key, value)

    def lambdas(self, spacing: Spacing, steps: int) -> list[float]:
        """Where a spacing evaluates; fewer than `steps` where the host's levels are too coarse for it."""
        return self.snap([round(v, 6) for v in spacing.lambdas(steps, self.span, self.teacher)])


def best_spacing(bench: Bench, steps: int, likely: Sequence[Entrant] = ()) -> Spacing:
    """The spacing with the lowest error on noises left out: of the candidates, then of moves around the best one.

    Few noises rank them, and all noises decide between the plan's finalists. That of the likeliest entrant, begun as late as
    the candidates, is one more: where formulas do best, fitted steps may.
    """
    plan = bench.plan
    if plan.search < 1 or plan.spacings + plan.moves <= 1:
        return CANDIDATES[0]
    tried: dict[tuple[float, ...], tuple[float, Spacing]] = {}

    def score(spacing: Spacing) -> float:
        lambdas = tuple(bench.lambdas(spacing, steps))
        if len(lambdas) < steps or lambdas in tried:
            return math.inf
        few = min(plan.search, len(bench.samples))
        key = f"spacing {steps} {'/'.join(map(str, astuple(spacing)))}"
        value = bench.kept(key, lambda: closed_loop(bench.runner, bench.samples[:few], bench.teacher.part(few), lambdas)[1])
        tried[lambdas] = (value, spacing)
        return value

    own = [replace(e.spacing, first=LATE) for e in likely[:1] if e.spacing is not None]
    for spacing in [*own, *CANDIDATES]:
        if len(tried) < plan.spacings + len(own):
            score(spacing)
    if not tried:
        return CANDIDATES[0]
    limit = len(tried) + plan.moves
    best = min(tried.values(), key=lambda v: v[0])
    for _ in range(3):
        for moved in _moves(best[1]):
            if len(tried) < limit and score(moved) < best[0]:
                best = min(tried.values(), key=lambda v: v[0])
                break
    finalists = [found for _, found in sorted(tried.values(), key=lambda v: v[0])[: plan.finalists]]
    if len(finalists) == 1:
        return finalists[0]
    return min(finalists, key=lambda v: fit_on(bench, bench.lambdas(v, steps))[1])


def fit_on(bench: Bench, lambdas: Sequence[float]) -> tuple[FittedSteps, float]:
    """Steps fitted on all noises, and their mean log error on noises left out; kept in the job's state."""

    def make() -> dict[str, Any]:
        steps, score = closed_loop(bench.runner, bench.samples, bench.teacher, lambdas)
        return {"decay": steps.decay, "weights": steps.weights, "lambdas": steps.lambdas, "score": min(score, 1e30)}

    plain = bench.kept(f"fit {' '.join(map(str, lambdas))}", make)
    weights = tuple(map(tuple, plain["weights"]))
    return FittedSteps(tuple(plain["lambdas"]), tuple(plain["decay"]), weights), plain["score"]


_LATER = 1.7
"""Factor between starts that are compared: the best one differs by more between models than all else of a spacing."""


def _moves(spacing: Spacing) -> list[Spacing]:
    """Neighbours: another start, the last evaluation earlier or later, other powers."""
    moved = [replace(spacing, first=spacing.first * _LATER if spacing.first else LATE)]
    moved += [replace(spacing, last=spacing.last + d) for d in (0.3, -0.3) if spacing.last + d >= 0]
    if spacing.kind not in ("lambda", "beta"):
        moved += [replace(spacing, power=spacing.power * f) for f in (1.2, 1 / 1.2)]
    return [*moved, replace(spacing, first=spacing.first / _LATER)]


def likely_entrants(bench: Bench, entrants: Sequence[Entrant], steps: int) -> list[Entrant]:
    """The few with the lowest errors on the first noises, best first; all of them where they are few."""
    usable = [e for e in entrants if follows(bench, e, steps)]
    return usable if len(usable) <= KEPT else sorted(usable, key=lambda e: _score(bench, e, steps))[:KEPT]


def follows(bench: Bench, entrant: Entrant, steps: int) -> bool:
    """Whether the host's levels allow this schedule, with coefficients that a file may hold."""
    try:
        found = entrant.steps(steps, bench.snap)
    except ValueError:
        return False
    return len(found.lambdas) == steps and not insane(found)


def _score(bench: Bench, entrant: Entrant, steps: int) -> float:
    few = min(bench.plan.heat, len(bench.samples))

    def value() -> float:
        end = few_steps(bench.runner, bench.samples[:few], entrant.steps(steps, bench.snap))
        return min(objective(bench.teacher.part(few).errors(end).nan_to_num(nan=1e30)), 100.0)

    return bench.kept(f"panel {steps} {few} {entrant.name}", value)
