"""Guided sampling in fewer passes of the network: which steps make the unconditional one, and what stands for it elsewhere.

An experiment: `passes.py` prints what it is worth, and no host uses it.

A guided step costs two passes, D = c + (g - 1)(c - u) with the conditional answer c and the unconditional one u. Where the gap
c - u is small or changes slowly, as it can at the ends of a run, it is predicted from what is known, and the passes saved buy a
further step. For a budget of passes, a few fixed patterns of guided steps are fitted, each on the spacing that suits it, in
closed loop (see `ems_tools.fit.steps`):

1. Where a step makes the conditional pass only, the gap is predicted: by least squares from earlier gaps, from y - c and from
   how c has changed (LinearAG, arXiv 2312.12487, with factors of the model and of this run).
2. The step itself corrects the second-order formula on the guided answers, true or predicted, towards the teacher. What it may
   correct with are all answers so far, conditional and unconditional.

While fitting, both passes are made at every step; the steps that are found are linear in the answers that a run really has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dpm_solver_v3.ems_tools.fit.spacing import CANDIDATES, Spacing
from dpm_solver_v3.ems_tools.fit.steps import formula_step, least_squares
from dpm_solver_v3.ems_tools.trajectory import Runner, Trajectories

__all__ = ["Pair", "PassSteps", "best_passes", "fit_pattern", "patterns", "run_passes"]

FINALISTS = 3
"""Pairs of pattern and spacing that are fitted on all noises."""
Pattern = tuple[bool, ...]
"""For every step whether it is guided, so that it makes two passes."""


@dataclass(frozen=True)
class PassSteps:
    """Steps that end at sigma = 0: y_(i+1) = decay_i y_i + sum_j weights_ij a_j.

    Args:
        lambdas: [n] half log-SNR of the evaluations, increasing.
        guided: [n], whether a step makes the unconditional pass as well.
        decay: [n], of y.
        weights: row i holds the factors of all answers a_j up to step i, c before u at a guided one.
    """

    lambdas: tuple[float, ...]
    guided: Pattern
    decay: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]

    @property
    def passes(self) -> int:
        """Of the network, for one picture."""
        return len(self.guided) + sum(self.guided)


@dataclass(frozen=True)
class Pair:
    """Both answers of a network.

    Args:
        conditional: c.
        guided: D = c + (guidance - 1)(c - u).
        guidance: not 1.
    """

    conditional: Runner
    guided: Runner
    guidance: float

    def answers(self, samples: Sequence[int], y: Tensor, lam: float, both: bool) -> list[Tensor]:
        """[c], or [c, u] for `both`, each [K, C, ...]."""
        c = self.conditional.denoise(samples, y, lam)
        if not both:
            return [c]
        D = self.guided.denoise(samples, y, lam)
        return [c, (self.guidance * c - D) / (self.guidance - 1)]


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


def patterns(passes: int) -> list[Pattern]:
    """The patterns that are tried at an even number of passes, those with the fewest steps first."""
    half = passes // 2
    short = lambda n: "G" * max(n, 0)  # noqa: E731
    words = [f".{short(half - 1)}.", f"..{short(half - 1)}", f".G.{short(half - 2)}", f".{short(half - 2)}.G"]
    words += [f".G.{short(half - 4)}.G.", f"..{short(half - 2)}.."] if half >= 6 else [".G.G.."]
    found = [tuple(letter == "G" for letter in word) for word in dict.fromkeys(words)]
    return [p for p in found if len(p) + sum(p) == passes]


def best_passes(
    pair: Pair,
    samples: Sequence[int],
    teacher: Trajectories,
    lambdas_of: Callable[[Spacing, int], Sequence[float]],
    passes: int,
    few: int = 5,
    spacings: int = 8,
) -> PassSteps | None:
    """The steps with the lowest error on noises left out; None where no pattern can be run.

    Args:
        pair: the network.
        samples, teacher: noises to fit on and their guided trajectories.
        lambdas_of: where a spacing evaluates at a number of steps.
        passes: the budget, an even number from 6 on.
        few: noises on which every pattern is tried on every spacing.
        spacings: how many are tried.

    The best pairs of pattern and spacing are then fitted on all noises.
    """
    found: list[tuple[float, Pattern, Sequence[float]]] = []
    for guided in patterns(passes):
        for spacing in CANDIDATES[:spacings]:
            lambdas = lambdas_of(spacing, len(guided))
            if len(lambdas) == len(guided):
                tried = fit_pattern(pair, samples[:few], teacher.part(few), lambdas, guided)
                found += [(tried[1], guided, lambdas)] if tried else []
    found.sort(key=lambda v: v[0])
    fitted = [fit_pattern(pair, samples, teacher, lambdas, guided) for _, guided, lambdas in found[:FINALISTS]]
    return min((f for f in fitted if f), key=lambda f: f[1], default=(None, 0.0))[0]


def fit_pattern(
    pair: Pair, samples: Sequence[int], teacher: Trajectories, lambdas: Sequence[float], guided: Pattern
) -> tuple[PassSteps, float] | None:
    """Steps on these lambdas, and the mean log final error on noises left out; None where the run overflows.

    Both passes are made at every step and sample.
    """
    size = 1 + len(guided) + sum(guided)
    unit = torch.eye(size, dtype=torch.float64)
    start = pair.conditional.start(samples, lambdas[0])
    flat = lambda values: values.flatten(1)[:, teacher.elements].double()  # noqa: E731
    y, state, score = start, _Term(flat(start), unit[0]), math.inf
    used: list[Tensor] = []
    rows, denoised, conditional, gaps = [state.factors], list[_Term](), list[_Term](), list[_Term]()
    for i, then in enumerate([*lambdas[1:], math.inf]):
        c, u = pair.answers(samples, y, lambdas[i], True)
        used += [c, u] if guided[i] else [c]
        now = _Term(flat(c), unit[len(used) - guided[i]])
        gap = flat(c) - flat(u)
        if guided[i]:
            gaps.append(_Term(gap, now.factors - unit[len(used)]))
        else:
            gaps.append(_predicted(gap, state, now, denoised, conditional, gaps))
        D = now + (pair.guidance - 1) * gaps[-1]
        decay, weights = formula_step(lambdas, i, then)
        base = sum((w * past for w, past in zip(weights, [*denoised, D])), decay * state)
        features = [state - D, D, *(D - past for past in denoised), now - D, *(now - past for past in conditional)]
        state, score = base.towards(teacher.clean if then == math.inf else teacher.at(then), features)
        rows.append(state.factors)
        denoised.append(D)
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
    """What stands for c - u (`gap` [K, P]) where only c (`now`) is known: the last gap, corrected by what is known."""
    features = [state - now, now, *(now - past for past in conditional[-2:]), *gaps[-2:]]
    base = gaps[-1] if gaps else 0.0 * now
    return base.towards(gap, features + [past - now for past in denoised[-2:]])[0]


def _relative(lambdas: Sequence[float], guided: Pattern, rows: Sequence[Tensor]) -> PassSteps:
    """Steps from rows that give y_i in terms of y_0 and all answers: the share of y_i in y_(i+1), and the answers' factors."""
    decay, weights, known = [], [], 1
    for i, (now, then) in enumerate(pairwise(rows)):
        known += 1 + guided[i]
        share = (then[0] / now[0]).item()
        decay.append(float(f"{share:.8g}"))
        weights.append(tuple(float(f"{v:.8g}") for v in (then[1:known] - share * now[1:known]).tolist()))
    return PassSteps(tuple(round(v, 6) for v in lambdas), guided, tuple(decay), tuple(weights))


def run_passes(pair: Pair, samples: Sequence[int], steps: PassSteps) -> Tensor:
    """The end y [K, C, ...] of a run, with as many passes a sample as `steps.passes`."""
    y, answers = pair.conditional.start(samples, steps.lambdas[0]), list[Tensor]()
    for lam, both, decay, weights in zip(steps.lambdas, steps.guided, steps.decay, steps.weights, strict=True):
        answers += pair.answers(samples, y, lam, both)
        y = y * decay
        for weight, answer in zip(weights, answers, strict=True):
            y = y + weight * answer
    return y
