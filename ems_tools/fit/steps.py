"""Coefficients fitted step by step to what the run itself has become (in closed loop).

Step i is y_{i+1} = decay_i y_i + sum_{j <= i} weights_{i,j} D_j. Its few numbers, the same for all pixels and noises, bring the
y_{i+1} of *this* run nearest to the teacher's (the last step: to x0), so each step knows the errors that the ones before it
made. They are corrections of the second-order formula (DPM-Solver++ 2M; the last step: of D itself), held to it by a ridge
whose strength is the one that leaves the least error on noises left out, one at a time: where a correction does not carry over
to other noises, the formula stays. The objective is the mean over noises of the log of the squared error: a few start noises
carry most of a mean square, and would be all that is fitted. Iteratively reweighted least squares minimises it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...sampler import FittedSteps
from ...sampler.fitted import formula_step
from ..trajectory import Runner, Trajectories

__all__ = ["closed_loop", "corrected", "least_squares", "objective", "rounded", "step_on"]

RIDGES = (0.003, 0.03, 0.3, 3.0)
"""Strengths tried, relative to what each feature explains; an infinite one (the formula alone) is tried too."""
_REWEIGHTINGS = 4
_FLOOR = 0.03
"""No noise weighs more than one with this share of the median error."""


def objective(errors: Tensor) -> float:
    """Mean log error; infinite for a run that overflowed."""
    value = errors.clamp(min=1e-30).log().mean().item()
    return value if math.isfinite(value) else math.inf


def least_squares(features: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """Factors c [F] for `target` [K, P] from `features` [K, F, P], float64, and the mean log error on noises left out.

    Minimises the mean over k of log |target_k - sum_f c_f features_kf|^2 with the ridge that does best on noises left out.
    """
    gram = torch.einsum("kfp,kgp->kfg", features, features)
    side = torch.einsum("kfp,kp->kf", features, target)
    size = target.square().sum(1)
    found, scores = _solve(gram, side, size, torch.tensor(RIDGES, dtype=torch.float64))
    best, lowest = torch.zeros(features.shape[1], dtype=torch.float64), objective(size)
    for c, score in zip(found, scores):
        if score < lowest:
            best, lowest = c, score
    return best, lowest - math.log(features.shape[2])


def _solve(gram: Tensor, side: Tensor, size: Tensor, ridges: Tensor) -> tuple[Tensor, list[float]]:
    """Factors [R, F] at each ridge, and the mean log of the squared error that the noises have when they are left out."""
    c = torch.zeros(len(ridges), side.shape[1], dtype=torch.float64)
    for _ in range(_REWEIGHTINGS):
        errors = _errors(gram, side, size, c[:, None])
        weight = 1 / torch.maximum(errors, (errors.median(1, keepdim=True).values * _FLOOR).clamp(min=1e-20))
        A, b = torch.einsum("rk,kfg->rfg", weight, gram), weight @ side
        own = A.diagonal(dim1=1, dim2=2)
        A = A + torch.diag_embed(ridges[:, None] * own + 1e-9 * own.amax(1, keepdim=True).clamp(min=1e-20))
        c = torch.linalg.solve(A, b)
    if len(size) < 2:
        return c, [objective(errors) for errors in _errors(gram, side, size, c[:, None])]
    others = torch.linalg.solve(A[:, None] - weight[:, :, None, None] * gram, b[:, None] - weight[:, :, None] * side)
    return c, [objective(errors) for errors in _errors(gram, side, size, others)]


def _errors(gram: Tensor, side: Tensor, size: Tensor, c: Tensor) -> Tensor:
    """Squared errors [R, K] with factors c [R, K or 1, F]."""
    value = size - 2 * (side * c).sum(2) + (torch.einsum("kfg,rkg->rkf", gram, c.expand(-1, len(size), -1)) * c).sum(2)
    return torch.maximum(value, 1e-12 * size)


def step_on(y: Tensor, history: Sequence[Tensor], decay: float, weights: Sequence[float]) -> Tensor:
    """The next y."""
    y = y * decay
    for weight, past in zip(weights, history, strict=True):
        if weight:
            y.add_(past, alpha=weight)
    return y


def closed_loop(
    runner: Runner, samples: Sequence[int], teacher: Trajectories, lambdas: Sequence[float]
) -> tuple[FittedSteps, float]:
    """Coefficients on these lambdas, one evaluation a step and sample; and the mean log final error on noises left out."""
    y, history = runner.start(samples, lambdas[0]), []
    decays, rows, score = [], [], math.inf
    pick = teacher.elements
    past: list[Tensor] = []
    for i, then in enumerate([*lambdas[1:], math.inf]):
        history.append(runner.denoise(samples, y, lambdas[i]))
        past.append(history[-1].flatten(1)[:, pick].double())
        decay, weights = formula_step(lambdas, i, then)
        state = y.flatten(1)[:, pick].double()
        base = step_on(state, past, decay, weights)
        target = (teacher.clean if then == math.inf else teacher.at(then)) - base
        now = past[-1]
        c, score = least_squares(torch.stack([state - now, now, *(now - D for D in past[:-1])], 1), target)
        decay, weights = corrected(decay, weights, c.tolist())
        decays.append(decay)
        rows.append(tuple(weights))
        y = step_on(y, history, decay, weights)
        if not y.isfinite().all():
            return FittedSteps(tuple(lambdas), tuple(decays), tuple(rows)), math.inf
    return rounded(FittedSteps(tuple(lambdas), tuple(decays), tuple(rows))), score


def corrected(decay: float, weights: list[float], c: list[float]) -> tuple[float, list[float]]:
    """Add c: of y - D_i, of D_i, and of D_i - D_j for each older j."""
    total = [w - v for w, v in zip(weights, c[2:])]
    return decay + c[0], [*total, weights[-1] - c[0] + c[1] + sum(c[2:])]


def rounded(steps: FittedSteps) -> FittedSteps:
    """As the file stores them: 6 decimals of lambda, 8 significant digits of the coefficients."""
    short = lambda v: float(f"{v:.8g}")  # noqa: E731
    return FittedSteps(
        tuple(round(v, 6) for v in steps.lambdas),
        tuple(map(short, steps.decay)),
        tuple(tuple(map(short, row)) for row in steps.weights),
        short(steps.start),
        steps.guided,
    )
