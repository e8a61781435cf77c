"""What a user would otherwise pick: formulas of known samplers, on schedules of many kinds, as coefficients of the fitted form.

Every multistep method is linear in y and the denoised values, so one run of a formula on symbols (unit vectors in place of D_0,
D_1, ...) yields its coefficients, whatever it is. A formula that ends above sigma = 0 leaves a known share of the start noise
in the picture, which its last step here takes out again at no evaluation.

| formula          | like                                     |
|------------------|------------------------------------------|
| order 2          | DPM-Solver++ 2M                          |
| order 3          | DPM-Solver++ 3M                          |
| order 2, UniC    | UniPC of order 2                         |
| order 3, UniC    | UniPC of order 3                         |
| order 2, noise   | DEIS of order 2 (noise prediction)       |
| order 3, noise   | DEIS of order 3                          |
| iPNDM            | iPNDM of order 4                         |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...sampler import EMS, FittedSteps, Space, sample_dpm_solver_v3
from .spacing import Range, Spacing

__all__ = ["FORMULAS", "Entrant", "entrants", "formula_steps"]


@lru_cache(maxsize=1)
def _noise_prediction() -> EMS:
    """(l, s, b) = (0, -1, 0) everywhere: the statistics with which v3 is DEIS."""
    ends = torch.tensor([-100.0, 100.0], dtype=torch.float64)
    zeros = torch.zeros(2, 1, dtype=torch.float64)
    return EMS(ends, zeros, zeros - 1, zeros)


FORMULAS: dict[str, dict[str, Any]] = {
    "order 2, UniC": {"order": 2, "corrector": "raised"},
    "order 3, noise": {"order": 3, "corrector": "none", "ems": "noise"},
    "order 2, noise": {"order": 2, "corrector": "none", "ems": "noise"},
    "order 2": {"order": 2, "corrector": "none"},
    "order 3": {"order": 3, "corrector": "none"},
    "order 3, UniC": {"order": 3, "corrector": "raised"},
    "iPNDM": {},
}
_GOOD = (
    ("vp 1.5", "order 2, UniC"),
    ("vp 2", "order 3, noise"),
    ("model 1", "order 2, UniC"),
    ("vp 2", "order 2, UniC"),
    ("flow 2", "order 2, UniC"),
    ("beta", "order 2, UniC"),
    ("vp 1.5", "order 2, noise"),
    ("karras", "order 2, noise"),
    ("vp 1", "order 2, UniC"),
    ("vp 2", "order 3"),
    ("lambda", "order 2, UniC"),
    ("karras", "order 2, UniC"),
    ("model 1", "order 2"),
    ("lambda", "iPNDM"),
)
"""The likeliest entrants first: measured on the zoo."""
_SCHEDULES = {
    "vp 1.5": Spacing("vp", 1.5, 1.0),
    "vp 2": Spacing("vp", 2.0, 1.0),
    "model 1": Spacing("model", 1.0, 1.0),
    "beta": Spacing("beta", 1.0, 0.0),
    "karras": Spacing("sigma", 7.0, 0.0),
    "lambda": Spacing("lambda", 1.0, 1.0),
    "vp 1": Spacing("vp", 1.0, 1.0),
    "flow 2": Spacing("flow", 2.0, 1.0),
    "flow 1": Spacing("flow", 1.0, 1.0),
    "model 2": Spacing("model", 2.0, 1.0),
    "model 1.5": Spacing("model", 1.5, 1.0),
}


@dataclass(frozen=True)
class Entrant:
    """A formula on a schedule: `levels_at` gives the lambdas of n evaluations and the lambda where it ends (inf: sigma = 0)."""

    schedule: str
    formula: str
    levels_at: Callable[[int], tuple[list[float], float]]

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.formula} on {self.schedule}"

    def steps(self, n: int, snap: Callable[[Sequence[float]], list[float]]) -> FittedSteps:
        """Its coefficients at n evaluations, moved by `snap`. Raises ValueError where the schedule cannot be followed."""
        lambdas, end = self.levels_at(n)
        return formula_steps(tuple(snap([round(v, 6) for v in lambdas])), end, self.formula)


def entrants(count: int, span: Range, hosts: Mapping[str, Callable[[int], tuple[list[float], float]]]) -> list[Entrant]:
    """The `count` likeliest entrants: the known good ones, every formula on the host's schedules, then all others."""
    schedules = {name: _levels_of(spacing, span) for name, spacing in _SCHEDULES.items()}
    pairs = [(schedule, formula) for schedule, formula in _GOOD]
    pairs += [(name, formula) for formula in list(FORMULAS)[:3] for name in hosts]
    pairs += [(name, formula) for formula in FORMULAS for name in (*_SCHEDULES, *hosts)]
    known = {**hosts, **schedules}
    return [Entrant(name, formula, known[name]) for name, formula in dict.fromkeys(pairs)][:count]


def _levels_of(spacing: Spacing, span: Range) -> Callable[[int], tuple[list[float], float]]:
    return lambda n: (spacing.lambdas(n, span), span.high if spacing.last else math.inf)


@lru_cache(maxsize=4096)
def formula_steps(lambdas: tuple[float, ...], end: float, formula: str) -> FittedSteps:
    """Coefficients of a formula that evaluates at these lambdas and ends at `end` (inf: sigma = 0); see the module."""
    n = len(lambdas)
    units = torch.eye(n + 1, dtype=torch.float64)
    rows: list[Tensor] = []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        del sigma
        rows.append(x.reshape(-1).clone())
        return units[len(rows)].reshape(x.shape)

    if formula == "iPNDM":
        return _relative(lambdas, _ipndm_rows(lambdas, end))
    options = dict(FORMULAS[formula])
    ems = _noise_prediction() if options.pop("ems", None) else None
    levels = torch.tensor([*(math.exp(-v) for v in lambdas), 0.0 if end == math.inf else math.exp(-end)], dtype=torch.float64)
    settings = {"predictor": "true", "lower_order_final": True, "corrector_below": math.inf, **options}
    last = sample_dpm_solver_v3(
        denoiser, units[0].reshape(1, n + 1, 1), levels, disable=True, space=Space.SIGMA, ems=ems, strength=1.0, **settings
    ).reshape(-1)
    rows.append(_without_noise(last))
    return _relative(lambdas, rows)


def _without_noise(last: Tensor) -> Tensor:
    """The end of a run [n + 1] in terms of (y_0, D_0, ...), its share of the start noise taken out."""
    return torch.cat([last[:1] * 0, last[1:] / (1 - last[0].item())])


_ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Adams and Bashforth's weights for even steps, the newest slope first."""


def _ipndm_rows(lambdas: tuple[float, ...], end: float) -> list[Tensor]:
    """Rows of iPNDM (Zhang and Chen 2022): Adams and Bashforth's on dy/dsigma = (y - D) / sigma, as if steps were even.

    To sigma = 0 the step is one of first order, as in ComfyUI.
    """
    n, sigmas = len(lambdas), [*(math.exp(-v) for v in lambdas), math.exp(-end)]
    units = torch.eye(n + 1, dtype=torch.float64)
    rows, slopes = [units[0]], list[Tensor]()
    for i in range(n):
        slopes.insert(0, (rows[-1] - units[i + 1]) / sigmas[i])
        weights = _ADAMS[0 if sigmas[i + 1] == 0 else min(i, 3)]
        slope = sum((w * s for w, s in zip(weights, slopes)), torch.zeros(n + 1, dtype=torch.float64))
        rows.append(rows[-1] + (sigmas[i + 1] - sigmas[i]) * slope)
    return [*rows[:-1], _without_noise(rows[-1])]


def _relative(lambdas: tuple[float, ...], rows: list[Tensor]) -> FittedSteps:
    """Fitted steps from rows that give y_i in terms of (y_0, D_0, D_1, ...)."""
    decay, weights = [], []
    for i, (now, then) in enumerate(pairwise(rows)):
        share = (then[0] / now[0]).item()
        decay.append(share)
        weights.append(tuple((then[1 : i + 2] - share * now[1 : i + 2]).tolist()))
    return FittedSteps(lambdas, tuple(decay), tuple(weights))
