"""Steps fitted to one model and one schedule: linear updates whose coefficients come from data, not from a formula.

In y = x0 + sigma n, with D_j the denoised of evaluation j at lambda_j, step i of a fitted schedule is

    y_{i+1} = decay_i y_i + sum_{j <= i} weights_{i,j} D_j,        y_n = x0 (sigma = 0)

from y_0 = start times what the host begins with (noise times sigma_0).
Every multistep method without per-channel statistics, with or without corrector, is of this form: only numbers differ.
`ems_tools.fit` chooses them, and the lambdas, on trajectories of the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["MATCH", "FittedSteps"]

MATCH = 2e-3
"""Largest difference in lambda between a schedule and the fitted one for its coefficients to apply."""


@dataclass(frozen=True)
class FittedSteps:
    """Coefficients for one schedule of n steps that ends at sigma = 0.

    Args:
        lambdas: [n] half log-SNR of the evaluations, increasing.
        decay: [n], of y.
        weights: row i holds the i + 1 factors of D_0 .. D_i.
        start: factor of the first y, near 1. A run that begins below the noisy end lacks what the trajectory holds there.

    Raises:
        ValueError: sizes that do not fit, values that are not finite, lambdas that do not increase.
    """

    lambdas: tuple[float, ...]
    decay: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    start: float = 1.0

    def __post_init__(self) -> None:
        n = len(self.lambdas)
        if not n or len(self.decay) != n or [len(row) for row in self.weights] != list(range(1, n + 1)):
            raise ValueError(f"fitted steps need n lambdas, n decays and rows of 1 to n weights (n = {n})")
        if not all(math.isfinite(v) for row in (self.lambdas, self.decay, *self.weights, (self.start,)) for v in row):
            raise ValueError("fitted steps hold values that are not finite")
        if any(b <= a for a, b in zip(self.lambdas, self.lambdas[1:])):
            raise ValueError("the lambdas of fitted steps must increase")

    def matches(self, lambdas: list[float]) -> bool:
        """Whether a schedule with these lambdas (the last one infinite: sigma = 0) is the one that was fitted."""
        if len(lambdas) != len(self.lambdas) + 1 or lambdas[-1] != math.inf:
            return False
        return all(abs(a - b) <= MATCH for a, b in zip(self.lambdas, lambdas))
