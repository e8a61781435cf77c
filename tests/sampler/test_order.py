"""Measured convergence: the order of every predictor and corrector, exactness, and indifference to the statistics.

Why the schedule looks odd. A multistep method starts at order 1; with steps of one size h that start alone limits the
global order to 2, and `lower_order_final` does the same at the end. So the order is measured with
`lower_order_final=False` on nodes lambda_0, + h^3, + h^2, + h, + 2h, + 3h, ...: steps of low order are short enough
that their error, also when divided by the short distances, stays of higher order.

What order to expect, with p the `order` option. Pseudo derivatives take g' from one divided difference, whose error
h g'' / 2 leaves h^3 in a step: order 2 globally, whatever p. The nonlinear term is not re-evaluated after a corrector,
so a corrector gains at most one order over its predictor.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from dpm_solver_v3.sampler import EMS, sample_dpm_solver_v3

VARIANTS = [
    (order, predictor, corrector)
    for order, predictor, corrector in itertools.product((1, 2, 3), ("true", "pseudo"), ("none", "true", "pseudo", "raised"))
    if order == 3 or predictor == "true"
]

FORMS = ["CompVisDenoiser", "CompVisVDenoiser", "DiscreteEpsDDPMDenoiser", "DiscreteVDDPMDenoiser", "Denoiser", "flow"]


def claimed_order(p: int, predictor: str, corrector: str) -> int:
    q = min(p, 2) if predictor == "pseudo" else p
    if corrector == "none" or (corrector == "true" and p == 1):  # a corrector of order 1 does nothing
        return q
    return min(q + 1, {"true": p, "raised": p + 1, "pseudo": 2}[corrector])


def refined_start(n: int, high: float, low: float) -> torch.Tensor:
    """sigmas on lambda_0 + (0, h^3, h^2, h, 2h, ..., n h)."""
    h = math.log(high / low) / n
    distance = torch.tensor([0, h**3, h**2, *(h * k for k in range(1, n + 1))], dtype=torch.float64)
    return high * (-distance).exp()


@pytest.fixture(scope="module")
def solution(mixture, y_start, ends, solve_exactly):
    return solve_exactly(mixture, y_start, *ends)


@pytest.mark.parametrize("with_ems", [False, True], ids=["data", "ems"])
@pytest.mark.parametrize(("order", "predictor", "corrector"), VARIANTS)
def test_convergence_order_is_as_claimed(order, predictor, corrector, with_ems, mixture, y_start, ends, solution, smooth_ems):
    claim = claimed_order(order, predictor, corrector)
    # A corrector of the predictor's own order nearly cancels its error here: the asymptotic slope shows later.
    counts = [400, 560, 800] if corrector == "true" and predictor == "true" and order > 1 else [80, 130, 210]
    errors = [
        (
            sample_dpm_solver_v3(
                mixture,
                y_start,
                refined_start(n, *ends),
                disable=True,
                ems=smooth_ems if with_ems else None,
                order=order,
                predictor=predictor,
                corrector=corrector,
                lower_order_final=False,
            )
            - solution
        )
        .norm()
        .item()
        for n in counts
    ]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(claim, abs=0.2), errors


@pytest.mark.parametrize("corrector", ["none", "true", "raised"])
@pytest.mark.parametrize("order", [1, 2])
def test_pseudo_predictor_is_the_true_one_below_order_3(order, corrector, mixture, y_start, sigmas, smooth_ems):
    options = {"disable": True, "ems": smooth_ems, "order": order, "corrector": corrector}
    true = sample_dpm_solver_v3(mixture, y_start, sigmas(8), predictor="true", **options)
    pseudo = sample_dpm_solver_v3(mixture, y_start, sigmas(8), predictor="pseudo", **options)
    torch.testing.assert_close(pseudo, true, rtol=1e-12, atol=1e-12)


def test_two_independent_solutions_agree(mixture, y_start, ends, solution):
    """The reference itself: DOP853 against this solver at order 4 in 800 steps."""
    ours = sample_dpm_solver_v3(
        mixture, y_start, refined_start(800, *ends), disable=True, order=3, corrector="raised", lower_order_final=False
    )
    torch.testing.assert_close(ours, solution, rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("with_ems", [False, True], ids=["data", "ems"])
@pytest.mark.parametrize("name", FORMS)
def test_all_forms_of_one_model_give_one_trajectory(name, with_ems, steps, form, mixture, y_start, sigmas, smooth_ems):
    """EPS, v, EDM and flow, each through its real wrapper with tables in float64."""
    options = {"ems": smooth_ems if with_ems else None, "order": 3, "corrector": "raised"}
    expected = form("plain", mixture).sample(sample_dpm_solver_v3, y_start, sigmas(steps), **options)
    found = form(name, mixture).sample(sample_dpm_solver_v3, y_start, sigmas(steps), **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["CompVisDenoiser", "CompVisVDenoiser", "Denoiser", "flow"])
@pytest.mark.parametrize(("order", "corrector", "claim"), [(1, "none", 1), (2, "none", 2), (3, "none", 3)])
def test_order_holds_in_every_form(order, corrector, claim, name, form, mixture, y_start, ends, solution, smooth_ems):
    """Fewer variants than above, as the forms agree step by step."""
    counts = [80, 160]
    options = {"ems": smooth_ems, "order": order, "corrector": corrector, "lower_order_final": False}
    errors = [
        (form(name, mixture).sample(sample_dpm_solver_v3, y_start, refined_start(n, *ends), **options) - solution).norm().item()
        for n in counts
    ]
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(claim, abs=0.2), errors


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_limit_of_many_steps_does_not_depend_on_the_statistics(order, mixture, y_start, ends, solution):
    """Any bounded l, s, b, here random ones on a coarse grid that covers a part of the range."""
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        l, s, b = (torch.rand(9, 2, generator=draw, dtype=torch.float64) * 2 - 0.7 for _ in range(3))
        ems = EMS(torch.linspace(-1.5, 1.2, 9, dtype=torch.float64), l, s, b)
        near, nearer = (
            (
                sample_dpm_solver_v3(
                    mixture, y_start, refined_start(n, *ends), disable=True, ems=ems, order=order, corrector="none"
                )
                - solution
            )
            .abs()
            .max()
            .item()
            for n in (200, 800)
        )
        assert nearer < near / 3
        assert nearer < 2e-2 if order == 1 else nearer < 1e-4


class LinearModel:
    """A model with f' = s f + b exactly: D(y, lambda) = (1 - l) y - f(lambda), f tabulated at a schedule's nodes.

    y and f come from scipy's DOP853, restarted at every kink of l, s, b; the statistics are read by numpy.interp.
    """

    def __init__(self, ems: EMS, y0: torch.Tensor, f0: torch.Tensor, lambdas: list[float]) -> None:
        grid = ems.lambdas.numpy()
        shape = f0.shape

        def at(values: torch.Tensor, lam: float) -> np.ndarray:
            return np.array([np.interp(lam, grid, values[:, c].numpy()) for c in range(shape[1])]).reshape(1, -1, 1, 1)

        def slope(lam: float, state: np.ndarray) -> np.ndarray:
            y, f = state.reshape(2, *shape)
            l, s, b = (at(v, lam) for v in (ems.l, ems.s, ems.b))
            return np.stack([-l * y - f, s * f + b]).ravel()

        stops = sorted({*lambdas, *(g for g in grid.tolist() if lambdas[0] < g < lambdas[-1])})
        states = [np.stack([y0.numpy(), f0.numpy()]).ravel()]
        for low, high in itertools.pairwise(stops):
            states.append(solve_ivp(slope, (low, high), states[-1], method="DOP853", rtol=1e-13, atol=1e-13).y[:, -1])
        self.solution = torch.from_numpy(states[-1].reshape(2, *shape)[0])
        self.table = [(lam, at(ems.l, lam), states[stops.index(lam)].reshape(2, *shape)[1]) for lam in lambdas]

    def __call__(self, y: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        _, l, f = min(self.table, key=lambda row: abs(row[0] + math.log(sigma[0].item())))
        return torch.from_numpy(1 - l) * y - torch.from_numpy(f)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(("order", "corrector"), [(1, "none"), (1, "pseudo"), (2, "true"), (3, "none"), (3, "raised")])
def test_a_model_that_obeys_its_statistics_is_solved_exactly(order, corrector, steps, y_start):
    """f' = s f + b makes g constant: order 1 is exact in any number of steps, and higher orders add nothing."""
    draw = torch.Generator().manual_seed(3)
    l, s, b = (torch.rand(6, 2, generator=draw, dtype=torch.float64) * 1.6 - 0.5 for _ in range(3))
    ems = EMS(torch.linspace(-2, 2, 6, dtype=torch.float64), l, s, b)
    lambdas = np.linspace(-1.7, 1.9, steps + 1).tolist()
    model = LinearModel(ems, y_start, torch.randn(y_start.shape, generator=draw, dtype=torch.float64), lambdas)
    sigmas = torch.tensor(lambdas, dtype=torch.float64).neg().exp()
    found = sample_dpm_solver_v3(model, y_start, sigmas, disable=True, ems=ems, order=order, corrector=corrector)
    torch.testing.assert_close(found, model.solution, rtol=1e-10, atol=1e-10)
