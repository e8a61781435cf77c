"""Where to evaluate: spacings of many kinds between the ends of the noise range.

A kind is a function of sigma in whose power the steps are uniform. With u(sigma) = time(sigma)^(1 / power), evaluation i of n
lies at u_0 + (u_end - u_0) i / (n - 1 + last): `last` 0 puts the last evaluation at the clean end, as hosts do before their
step to 0, 1 stops one step before it, as the paper does.

| kind   | time(sigma)                                                                  |
|--------|------------------------------------------------------------------------------|
| vp     | of the VP process with linear beta from 0.1 to 20, whatever the model's is    |
| flow   | sigma / (1 + sigma)                                                          |
| model  | the model's own                                                              |
| lambda | log sigma                                                                    |
| sigma  | sigma; power 7 is Karras et al.                                              |
| beta   | the model's own, dense at both ends (the quantiles of a beta distribution)   |

`benchmarks/zoo.py --spacings` prints what each is worth on every network of the zoo: VP time to the power 1.5 or 2 is at or
near the best nearly everywhere unguided, also on models that are no VP models; strong guidance asks for more steps at the
noisy end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...sampler import EDM, NoiseSchedule, VPContinuous
from ..trajectory import Trajectories

__all__ = ["CANDIDATES", "LATE", "Range", "Spacing"]


@dataclass(frozen=True)
class Range:
    """Between which lambdas evaluations may lie, and the model's own time as a table (of lambda, increasing) if it has one."""

    low: float
    high: float
    table: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, lambdas: tuple[float, ...], schedule: NoiseSchedule | None) -> Range:
        """The range of a grid; a schedule whose time is sigma tells nothing of its own."""
        if schedule is None or isinstance(schedule, EDM):
            return cls(lambdas[0], lambdas[-1])
        times = torch.linspace(schedule.time_max, schedule.time_min, 2001, dtype=torch.float64)
        own = schedule.space.lambda_of(schedule.level_at(times))
        inside = own.isfinite() & (own > lambdas[0] - 1)  # a flow begins at minus infinity
        return cls(lambdas[0], lambdas[-1], (own[inside], times[inside]))


@dataclass(frozen=True)
class Spacing:
    """A kind of spacing (see the module).

    Args:
        kind, power, last: see the module.
        first: how late the first evaluation lies: times the share of the picture that `steps` evaluations can afford not to
            resolve, exp(-1.05 - 0.16 steps) (0: at the noisy end).
    """

    kind: str
    power: float
    last: float
    first: float = 0.0

    @property
    def name(self) -> str:
        """In a few words."""
        return f"{self.kind} {self.power:g}, end {self.last:g}"

    def lambdas(self, steps: int, span: Range, teacher: Trajectories | None = None) -> list[float]:
        """Of `steps` evaluations, increasing; `teacher` is needed for a `first` above 0."""
        low = span.low
        if self.first > 0 and teacher is not None:
            share = 1 - self.first * math.exp(-1.05 - 0.16 * steps)
            low = min(teacher.lambda_where_left(max(share, 0.5)), span.low + 0.5 * (span.high - span.low))
        u = torch.arange(steps, dtype=torch.float64) / max(steps - 1 + self.last, 1e-9)
        if self.kind == "beta":
            u = _beta_quantiles(u)
        ends = self._time(torch.tensor([low, span.high], dtype=torch.float64), span).tolist()
        a, b = (v ** (1 / self.power) for v in ends)
        found = self._lambda((a + u * (b - a)) ** self.power, span)
        return [low, *found[1:].tolist()]

    def _time(self, lam: Tensor, span: Range) -> Tensor:
        sigma = (-lam).exp()
        if self.kind == "lambda":
            return lam
        if self.kind == "vp":
            return VPContinuous().time_at(sigma)
        if self.kind == "flow" or (self.kind in ("model", "beta") and span.table is None):
            return sigma / (1 + sigma)
        if self.kind == "sigma":
            return sigma
        assert span.table is not None
        return _interpolate(lam, *span.table)

    def _lambda(self, time: Tensor, span: Range) -> Tensor:
        if self.kind == "lambda":
            return time
        if self.kind == "vp":
            return -VPContinuous().level_at(time).log()
        if self.kind == "flow" or (self.kind in ("model", "beta") and span.table is None):
            return ((1 - time) / time).log()
        if self.kind == "sigma":
            return -time.log()
        assert span.table is not None
        own, times = span.table
        return _interpolate(time.neg(), times.neg(), own)


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through (xs, ys), xs increasing (repeats allowed), held at the ends."""
    i = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    width = (xs[i] - xs[i - 1]).clamp(min=1e-12)
    return torch.lerp(ys[i - 1], ys[i], ((x - xs[i - 1]) / width).clamp(0, 1))


def _beta_quantiles(u: Tensor, power: float = 0.6) -> Tensor:
    """Quantiles of the beta distribution with both parameters `power`, by integrating its density (no SciPy in hosts)."""
    angle = torch.linspace(0, math.pi / 2, 2001, dtype=torch.float64)
    x = angle.sin() ** 2  # makes the density x^(p-1) (1-x)^(p-1) dx smooth at both ends
    density = (x * (1 - x)).clamp(min=1e-300) ** (power - 0.5)
    total = torch.cat([density.new_zeros(1), torch.cumulative_trapezoid(density, angle)])
    return _interpolate(u, total / total[-1], x)


LATE = 1.0
"""Where most candidates begin, see `Spacing.first`."""
CANDIDATES = (
    Spacing("vp", 2.0, 1.0, LATE),
    Spacing("vp", 3.0, 0.5, LATE),
    Spacing("vp", 1.5, 0.5, LATE),
    Spacing("model", 2.0, 0.5, LATE),
    Spacing("vp", 1.0, 0.5, LATE),
    Spacing("vp", 3.0, 1.5, LATE),
    Spacing("beta", 1.0, 1.5, LATE),
    Spacing("model", 1.5, 0.5, 0.0),
    Spacing("flow", 2.0, 0.5, 0.0),
    Spacing("flow", 1.0, 0.5, LATE),
    Spacing("flow", 1.5, 1.0, LATE),
    Spacing("beta", 1.0, 0.5, 0.0),
    Spacing("sigma", 7.0, 1.0, LATE),
    Spacing("vp", 1.5, 1.5, 0.0),
    Spacing("lambda", 1.0, 1.5, LATE),
    Spacing("model", 1.0, 0.5, 0.0),
)
"""Spacings to fit on, the most likely ones first."""
