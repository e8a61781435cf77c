"""A finer solution beside a run of few steps, from what the run evaluated and a few evaluations more.

The run left y_i and D_i = D(y_i, lambda_i) at its nodes. The solution sought passes somewhere near:

    y(lambda) = y_k e^(lambda_k - lambda) + integral from lambda_k to lambda of e^(mu - lambda) D(y(mu), mu) dmu  (eq. 7)

It is followed from node to node, with D interpolated between neighbours on both sides, past and to come. Where the
solution is off the run by e = y - y_i, the denoiser answers D_i + response(lambda) e, with the response of typical models
(`sampler.typical`). What is evaluated anew lies between the run's nodes, in the widest gaps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...sampler import Space
from ...sampler.plan import Plan
from ...sampler.typical import stored_trajectories

__all__ = ["Node", "Reference", "chosen_nodes", "integral", "settled", "stepped"]

_SHORTEST, _ORDER, _ROUNDS = 0.15, 4, 4
_SAME = 5e-3
"""Difference in lambda below which two levels are one: half-precision hosts round them."""
_POINTS, _FACTORS = np.polynomial.legendre.leggauss(6)


@dataclass(frozen=True, eq=False)
class Node:
    """A point of the solution: the run's `y` and `denoised` [B, C, ...]; None between its nodes, where D is asked for."""

    lam: float
    y: Tensor | None = None
    denoised: Tensor | None = None


def chosen_nodes(run: Sequence[Node], clean: float, evaluations: int) -> list[Node]:
    """The run's nodes, and where D is asked for, at most `evaluations` times.

    Args:
        run: at least two, by increasing lambda.
        clean: lambda up to which the solution is followed beyond the last node.
        evaluations: at most.
    """
    new = [clean] if clean > run[-1].lam + _SHORTEST else []
    while len(new) < evaluations:
        at = sorted([n.lam for n in run] + new)
        gap, low = max((b - a, a) for a, b in pairwise(at))
        if gap < 2 * _SHORTEST:
            break
        new.append(low + gap / 2)
    return sorted([*run, *map(Node, new)], key=lambda n: n.lam)


def response(lam: float) -> float:
    """What a typical denoiser answers to an error of y: 0 under much noise, towards 1 at the clean end."""
    return float(stored_trajectories().at(lam)[2].median())


@dataclass
class Reference:
    """The solution from y at the first node on: `y` and `denoised` at every node so far.

    Args:
        nodes: by increasing lambda; the first is one of the run's.
        start: y [B, C, ...] there.
        ask: D of y [B, C, ...] at a lambda.
    """

    nodes: list[Node]
    start: Tensor
    ask: Callable[[Tensor, float], Tensor]
    y: list[Tensor] = field(default_factory=list)
    denoised: list[Tensor] = field(default_factory=list)
    evaluations: int = 0

    def __post_init__(self) -> None:
        self._responses = [response(n.lam) for n in self.nodes]
        self.y, self.denoised = [self.start], [self._answer(0, self._off(0, self.start))]
        for k in range(len(self.nodes) - 1):
            self._advance(k)

    def _off(self, i: int, y: Tensor) -> Tensor:
        at = self.nodes[i].y
        assert at is not None
        return y - at

    def _answer(self, i: int, off: Tensor) -> Tensor:
        """D at node i of the run where the solution is off it by `off`."""
        denoised = self.nodes[i].denoised
        assert denoised is not None
        return denoised + self._responses[i] * off

    def _coming(self, k: int, off: Tensor) -> dict[int, Tensor]:
        """D at the run's next nodes beyond k, if the solution keeps off it as an error decays."""
        own = [i for i in range(k + 1, len(self.nodes)) if self.nodes[i].y is not None][: _ORDER - min(k + 1, 2)]
        found = {}
        for i in own:
            kept = math.exp((self._responses[i] - 1) * (self.nodes[i].lam - self.nodes[k].lam))
            found[i] = self._answer(i, off * kept)
        return found

    def _advance(self, k: int) -> None:
        """From node k to the next one: predicted, D there, corrected."""
        last = max(i for i in range(k + 1) if self.nodes[i].y is not None)
        off = self._off(last, self.y[last])
        known = {i: self.denoised[i] for i in range(max(k - 1, 0), k + 1)} | self._coming(k, off)
        node, response = self.nodes[k + 1], self._responses[k + 1]
        y = self._step(k, known)
        if node.y is None:
            denoised = self.ask(y, node.lam)
            self.evaluations += 1
            if len(known) >= _ORDER:
                known.pop(max(known))
        else:
            denoised = self._answer(k + 1, self._off(k + 1, y))
            known |= self._coming(k + 1, self._off(k + 1, y))
        corrected = self._step(k, dict(sorted({**known, k + 1: denoised}.items())[:_ORDER]))
        self.y.append(corrected)
        self.denoised.append(denoised + response * (corrected - y))

    def _step(self, k: int, known: dict[int, Tensor]) -> Tensor:
        low, high = self.nodes[k].lam, self.nodes[k + 1].lam
        return self.y[k] * math.exp(low - high) + integral({self.nodes[i].lam: d for i, d in known.items()}, low, high)

    def end(self, lam: float) -> Tensor:
        """The solution at a lambda beyond the last node: y there, at an infinite one the picture."""
        last, before = self.nodes[-1].lam, self.nodes[-2].lam
        if math.isinf(lam):
            return _picture((before, last), self.denoised)
        known = {node.lam: d for node, d in zip(self.nodes[-3:], self.denoised[-3:])}
        return self.y[-1] * math.exp(last - lam) + integral(known, last, lam)

    def at(self, lam: float) -> tuple[Tensor, Tensor]:
        """Y and D of the solution at any lambda from the first node on."""
        n = len(self.nodes)
        i = min(max(sum(node.lam <= lam + _SAME for node in self.nodes) - 1, 0), n - 1)
        low = self.nodes[i].lam
        if abs(low - lam) < 2 * _SAME:
            return self.y[i], self.denoised[i]
        first = min(max(i - 1, 0), max(n - _ORDER, 0))
        known = {self.nodes[k].lam: self.denoised[k] for k in range(first, min(first + _ORDER, n))}
        basis = _lagrange(list(known), np.array([lam]))
        denoised = _combined(basis[:, 0].tolist(), list(known.values()))
        return self.y[i] * math.exp(low - lam) + integral(known, low, lam), denoised

    def end_of(self, plan: Plan, space: Space, start: Tensor) -> Tensor:
        """Where a run of another plan from y = `start` would end, as far as the solution and the response tell: y there.

        The plan's first level is at the first node's or below.
        """

        def answer(y: Tensor, lam: float) -> Tensor:
            near, denoised = self.at(lam)
            return denoised + response(lam) * (y - near)

        return stepped(plan, space, start, answer)


def settled(lambdas: Sequence[float], y: Sequence[Tensor], denoised: Sequence[Tensor]) -> Tensor:
    """The picture [B, C, ...] of the solution from the first node of a run near it, without a new evaluation.

    Every step takes D of neighbours on both sides, and the whole is repeated, until y and D go together.

    Args:
        lambdas, y, denoised: of the run's nodes, by increasing lambda.
    """
    n, responses = len(lambdas), [response(lam) for lam in lambdas]
    now, answers = list(y), list(denoised)
    for _ in range(_ROUNDS):
        for k, (low, high) in enumerate(pairwise(lambdas)):
            first = min(max(k - 1, 0), max(n - _ORDER, 0))
            known = dict(zip(lambdas[first : first + _ORDER], answers[first : first + _ORDER]))
            now[k + 1] = now[k] * math.exp(low - high) + integral(known, low, high)
            answers[k + 1] = denoised[k + 1] + responses[k + 1] * (now[k + 1] - y[k + 1])
    return _picture(lambdas, answers)


def _picture(lambdas: Sequence[float], denoised: Sequence[Tensor]) -> Tensor:
    """What lies at sigma 0 on a line through the last two D, over sigma."""
    away, there = (math.exp(-lam) for lam in lambdas[-2:])
    return denoised[-1] + (denoised[-1] - denoised[-2]) * (there / (away - there))


def stepped(plan: Plan, space: Space, start: Tensor, ask: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Where a run of `plan` from y = `start` [B, C, ...] ends, in y; `ask` gives D of y at a lambda."""
    levels = torch.tensor(plan.levels, dtype=torch.float64)
    lambdas, alphas = space.lambda_of(levels).tolist(), space.alpha_of(levels).tolist()
    x, m = start * (alphas[0] * plan.start), {}
    for i, update in enumerate(plan.updates()):
        m[i] = ask(x / alphas[i], lambdas[i])
        x = x * float(update.decay) + _combined([float(w) for w in update.weights], [m[n] for n in update.nodes])
    return x / (alphas[-1] or 1.0)


def _combined(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(values[0])
    for weight, value in zip(weights, values, strict=True):
        total.add_(value, alpha=float(weight))
    return total


def _lagrange(nodes: Sequence[float], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values [nodes, points] of the polynomials that are 1 at one node and 0 at the others."""
    rows = [np.prod([(at - b) / (a - b) for b in nodes if b != a], axis=0) * np.ones_like(at) for a in nodes]
    return np.array(rows)


def integral(known: dict[float, Tensor], low: float, high: float) -> Tensor:
    """The integral from `low` to `high` of e^(lambda - high) times the polynomial through D at the lambdas of `known`."""
    at = (low + high) / 2 + (high - low) / 2 * _POINTS
    factors = (high - low) / 2 * _FACTORS * np.exp(at - high)
    return _combined((_lagrange(list(known), at) * factors).sum(1).tolist(), list(known.values()))
