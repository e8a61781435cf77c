"""What a fit is worth: on noise of no other use, against the best of a panel of formulas and schedules (see `panel`).

Only the rival is chosen on some of that noise, which errs in its favour: chosen on other noise, it is often not the best of
the panel here, and the fit is flattered.

What the file stores and every host prints is the ratio of the two errors. A fit that is not better is not used: the panel's
winner, which is a schedule and coefficients too, then stands in its place, and the ratio is 1. No margin
is asked for: on few noises the panel's winner is in as much doubt as the fit. One is asked of that winner
against what hosts do without a file: with one it must never be worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...sampler import FittedSteps
from ..file.rows import FittedRow
from ..trajectory import Runner, Trajectories, few_steps
from .steps import objective

__all__ = ["Rivals", "averages", "judged_row", "ratio_of"]

_CLEARLY = 0.8
"""Of the error without a file, on few noises, that another rival has to stay below: it takes the place of a fit that loses, and
a file must not be worse than none. Where two noises found one merely better, it was worse than none on other noises in 6 of
100 cases, such in 2 of 100 (three networks of the zoo, a script that was not kept)."""


@dataclass(frozen=True)
class Rivals:
    """What a fit has to beat.

    Args:
        steps: by name.
        few: noises on which they are compared, the first of those to judge on.
        without_file: the name of what hosts do without a file; another one has to be clearly better.
    """

    steps: Mapping[str, FittedSteps]
    few: int
    without_file: str = ""

    def winner(self, runner: Runner, samples: Sequence[int], judge: Trajectories) -> tuple[str, Tensor]:
        """The best one's name, and its errors [K] on all samples."""
        few = len(samples) if len(self.steps) == 1 else min(self.few, len(samples))
        ends = {name: few_steps(runner, samples[:few], steps) for name, steps in self.steps.items()}
        scores = {name: objective(_usable(judge.part(few).errors(end))) for name, end in ends.items()}
        if self.without_file in scores:
            scores[self.without_file] += math.log(_CLEARLY)
        name = min(scores, key=lambda v: scores[v])
        end = ends[name]
        if few < len(samples):
            end = torch.cat([end, few_steps(runner, samples[few:], self.steps[name])])
        return name, judge.errors(end)


def judged_row(
    runner: Runner, samples: Sequence[int], judge: Trajectories, guidance: float, fitted: FittedSteps | None, rivals: Rivals
) -> FittedRow:
    """The row of one step count: the fit, or the winner of the rivals where the fit is not better or is None."""
    name, theirs = rivals.winner(runner, samples, judge)
    kept, mine, ratio = rivals.steps[name], theirs, (1.0, 1.0, 1.0)
    if fitted is not None:
        own = judge.errors(few_steps(runner, samples, fitted))
        measured = ratio_of(own, theirs)
        if measured[0] < 1:
            kept, mine, ratio = fitted, own, measured
    return FittedRow(
        guidance, len(kept.lambdas), kept.lambdas, kept, averages(mine), averages(theirs), name, ratio, len(samples)
    )


def ratio_of(mine: Tensor, theirs: Tensor) -> tuple[float, float, float]:
    """Geometric mean of mine / theirs [K] with its 95 % interval (Student's)."""
    logs = (_usable(mine).log() - _usable(theirs).log()).clamp(-60, 60)
    mean, freedom = logs.mean().item(), max(len(logs) - 1, 1)
    error = logs.std().item() / math.sqrt(len(logs)) if len(logs) > 1 else 1.0
    wide = (1.96 + 2.37 / freedom + 2.8 / freedom**2) * error  # Student's quantile, to 2 % from 3 degrees of freedom on
    a, b, c = (float(f"{math.exp(min(max(v, -60), 60)):.4g}") for v in (mean, mean - wide, mean + wide))
    return a, b, c


def _usable(errors: Tensor) -> Tensor:
    return errors.nan_to_num(nan=1e30).clamp(1e-30, 1e30)


def averages(errors: Tensor) -> tuple[float, float, float]:
    """Geometric mean, median and mean, to 5 digits."""
    errors = _usable(errors)
    values = (math.exp(objective(errors)), errors.median().item(), errors.mean().item())
    a, b, c = (float(f"{min(v, 1e30):.4e}") for v in values)
    return a, b, c
