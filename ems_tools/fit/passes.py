"""Guided sampling in fewer passes: which evaluations make the unconditional one, and what stands for it elsewhere.

A guided answer D = c + (g - 1)(c - u) costs two passes, the conditional c and the unconditional u. Where D - c is small or
changes slowly, as it can at the ends of a run, it is predicted from what is known, and the passes saved buy a further
evaluation. For the passes that n guided steps cost, patterns of guided evaluations are tried on several spacings, in closed
loop (see `steps`):

1. Where an evaluation makes the conditional pass only, D - c is predicted: by least squares from earlier such gaps, from y - c
   and from how c has changed (as LinearAG, arXiv 2312.12487, but with factors of the model and of this run).
2. The step itself corrects the second-order formula on the guided answers, true or predicted, towards the teacher. What it may
   correct with are all answers so far.

While fitting, both passes are made at every evaluation; the steps that are found are linear in the answers that a run has.
They are kept where, on noise of no other use, they are better than the file's guided steps of as many passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ...sampler import FittedSteps
from ...sampler.fitted import formula_step
from ..file.rows import FittedRow, insane
from ..trajectory import Pair, Trajectories, few_steps
from .judge import averages, ratio_of
from .spacing import Spacing
from .steps import least_squares, rounded

__all__ = ["FINALISTS", "SEARCH", "best_passes", "fit_pattern", "passes_row", "patterns"]

FINALISTS, SEARCH = 2, 5
"""Pairs of pattern and spacing that are fitted on all noises, and noises that they are found on."""
FEWEST = {1: 3, 2: 5, 3: 8}
"""From how many guided steps on so many further evaluations are tried."""
Pattern = tuple[bool, ...]
"""For every evaluation whether it is guided, so that it costs two passes."""


@dataclass(frozen=True)
class _Term:
    """A linear combination of the start and of the answers so far: its values [K, P] and its factors [1 + answers]."""

    values: Tensor
    factors: Tensor

    def __add__(self, other: _Term) -> _Term:
        return _Term(self.values + other.values, self.factors + other.factors)

    def __sub__(self, other: _Term) -> _Term:
        return _Term(self.values - other.values, self.factors - other.factors)

    def __rmul__(self, factor: float) -> _Term:
        return _Term(factor * self.values, factor * self.factors)

    def towards(self, target: Tensor, features: Sequence[_Term]) -> tuple[_Term, float]:
        """Self corrected by `features` so that it comes near `target` [K, P]; mean log error on noises left out."""
        found, score = least_squares(torch.stack([f.values for f in features], 1), target - self.values)
        return sum((c * f for c, f in zip(found.tolist(), features)), self), score


def patterns(steps: int) -> list[Pattern]:
    """The patterns of as many passes as `steps` guided steps; the first one is what spacings are compared with.

    The last evaluation, which sees the finished picture, is never guided: where all patterns were compared, on two development
    networks, that is what the best ones had in common.
    """
    alone: dict[int, list[tuple[int, ...]]] = {
        1: [(0,), (1,), (2,), (steps - 1,)],
        2: [(0, 1, 3), (0, 2, 4), (1, 3, 5)],
        3: [(0, 2, 4, 6, 8)],
    }
    found: list[Pattern] = []
    for more, places in alone.items():
        n = steps + more
        found += [tuple(i not in (*c, n - 1) for i in range(n)) for c in places if c[-1] < n - 1 and steps >= FEWEST[more]]
    return list(dict.fromkeys(found))


def best_passes(
    pair: Pair,
    samples: Sequence[int],
    teacher: Trajectories,
    lambdas_of: Callable[[Spacing, int], Sequence[float]],
    steps: int,
    spacings: Sequence[Spacing],
) -> FittedSteps | None:
    """The steps with the lowest error on noises left out; None where no pattern can be run.

    Args:
        pair: the network.
        samples, teacher: noises to fit on and their guided trajectories.
        lambdas_of: where a spacing evaluates at a number of evaluations.
        steps: the guided steps whose passes may be spent.
        spacings: are tried with the first pattern on SEARCH noises, then the other patterns on the best of them, then the best
            FINALISTS of all on all noises.
    """
    few = min(SEARCH, len(samples))
    tried: list[tuple[float, Pattern, Sequence[float], Spacing]] = []

    def attempt(guided: Pattern, spacing: Spacing) -> None:
        lambdas = lambdas_of(spacing, len(guided))
        if len(lambdas) == len(guided):
            found = fit_pattern(pair, samples[:few], teacher.part(few), lambdas, guided)
            tried.extend([(found[1], guided, lambdas, spacing)] if found else [])

    if not patterns(steps):
        return None
    first, *others = patterns(steps)
    for spacing in spacings:
        attempt(first, spacing)
    if not tried:
        return None
    best = min(tried, key=lambda v: v[0])[3]
    for guided in others:
        attempt(guided, best)
    tried.sort(key=lambda v: v[0])
    fitted = [fit_pattern(pair, samples, teacher, lambdas, guided) for _, guided, lambdas, _ in tried[:FINALISTS]]
    return min((f for f in fitted if f), key=lambda f: f[1], default=(None, 0.0))[0]


def fit_pattern(
    pair: Pair, samples: Sequence[int], teacher: Trajectories, lambdas: Sequence[float], guided: Pattern
) -> tuple[FittedSteps, float] | None:
    """Steps on these lambdas, and the mean log final error on noises left out; None where the run overflows.

    Both passes are made at every evaluation and sample.
    """
    size = 1 + len(guided) + sum(guided)
    unit = torch.eye(size, dtype=torch.float64)
    start = pair.start(samples, lambdas[0])
    flat = lambda values: values.flatten(1)[:, teacher.elements].double()  # noqa: E731
    y, state, score = start, _Term(flat(start), unit[0]), math.inf
    used: list[Tensor] = []
    rows, denoised, conditional, gaps = [state.factors], list[_Term](), list[_Term](), list[_Term]()
    for i, then in enumerate([*lambdas[1:], math.inf]):
        c, D = pair.answers(samples, y, lambdas[i], True)
        used += [c, D] if guided[i] else [c]
        now = _Term(flat(c), unit[len(used) - guided[i]])
        gap = flat(D) - flat(c)
        if guided[i]:
            gaps.append(_Term(gap, unit[len(used)] - now.factors))
        else:
            gaps.append(_predicted(gap, state, now, denoised, conditional, gaps))
        best = now + gaps[-1]
        decay, weights = formula_step(lambdas, i, then)
        base = sum((w * past for w, past in zip(weights, [*denoised, best])), decay * state)
        features = [state - best, best, *(best - past for past in denoised), now - best, *(now - past for past in conditional)]
        state, score = base.towards(teacher.clean if then == math.inf else teacher.at(then), features)
        rows.append(state.factors)
        denoised.append(best)
        conditional.append(now)
        y = start * state.factors[0].item()
        for factor, answer in zip(state.factors[1:].tolist(), used):
            y = y + factor * answer
        if not y.isfinite().all():
            return None
        state = _Term(flat(y), state.factors)
    return _relative(lambdas, guided, rows), score


def _predicted(
    gap: Tensor, state: _Term, now: _Term, denoised: list[_Term], conditional: list[_Term], gaps: list[_Term]
) -> _Term:
    """What stands for D - c (`gap` [K, P]) where only c (`now`) is known: the last gap, corrected by what is known."""
    features = [state - now, now, *(now - past for past in conditional[-2:]), *gaps[-2:]]
    base = gaps[-1] if gaps else 0.0 * now
    return base.towards(gap, features + [past - now for past in denoised[-2:]])[0]


def _relative(lambdas: Sequence[float], guided: Pattern, rows: Sequence[Tensor]) -> FittedSteps:
    """Steps from rows that give y_i in terms of y_0 and all answers: the share of y_i in y_(i+1), and the answers' factors."""
    decay, weights, known = [], [], 1
    for i, (now, then) in enumerate(pairwise(rows)):
        known += 1 + guided[i]
        share = (then[0] / now[0]).item()
        decay.append(share)
        weights.append(tuple((then[1:known] - share * now[1:known]).tolist()))
    return rounded(FittedSteps(tuple(lambdas), tuple(decay), tuple(weights), guided=guided))


_CLEARLY = 0.9
"""What was chosen among many patterns flatters itself, and where it loses a person has worse pictures than without it."""


def passes_row(
    pair: Pair, samples: Sequence[int], truth: Trajectories, rival: FittedRow, found: FittedSteps | None
) -> FittedRow | None:
    """The row of `found`, judged on these samples against the guided steps of `rival`, which cost as many passes.

    None where it is not better by `_CLEARLY`: then a file holds none. `truth` are the samples' trajectories.
    """
    if found is None or rival.coefficients is None or insane(found):
        return None
    mine = truth.errors(few_steps(pair, samples, found))
    theirs = truth.errors(few_steps(pair.guided, samples, rival.coefficients))
    ratio = ratio_of(mine, theirs)
    if ratio[0] >= _CLEARLY:
        return None
    name = f"{rival.steps} guided steps"
    n = len(found.lambdas)
    return FittedRow(rival.guidance, n, found.lambdas, found, averages(mine), averages(theirs), name, ratio, len(samples))
