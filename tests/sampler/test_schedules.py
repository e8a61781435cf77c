"""Noise schedules and step schedules against closed forms and against k-diffusion's own tables."""

from __future__ import annotations

import math

import pytest
import torch

from dpm_solver_v3.sampler import (
    EDM,
    Flow,
    LevelTable,
    Space,
    VPContinuous,
    VPDiscrete,
    cosine_time,
    half_corrector_sigma,
    karras,
    quadratic_time,
    sample_dpm_solver_v3,
    unfitted_from,
    unfitted_steps,
    uniform_lambda,
    uniform_time,
)

SD = VPDiscrete.linear()
SCHEDULES = {
    "vp discrete": SD,
    "vp continuous": VPContinuous(),
    "edm": EDM(),
    "flow": Flow(),
    "shifted flow": Flow(shift=3.0),
}
STEPS = {"time": uniform_time, "quadratic": quadratic_time, "lambda": uniform_lambda, "karras": karras}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
every_steps = pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def ends(schedule):
    return schedule.level_at(f64(schedule.time_max, schedule.time_min)).tolist()


@every_steps
@every_schedule
@pytest.mark.parametrize("to_zero", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_n_steps_run_down_from_the_noisiest_level(n, to_zero, schedule, steps):
    levels = steps(schedule, n, to_zero=to_zero)
    high, low = ends(schedule)
    assert levels.shape == (n + 1,)
    assert levels.dtype == torch.float64
    assert (levels.diff() < 0).all()
    assert levels[0].item() == pytest.approx(high, rel=1e-12)
    assert levels[-1].item() == pytest.approx(0 if to_zero else low, rel=1e-12)
    if to_zero and n > 1:
        assert levels[-2].item() == pytest.approx(low, rel=1e-12)


@every_steps
@every_schedule
def test_no_steps_and_fewer(schedule, steps):
    assert steps(schedule, 0).shape == (0,)
    with pytest.raises(ValueError, match="number of steps must be at least 0, not -1"):
        steps(schedule, -1)


@every_schedule
def test_uniform_time_halves_time(schedule):
    middle = (schedule.time_max + schedule.time_min) / 2
    assert uniform_time(schedule, 2)[1] == schedule.level_at(f64(middle))


@every_schedule
def test_quadratic_time_halves_the_root_of_time(schedule):
    middle = ((schedule.time_max**0.5 + schedule.time_min**0.5) / 2) ** 2
    torch.testing.assert_close(quadratic_time(schedule, 2)[1:2], schedule.level_at(f64(middle)))


@pytest.mark.parametrize("schedule", [SD, VPContinuous(), EDM(), Flow(time_max=0.99)], ids=["vp discrete", "vp", "edm", "flow"])
def test_uniform_lambda_is_uniform_in_lambda(schedule):
    steps = schedule.space.lambda_of(uniform_lambda(schedule, 7)).diff()
    torch.testing.assert_close(steps, steps.mean().expand(7))


def test_uniform_lambda_of_a_flow_from_1_has_its_other_nodes_uniform_from_0_999():
    levels = uniform_lambda(Flow(), 6)
    lam = Space.FLOW.lambda_of(levels)
    first = math.log(0.001 / 0.999)
    assert levels[0] == 1
    torch.testing.assert_close(lam[1:], first + (lam[-1] - first) * torch.arange(1, 7, dtype=torch.float64) / 6)


@pytest.mark.parametrize("rho", [1.0, 5.0, 7.0])
@pytest.mark.parametrize("n", [1, 5, 18])
def test_karras_is_k_diffusions(n, rho):
    from k_diffusion.sampling import get_sigmas_karras

    theirs = get_sigmas_karras(n, 0.002, 80.0, rho)
    torch.testing.assert_close(karras(EDM(), n, rho=rho, to_zero=True), theirs.double(), rtol=1e-5, atol=5e-6)


def test_uniform_time_of_stable_diffusion_is_k_diffusions_get_sigmas(make_mixture):
    """CompVisDenoiser.get_sigmas: uniform in time steps 999 .. 0, log sigma interpolated, then 0. Tables in float32."""
    from k_diffusion.external import DiscreteEpsDDPMDenoiser

    theirs = DiscreteEpsDDPMDenoiser(None, SD.alphas_cumprod.float(), quantize=False)
    for n in (2, 7, 20):
        torch.testing.assert_close(uniform_time(SD, n, to_zero=True), theirs.get_sigmas(n).double(), rtol=2e-4, atol=1e-7)


def test_stable_diffusions_table():
    """The published range of sigma of SD 1.x, and its trained steps met exactly."""
    assert ends(SD) == pytest.approx([14.6146, 0.0292], abs=1e-4)
    a = SD.alphas_cumprod
    times = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(SD.level_at(times), ((1 - a) / a).sqrt(), rtol=1e-9, atol=0)


def test_between_trained_steps_log_sigma_is_linear():
    low, middle, high = SD.level_at(f64(0.500, 0.5005, 0.501)).log()
    torch.testing.assert_close(middle, (low + high) / 2)


def test_times_outside_the_trained_steps_take_the_nearest():
    assert SD.level_at(f64(0.0, 1.5)).tolist() == [ends(SD)[1], ends(SD)[0]]


def test_linear_betas_without_the_root_are_ddpms():
    """DDPM: beta from 1e-4 to 0.02; alpha-bar_1 = 1 - 1e-4."""
    ddpm = VPDiscrete.linear(1e-4, 0.02, 1000, sqrt=False)
    assert ddpm.alphas_cumprod[0].item() == pytest.approx(1 - 1e-4, rel=1e-12)
    betas = 1 - ddpm.alphas_cumprod[1:] / ddpm.alphas_cumprod[:-1]
    torch.testing.assert_close(betas.diff(), torch.full_like(betas[1:], 0.0199 / 999), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "bad",
    [
        torch.tensor([0.5]),
        torch.ones(2, 2) / 2,
        torch.tensor([0.5, 0.9]),
        torch.tensor([1.0, 0.5]),
        torch.tensor([0.5, 0.0]),
    ],
)
def test_a_table_that_is_no_alpha_bar_is_refused(bad):
    with pytest.raises(ValueError, match=r"alphas_cumprod must be a decreasing tensor \[N\] of values in \(0, 1\)"):
        VPDiscrete(bad)


@pytest.mark.parametrize("time", [1e-3, 0.1, 0.5, 1.0])
def test_the_continuous_vp_schedule_in_closed_form(time):
    """alpha = exp(-(19.9 t^2 / 4 + 0.1 t / 2)), sigma = sqrt(1 - alpha^2) / alpha."""
    alpha = math.exp(-19.9 * time**2 / 4 - 0.1 * time / 2)
    expected = math.sqrt(1 - alpha**2) / alpha
    assert VPContinuous().level_at(f64(time)).item() == pytest.approx(expected, rel=1e-10)


def test_edms_time_is_sigma():
    assert EDM().level_at(f64(0.5, 80.0)).tolist() == [0.5, 80.0]
    assert ends(EDM(0.03, 14.6)) == [14.6, 0.03]


@pytest.mark.parametrize(("shift", "time", "level"), [(1.0, 0.3, 0.3), (3.0, 0.5, 0.75), (3.0, 1.0, 1.0), (3.0, 0.0, 0.0)])
def test_the_shift_of_a_flow(shift, time, level):
    assert Flow(shift).level_at(f64(time)).item() == pytest.approx(level)


@pytest.mark.parametrize(
    ("schedule", "sigma"),
    [
        (SD, float(((1 - SD.alphas_cumprod[499]) / SD.alphas_cumprod[499]).sqrt())),
        (EDM(), 0.5),
        (Flow(), 1.0),
        (Flow(3.0), 3.0),
        (VPContinuous(), math.sqrt(math.expm1(19.9 / 8 + 0.05))),
    ],
)
def test_the_half_correctors_sigma_is_that_of_time_one_half(schedule, sigma):
    """On Stable Diffusion the trained step 499."""
    assert half_corrector_sigma(schedule) == pytest.approx(sigma, rel=1e-12)


@pytest.mark.parametrize("space", list(Space))
def test_levels_and_lambdas_are_each_others_inverse(space):
    lam = torch.linspace(-5, 5, 21, dtype=torch.float64)
    level = space.level_of(lam)
    torch.testing.assert_close(space.lambda_of(level), lam)
    sigma = (-lam).exp()
    torch.testing.assert_close(level, sigma / (1 + sigma) if space is Space.FLOW else sigma)
    torch.testing.assert_close(space.alpha_of(level), 1 / (1 + sigma) if space is Space.FLOW else torch.ones_like(lam))


def test_lambda_at_the_ends():
    assert Space.SIGMA.lambda_of(f64(0.0)).item() == math.inf
    assert Space.FLOW.lambda_of(f64(0.0, 1.0)).tolist() == [math.inf, -math.inf]


def test_vp_between_two_sigmas():
    made = VPContinuous.between(0.02, 80.0)
    assert torch.allclose(made.level_at(f64(made.time_min, made.time_max)), f64(0.02, 80.0), rtol=1e-12)


HOST_EDM = LevelTable(torch.linspace(math.log(0.002), math.log(120), 1000, dtype=torch.float64).exp())
ZERO_SNR = LevelTable(torch.cat([SD.level_at(torch.arange(1, 1000, dtype=torch.float64) / 1000), f64(4518.0)]))
"""ComfyUI's tables of an EDM model and of a v model with zero terminal SNR."""


@pytest.mark.parametrize("schedule", [EDM(), HOST_EDM, ZERO_SNR, VPContinuous()], ids=["edm", "edm table", "zero snr", "vp"])
def test_without_a_fit_a_wide_noise_range_is_no_waste(schedule, mixture):
    """On a closed-form model in 5, 8 and 12 steps, Karras steps had 4 to 800 times the error."""
    high = schedule.level_at(f64(schedule.time_max))
    noise = torch.randn(32, 2, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def end(levels, **options):
        return sample_dpm_solver_v3(mixture, noise * levels[0], levels, disable=True, **options)

    fine = torch.cat([torch.linspace(high.log().item(), math.log(0.002), 300, dtype=torch.float64).exp(), f64(0.0)])
    exact = end(fine, order=3, corrector="none")
    for n in (5, 8, 12):
        mine, theirs, equal = (
            (end(levels) - exact).square().flatten(1).mean(1).log().mean().exp()
            for levels in (
                unfitted_steps(schedule, n)[1],
                karras(schedule, n, to_zero=True),
                cosine_time(schedule, n, share=0.0, to_zero=True),
            )
        )
        assert mine < theirs / 2 and mine < equal


def test_stable_diffusions_range_keeps_karras_steps_from_eight_on():
    table = LevelTable(SD.level_at(torch.arange(1, 1001, dtype=torch.float64) / 1000))
    ends_only = LevelTable(f64(0.0292, 14.61))  # all that a host may tell
    assert [unfitted_steps(table, n)[0] for n in (7, 8, 20)] == ["half-cosine", "Karras", "Karras"]
    assert [unfitted_steps(ends_only, n)[0] for n in (7, 8, 20)] == ["cosine", "Karras", "Karras"]
    assert unfitted_steps(EDM(), 20)[0] == "Karras" and unfitted_steps(ZERO_SNR, 20)[0] == "cosine"


@pytest.mark.parametrize("schedule", [SD, EDM(), ZERO_SNR, VPContinuous(), Flow(shift=3.0)])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_the_last_part_of_unfitted_steps_follows_from_where_it_begins(schedule, steps):
    """As hosts cut it off for image to image, of so many steps that the kind does not change with their number."""
    whole = unfitted_steps(schedule, 24)[1]
    found = unfitted_from(schedule, whole[-steps - 1].item(), steps)
    assert torch.allclose(found, whole[-steps - 1 :], rtol=1e-3, atol=0)
    assert torch.equal(found[0], whole[-steps - 1])
