"""Moments of (y, D, D') and of the Jacobian's diagonal: all that l, s and b need, in sums that add up.

Per grid point lambda_i, with f = (1 - l) y - D and f' its total derivative along the ODE (paper, eq. 10 and 12; method in
`sampler.coefficients`),

    l = E[diag(I - dD/dy)]                                                   from v * (J v), v random signs
    f' = -l' y + (1 - l)(D - y) - D' = p y + q D - D',   p = -l' - (1 - l),  q = 1 - l
    s = Cov(f, f') / Var(f),   b = E[f'] - s E[f]

f and f' are linear in y, D, D', so nine sums suffice. They are kept for several groups of samples (sample k belongs to
group k mod G): the spread between groups gives standard errors (jackknife), for any batch size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...sampler import EMSError

__all__ = ["MOMENTS", "Moments", "Statistics", "smoothed_slope"]

MOMENTS = ("y", "D", "D'", "yy", "yD", "DD", "yD'", "DD'", "vJv")
SMOOTHING = 0.4
"""Half width in lambda of the local cubic fit that gives the slope l' (the paper: an 11-point moving average)."""
_WINDOW = 64
L_LIMIT, S_LIMIT = 5.0, 10.0
"""|l| and |s| are held to these. l is about 0 to 1 of any model. f grows or decays by e^(s h) over a step h: more means that f
hardly varies, and s is a ratio of two rounding errors. (The largest |s| of the embedded model is 1.1.)"""


@dataclass(frozen=True, eq=False)
class Statistics:
    """l, s, b [N+1, C, ...] in float64 and their standard errors (NaN with fewer than two groups)."""

    l: Tensor
    s: Tensor
    b: Tensor
    l_se: Tensor
    s_se: Tensor
    b_se: Tensor

    def worst_error(self) -> float:
        """The largest of the root-mean-square standard errors of l, s and b."""
        return max(e.square().mean().sqrt().item() for e in (self.l_se, self.s_se, self.b_se))


@dataclass(eq=False)
class Moments:
    """Sums over samples, changed in place by `add`.

    Args:
        lambdas: [N+1] grid, float64.
        count: [G] samples per group, float64.
        sums: [9, G, N+1, C] (or [9, G, N+1, C, *spatial] per element) in the order of `MOMENTS`, float64; per
            channel each sample contributes its mean over positions.
    """

    lambdas: Tensor
    count: Tensor
    sums: Tensor

    @classmethod
    def empty(cls, lambdas: Tensor, shape: tuple[int, ...], per_element: bool = False, groups: int = 32) -> Moments:
        """No samples yet, for latents of `shape` [C, ...]."""
        kept = shape if per_element else shape[:1]
        sums = torch.zeros(len(MOMENTS), groups, len(lambdas), *kept, dtype=torch.float64)
        return cls(lambdas.to(torch.float64), torch.zeros(groups, dtype=torch.float64), sums)

    @property
    def samples(self) -> int:
        """How many samples are in."""
        return int(self.count.sum().item())

    @property
    def per_element(self) -> bool:
        """Whether positions are kept apart."""
        return self.sums.ndim > 4

    def add(self, samples: list[int], values: Tensor) -> None:
        """Add the moments [9, B, N+1, C, ...] of the samples with these indices."""
        groups = torch.tensor(samples) % len(self.count)
        self.count.index_add_(0, groups, torch.ones(len(samples), dtype=torch.float64))
        self.sums.index_add_(1, groups, values.to("cpu", torch.float64))

    def merged(self, other: Moments) -> Moments:
        """The sum of two disjoint sets of samples. Raises EMSError unless grids and shapes agree."""
        if self.lambdas.shape != other.lambdas.shape or not torch.equal(self.lambdas, other.lambdas):
            raise EMSError("the grids of lambda differ: only statistics computed on the same grid can be added")
        if self.sums.shape != other.sums.shape:
            mine, theirs = tuple(self.sums.shape[3:]), tuple(other.sums.shape[3:])
            raise EMSError(f"the shapes differ: {mine} and {theirs} (channels, positions) or the number of groups")
        return Moments(self.lambdas, self.count + other.count, self.sums + other.sums)

    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """l, s, b [N+1, C, ...] from all samples. Raises ValueError without any."""
        if self.samples == 0:
            raise ValueError("no samples yet")
        return _solve(self.lambdas, self.sums.sum(1) / self.count.sum())

    def statistics(self) -> Statistics:
        """l, s, b from all samples, and jackknife standard errors over the groups in use. Raises ValueError without samples."""
        values = self.values()
        total, count = self.sums.sum(1), self.count.sum()
        used = (self.count > 0).nonzero().flatten().tolist()
        if len(used) < 2:
            nan = torch.full_like(values[0], torch.nan)
            return Statistics(*values, nan, nan, nan)
        squares = [torch.zeros_like(v) for v in values]
        means = [torch.zeros_like(v) for v in values]
        for n, g in enumerate(used, 1):  # Welford: one leave-one-out estimate in memory at a time
            left_out = _solve(self.lambdas, (total - self.sums[:, g]) / (count - self.count[g]))
            for value, mean, square in zip(left_out, means, squares, strict=True):
                delta = value - mean
                mean += delta / n
                square += delta * (value - mean)
        scale = (len(used) - 1) / len(used)
        errors = [(square * scale).sqrt() for square in squares]
        return Statistics(*values, *errors)


def _solve(lambdas: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """l, s, b [N+1, C, ...] from mean moments [9, N+1, C, ...]."""
    y, D, Dp, yy, yD, DD, yDp, DDp, vJv = mean
    l = (1 - vJv).clamp(-L_LIMIT, L_LIMIT)
    slope = smoothed_slope(lambdas, l)
    q = 1 - l
    p = -slope - q
    c_yy, c_yD, c_DD = yy - y * y, yD - y * D, DD - D * D
    c_yDp, c_DDp = yDp - y * Dp, DDp - D * Dp
    var_f = q * q * c_yy - 2 * q * c_yD + c_DD
    cov = q * (p * c_yy + q * c_yD - c_yDp) - (p * c_yD + q * c_DD - c_DDp)
    # Where f does not vary beyond rounding (a constant border, or D linear in y), s is free: take none.
    floor = 1e-10 * c_DD + 1e-30
    s = torch.where(var_f > floor, cov / var_f.clamp(min=floor), torch.zeros_like(cov)).clamp(-S_LIMIT, S_LIMIT)
    b = (p * y + q * D - Dp) - s * (q * y - D)
    return l, s, b


def smoothed_slope(lambdas: Tensor, values: Tensor, half_width: float = SMOOTHING) -> Tensor:
    """Slope [N+1, ...] of a local cubic fit within `half_width` (at least 7 points of the grid, or all of it).

    The weights are a parabola over the window (Epanechnikov), so that a noisy value at its edge counts little. Of a window with
    more than 64 points about 64 are used: time and memory grow with N, however dense a stranger's grid is.
    """
    slope = torch.zeros_like(values, dtype=torch.float64)
    for i, (inside, weights) in enumerate(_slope_weights(tuple(lambdas.tolist()), half_width)):
        slope[i] = torch.tensordot(weights, values[inside].double(), dims=1)
    return slope


@lru_cache(maxsize=2)
def _slope_weights(grid: tuple[float, ...], half_width: float) -> list[tuple[slice, Tensor]]:
    """For every point, which values the slope there is made of, and their factors; the same for all guidance scales."""
    n, lambdas = len(grid), torch.tensor(grid, dtype=torch.float64)
    found = []
    for i in range(n):
        near = lambdas[max(i - 7, 0) : i + 8] - lambdas[i]
        width = max(half_width, near.abs().sort().values[min(6, n - 1)].item() * 1.01)
        ends = torch.searchsorted(
            lambdas, lambdas[i] + width * torch.tensor([-1 + 1e-9, 1 - 1e-9], dtype=torch.float64)
        ).tolist()
        inside = slice(ends[0], ends[1], max((ends[1] - ends[0]) // _WINDOW, 1))
        u = (lambdas[inside] - lambdas[i]) / width
        root = (1 - u**2).clamp(min=1e-3).sqrt()
        design = u[:, None] ** torch.arange(min(4, len(u)), dtype=torch.float64)
        weights = torch.linalg.lstsq(root[:, None] * design, torch.diag(root)).solution[1] / width
        found.append((inside, weights))
    return found
