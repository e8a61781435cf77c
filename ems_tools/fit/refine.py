"""Turn lambdas and coefficients together so that the *final* error falls.

Fitting each step to the teacher for its own sake ignores what an error there does to the steps after it. Gauss-Newton rounds
on the mean log of the final error take derivatives from runs that differ in one knob each, begun where that knob first acts.
The lambdas alone (see `turn`) are few knobs and cheap, and coefficients fitted anew on the new ones are as good as turned ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ...sampler import FittedSteps
from ..trajectory import Pair, Runner, Trajectories
from .steps import corrected, least_squares, objective, step_on

__all__ = ["knobs_of", "refine", "turns_of", "with_last_step"]

_DAMPING = 1e-3
"""Of all knobs together; see `_turns`."""


@dataclass
class _Point:
    """A schedule and its coefficients as corrections of first-order steps (DDIM), so that the lambdas can move under them."""

    lambdas: list[float]
    decay: list[float]
    weights: list[list[float]]
    start: float
    guided: tuple[bool, ...] = ()

    @classmethod
    def of(cls, steps: FittedSteps) -> _Point:
        point = cls(list(steps.lambdas), list(steps.decay), [list(row) for row in steps.weights], steps.start, steps.guided)
        point._add(-1)
        return point

    def steps(self) -> FittedSteps:
        """The coefficients themselves."""
        other = self.copy()
        other._add(1)
        return FittedSteps(
            tuple(other.lambdas), tuple(other.decay), tuple(map(tuple, other.weights)), other.start, other.guided
        )

    def copy(self) -> _Point:
        return _Point(list(self.lambdas), list(self.decay), [list(row) for row in self.weights], self.start, self.guided)

    def _add(self, sign: int) -> None:
        for i, (lam, then) in enumerate(zip(self.lambdas, [*self.lambdas[1:], math.inf])):
            first = math.exp(lam - then)
            self.decay[i] += sign * first
            self.weights[i][-1] += sign * (1 - first)

    def move(self, knob: tuple[str, int, int], by: float) -> None:
        """Turn one knob: a lambda, the start, or in step i the share of y against the newest answer, or of that against j."""
        what, i, j = knob
        if what == "lambda":
            self.lambdas[i] += by
        elif what == "start":
            self.start += by
        elif what == "y":
            self.decay[i] += by
            self.weights[i][-1] -= by
        else:
            self.weights[i][-1] += by
            self.weights[i][j] -= by


_TURN = {"lambda": 0.04, "start": 0.01, "y": 0.02, "D": 0.04}
"""How far a knob is turned to see what it does."""


def knobs_of(steps: int, guided: Sequence[bool] = ()) -> list[tuple[str, int, int]]:
    """Of all steps but the last, whose coefficients are fitted whatever the others are; `guided` as in `FittedSteps`.

    ("D", i, j): in step i the newest answer against answer j, one of the two before it (of three, in fewer passes).
    """
    knobs = [("lambda", i, 0) for i in range(steps)] + [("y", i, 0) for i in range(steps - 1)]
    newest = [k - 1 for k in accumulate(1 + both for both in guided or [False] * steps)]
    back = 3 if guided else 2
    answers = [("D", i, j) for i, new in enumerate(newest[:-1]) for j in range(max(new - back, 0), new)]
    return [("start", 0, 0), *knobs, *answers]


def refine(
    runner: Runner | Pair, samples: Sequence[int], teacher: Trajectories, steps: FittedSteps, rounds: int
) -> FittedSteps:
    """Turn all knobs together so that the *final* error falls: Gauss-Newton rounds on the mean log error.

    A round ends where none of three lengths of the turn lowers it.
    """
    for _ in range(rounds):
        point, knobs = _Point.of(steps), knobs_of(len(steps.lambdas), steps.guided)
        turn, errors = turns_of(runner, samples, teacher, steps, knobs)
        for share in (1.0, 0.5, 0.25):
            trial = point.copy()
            for knob, by in zip(knobs, turn):
                trial.move(knob, share * by)
            trial.lambdas[0] = max(trial.lambdas[0], runner.job.lambdas[0])
            if (
                any(b - a < 0.02 for a, b in zip(trial.lambdas, trial.lambdas[1:]))
                or trial.lambdas[-1] > runner.job.lambdas[-1]
            ):
                continue
            found, now = with_last_step(runner, samples, teacher, trial.steps())
            if objective(now) < objective(errors):
                steps = found
                break
        else:
            break
    return steps


def turns_of(
    runner: Runner | Pair,
    samples: Sequence[int],
    teacher: Trajectories,
    steps: FittedSteps,
    knobs: Sequence[tuple[str, int, int]],
    damping: float = _DAMPING,
) -> tuple[list[float], Tensor]:
    """How far Gauss-Newton turns each knob, the last step's coefficients being fitted anew; and the errors [K] as it is.

    Derivatives are differences between runs that begin where a knob first acts.
    """
    point = _Point.of(steps)
    ys, history, residual = _trace(runner, samples, teacher, steps)
    errors, columns = residual.square().mean(1), list[Tensor]()
    for knob in knobs:
        moved = point.copy()
        moved.move(knob, _TURN[knob[0]])
        begin = knob[1] - (knob[0] in ("lambda", "start"))
        end = _trace(runner, samples, teacher, moved.steps(), begin, ys, history)[2]
        columns.append((end - residual) / _TURN[knob[0]])
    last = [D.flatten(1)[:, teacher.elements].double() for D in history]
    columns += [ys[-1].flatten(1)[:, teacher.elements].double() - last[-1], *last]
    return _turns(torch.stack(columns, 1), residual, errors, damping)[: len(knobs)].tolist(), errors


def with_last_step(
    runner: Runner | Pair, samples: Sequence[int], teacher: Trajectories, steps: FittedSteps
) -> tuple[FittedSteps, Tensor]:
    """The same steps with the last one's coefficients fitted anew, and the errors [K] on these samples."""
    states, history, _ = _trace(runner, samples, teacher, steps)
    past = [D.flatten(1)[:, teacher.elements].double() for D in history]
    y, now = states[-1].flatten(1)[:, teacher.elements].double(), past[-1]
    features = torch.stack([y - now, now, *(now - D for D in past[:-1])], 1)
    target = teacher.clean - now
    c = least_squares(features, target)[0]
    errors = (target - torch.einsum("f,kfp->kp", c, features)).square().mean(1)
    decay, weights = corrected(0.0, [0.0] * (len(past) - 1) + [1.0], c.tolist())
    decays, rows = (*steps.decay[:-1], decay), (*steps.weights[:-1], tuple(weights))
    return FittedSteps(steps.lambdas, decays, rows, steps.start, steps.guided), errors


def _turns(columns: Tensor, residual: Tensor, errors: Tensor, damping: float) -> Tensor:
    """The damped, weighted least-squares turn of every knob; columns [K, F, P]."""
    weight = 1 / errors.clamp(min=max(errors.median().item() * 1e-2, 1e-20))
    A = torch.einsum("k,kfp,kgp->fg", weight, columns, columns)
    b = -torch.einsum("k,kfp,kp->f", weight, columns, residual)
    scale = A.diagonal().clamp(min=1e-30).sqrt()
    A = A / scale[:, None] / scale + damping * torch.eye(len(scale), dtype=torch.float64)
    return torch.linalg.solve(A, b / scale) / scale


def _trace(
    runner: Runner | Pair,
    samples: Sequence[int],
    teacher: Trajectories,
    steps: FittedSteps,
    begin: int = -1,
    ys: Sequence[Tensor] = (),
    past: Sequence[Tensor] = (),
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Y and all answers of a run, and the final residual [K, P]; of one that differs from (ys, past) from `begin` on."""
    known = [0, *accumulate(steps.answers)]
    states, history = list(ys[: begin + 1]), list(past[: known[begin + 1]])
    if not states:
        states = [runner.start(samples, steps.lambdas[0]) * steps.start]
    for i in range(max(begin, 0), len(steps.lambdas)):
        if known[i] >= len(history):
            history += runner.answers(samples, states[-1], steps.lambdas[i], bool(steps.guided) and steps.guided[i])
        states.append(step_on(states[-1], history, steps.decay[i], steps.weights[i]))
    return states[:-1], history, states[-1].flatten(1)[:, teacher.elements].double() - teacher.clean
