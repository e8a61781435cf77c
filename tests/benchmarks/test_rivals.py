"""The rival samplers of the benchmarks are driven right: against an analytic ODE, each other, and ours."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dpm_solver_v3.sampler import sample_dpm_solver_v3
from loading import benchmark

pytest.importorskip("diffusers")
pytest.importorskip("k_diffusion")

SIGMA_MAX, SIGMA_MIN = 1000.0, 0.01  # so wide that the low-order first steps do not hide a sampler's order


MODULE = benchmark("rivals")
RIVALS = MODULE.RIVALS
ORDERS = {
    "euler": 1,
    "lms": 4,
    "dpmpp_2m": 2,
    "dpmpp_2m_diffusers": 2,
    "dpmpp_2m_heun_diffusers": 2,
    "dpmpp_3m_diffusers": 2,  # its last term lacks a factor 2 against the third-order expansion
    "unipc_bh1_2": 3,
    "unipc_bh1_3": 2,  # third until its first and last steps, of lower order, dominate; so for the next ones
    "unipc_bh2_2": 3,
    "unipc_bh2_3": 2,
    "deis_2": 2,
    "deis_3": 3,
    "ipndm": 2,  # constant coefficients on steps of unequal length
    "sa_solver_2": 2,
    "sa_solver_3": 2,
}


def mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] for three Gaussians of deviation 0.4 in 3 dimensions."""
    assert x.ndim == 2 and sigma.shape == x.shape[:1] and sigma.dtype == x.dtype
    means = x.new_tensor([[-1.0, 0.5, 0.2], [0.8, -0.6, 1.0], [0.1, 1.2, -0.7]])
    variance = (0.16 + sigma**2)[:, None]
    away = x[:, None] - means
    weights = torch.softmax(x.new_tensor([0.3, 0.5, 0.2]).log() - (away**2).sum(-1) / (2 * variance), 1)
    return (weights[..., None] * (means + 0.16 / variance[..., None] * away)).sum(1)


def steps(n: int, to_zero: bool = False) -> Tensor:
    """n + 1 levels uniform in lambda, the last one 0 if asked."""
    sigmas = torch.linspace(math.log(SIGMA_MAX), math.log(SIGMA_MIN), n + 1 - to_zero, dtype=torch.float64).exp()
    return torch.cat([sigmas, sigmas.new_zeros(1)]) if to_zero else sigmas


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of 18 numbers: waiting for a second thread costs 100 times the work where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return SIGMA_MAX * torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def solution(noise: Tensor) -> Tensor:
    """Classical Runge-Kutta of order 4 on dx/dlog sigma = x - D, 400 steps."""

    def slope(x: Tensor, log_sigma: float) -> Tensor:
        return x - mixture(x, x.new_full((len(x),), math.exp(log_sigma)))

    x, n = noise, 400
    u = math.log(SIGMA_MAX)
    h = (math.log(SIGMA_MIN) - u) / n
    for _ in range(n):
        k1 = slope(x, u)
        k2 = slope(x + h / 2 * k1, u + h / 2)
        k3 = slope(x + h / 2 * k2, u + h / 2)
        k4 = slope(x + h * k3, u + h)
        x, u = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), u + h
    return x


def test_every_rival_has_a_known_order() -> None:
    assert set(ORDERS) == set(RIVALS)


@pytest.mark.parametrize("name", ORDERS)
def test_converges_to_the_ode_at_its_order(name: str, noise: Tensor, solution: Tensor) -> None:
    errors = []
    for n in (64, 128):
        error = RIVALS[name](mixture, noise, steps(n)) - solution
        errors.append(error.pow(2).mean().sqrt().item())
    assert errors[1] < 0.02
    slope = math.log2(errors[0] / errors[1])
    assert ORDERS[name] - 0.5 < slope < ORDERS[name] + 2


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("to_zero", [False, True])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_one_call_a_step_at_exactly_the_given_levels(name: str, to_zero: bool, n: int, noise: Tensor) -> None:
    sigmas = steps(n, to_zero)
    seen: list[float] = []

    def spy(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma[0].item())
        return mixture(x, sigma)

    out = RIVALS[name](spy, noise, sigmas)
    assert seen == pytest.approx(sigmas[:-1].tolist(), rel=1e-12)
    assert out.isfinite().all() and out.shape == noise.shape and out.dtype == noise.dtype


@pytest.mark.parametrize("name", ORDERS)
def test_single_precision_agrees(name: str, noise: Tensor) -> None:
    sigmas = steps(12, to_zero=True)
    low = RIVALS[name](mixture, noise.float(), sigmas.float())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), RIVALS[name](mixture, noise, sigmas), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["dpmpp_2m_diffusers", "unipc_bh2_2", "unipc_bh2_3"])
def test_the_limit_at_sigma_zero_is_the_librarys_own(name: str, noise: Tensor) -> None:
    """The two schedulers that can evaluate their step to 0 return D there, as our driver does for all."""
    import diffusers

    rival = RIVALS[name]
    sigmas, at_last = steps(6, to_zero=True), {}

    def spy(x: Tensor, sigma: Tensor) -> Tensor:
        at_last["denoised"] = mixture(x, sigma)
        return at_last["denoised"]

    out = rival(spy, noise, sigmas)
    assert torch.equal(out, at_last["denoised"])
    scheduler = getattr(diffusers, rival.args[0])(prediction_type="sample", **rival.args[1])
    MODULE._start(scheduler, sigmas)
    alphas = (1 + sigmas**2).rsqrt()
    x = noise * alphas[0]
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(mixture(x / alphas[i], sigmas[i] * x.new_ones(len(x))), t, x).prev_sample
    torch.testing.assert_close(x, out, atol=1e-6, rtol=0)


@pytest.mark.parametrize("n", [6, 12, 20])
def test_2m_is_the_same_in_both_libraries(n: int, noise: Tensor) -> None:
    sigmas = steps(n, to_zero=True)
    ours = RIVALS["dpmpp_2m"](mixture, noise, sigmas)
    torch.testing.assert_close(RIVALS["dpmpp_2m_diffusers"](mixture, noise, sigmas), ours, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("n", "to_zero", "lower"), [(6, True, False), (20, True, False), (20, False, False), (12, False, True)]
)
def test_ours_without_statistics_is_2m(n: int, to_zero: bool, lower: bool, noise: Tensor) -> None:
    """DPM-Solver++ 2M with the exact second-order weight, which diffusers calls the "heun" type.

    k-diffusion's 2M halves the first-order weight instead ("midpoint"), which differs by O(h^3) a step.
    """
    sigmas = steps(n, to_zero)
    ours = sample_dpm_solver_v3(mixture, noise, sigmas, disable=True, order=2, corrector="none", lower_order_final=lower)
    theirs = RIVALS["dpmpp_2m_heun_diffusers"](mixture, noise, sigmas)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_ours_first_order_is_euler(noise: Tensor) -> None:
    sigmas = steps(8, to_zero=True)
    ours = sample_dpm_solver_v3(mixture, noise, sigmas, disable=True, order=1, corrector="none")
    torch.testing.assert_close(ours, RIVALS["euler"](mixture, noise, sigmas), atol=1e-9, rtol=0)
