"""The sampler behind real hosts: k-diffusion's own denoisers, a rectified flow, a plain function.

The hosts' tables are in float32 here, as hosts have them; with tables in float64 the same wrappers agree to 1e-9
(test_order). k-diffusion looks log sigma up in a float32 table, an error of about 1e-7 / 0.005 = 2e-5 of a time step.
Here sigma moves by at most 2.5% a time step, so the sigma that the network is told is off by less than 1e-6 of itself.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from dpm_solver_v3.ems_tools.embedded import SHAPE, FlowHost, VPHost, load_denoiser
from dpm_solver_v3.sampler import LambdaDenoiser, Space, sample_dpm_solver_v3

NAMES = ["CompVisDenoiser", "CompVisVDenoiser", "DiscreteEpsDDPMDenoiser", "DiscreteVDDPMDenoiser", "Denoiser", "flow"]


@pytest.fixture(scope="module")
def embedded():
    """The shipped network, guided, for two classes."""
    return load_denoiser(labels=torch.tensor([3, 6]), guidance=2.0)


@pytest.mark.parametrize("name", NAMES)
def test_hosts_with_float32_tables_agree(name, form, mixture, y_start, sigmas, smooth_ems):
    options = {"ems": smooth_ems, "order": 2, "corrector": "pseudo"}
    expected = form("plain", mixture).sample(sample_dpm_solver_v3, y_start, sigmas(8), **options)
    found = form(name, mixture, torch.float32).sample(sample_dpm_solver_v3, y_start, sigmas(8), **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_embedded_network_in_every_host(name, form, embedded, sigmas):
    """A trained network in float32: the forms differ by rounding, which the network amplifies."""
    torch.manual_seed(4)
    schedule = sigmas(6, 14.0, 0.05).float()
    x = schedule[0] * torch.randn(2, *SHAPE)
    expected = form("plain", embedded).sample(sample_dpm_solver_v3, x, schedule)
    found = form(name, embedded, torch.float32).sample(sample_dpm_solver_v3, x, schedule)
    assert found.dtype == torch.float32
    assert ((found - expected).norm() / expected.norm()).item() < 1e-3


def test_its_first_parameters_are_k_diffusions():
    """So that a host may call it as it calls its own."""
    from k_diffusion.sampling import sample_dpmpp_2m

    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (sample_dpm_solver_v3, sample_dpmpp_2m))
    assert [(p.name, p.default) for p in ours[:6]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[6:])


def test_it_meets_dpmpp_2m_in_the_limit(mixture, y_start, sigmas):
    """Both converge to the ODE's solution: on one schedule of 800 steps they meet."""
    from k_diffusion.sampling import sample_dpmpp_2m

    theirs = sample_dpmpp_2m(mixture, y_start, sigmas(800), disable=True)
    ours = sample_dpm_solver_v3(mixture, y_start, sigmas(800), disable=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_vp_host_re_expresses_the_denoiser_exactly(prediction, mixture, y_start):
    """On trained steps: eps = (y - D) / sigma and v = alpha eps - s D with x = alpha y, s = sigma alpha."""
    host = VPHost(mixture, prediction)
    t = torch.tensor([100, 700])
    a = host.schedule.alphas_cumprod[t].reshape(2, 1, 1, 1)
    alpha, s = a.sqrt(), (1 - a).sqrt()
    x0, noise = torch.randn_like(y_start), torch.randn_like(y_start)
    x = alpha * x0 + s * noise
    d = mixture(x / alpha, (s / alpha).flatten())
    eps = (x - alpha * d) / s
    expected = eps if prediction == "eps" else alpha * eps - s * d
    torch.testing.assert_close(host(x, t), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(host.apply_model(x, t, None), expected, rtol=1e-9, atol=1e-9)


def test_the_vp_host_refuses_other_predictions(mixture):
    with pytest.raises(ValueError, match="prediction must be 'eps' or 'v', not 'x0'"):
        VPHost(mixture, "x0")


def test_the_flow_hosts_velocity_is_noise_less_data(mixture, y_start):
    """u = n - x0 for the x0 and n that the denoiser sees in x."""
    t = torch.tensor([0.3, 0.9], dtype=torch.float64)
    column = t.reshape(2, 1, 1, 1)
    x0 = mixture(y_start / (1 - column), t / (1 - t))
    noise = (y_start - (1 - column) * x0) / column
    torch.testing.assert_close(FlowHost(mixture).velocity(y_start, t), noise - x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(FlowHost(mixture)(y_start, t), x0, rtol=1e-9, atol=1e-9)


def test_the_flow_host_is_finite_at_pure_noise(mixture, y_start):
    """There D is the mean of the data, whatever x."""
    mean = (mixture.weights.reshape(-1, 1, 1, 1) * mixture.means).sum(0) / mixture.weights.sum()
    out = FlowHost(mixture)(y_start / 6, torch.ones(2, dtype=torch.float64))
    assert out.isfinite().all()
    assert out.shape == y_start.shape
    far = mixture(torch.zeros_like(y_start), torch.full((2,), 1e6, dtype=torch.float64))
    torch.testing.assert_close(far[0], mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("space", ["sigma", "flow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_denoiser_seen_in_lambda(dtype, space, form, mixture, y_start):
    model = form("flow" if space == "flow" else "plain", mixture).model
    seen = LambdaDenoiser(model, space)
    y, lam = y_start.to(dtype), 0.3
    expected = mixture(y, Space.SIGMA.level_of(torch.tensor([lam, lam], dtype=torch.float64)))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert seen(y, lam).dtype == dtype
    torch.testing.assert_close(seen(y, lam), expected, rtol=tolerance, atol=tolerance)


def test_a_denoiser_seen_in_lambda_passes_its_arguments_on(y_start):
    seen = []
    LambdaDenoiser(lambda x, sigma, **kwargs: seen.append(kwargs) or x, extra_args={"cond": 1})(y_start, 0.0)
    assert seen == [{"cond": 1}]
