"""What the solver does at every step of a schedule, worked out before the first model call.

The multistep predictor-corrector of DPM-Solver-v3 (paper, algorithm 2): which nodes each update uses, at which order,
and with which coefficients. Everything is in float64 and depends on the schedule, the statistics and the settings only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .coefficients import StepIntegrals, Update, data_prediction_step, integrate_step, make_update
from .ems import EMS
from .fitted import FittedSteps
from .settings import Settings
from .space import Space
from .typical import typical_steps

__all__ = ["Plan", "StepPlan", "check_levels", "fitted_plan", "forget_plans", "make_plan", "typical_plan"]


@dataclass(frozen=True)
class StepPlan:
    """Step i of the plan, in the host's x: m_i = D_i - slope x_i, the corrector that redoes step i - 1, the predictor."""

    slope: Tensor
    corrector: Update | None
    predictor: Update


TRIVIAL_SIGMA = 0.05
"""A step to 0 from this sigma or less changes next to nothing, so the step before it is the final one.

There the model only removes the little noise that is left: an error of that step stays. Hosts' schedules mostly end so, at the
model's smallest sigma and then 0. Measured (benchmarks/last_step.py --threshold): below 0.05 the rule lowers the error or
leaves it as it is; where it begins to raise it depends on the schedule, 0.07 to above 0.3.
"""


SHORT_STEP = 0.15
"""A node is not corrected where the next step is shorter than this share of the step that led there, in lambda.

The corrected y lies off the y that D was evaluated at. If the next evaluation is very near, this difference, divided by the
short step, passes for a slope of D. With one level repeated at sigma (1 - r) on Karras steps (8, embedded model) the error was
0.0009 without it, 0.0031 at r = 0.1, 0.098 at 0.01 and 13.8 at 0.0001 (benchmarks/near_levels.py).
"""
MAX_DECAY, MAX_WEIGHTS = 5.0, 80.0
"""What the update of a falling schedule can need at most: the factor of y, and the sum of the weights' sizes.

Data and noise prediction reach 1 and 7 on the paper's schedules, at any order with any corrector (tests/sampler/test_plan.py);
known formulas as fitted steps 38.5, and fits a factor of 2.2 (benchmarks/bounds.py).
"""


@dataclass(frozen=True, eq=False)
class Plan:
    """A whole schedule. Equal to itself only: `make_plan` returns the same object for the same arguments.

    Args:
        levels: the host's noise levels, [n + 1].
        steps: what to do at each, [n].
        start: factor of x before the first step.
        guided: for steps in fewer passes (see `fitted`), () for all others. Nodes are then answers, not evaluations.
    """

    levels: tuple[float, ...]
    steps: tuple[StepPlan, ...]
    start: float = 1.0
    guided: tuple[bool, ...] = ()

    @property
    def answers(self) -> list[int]:
        """How many answers each evaluation gives."""
        return [1 + both for both in self.guided] if self.guided else [1] * len(self.steps)

    def updates(self) -> Iterator[Update]:
        """The steps as one update each, from the x where the model was called: corrections are part of it."""
        taken: Update | None = None
        for step in self.steps:
            if step.corrector is None or taken is None or not step.predictor.decay.any():
                yield step.predictor  # without decay, as to sigma = 0, nothing is left of a correction
            else:
                yield step.predictor.after_redoing(taken, step.corrector)
            taken = step.predictor

    def is_sane(self, space: Space) -> bool:
        """Whether no update of a falling schedule multiplies y or m by more than any step can need."""
        return _is_sane_plan(self, space)


@dataclass(frozen=True)
class _Nodes:
    """The schedule's nodes: host levels, half log-SNR and alpha of each, [n + 1]."""

    levels: tuple[float, ...]
    lambdas: tuple[float, ...]
    alphas: tuple[float, ...]

    @classmethod
    def of(cls, levels: tuple[float, ...], space: Space) -> _Nodes:
        host = torch.tensor(levels, dtype=torch.float64)
        return cls(levels, tuple(space.lambda_of(host).tolist()), tuple(space.alpha_of(host).tolist()))

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    @property
    def first(self) -> int:
        """The first node that can serve as history: one at lambda = -inf (t = 1 of a flow) cannot."""
        return 1 if math.isinf(self.lambdas[0]) else 0

    @property
    def ends_trivially(self) -> bool:
        """Whether the schedule falls and its last step is one to 0 that changes next to nothing."""
        falls_to_zero = self.levels[-1] == 0 and self.levels[0] > 0
        return falls_to_zero and math.exp(-self.lambdas[-2]) <= TRIVIAL_SIGMA

    def is_finite(self, i: int) -> bool:
        """Whether step i leads between finite lambdas."""
        return i >= self.first and math.isfinite(self.lambdas[i + 1])


@dataclass(frozen=True)
class _Expansion:
    """How an update expands g: `raised` above the predictor's order, with full or `pseudo` derivatives."""

    raised: int
    pseudo: bool


_PREDICTORS = {"true": _Expansion(0, False), "pseudo": _Expansion(0, True)}
_CORRECTORS = {"true": _Expansion(0, False), "pseudo": _Expansion(1, True), "raised": _Expansion(1, False)}
"""By the names of `Settings`; a corrector that is not here ("none") does nothing."""


def check_levels(levels: Tensor, space: Space) -> None:
    """Raise ValueError, saying where, unless `levels` is a schedule that the solver can follow.

    It must be finite, strictly monotone and within the space's range. Increasing schedules (inversion, "unsampling") begin
    above 0 and may end at t = 1 of a flow.
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


def _first(mask: Tensor) -> int:
    return int(mask.nonzero()[0].item())


def make_plan(levels: tuple[float, ...], space: Space, ems: EMS, settings: Settings) -> Plan:
    """The plan for host noise `levels` [n + 1], valid as `check_levels` demands.

    Cached by the content of the arguments, because hosts repeat schedules.
    """
    return _plan(levels, space, _ByContent(ems), settings)


def forget_plans() -> None:
    """Empty the cache of `make_plan` (benchmarks time a plan that is made anew)."""
    _plan.cache_clear()


class _ByContent:
    """Statistics as the key of a cache: equal where their numbers are."""

    def __init__(self, ems: EMS) -> None:
        self.ems = ems

    def __hash__(self) -> int:
        return hash(self.ems.content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByContent) and self.ems.content == other.ems.content


@lru_cache(maxsize=8)
def _plan(levels: tuple[float, ...], space: Space, statistics: _ByContent, settings: Settings) -> Plan:
    nodes, ems = _Nodes.of(levels, space), statistics.ems.scaled(settings.strength)
    orders = _orders(nodes, settings)
    integrals = [
        integrate_step(ems, nodes.lambdas[i], nodes.lambdas[i + 1], orders[i] + 1)
        for i in range(nodes.first, nodes.steps)
        if nodes.is_finite(i)
    ]
    slopes = _slopes(nodes, ems)
    steps = []
    for i in range(nodes.steps):
        if not nodes.is_finite(i):
            steps.append(StepPlan(torch.zeros_like(slopes[i]), None, _data_step(nodes, i)))
            continue
        used = [i - j for j in range(orders[i])]
        predictor = _update(nodes, integrals, i, used, _PREDICTORS[settings.predictor].pseudo)
        steps.append(StepPlan(slopes[i], _corrector(nodes, integrals, orders, i, settings), predictor))
    return Plan(levels, tuple(steps))


def _orders(nodes: _Nodes, settings: Settings) -> list[int]:
    """The predictor's order at every step (paper, algorithm 2): what history allows, lowered at the end if so set."""
    orders = []
    for i in range(nodes.steps):
        order = min(i - nodes.first + 1, settings.order)
        if settings.lower_order_final:
            order = min(order, max(nodes.steps - i - nodes.ends_trivially, 1))
        orders.append(order)
    return orders


def _slopes(nodes: _Nodes, ems: EMS) -> list[Tensor]:
    """(1 - l) / alpha at every node: m = D - (1 - l) y = D - slope x for the host's x = alpha y (paper, eq. 7)."""
    l = ems.at(torch.tensor(nodes.lambdas, dtype=torch.float64).nan_to_num(posinf=1e3, neginf=-1e3))[0]
    return [(1 - l[i]) / (alpha if alpha > 0 else 1) for i, alpha in enumerate(nodes.alphas)]


def _data_step(nodes: _Nodes, i: int) -> Update:
    ends = nodes.levels[i], nodes.levels[i + 1], nodes.alphas[i], nodes.alphas[i + 1]
    return data_prediction_step(*ends, node=i)


def _corrector(nodes: _Nodes, integrals: list[StepIntegrals], orders: list[int], i: int, settings: Settings) -> Update | None:
    """The corrector of the step that led to node i, whose predictor was of order `orders[i - 1]`."""
    how = _CORRECTORS.get(settings.corrector)
    if how is None or i <= nodes.first or math.exp(-nodes.lambdas[i]) > settings.corrector_below:
        return None
    order = orders[i - 1] + how.raised
    if order == 1 or _is_short(nodes, i):
        return None
    used = [i - 1, i, *(i - 1 - j for j in range(1, order - 1))]
    return _update(nodes, integrals, i - 1, used, how.pseudo)


def _is_short(nodes: _Nodes, i: int) -> bool:
    """Whether the step from node i is so much shorter than the one that led there that i is not to be corrected."""
    before, after = (abs(nodes.lambdas[k + 1] - nodes.lambdas[k]) for k in (i - 1, i))
    return after < SHORT_STEP * before


@lru_cache(maxsize=8)
def _is_sane_plan(plan: Plan, space: Space) -> bool:
    if len(plan.levels) < 2 or plan.levels[-1] > plan.levels[0]:
        return True
    alphas = _Nodes.of(plan.levels, space).alphas
    updates = [(i, step.predictor) for i, step in enumerate(plan.steps)]
    updates += [(i - 1, step.corrector) for i, step in enumerate(plan.steps) if step.corrector is not None]
    return 1 / MAX_DECAY <= plan.start <= MAX_DECAY and all(_is_sane(u, alphas[i], alphas[i + 1]) for i, u in updates)


def _is_sane(update: Update, alpha_s: float, alpha_t: float) -> bool:
    """Of an update in the host's x; judged in y, where x = alpha y."""
    if not alpha_s > 0:  # from t = 1 of a flow: the exact first-order step
        return True
    size = sum(float(w.abs().max()) for w in (*update.weights, update.offset)) / alpha_t
    return float(update.decay.abs().max()) * alpha_s / alpha_t <= MAX_DECAY and size <= MAX_WEIGHTS


def _update(nodes: _Nodes, integrals: list[StepIntegrals], i: int, used: Sequence[int], pseudo: bool) -> Update:
    """The update of x from node i, with g expanded through the nodes `used`."""
    first = nodes.first
    update = make_update(integrals, nodes.lambdas[first:], i - first, [node - first for node in used], pseudo)
    update = Update(update.decay, update.offset, update.weights, tuple(used))
    return update.in_host_space(nodes.alphas[i], nodes.alphas[i + 1])


@lru_cache(maxsize=8)
def fitted_plan(levels: tuple[float, ...], fitted: FittedSteps, space: Space) -> Plan:
    """The plan of fitted steps for host noise `levels` [n + 1] that they match; every step looks back to the first."""
    alphas = _Nodes.of(levels, space).alphas
    slope = torch.zeros(1, dtype=torch.float64)  # m = D
    steps = [
        StepPlan(slope, None, Update.of_numbers(decay, weights, range(len(weights))).in_host_space(alphas[i], alphas[i + 1]))
        for i, (decay, weights) in enumerate(zip(fitted.decay, fitted.weights))
    ]
    return Plan(levels, tuple(steps), fitted.start, fitted.guided)


@lru_cache(maxsize=8)
def typical_plan(levels: tuple[float, ...], space: Space, guidance: float | None) -> Plan:
    """The plan for falling host noise `levels` [n + 1] when nothing but perhaps the guidance scale is known: `typical`."""
    slope = torch.zeros(1, dtype=torch.float64)  # m = D
    steps = (StepPlan(slope, corrector, predictor) for corrector, predictor in typical_steps(levels, space, guidance))
    return Plan(levels, tuple(steps))
