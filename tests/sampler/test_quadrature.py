"""The solver against a second implementation of the same formulas, and against closed forms.

The second one follows the published formulas (arXiv 2310.13268, in y = x0 + sigma n) with numpy alone and shares no
code with sampler/. Integrals are taken by composite Simpson on a fine grid between the knots, from the step's start to
each node directly; derivatives come from a plain linear solve or a divided-difference table.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dpm_solver_v3.sampler import EMS, sample_dpm_solver_v3

Array = NDArray[np.float64]


class Statistics:
    """l, s, b [N+1, C, ...] by linear interpolation, s = b = 0 and l constant outside; and their integrals."""

    def __init__(self, lambdas: Array, l: Array, s: Array, b: Array) -> None:
        self.lambdas, self.tables = lambdas, (l, s, b)

    def value(self, which: int, lam: Array, inside: Array) -> Array:
        table = self.tables[which].reshape(len(self.lambdas), -1)
        columns = [np.interp(lam, self.lambdas, column) for column in table.T]
        values = np.stack(columns, -1).reshape(*lam.shape, *self.tables[which].shape[1:])
        mask = inside.reshape(*lam.shape, *(1,) * (values.ndim - 1))
        return values if which == 0 else np.where(mask, values, 0.0)

    def l_at(self, lam: float) -> Array:
        return self.value(0, np.array([lam]), np.array([True]))[0]

    def integrals(self, start: float, end: float, orders: int) -> tuple[Array, Array, Array, Array, list[Array]]:
        """L, S, B at `end`, C and J_0 .. J_{orders-1}, all from `start`; the direction is free."""
        low, high = min(start, end), max(start, end)
        knots = [low, *self.lambdas[(self.lambdas > low) & (self.lambdas < high)], high]
        pieces = [np.linspace(a, z, 2 + int((z - a) / 0.002))[:-1] for a, z in itertools.pairwise(knots)]
        edges = np.append(np.concatenate(pieces), high)
        if end < start:
            edges = edges[::-1]
        a, z = edges[:-1], edges[1:]
        mid = (a + z) / 2
        inside = (mid > self.lambdas[0]) & (mid < self.lambdas[-1])
        left, centre, right = ([self.value(i, lam, inside) for i in range(3)] for lam in (a, mid, z))
        h = (z - a).reshape(-1, *(1,) * (left[0].ndim - 1))

        def before(cells: Array) -> Array:
            """Integral from the start to the left edge of every cell."""
            return np.concatenate([np.zeros_like(cells[:1]), cells.cumsum(0)[:-1]])

        def along(v: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            """The running integral at left edge, centre and right edge, exact for parabolas."""
            cells = h / 6 * (v[0] + 4 * v[1] + v[2])
            first = before(cells)
            return first, first + h / 24 * (5 * v[0] + 8 * v[1] - v[2]), first + cells

        L, S = (along((left[i], centre[i], right[i])) for i in (0, 1))
        B = along(tuple(np.exp(-S[j]) * v[2] for j, v in enumerate((left, centre, right))))
        E = [np.exp(L[j] + S[j]) for j in range(3)]
        offsets = [(lam - start).reshape(h.shape) for lam in (a, mid, z)]

        def whole(values: Callable[[int], Array]) -> Array:
            return (h / 6 * (values(0) + 4 * values(1) + values(2))).sum(0)

        J = [whole([E[j] * offsets[j] ** k / math.factorial(k) for j in range(3)].__getitem__) for k in range(orders)]
        return L[2][-1], S[2][-1], B[2][-1], whole(lambda j: E[j] * B[j]), J


def derivatives(lam: list[float], g: list[Array], pseudo: bool) -> list[Array]:
    """g, g', ... at lam[0] from values at all of `lam`."""
    n = len(lam)
    if pseudo:
        table, found = list(g), [g[0]]
        for k in range(1, n):
            table = [(table[j + 1] - table[j]) / (lam[j + k] - lam[j]) for j in range(n - k)]
            found.append(math.factorial(k) * table[0])
        return found
    if n == 1:
        return [g[0]]
    matrix = [[(lam[i] - lam[0]) ** k / math.factorial(k) for k in range(1, n)] for i in range(1, n)]
    rest = np.stack([(g[i] - g[0]).ravel() for i in range(1, n)])
    return [g[0], *(row.reshape(g[0].shape) for row in np.linalg.solve(np.array(matrix), rest))]


def one_step(st: Statistics, lam: list[float], f: dict[int, Array], y: Array, i: int, nodes: list[int], pseudo: bool) -> Array:
    """y at node i + 1 from y at node i, with g expanded through `nodes`."""
    L, _, _, C, J = st.integrals(lam[i], lam[i + 1], len(nodes))
    g = []
    for node in nodes:
        _, S, B, _, _ = st.integrals(lam[i], lam[node], 0) if node != i else (0, 0.0, 0.0, 0, [])
        g.append(np.exp(-S) * f[node] - B)
    expansion = derivatives([lam[j] for j in nodes], g, pseudo)
    return np.exp(-L) * (y - C - sum(J[k] * expansion[k] for k in range(len(nodes))))


def reference(
    denoise: Callable[[Array, float], Array],
    y: Array,
    sigmas: list[float],
    st: Statistics,
    *,
    order: int,
    predictor: str,
    corrector: str,
    lower_order_final: bool = True,
    corrector_below: float = math.inf,
) -> Array:
    """Algorithm 2: multistep predictor and corrector."""
    lam = [-math.log(sigma) for sigma in sigmas]
    f: dict[int, Array] = {}
    n, used, y_before = len(lam) - 1, 0, y
    for i in range(n):
        f[i] = (1 - st.l_at(lam[i])) * y - denoise(y, sigmas[i])
        p_corrector = {"none": 0, "true": used, "pseudo": used + 1, "raised": used + 1}[corrector]
        if i > 0 and p_corrector > 1 and sigmas[i] <= corrector_below:
            nodes = [i - 1, i, *range(i - 2, i - p_corrector, -1)]
            y = one_step(st, lam, f, y_before, i - 1, nodes, corrector == "pseudo")
        used = min(order, i + 1, n - i) if lower_order_final else min(order, i + 1)
        y_before = y
        y = one_step(st, lam, f, y, i, [i - j for j in range(used)], predictor == "pseudo")
    return y


def hand_made(points: int, shape: tuple[int, ...], low: float = -2.2, high: float = 2.4, seed: int = 5) -> EMS:
    """Wavy statistics with kinks at every knot, away from (1, 0, 0)."""
    draw = torch.Generator().manual_seed(seed)
    lam = torch.linspace(low, high, points, dtype=torch.float64)
    column = lam.reshape(-1, *(1,) * len(shape))
    phase = 3 * torch.rand(3, *shape, generator=draw, dtype=torch.float64)
    return EMS(
        lam,
        0.6 + 0.35 * torch.sin(1.7 * column + phase[0]),
        -0.4 + 0.5 * torch.cos(2.1 * column + phase[1]),
        0.4 * torch.sin(1.1 * column + phase[2]),
    )


def both(ems: EMS, model: Any, y: torch.Tensor, sigmas: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The sampler's result and the reference's."""

    def denoise(now: Array, sigma: float) -> Array:
        return model(torch.from_numpy(now), torch.full((len(now),), sigma, dtype=torch.float64)).numpy()

    st = Statistics(*(v.double().numpy() for v in (ems.lambdas, ems.l, ems.s, ems.b)))
    if st.tables[0].ndim == 2:  # per channel: along the two axes of space
        l, s, b = (t[..., None, None] for t in st.tables)
        st.tables = (l, s, b)
    expected = reference(denoise, y.numpy(), sigmas.tolist(), st, **options)
    return sample_dpm_solver_v3(model, y, sigmas, disable=True, ems=ems, strength=1, **options), torch.from_numpy(expected)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """1e-6 relative is the demand; 1e-10 is what two correct quadratures reach."""
    assert ((found - expected).norm() / expected.norm()).item() < 1e-10


@pytest.mark.parametrize("corrector", ["none", "true", "pseudo", "raised"])
@pytest.mark.parametrize("predictor", ["true", "pseudo"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [5, 8, 20])
def test_agrees_with_an_independent_quadrature(steps, order, predictor, corrector, mixture, y_start, sigmas):
    ems = hand_made(121, (2,))
    assert_same(*both(ems, mixture, y_start, sigmas(steps), order=order, predictor=predictor, corrector=corrector))


@pytest.mark.parametrize("points", [2, 121, 1201])
@pytest.mark.parametrize("shape", [(1,), (2,), (2, 2, 2)], ids=["one for all", "per channel", "per element"])
def test_agrees_for_every_shape_of_the_statistics(shape, points, mixture, y_start, sigmas):
    ems = hand_made(points, shape)
    assert_same(*both(ems, mixture, y_start, sigmas(7), order=3, predictor="true", corrector="raised"))


@pytest.mark.parametrize("covered", [(-0.8, 1.0), (-5.0, 0.3), (0.2, 6.0), (5.0, 6.0)])
def test_agrees_where_the_schedule_leaves_the_covered_range(covered, mixture, y_start, sigmas):
    """Outside, l holds its end value and s = b = 0."""
    ems = hand_made(121, (2,), *covered)
    assert_same(*both(ems, mixture, y_start, sigmas(6), order=3, predictor="pseudo", corrector="pseudo"))


@pytest.mark.parametrize("lower_order_final", [True, False])
def test_agrees_on_an_uneven_schedule_off_the_grid(lower_order_final, mixture, y_start):
    levels = torch.tensor([6.0, 5.7, 3.1, 2.7, 1.234, 0.5, 0.43, 0.151], dtype=torch.float64)
    options = {"order": 3, "predictor": "true", "corrector": "pseudo", "lower_order_final": lower_order_final}
    assert_same(*both(hand_made(121, (2,)), mixture, y_start, levels, **options))


def test_agrees_when_the_schedule_rises(mixture, y_start, sigmas):
    options = {"order": 3, "predictor": "true", "corrector": "raised"}
    assert_same(*both(hand_made(121, (2,)), mixture, y_start / 40, sigmas(9).flip(0), **options))


@pytest.mark.parametrize("corrector", ["true", "pseudo", "raised"])
def test_agrees_with_the_half_corrector(corrector, mixture, y_start, sigmas):
    options = {"order": 3, "predictor": "true", "corrector": corrector, "corrector_below": 1.0}
    assert_same(*both(hand_made(121, (2,)), mixture, y_start, sigmas(9), **options))


def test_float32_statistics_are_read_without_loss(mixture, y_start, sigmas):
    wide = hand_made(121, (2,))
    ems = EMS(wide.lambdas.float(), wide.l.float(), wide.s.float(), wide.b.float())
    assert_same(*both(ems, mixture, y_start, sigmas(7), order=2, predictor="true", corrector="pseudo"))


def test_the_same_steps_in_a_flow(form, mixture, y_start, sigmas):
    ems = hand_made(121, (2,))
    options = {"order": 3, "predictor": "true", "corrector": "raised"}
    _, expected = both(ems, mixture, y_start, sigmas(7), **options)
    assert_same(form("flow", mixture).sample(sample_dpm_solver_v3, y_start, sigmas(7), ems=ems, **options), expected)


def constant(l: float, s: float) -> EMS:
    one = torch.ones(2, 1, dtype=torch.float64)
    return EMS(torch.tensor([-9.0, 9.0], dtype=torch.float64), l * one, s * one, 0 * one)


@pytest.mark.parametrize("ems", [None, constant(1, 0), constant(0, -1)], ids=["none", "data", "noise"])
def test_order_1_of_data_and_of_noise_prediction_is_ddim(ems, mixture, y_start, sigmas):
    """DDIM: x_t = D + (sigma_t / sigma_s) (x_s - D)."""
    expected, levels = y_start, sigmas(6)
    for a, b in itertools.pairwise(levels):
        d = mixture(expected, a.expand(2))
        expected = d + b / a * (expected - d)
    found = sample_dpm_solver_v3(mixture, y_start, levels, disable=True, ems=ems, order=1, corrector="none")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_order_2_of_data_prediction_in_closed_form(mixture, y_start, sigmas):
    """DPM-Solver++ with exact weights: e^-h x + (1 - e^-h) D + (h - 1 + e^-h) (D - D_old) / h_old."""
    levels = sigmas(3)[:3]
    h = math.log(levels[0] / levels[1])
    d0 = mixture(y_start, levels[:1].expand(2))
    x1 = math.exp(-h) * y_start + (1 - math.exp(-h)) * d0
    d1 = mixture(x1, levels[1:2].expand(2))
    expected = math.exp(-h) * x1 + (1 - math.exp(-h)) * d1 + (h - 1 + math.exp(-h)) * (d1 - d0) / h
    options: dict[str, Any] = {"disable": True, "order": 2, "corrector": "none", "lower_order_final": False}
    torch.testing.assert_close(sample_dpm_solver_v3(mixture, y_start, levels, **options), expected, rtol=1e-12, atol=1e-12)


def test_order_2_of_noise_prediction_in_closed_form(mixture, y_start, sigmas):
    """Exponential Adams-Bashforth on eps:
    x_t = x_s - sigma_s ((1 - e^-h) eps + (1 - (1 + h) e^-h) (eps - eps_old) / h_old)."""
    levels = sigmas(3)[:3]
    h = math.log(levels[0] / levels[1])
    e0 = (y_start - mixture(y_start, levels[:1].expand(2))) / levels[0]
    x1 = y_start - levels[0] * (1 - math.exp(-h)) * e0
    e1 = (x1 - mixture(x1, levels[1:2].expand(2))) / levels[1]
    step = (1 - math.exp(-h)) * e1 + (1 - (1 + h) * math.exp(-h)) * (e1 - e0) / h
    options: dict[str, Any] = {
        "disable": True,
        "ems": constant(0, -1),
        "order": 2,
        "corrector": "none",
        "lower_order_final": False,
    }
    found = sample_dpm_solver_v3(mixture, y_start, levels, **options)
    torch.testing.assert_close(found, x1 - levels[1] * step, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("high", [1.5, 6.0])
def test_differs_from_k_diffusions_dpmpp_2m_by_its_midpoint_weight_alone(high, mixture, y_start, sigmas):
    """dpmpp_2m weighs (D - D_old) / h_old with (1 - e^-h) h / 2, an approximation of the integral h - 1 + e^-h that
    this solver takes exactly. Nothing else differs, to rounding."""
    from k_diffusion.sampling import sample_dpmpp_2m

    levels = sigmas(2, high, high / 4)
    seen: list[torch.Tensor] = []
    theirs = sample_dpmpp_2m(mixture, y_start, levels, callback=lambda d: seen.append(d["denoised"]), disable=True)
    h = math.log(2)
    weight = (h - 1 + math.exp(-h)) - (1 - math.exp(-h)) * h / 2
    options: dict[str, Any] = {"disable": True, "order": 2, "corrector": "none", "lower_order_final": False}
    ours = sample_dpm_solver_v3(mixture, y_start, levels, **options)
    torch.testing.assert_close(ours, theirs + weight * (seen[1] - seen[0]) / h, rtol=1e-12, atol=1e-12)
