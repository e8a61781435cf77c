"""Steps fitted to one model and one schedule: linear updates whose coefficients come from data, not from a formula.

In y = x0 + sigma n, with D_j the denoised of evaluation j at lambda_j, step i of a fitted schedule is

    y_{i+1} = decay_i y_i + sum_{j <= i} weights_{i,j} D_j,        y_n = x0 (sigma = 0)

from y_0 = start times what the host begins with (noise times sigma_0).
Every multistep method without per-channel statistics, with or without corrector, is of this form: only numbers differ.
`ems_tools.fit` chooses them, and the lambdas, on trajectories of the model.

Under classifier-free guidance D costs two passes of the network, a conditional and an unconditional one. Steps in fewer passes
make the conditional one alone at some evaluations. They are of the same form over all answers a_j so far: c, the conditional
answer, at every evaluation, and after it D where the evaluation is guided.

A run that begins inside the noise range, from a picture with noise on it (image to image), can begin anywhere. For some
beginnings steps are fitted; between two of them `between` places the evaluations in proportion, and adds as much of both
corrections of the second-order formula to that formula on the steps at hand. On three networks of the zoo, half-way between
beginnings 0.9 apart in lambda, that was as good as a fit made there (a script that was not kept).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

__all__ = ["MATCH", "FittedSteps", "between", "formula_step"]

MATCH = 2e-3
"""Largest difference in lambda between a schedule and the fitted one for its coefficients to apply."""
APART, REACH = 1.3, 0.35
"""In lambda: how far apart two fitted beginnings may lie for a run to begin between them, and how far from one it may else."""


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


def formula_step(lambdas: Sequence[float], i: int, then: float) -> tuple[float, list[float]]:
    """Decay and weights of DPM-Solver++ 2M from evaluation i to `then`; to sigma = 0 (inf) it is D_i."""
    if then == math.inf:
        return 0.0, [0.0] * i + [1.0]
    h = then - lambdas[i]
    decay = math.exp(-h)
    weights = [0.0] * i + [1 - decay]
    if i:
        slope = (h - 1 + decay) / (lambdas[i] - lambdas[i - 1])
        weights[i] += slope
        weights[i - 1] -= slope
    return decay, weights


def between(known: Iterable[FittedSteps], first: float, steps: int) -> FittedSteps | None:
    """Steps for a run of `steps` evaluations that begins at lambda `first`, from those fitted for other beginnings.

    None where none of them has so many steps, or none begins near enough.
    """
    rows = sorted((r for r in known if len(r.lambdas) == steps and not r.guided), key=lambda r: r.lambdas[0])
    for low, high in pairwise(rows):
        apart = high.lambdas[0] - low.lambdas[0]
        if low.lambdas[0] <= first <= high.lambdas[0] and 0 < apart <= APART:
            share = (first - low.lambdas[0]) / apart
            return _mixed([(1 - share, low), (share, high)], first)
    near = min(rows, key=lambda r: abs(r.lambdas[0] - first), default=None)
    return None if near is None or abs(near.lambdas[0] - first) > REACH else _mixed([(1.0, near)], first)


def _mixed(parts: Sequence[tuple[float, FittedSteps]], first: float) -> FittedSteps | None:
    """The formula on lambdas that begin at `first`, with these shares of the rows' corrections of it."""
    last = sum(share * row.lambdas[-1] for share, row in parts)
    whole = [(share / (row.lambdas[-1] - row.lambdas[0]), row) for share, row in parts if len(row.lambdas) > 1]
    n = len(parts[0][1].lambdas)
    lambdas = [first + (last - first) * sum(k * (row.lambdas[i] - row.lambdas[0]) for k, row in whole) for i in range(n)]
    if n > 1 and last <= first:
        return None
    decays, rows = [], []
    for i, then in enumerate([*lambdas[1:], math.inf]):
        decay, weights = formula_step(lambdas, i, then)
        for share, row in parts:
            usual, factors = formula_step(row.lambdas, i, [*row.lambdas, math.inf][i + 1])
            decay += share * (row.decay[i] - usual)
            weights = [w + share * (mine - u) for w, mine, u in zip(weights, row.weights[i], factors, strict=True)]
        decays.append(decay)
        rows.append(tuple(weights))
    return FittedSteps(tuple(lambdas), tuple(decays), tuple(rows))
