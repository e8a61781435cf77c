"""Whether statistics suit a model, judged by the first sampling run with them: almost no extra evaluations.

In z = e^lambda y the ODE is dz/dlambda = e^lambda D (paper, eq. 7, with l = 1, s = b = 0), whatever the statistics. So the D
that a run evaluated, interpolated between neighbouring nodes on both sides, tell where it should have been at every node:

    q_i = sigma_i (z_0 + integral from lambda_0 to lambda_i of e^lambda D)

How far it was from there, |y_i - q_i|, is compared with how far data prediction would have been, given the same D. Where the
statistics are right the ratio of the squares is below 1 near the clean end; wrong ones push y away from what D says, by more
than data prediction's own error. Fitted steps end in a sum that no statistics give, so for them three evaluations go on from
the last node towards sigma = 0, and the result is compared with what they find. benchmarks/forged.py measures both error rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...sampler import Space

__all__ = ["EXTRA", "Trial", "Verdict"]

LIMIT, LIMIT_CORRECTED, LIMIT_ANYWHERE = 1.5, 2.25, 8.0
LIMIT_FITTED, LIMIT_FITTED_ANYWHERE, FEW_STEPS = 4.3, 200.0, 10
"""Largest ratio of squared residuals that passes: at the last node, there over data prediction with a corrector, and anywhere.

The first two are for FEW_STEPS steps. With fewer, data prediction is so far off that right statistics stay below 0.1; with
more, both residuals are next to nothing, and what a file's standard errors leave counts. Fitted steps may stray on the way
(right ones up to 41), for they make up for it at the end (right ones up to 4).
"""
EXTRA = 3
"""Evaluations beyond those of the run, at most."""
_REACH = 0.8
"""Step in lambda of the extra evaluations."""
_SAMPLES, _ELEMENTS = 4, 4096
_POINTS, _FACTORS = np.polynomial.legendre.leggauss(6)


@dataclass(frozen=True)
class Verdict:
    """What a run showed.

    Args:
        ratio: of the squared residual with the statistics over that of data prediction, in units of what passes, the largest
            of those that count; None where a run is too short to tell.
        limit: the largest ratio that passes.
        evaluations: beyond those of the run.
    """

    ratio: float | None
    limit: float = 1.0
    evaluations: int = 0

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the statistics."""
        return self.ratio is None or self.ratio <= self.limit


@dataclass
class Trial:
    """A denoiser D(x, level, ...) that remembers where it was evaluated, for one run from `x` [B, C, ...].

    Args:
        model: the denoiser; positional x and level, any further keyword arguments.
        space: the host's.
        fitted: whether the run takes fitted steps.
        start: the run's x, if known: fitted steps begin with a multiple of it.
    """

    model: Callable[..., Tensor]
    space: Space
    fitted: bool
    start: Tensor | None = None
    _at_first_call: bool = False
    _lambdas: list[float] = field(default_factory=list)
    _y: list[Tensor] = field(default_factory=list)
    _denoised: list[Tensor] = field(default_factory=list)
    _last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, level: Tensor, **extra_args: object) -> Tensor:
        """The model's denoised; a few thousand elements of it are kept."""
        denoised = self.model(x, level, **extra_args)
        self._keep(x, level, denoised)
        self._last = (x, denoised)
        return denoised

    def _keep(self, x: Tensor, level: Tensor, denoised: Tensor) -> None:
        first = level.reshape(-1)[:1].detach().to("cpu", torch.float64)
        lam = float(self.space.lambda_of(first))
        if math.isfinite(lam):  # a flow's start at t = 1 has no y
            self._at_first_call |= self._last is None
            self._lambdas.append(lam)
            self._y.append(_some(x) / float(self.space.alpha_of(first)))
            self._denoised.append(_some(denoised))

    def verdict(self, end: Tensor, level: float, extra_args: Mapping[str, object]) -> Verdict:
        """Judge the finished run, whose result is `end` [B, C, ...] at host level `level`.

        Evaluates at most EXTRA times. Raises what the model raises.
        """
        if len(self._lambdas) < 4 or not all(b > a for a, b in zip(self._lambdas, self._lambdas[1:])):
            return Verdict(None)
        if not torch.isfinite(end).all():
            return Verdict(math.inf)
        nodes, ratios, used = len(self._lambdas), [], 0
        if level > 0:
            self(end, end.new_full((len(end),), level), **extra_args)
            nodes, used = nodes + 1, 1
        elif self.fitted:
            used = self._go_on(extra_args)
            target = self._denoised[-1]
            ratios.append(_ratio(_some(end) - target, self._denoised[nodes - 1] - target, target))
        plain, corrected = self._residuals(nodes)
        if self.fitted:
            strayed = max(plain) / LIMIT_FITTED_ANYWHERE
            return Verdict(max(*(r / LIMIT_FITTED for r in (*ratios, *plain[-2:])), strayed), 1.0, used)
        steps = nodes / FEW_STEPS
        last, third = LIMIT * steps ** (2 if steps < 1 else 1.5), LIMIT_CORRECTED * max(steps, 1.0) ** 3
        return Verdict(max(plain[-1] / last, corrected / third, max(plain) / LIMIT_ANYWHERE), 1.0, used)

    def _go_on(self, extra_args: Mapping[str, object]) -> int:
        """EXTRA steps of data prediction of order 2 from the last node towards sigma = 0."""
        assert self._last is not None
        x, denoised = self._last
        before: Tensor | None = None
        for _ in range(EXTRA):
            lam = self._lambdas[-1]
            levels = self.space.level_of(torch.tensor([lam, lam + _REACH], dtype=torch.float64))
            alphas = self.space.alpha_of(levels).tolist()
            ahead = denoised if before is None else denoised + (denoised - before) / 2
            shrink = math.exp(-_REACH)
            x = alphas[1] * (shrink * x / alphas[0] + (1 - shrink) * ahead)
            before = denoised
            denoised = self(x, x.new_full((len(x),), float(levels[1])), **extra_args)
        return EXTRA

    def _residuals(self, nodes: int) -> tuple[list[float], float]:
        """Ratio of the squared residuals at nodes 1 to `nodes` - 1; and at the last one over those with a corrector."""
        lambdas, D, count = self._lambdas, self._denoised, len(self._lambdas)
        right = plain = corrected = self._first * math.exp(lambdas[0])
        found, last = [], math.inf
        for i in range(nodes - 1):
            first = min(max(i - 1, 0), count - 4)
            right = right + _integral(lambdas, D, range(first, first + 4), i)
            plain = plain + _integral(lambdas, D, range(max(i - 1, 0), i + 1), i)
            corrected = corrected + _integral(lambdas, D, range(max(i - 1, 0), i + 1 if i == nodes - 2 else i + 2), i)
            sigma = math.exp(-lambdas[i + 1])
            mine = self._y[i + 1] - sigma * right
            found.append(_ratio(mine, sigma * (plain - right), D[i + 1]))
            last = _ratio(mine, sigma * (corrected - right), D[i + 1])
        return found, last

    @property
    def _first(self) -> Tensor:
        """Y at the first node, before any factor that fitted steps begin with."""
        level = self.space.level_of(torch.tensor([self._lambdas[0]], dtype=torch.float64))
        known = self.start is not None and self._at_first_call
        return _some(self.start) / float(self.space.alpha_of(level)) if known and self.start is not None else self._y[0]


def _some(x: Tensor) -> Tensor:
    """A few thousand elements [K, M] of x [B, C, ...], spread evenly, in float64 on the CPU."""
    flat = x[:_SAMPLES].detach().flatten(1)
    return flat[:, :: max(flat.shape[1] // _ELEMENTS, 1)].to("cpu", torch.float64)


def _integral(lambdas: list[float], denoised: list[Tensor], nodes: range, i: int) -> Tensor:
    """The integral from lambda_i to lambda_{i+1} of e^lambda times the polynomial through D at `nodes`."""
    low, high = lambdas[i], lambdas[i + 1]
    at = (low + high) / 2 + (high - low) / 2 * _POINTS
    factors = (high - low) / 2 * _FACTORS * np.exp(at)
    total = torch.zeros_like(denoised[i])
    for k in nodes:
        basis = np.ones_like(at)
        for j in nodes:
            if j != k:
                basis = basis * (at - lambdas[j]) / (lambdas[k] - lambdas[j])
        total = total + float((factors * basis).sum()) * denoised[k]
    return total


def _ratio(mine: Tensor, theirs: Tensor, scale: Tensor) -> float:
    """Mean square of `mine` over that of `theirs`; what is less than 1e-4 of the picture's contrast cannot be told from it."""
    floor = 1e-8 * float(scale.var()) + 1e-30
    value = (float(mine.square().mean()) + floor) / (float(theirs.square().mean()) + floor)
    return value if math.isfinite(value) else math.inf
