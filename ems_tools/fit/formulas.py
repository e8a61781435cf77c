"""Formulas of known samplers as coefficients of the fitted form.

Every multistep method is linear in y and the denoised values, so one run of a formula on symbols (unit vectors in place of
y_0, D_0, D_1, ...) yields its coefficients, whatever it is. A formula that ends above sigma = 0 leaves that much noise in the
picture, as the sampler itself does.

| formula         | what it is                                                                                          |
|-----------------|-----------------------------------------------------------------------------------------------------|
| DPM-Solver++ 2M | k-diffusion's dpmpp_2m: order 2 to the end, unless that is sigma = 0                                |
| UniPC 2, 3      | Zhao et al. 2023 (arXiv 2302.04867), B(h) = e^h - 1, lower order at the end; diffusers' default      |
| DEIS 2, 3       | Zhang and Chen 2022: polynomials of the noise in lambda; here v3 with (l, s, b) = (0, -1, 0)        |
| DPM-Solver++ 3M | polynomials of D in lambda, of order 3                                                              |
| SA-Solver 3     | the same, each step done again with the evaluation after it, without noise (Xue et al. 2023)        |
| iPNDM           | Adams and Bashforth's weights, as if steps were even (Zhang and Chen 2022)                          |

`OWN` is what this sampler does on these steps at "auto" without a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...sampler import EMS, FittedSteps, Space, sample_dpm_solver_v3

__all__ = ["FORMULAS", "OWN", "formula_steps"]

OWN = "this sampler without a file"

_Rows = Callable[[tuple[float, ...], float], list[Tensor]]
"""From n lambdas and the end (inf: sigma = 0) to y at each of them and at the end, [n + 1] each, of (y_0, D_0, ...)."""


@lru_cache(maxsize=4096)
def formula_steps(lambdas: tuple[float, ...], end: float, formula: str, guidance: float = 1.0) -> FittedSteps:
    """Coefficients of a formula that evaluates at these lambdas and ends at `end` (inf: sigma = 0); see the module.

    Only `OWN` depends on the guidance scale.
    """
    rows = _run({"guidance": guidance}, lambdas, end) if formula == OWN else FORMULAS[formula](lambdas, end)
    decay, weights = [], []
    for i, (now, then) in enumerate(pairwise(rows)):
        share = (then[0] / now[0]).item()
        decay.append(share)
        weights.append(tuple((then[1 : i + 2] - share * now[1 : i + 2]).tolist()))
    return FittedSteps(lambdas, tuple(decay), tuple(weights))


def _units(n: int) -> Tensor:
    return torch.eye(n + 1, dtype=torch.float64)


def _two_m(lambdas: tuple[float, ...], end: float) -> list[Tensor]:
    """DPM-Solver++ 2M as k-diffusion has it."""
    n, units = len(lambdas), _units(len(lambdas))
    y, D = units[0], units[1:]
    rows = [y]
    for i, (lam, then) in enumerate(pairwise([*lambdas, end])):
        share = math.exp(lam - then)
        both = D[i]
        if i and then != math.inf:
            both = D[i] + (then - lam) / (lam - lambdas[i - 1]) / 2 * (D[i] - D[i - 1])
        y = share * y + (1 - share) * both
        rows.append(y)
    assert len(rows) == n + 1
    return rows


def _uni_pc(order: int, lambdas: tuple[float, ...], end: float) -> list[Tensor]:
    """UniPC: each step is predicted, and done again with the evaluation after it before the next one is predicted."""
    n, D = len(lambdas), _units(len(lambdas))[1:]
    nodes = [*lambdas, end]
    rows = [_units(n)[0]]
    y, before = rows[0], rows[0]  # at node i, and the corrected y at node i - 1
    for i in range(n):
        if i:
            y = _uni_step(before, D, nodes, i - 1, min(order, i, n - i + 1), corrected=True)
        before = y
        rows.append(_uni_step(y, D, nodes, i, min(order, i + 1, n - i), corrected=False))
    return rows


def _uni_step(y: Tensor, D: Tensor, nodes: list[float], i: int, order: int, *, corrected: bool) -> Tensor:
    """From node i to the next one: h = lambda_t - lambda_s, r_k = (lambda_k - lambda_s) / h, rho for UniPC's B(h)."""
    h = nodes[i + 1] - nodes[i]
    share = math.exp(-h)
    plain = share * y + (1 - share) * D[i]
    if h == math.inf or (order == 1 and not corrected):
        return plain
    others = [i - k for k in range(1, order)] + ([i + 1] if corrected else [])
    ratios = torch.tensor([(nodes[j] - nodes[i]) / h for j in others], dtype=torch.float64)
    slopes = torch.stack([D[j] - D[i] for j in others]) / ratios[:, None]
    return plain + (1 - share) * (_rho(h, ratios) @ slopes)


def _rho(h: float, ratios: Tensor) -> Tensor:
    """Solves sum_k rho_k r_k^(m - 1) = b_m; one unknown alone is 1/2, as the authors set it."""
    count = len(ratios)
    if count == 1:
        return torch.full((1,), 0.5, dtype=torch.float64)
    phi, right = math.expm1(-h) / -h - 1, []
    for m in range(1, count + 1):
        right.append(phi * math.factorial(m) / math.expm1(-h))
        phi = phi / -h - 1 / math.factorial(m + 1)
    powers = torch.stack([ratios ** (m - 1) for m in range(1, count + 1)])
    return torch.linalg.solve(powers, torch.tensor(right, dtype=torch.float64))


@lru_cache(maxsize=1)
def _noise_prediction() -> EMS:
    """(l, s, b) = (0, -1, 0) everywhere: the statistics with which v3 is DEIS."""
    ends = torch.tensor([-100.0, 100.0], dtype=torch.float64)
    zeros = torch.zeros(2, 1, dtype=torch.float64)
    return EMS(ends, zeros, zeros - 1, zeros)


def _v3(options: dict[str, Any], lambdas: tuple[float, ...], end: float) -> list[Tensor]:
    """A setting of our own solver, none of which is left to "auto"."""
    fixed = {"predictor": "true", "corrector": "none", "lower_order_final": True, "corrector_below": math.inf, "strength": 1.0}
    return _run({**fixed, **options}, lambdas, end)


def _run(options: dict[str, Any], lambdas: tuple[float, ...], end: float) -> list[Tensor]:
    """Our own solver, run on symbols."""
    n = len(lambdas)
    units, rows = _units(n), list[Tensor]()

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        del sigma
        rows.append(x.reshape(-1).clone())
        return units[len(rows)].reshape(x.shape)

    levels = torch.tensor([*(math.exp(-v) for v in lambdas), math.exp(-end)], dtype=torch.float64)
    y = units[0].reshape(1, n + 1, 1)
    last = sample_dpm_solver_v3(denoiser, y, levels, disable=True, space=Space.SIGMA, **options)
    return [*rows, last.reshape(-1)]


_ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Adams and Bashforth's weights for even steps, the newest slope first."""


def _ipndm(lambdas: tuple[float, ...], end: float) -> list[Tensor]:
    """Steps on dy/dsigma = (y - D) / sigma. To sigma = 0 the step is one of first order, as in ComfyUI."""
    n, sigmas = len(lambdas), [*(math.exp(-v) for v in lambdas), math.exp(-end)]
    units = _units(n)
    rows, slopes = [units[0]], list[Tensor]()
    for i in range(n):
        slopes.insert(0, (rows[-1] - units[i + 1]) / sigmas[i])
        weights = _ADAMS[0 if sigmas[i + 1] == 0 else min(i, 3)]
        slope = sum((w * s for w, s in zip(weights, slopes)), torch.zeros(n + 1, dtype=torch.float64))
        rows.append(rows[-1] + (sigmas[i + 1] - sigmas[i]) * slope)
    return rows


FORMULAS: dict[str, _Rows] = {
    "UniPC 2": partial(_uni_pc, 2),
    "UniPC 3": partial(_uni_pc, 3),
    "DEIS 3": lambda lambdas, end: _v3({"order": 3, "ems": _noise_prediction()}, lambdas, end),
    "DEIS 2": lambda lambdas, end: _v3({"order": 2, "ems": _noise_prediction()}, lambdas, end),
    "DPM-Solver++ 2M": _two_m,
    "DPM-Solver++ 3M": partial(_v3, {"order": 3}),
    "SA-Solver 3": partial(_v3, {"order": 3, "corrector": "true"}),
    "iPNDM": _ipndm,
}
