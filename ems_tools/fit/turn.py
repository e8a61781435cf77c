"""Move the evaluations of the best spacing so that the final error falls; the coefficients are fitted anew on what comes out.

A spacing has one or two numbers, the same for all models; where a model's picture is decided is its own affair. Gauss-Newton's
turn of the lambdas alone (`refine.turns_of`) costs one run of a few noises for every evaluation, begun there. It is taken where
the fit on the new lambdas has a lower error on noises left out. Two or three step counts are turned so, the others take over
how far the evaluations moved at the same share of the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from ...sampler import FittedSteps
from .candidates import Bench, fit_on
from .refine import turns_of
from .spacing import Spacing

__all__ = ["Turned", "best_turned", "moved"]

_FARTHEST = 0.6
"""No lambda moves by more in a round."""
_CLOSEST = 0.02
_DAMPING = 0.03
"""Where few noises of small pictures tell little of a direction, the lambdas stay."""


@dataclass(frozen=True)
class Turned:
    """A fit, and how far the lambdas of its spacing have moved."""

    steps: FittedSteps
    by: tuple[float, ...]

    def moves(self, count: int) -> list[float]:
        """How far those of `count` evaluations move: linear between these, over the share of the way."""
        if count < 2 or len(self.by) < 2:
            return [0.0] * count
        found = []
        for k in range(count):
            place = k * (len(self.by) - 1) / (count - 1)
            i = min(int(place), len(self.by) - 2)
            found.append(self.by[i] + (place - i) * (self.by[i + 1] - self.by[i]))
        return found


def best_turned(bench: Bench, spacing: Spacing, steps: int) -> Turned | None:
    """The fit on this spacing after the plan's rounds of turning; None where the host has too few levels for it."""
    before = bench.lambdas(spacing, steps)
    if len(before) < steps:
        return None
    found, score = fit_on(bench, before)
    for k in range(bench.plan.turns):
        lambdas = bench.kept(f"turn {steps} {k}", partial(_next_lambdas, bench, found))
        if len(lambdas) < steps:
            break
        other, now = fit_on(bench, lambdas)
        if now >= score:
            break
        found, score = other, now
    return Turned(found, tuple(now - then for now, then in zip(found.lambdas, before)))


def _next_lambdas(bench: Bench, steps: FittedSteps) -> list[float]:
    """Where Gauss-Newton would have the evaluations; fewer where they would meet."""
    few, knobs = min(bench.plan.turn_noises, len(bench.samples)), [("lambda", i, 0) for i in range(len(steps.lambdas))]
    turns, _ = turns_of(bench.runner, bench.samples[:few], bench.teacher.part(few), steps, knobs, _DAMPING)
    return moved(bench, steps.lambdas, turns)


def moved(bench: Bench, lambdas: Sequence[float], by: Sequence[float]) -> list[float]:
    """The lambdas moved, inside the range and on the host's levels; fewer where they would meet."""
    low, high = bench.span.low, bench.span.high
    wanted = [min(max(v + min(max(d, -_FARTHEST), _FARTHEST), low), high) for v, d in zip(lambdas, by)]
    if any(b - a < _CLOSEST for a, b in pairwise(wanted)):
        return []
    return bench.snap([round(v, 6) for v in wanted])
