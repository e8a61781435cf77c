"""What the solver does at every step of a schedule, worked out before the first model call.

The multistep predictor-corrector of DPM-Solver-v3 (paper, algorithm 2): which nodes each update uses, at which order,
and with which coefficients. Everything is in float64 and depends on the schedule, the statistics and the settings only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .coefficients import StepIntegrals, Update, data_prediction_step, integrate_step, make_update
from .ems import EMS
from .fitted import FittedSteps
from .settings import Settings
from .space import Space

__all__ = ["DataStep", "LinearStep", "Plan", "StepPlan", "check_levels", "fitted_plan", "make_plan"]


@dataclass(frozen=True)
class LinearStep:
    """x_t = update.decay x_s + update.offset + sum_j update.weights[j] f_{nodes[j]}, x in host space."""

    update: Update
    nodes: tuple[int, ...]


@dataclass(frozen=True)
class DataStep:
    """x_t = x_factor x_s + denoised_factor D: the end points where lambda is infinite."""

    x_factor: float
    denoised_factor: float


@dataclass(frozen=True)
class StepPlan:
    """Step i of the plan: f_i = x_slope x_i - D_i, then the corrector that redoes step i - 1, then the predictor."""

    x_slope: Tensor
    corrector: LinearStep | None
    predictor: LinearStep | DataStep


TRIVIAL_SIGMA = 0.05
"""A step to 0 from this sigma or less changes next to nothing, so the step before it is the final one.

There the model only removes the little noise that is left: an error of that step stays. Hosts' schedules mostly end so, at the
model's smallest sigma and then 0. Measured (benchmarks/last_step.py --threshold): below 0.05 the rule lowers the error or
leaves it as it is; where it begins to raise it depends on the schedule, 0.07 to above 0.3.
"""


@dataclass(frozen=True, eq=False)
class Plan:
    """A whole schedule. Equal to itself only: `make_plan` returns the same object for the same arguments."""

    levels: tuple[float, ...]
    steps: tuple[StepPlan, ...]
    keep: int
    """How many past values of f the updates look back to."""
    start: float = 1.0
    """Factor of x before the first step."""


def check_levels(levels: Tensor, space: Space) -> None:
    """Raise ValueError, saying where, unless `levels` is a schedule that the solver can follow.

    It must be finite, strictly monotone and within the space's range; 0 may come last only, t = 1 first only.
    Increasing schedules (inversion, "unsampling") are allowed between finite lambdas.
    """
    if not torch.isfinite(levels).all():
        raise ValueError(f"sigmas[{_first(~torch.isfinite(levels))}] is not finite")
    top = 1.0 if space is Space.FLOW else math.inf
    if (levels < 0).any() or (levels > top).any():
        i = _first((levels < 0) | (levels > top))
        rule = "in [0, 1] for a rectified-flow model (space='flow')" if space is Space.FLOW else ">= 0"
        raise ValueError(f"sigmas[{i}] = {levels[i].item():g}, but noise levels must be {rule}")
    rises = levels.diff() > 0
    if (len(levels) > 1 and bool(rises[0]) != bool(rises[-1])) or (rises.any() and not rises.all()):
        i = _first(rises != rises[0]) if not rises[0] else _first(~rises)
        raise ValueError(
            f"sigmas must be monotone: from sigmas[{i}] = {levels[i].item():g} to sigmas[{i + 1}] = "
            f"{levels[i + 1].item():g} they turn round; sort them, or split the schedule there"
        )
    if len(levels) > 1 and levels[0] == 0:
        raise ValueError("sigmas start at 0, where there is no noise to begin from: start an increasing schedule above 0")
    if len(levels) > 1 and levels[-1] == top:
        raise ValueError("sigmas end at t = 1, pure noise: end an increasing flow schedule below 1")


def _first(mask: Tensor) -> int:
    return int(mask.nonzero()[0].item())


@lru_cache(maxsize=8)
def make_plan(levels: tuple[float, ...], space: Space, ems: EMS, settings: Settings) -> Plan:
    """The plan for host noise `levels` [n + 1], valid as `check_levels` demands; cached, as hosts repeat schedules."""
    host = torch.tensor(levels, dtype=torch.float64)
    lambdas = space.lambda_of(host)
    alphas = space.alpha_of(host)
    ems = ems.scaled(settings.strength)
    l_at = ems.at(lambdas.nan_to_num(posinf=1e3, neginf=-1e3))[0]
    n = len(levels) - 1
    first = 1 if math.isinf(lambdas[0]) else 0  # a node at lambda = -inf cannot serve as history
    trivial_end = levels[-1] == 0 and levels[0] > 0 and float((-lambdas[-2]).exp()) <= TRIVIAL_SIGMA
    integrals: list[StepIntegrals] = []  # of steps first, first + 1, ...
    finite = [lam for lam in lambdas[first:].tolist() if math.isfinite(lam)]
    steps: list[StepPlan] = []
    orders: list[int] = []
    for i in range(n):
        corrector = None
        if i < first or math.isinf(lambdas[i + 1]):
            orders.append(0)
            factors = data_prediction_step(levels[i], levels[i + 1], alphas[i].item(), alphas[i + 1].item())
            predictor: LinearStep | DataStep = DataStep(*factors)
        else:
            order = min(i - first + 1, settings.order)
            if settings.lower_order_final:
                order = min(order, max(n - i - trivial_end, 1))
            orders.append(order)
            integrals.append(integrate_step(ems, finite[i - first], finite[i - first + 1], order + 1))
            nodes = [i - first - j for j in range(order)]
            if i > first and float((-lambdas[i]).exp()) <= settings.corrector_below:
                corrector = _corrector(integrals, finite, i - 1 - first, orders[i - 1], settings)
            update = make_update(integrals, finite, i - first, nodes, settings.predictor == "pseudo")
            predictor = LinearStep(update, tuple(nodes))
        slope = (1 - l_at[i]) / (alphas[i] if alphas[i] > 0 else 1)
        steps.append(
            StepPlan(
                slope if i >= first else torch.zeros_like(slope),
                _in_host_space(corrector, alphas, i - 1, first) if corrector else None,
                _in_host_space(predictor, alphas, i, first) if isinstance(predictor, LinearStep) else predictor,
            )
        )
    keep = max((i - node for i, step in enumerate(steps) for node in _nodes(step)), default=0)
    return Plan(levels, tuple(steps), keep)


@lru_cache(maxsize=8)
def fitted_plan(levels: tuple[float, ...], space: Space, fitted: FittedSteps) -> Plan:
    """The plan of fitted steps for host noise `levels` [n + 1] that they match; every step looks back to the first."""
    alphas = space.alpha_of(torch.tensor(levels, dtype=torch.float64))
    none = torch.zeros(1, dtype=torch.float64)
    steps = []
    for i, (decay, weights) in enumerate(zip(fitted.decay, fitted.weights)):
        factors = tuple(torch.tensor([-w], dtype=torch.float64) for w in weights)  # of f = -D
        update = Update(torch.tensor([decay], dtype=torch.float64), none, factors)
        steps.append(StepPlan(none, None, _in_host_space(LinearStep(update, tuple(range(i + 1))), alphas, i, 0)))
    return Plan(levels, tuple(steps), len(steps), fitted.start)


def _corrector(
    integrals: list[StepIntegrals], lambdas: list[float], start: int, order: int, settings: Settings
) -> LinearStep | None:
    """The corrector of the step from node `start`, whose predictor was of `order`."""
    if settings.corrector == "none":
        return None
    corrector_order = order if settings.corrector == "true" else order + 1
    if corrector_order == 1:
        return None
    nodes = [start, start + 1, *(start - j for j in range(1, corrector_order - 1))]
    return LinearStep(make_update(integrals, lambdas, start, nodes, settings.corrector == "pseudo"), tuple(nodes))


def _in_host_space(step: LinearStep, alphas: Tensor, i: int, first: int) -> LinearStep:
    """The same step for x = alpha y, and with nodes counted from the schedule's start."""
    u, a_s, a_t = step.update, alphas[i], alphas[i + 1]
    update = Update(u.decay * a_t / a_s, u.offset * a_t, tuple(w * a_t for w in u.weights))
    return replace(step, update=update, nodes=tuple(node + first for node in step.nodes))


def _nodes(step: StepPlan) -> list[int]:
    parts = (step.corrector, step.predictor)
    return [node for part in parts if isinstance(part, LinearStep) for node in part.nodes]
