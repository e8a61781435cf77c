"""Whether statistics suit a model, judged by the first sampling run with them and at most EXTRA evaluations more.

Judged twice, for one measure is fine and the other robust:

- The run with the statistics ends in a picture. What it evaluated, and a few evaluations more, give a finer solution of the
  same ODE from the same start (`judge.reference`). Around that solution the run that the user would have had without the
  statistics is followed without evaluations. The squared distances of both pictures from the finer one are compared.
- Where a run goes far astray, a solution that leans on it is no help. But the D that it evaluated, interpolated between
  neighbouring nodes on both sides, tell where it should have been at every node: q_i = y_0 e^(lambda_0 - lambda_i) plus the
  integral of e^(lambda - lambda_i) D. How far it was from there is compared with how far data prediction would have been,
  given the same D.

Fitted steps may stray on the way, for they make up for it. Where they do, the evaluations are spent on the run without the
statistics itself, and the solution leans on that one. Where they begin below the model's noisiest level, the solution begins
there, with the same noise: a run lacks what the solution holds by then, and a file may make that worse or better. Steps in
fewer passes, whose trial makes both passes everywhere, stay near; of them the distance is also compared with what their row
states.

benchmarks/first_run.py measures both error rates, benchmarks/first_passes.py those of steps in fewer passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ...sampler import Answers, Space
from ...sampler.plan import Plan
from .reference import Node, Reference, chosen_nodes, integral, settled, stepped

__all__ = ["EXTRA", "Trial", "Verdict"]

EXTRA = 8
"""Evaluations beyond those of the run, at most."""
LIMIT, LIMIT_MANY, LIMIT_FIT, LIMIT_OTHER = 3.5, 4.5, 2.2, 12.0
"""Largest ratio of the squared distances that passes: up to MANY_STEPS - 1 evaluations; with more, for then the solution is
hardly finer than the run without statistics; of fitted steps; and of those over a run on other steps than the fit's own."""
MANY_STEPS = 10
LIMIT_ASTRAY, LIMIT_CORRECTED, LIMIT_ANYWHERE = 2.4, 3.6, 13.0
LIMIT_FITTED, LIMIT_FITTED_ANYWHERE = 7.0, 320.0
"""The same of the second measure: at the last node, there over data prediction with a corrector, and anywhere. The first
two are for FEW_STEPS steps. With fewer, data prediction is so far off that right statistics stay below 0.1; with more, both are
next to nothing, and what a file's standard errors leave counts. Fitted steps may stray on the way, for they make up for it;
of fewer than six the interpolation tells little: the shipped file's four steps at guidance 1 would now and then be refused."""
FEW_STEPS = 10
LIMIT_FEWER, LIMIT_STATED = 5.0, 4.0
"""For steps in fewer passes: of both ratios, and of the squared distance over the mean that their row states."""
LEANING, LIMIT_ALONE = 0.15, 12.0
"""From which share of what passes by the second measure on fitted steps are not leant on, and what passes then. Right
fits seldom stray so far, and then stay well below; the bent ones of the test of this rule begin above."""
SEEN = 3e-3
"""Of a picture's contrast: what nobody sees, and what a solution from so few evaluations cannot tell either."""
LATE = 0.5
"""How far in lambda above the model's noisiest level fitted steps begin late."""
FURTHER = 2.4
"""How far in lambda the solution is followed beyond the last evaluation of a run to sigma = 0, at most."""


@dataclass(frozen=True)
class Verdict:
    """What a run showed.

    Args:
        ratio: of the squared distances of the pictures with and without the statistics from the finer solution's, in units of
            what passes; None where a run is too short to tell.
        evaluations: beyond those of the run.
    """

    ratio: float | None
    evaluations: int = 0

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the statistics."""
        return self.ratio is None or self.ratio <= 1


@dataclass
class Trial:
    """A denoiser D(x, level, ...) that remembers what it was asked, for one run from `x` [B, C, ...].

    Args:
        model: the denoiser; positional x and level, any further keyword arguments.
        space: the host's.
        start: the run's x; fitted steps begin with a multiple of it.
        passes: for steps in fewer passes, the host's: `answers` then makes both passes at every evaluation.
    """

    model: Callable[..., Tensor]
    space: Space
    start: Tensor
    passes: Answers | None = None
    _nodes: list[Node] = field(default_factory=list)
    _skipped: bool = False

    def __call__(self, x: Tensor, level: Tensor, **extra_args: object) -> Tensor:
        """The model's denoised, which is kept."""
        return self._keep(_kept(x), level, self._guided(x, level, **extra_args)[-1])

    def answers(self, x: Tensor, level: Tensor, guided: bool, **extra_args: object) -> Sequence[Tensor]:
        """What steps in fewer passes are given: of both answers, which are made here everywhere, those that they may use."""
        before, both = _kept(x), self._guided(x, level, **extra_args)
        self._keep(before, level, both[-1])
        return both if guided else both[:1]

    def _guided(self, x: Tensor, level: Tensor, **extra_args: object) -> Sequence[Tensor]:
        """(D,), or (c, D) where the host makes passes."""
        if self.passes is not None:
            return self.passes(x, level, True, **extra_args)
        return (self.model(x, level, **extra_args),)

    def _keep(self, before: Tensor, level: Tensor, denoised: Tensor) -> Tensor:
        lam, alpha = self._place(level)
        if math.isfinite(lam):
            self._nodes.append(Node(lam, before / alpha, _kept(denoised)))
        else:
            self._skipped = True  # a flow's start at t = 1 has no y
        return denoised

    def _place(self, level: Tensor) -> tuple[float, float]:
        first = level.reshape(-1)[:1].detach().to("cpu", torch.float64)
        return float(self.space.lambda_of(first)), float(self.space.alpha_of(first))

    def verdict(
        self,
        end: Tensor,
        levels: Tensor,
        others: Callable[[float | None], Tensor] | None,
        plan_of: Callable[[Tensor], Plan],
        sigmas: tuple[float, float],
        extra_args: Mapping[str, object],
        stated: float = math.inf,
    ) -> Verdict:
        """Judge the finished run, whose result is `end` [B, C, ...].

        Args:
            end: of the run with the statistics.
            levels: of the run, [n + 1].
            others: where the statistics brought these levels, what a user takes without: from a sigma, or from there.
            plan_of: what the sampler does on given levels without statistics.
            sigmas: where the model's noise ends and begins.
            extra_args: the model's.
            stated: for steps in fewer passes, the mean squared error of their pictures, as the file has it.

        Raises what the model raises.
        """
        nodes = self._nodes
        if len(nodes) < 2 or not all(b.lam > a.lam for a, b in pairwise(nodes)):
            return Verdict(None)
        if not torch.isfinite(end).all():
            return Verdict(math.inf)
        assert nodes[0].y is not None
        begin = nodes[0].y if self._skipped else _kept(self.start) / self._place(levels)[1]
        last, alpha = self._place(levels[-1:])
        clean = min(-math.log(sigmas[0]), nodes[-1].lam + FURTHER) if math.isinf(last) else nodes[-1].lam
        ask, mine, top, extra = self._asked(end, extra_args), _kept(end) / (alpha or 1.0), begin, EXTRA
        usual = others(None) if others is not None else None
        if others is not None and -math.log(sigmas[1]) < nodes[0].lam - LATE and _is_noise(begin, nodes[0].lam):
            top, usual = begin * (sigmas[1] * math.exp(nodes[0].lam)), others(sigmas[1])
            nodes, extra = [Node(-math.log(sigmas[1]), top, ask(top, -math.log(sigmas[1]))), *nodes], EXTRA - 1
        astray, used, fewer = _astray(nodes, top, usual is not None), EXTRA - extra, math.isfinite(stated)
        can_lean = not fewer and 4 <= len(self._nodes) <= EXTRA and math.isinf(last)
        if usual is not None and can_lean and (used or astray > LEANING):
            plan, first = plan_of(usual[1:] if self._skipped else usual), nodes[0].denoised if used else None
            ratio, used = self._alone(mine, top, plan, ask, first)
            return Verdict(max(astray, ratio / LIMIT_ALONE), used)
        solution = Reference(chosen_nodes(nodes, clean, extra), top, ask)
        truth = solution.end(last)

        def ratio_to(levels: Tensor, start: Tensor, limit: float) -> float:
            rival = solution.end_of(plan_of(levels[1:] if self._skipped else levels), self.space, start)
            return _ratio(mine - truth, rival - truth, truth, SEEN) / (LIMIT_FEWER if fewer else limit)

        limit = LIMIT_FIT if usual is not None else LIMIT if len(nodes) < MANY_STEPS else LIMIT_MANY
        other = ratio_to(usual, top, LIMIT_OTHER) if usual is not None else 0.0
        over = _over(mine - truth, stated, truth) if fewer else 0.0
        return Verdict(max(astray, ratio_to(levels, begin, limit), other, over), used + solution.evaluations)

    def _alone(
        self, mine: Tensor, begin: Tensor, plan: Plan, ask: Callable[[Tensor, float], Tensor], first: Tensor | None
    ) -> tuple[float, int]:
        """The first measure with a solution that leans on a real run of `plan`, and the evaluations; `first` is its first D."""
        run: list[tuple[float, Tensor, Tensor]] = []

        def kept(y: Tensor, lam: float) -> Tensor:
            denoised = first if first is not None and not run else ask(y, lam)
            run.append((lam, y, denoised))
            return denoised

        rival = stepped(plan, self.space, begin, kept)
        truth = settled(*zip(*run, strict=True))
        return _ratio(mine - truth, rival - truth, truth, SEEN), len(run)

    def _asked(self, like: Tensor, extra_args: Mapping[str, object]) -> Callable[[Tensor, float], Tensor]:
        """D of y at a lambda, on the model's device and in the run's dtype."""

        def ask(y: Tensor, lam: float) -> Tensor:
            level = self.space.level_of(torch.tensor([lam], dtype=torch.float64))
            x = (y * float(self.space.alpha_of(level))).to(like)
            return _kept(self._guided(x, level.to(like).expand(len(x)), **extra_args)[-1])

        return ask


def _astray(nodes: Sequence[Node], begin: Tensor, fitted: bool) -> float:
    """The second measure, in units of what passes; `begin` is y at the first node as it should be."""
    lambdas, n = [node.lam for node in nodes], len(nodes)
    y, denoised = zip(*((_some(node.y), _some(node.denoised)) for node in nodes), strict=True)
    right = plain = corrected = _some(begin)
    ratios, last = [], 0.0
    for i, (low, high) in enumerate(pairwise(lambdas)):

        def advanced(state: Tensor, first: int, end: int, low: float = low, high: float = high) -> Tensor:
            return state * math.exp(low - high) + integral(dict(zip(lambdas[first:end], denoised[first:end])), low, high)

        first, before = min(max(i - 1, 0), max(n - 4, 0)), max(i - 1, 0)
        right, plain = advanced(right, first, first + 4), advanced(plain, before, i + 1)
        corrected = advanced(corrected, before, i + 1 if i == n - 2 else i + 2)
        ratios.append(_ratio(y[i + 1] - right, plain - right, denoised[i + 1]))
        last = _ratio(y[i + 1] - right, corrected - right, denoised[i + 1])
    if n < 4:  # the solution is no better than data prediction
        return 0.0
    if fitted:
        return max(max(ratios[-2:]) / (LIMIT_FITTED * max(6 / n, 1.0) ** 5), max(ratios) / LIMIT_FITTED_ANYWHERE)
    steps = n / FEW_STEPS
    at_end = ratios[-1] / (LIMIT_ASTRAY * steps ** (1 if steps < 1 else 1.5))
    return max(at_end, last / (LIMIT_CORRECTED * max(steps, 1.0) ** 3), max(ratios) / LIMIT_ANYWHERE)


def _is_noise(y: Tensor, lam: float) -> bool:
    """Whether y is what hosts begin a picture with there, noise times sigma; not a picture with noise on it."""
    share = float(y.square().mean()) * math.exp(2 * lam)
    return abs(share - 1) < 0.05 + 4 * math.sqrt(2 / y.numel())


def _some(x: Tensor | None) -> Tensor:
    """A few thousand elements [K, M] of x [B, C, ...], spread evenly, in float64."""
    assert x is not None
    flat = x[:4].flatten(1)
    return flat[:, :: max(flat.shape[1] // 4096, 1)].double()


def _kept(x: Tensor) -> Tensor:
    """A copy in float32 on the CPU."""
    return x.detach().to("cpu", torch.float32, copy=True)


def _over(off: Tensor, stated: float, picture: Tensor) -> float:
    """Squared distance over the stated one, in units of what passes."""
    floor = SEEN**2 * float(picture.var())
    value = (float(off.square().mean()) + floor) / (stated + floor) / LIMIT_STATED
    return value if math.isfinite(value) else math.inf


def _ratio(mine: Tensor, theirs: Tensor, scale: Tensor, least: float = 1e-4) -> float:
    """Mean square of `mine` over that of `theirs`; what is less than `least` of the picture's contrast is not told from it."""
    floor = least**2 * float(scale.var()) + 1e-30
    value = (float(mine.square().mean()) + floor) / (float(theirs.square().mean()) + floor)
    return value if math.isfinite(value) else math.inf
