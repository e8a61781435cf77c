"""Steps fitted to one model and one schedule: linear updates whose coefficients come from data, not from a formula.

In y = x0 + sigma n, with D_j the denoised of evaluation j at lambda_j, step i of a fitted schedule is

    y_{i+1} = decay_i y_i + sum_{j <= i} weights_{i,j} D_j,        y_n = x0 (sigma = 0)

from y_0 = start times what the host begins with (noise times sigma_0).
Every multistep method without per-channel statistics, with or without corrector, is of this form: only numbers differ.
`ems_tools.fit` chooses them, and the lambdas, on trajectories of the model.

Under classifier-free guidance D costs two passes of the network, a conditional and an unconditional one. Steps in fewer passes
make the conditional one alone at some evaluations. They are of the same form over all answers a_j so far: c, the conditional
answer, at every evaluation, and after it D where the evaluation is guided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

__all__ = ["MATCH", "FittedSteps"]

MATCH = 2e-3
"""Largest difference in lambda between a schedule and the fitted one for its coefficients to apply."""


@dataclass(frozen=True)
class FittedSteps:
    """Coefficients for one schedule of n steps that ends at sigma = 0.

    Args:
        lambdas: [n] half log-SNR of the evaluations, increasing.
        decay: [n], of y.
        weights: row i holds the i + 1 factors of D_0 .. D_i; those of all answers so far where `guided` is given.
        start: factor of the first y, near 1. A run that begins below the noisy end lacks what the trajectory holds there.
        guided: [n] for steps in fewer passes: whether an evaluation makes the unconditional pass as well. () for all others.

    Raises:
        ValueError: sizes that do not fit, values that are not finite, lambdas that do not increase.
    """

    lambdas: tuple[float, ...]
    decay: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    start: float = 1.0
    guided: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.lambdas)
        if self.guided and len(self.guided) != n:
            raise ValueError(f"steps in fewer passes must say of each of {n} evaluations whether it is guided")
        if not n or len(self.decay) != n or [len(row) for row in self.weights] != list(accumulate(self.answers)):
            what = "rows of weights of all answers so far" if self.guided else "rows of 1 to n weights"
            raise ValueError(f"fitted steps need n lambdas, n decays and {what} (n = {n})")
        if not all(math.isfinite(v) for row in (self.lambdas, self.decay, *self.weights, (self.start,)) for v in row):
            raise ValueError("fitted steps hold values that are not finite")
        if any(b <= a for a, b in zip(self.lambdas, self.lambdas[1:])):
            raise ValueError("the lambdas of fitted steps must increase")

    @property
    def answers(self) -> list[int]:
        """How many answers each evaluation gives."""
        return [1 + both for both in self.guided] if self.guided else [1] * len(self.lambdas)

    @property
    def passes(self) -> int:
        """Passes of the network for a picture under guidance."""
        return sum(self.answers) if self.guided else 2 * len(self.lambdas)

    def matches(self, lambdas: list[float]) -> bool:
        """Whether a schedule with these lambdas (the last one infinite: sigma = 0) is the one that was fitted."""
        if len(lambdas) != len(self.lambdas) + 1 or lambdas[-1] != math.inf:
            return False
        return all(abs(a - b) <= MATCH for a, b in zip(self.lambdas, lambdas))
