"""What a fit is worth: on noise of no other use, against the best of a panel of formulas and schedules (see `panel`).

What the file stores and every host prints is the ratio of the two errors. A fit that is not clearly better is not used: the
panel's winner, which is a schedule and coefficients too, then stands in its place, and the ratio is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ...sampler import FittedSteps
from ..file.rows import FittedRow, insane
from ..trajectory import Runner, Trajectories, few_steps
from .steps import objective

__all__ = ["judged_row", "ratio_of"]


def judged_row(
    runner: Runner,
    samples: Sequence[int],
    judge: Trajectories,
    guidance: float,
    fitted: FittedSteps,
    rival: FittedSteps,
    rival_name: str,
) -> FittedRow:
    """The row of one step count: the fit, or the panel's winner where the fit is not better by a standard error."""
    mine = judge.errors(few_steps(runner, samples, fitted))
    theirs = judge.errors(few_steps(runner, samples, rival))
    ratio, clear = ratio_of(mine, theirs)
    kept = fitted
    if not clear or insane(fitted):
        kept, mine, ratio = rival, theirs, (1.0, 1.0, 1.0)
    return FittedRow(
        guidance, len(kept.lambdas), kept.lambdas, kept, _averages(mine), _averages(theirs), rival_name, ratio, len(samples)
    )


def ratio_of(mine: Tensor, theirs: Tensor) -> tuple[tuple[float, float, float], bool]:
    """Geometric mean of mine / theirs [K] with its 95 % interval (Student's), and whether it is below 1 by a standard error."""
    logs = (_usable(mine).log() - _usable(theirs).log()).clamp(-60, 60)
    mean, freedom = logs.mean().item(), max(len(logs) - 1, 1)
    error = logs.std().item() / math.sqrt(len(logs)) if len(logs) > 1 else 1.0
    wide = (1.96 + 2.37 / freedom + 2.8 / freedom**2) * error  # Student's quantile, to 2 % from 3 degrees of freedom on
    a, b, c = (float(f"{math.exp(min(max(v, -60), 60)):.4g}") for v in (mean, mean - wide, mean + wide))
    return (a, b, c), mean + error < 0


def _usable(errors: Tensor) -> Tensor:
    return errors.nan_to_num(nan=1e30).clamp(1e-30, 1e30)


def _averages(errors: Tensor) -> tuple[float, float, float]:
    """Geometric mean, median and mean, to 5 digits."""
    errors = _usable(errors)
    values = (math.exp(objective(errors)), errors.median().item(), errors.mean().item())
    a, b, c = (float(f"{min(v, 1e30):.4e}") for v in values)
    return a, b, c
