"""The sampler as its callers meet it: schedules, options, dtypes, errors, memory."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpm_solver_v3.sampler import (
    DEFAULTS,
    EMS,
    EMSError,
    FittedSteps,
    Plan,
    Recommendation,
    RecommendationEntry,
    Run,
    SamplingError,
    Settings,
    Space,
    plan_for,
    sample_dpm_solver_v3,
    settings_for,
)
from dpm_solver_v3.sampler.choice import GROWTH_LIMIT
from dpm_solver_v3.sampler.coefficients import Update

FULL: dict[str, Any] = {"order": 3, "corrector": "raised"}


def run(model, x, sigmas, **options):
    return sample_dpm_solver_v3(model, x, sigmas, options.pop("extra_args", None), disable=True, **options)


def levels(*values):
    return torch.tensor(values, dtype=torch.float64)


class Counting:
    """A denoiser that keeps what it was called with."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, x, sigma, **kwargs):
        self.calls.append((x, sigma, kwargs))
        return self.model(x, sigma)


# Schedules


@pytest.mark.parametrize("schedule", [levels(), levels(2.0), levels(2.0, 2.0), levels(0.0)])
def test_a_schedule_without_a_step_returns_x(schedule, mixture, y_start):
    model = Counting(mixture)
    assert run(model, y_start, schedule) is y_start
    assert not model.calls


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_few_steps_use_the_order_they_can(order, steps, mixture, y_start, sigmas, smooth_ems):
    """With as many steps as orders or fewer, a higher `order` changes nothing under lower_order_final."""
    possible = min(order, (steps + 1) // 2)
    found = run(mixture, y_start, sigmas(steps), ems=smooth_ems, order=order, corrector="none")
    expected = run(mixture, y_start, sigmas(steps), ems=smooth_ems, order=possible, corrector="none")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("with_ems", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_last_sigma_of_0_returns_the_last_prediction(steps, with_ems, mixture, y_start, sigmas, smooth_ems):
    seen: list[Any] = []
    schedule = torch.cat([sigmas(steps)[:-1], levels(0.0)])
    ems = smooth_ems if with_ems else None
    out = sample_dpm_solver_v3(mixture, y_start, schedule, None, seen.append, True, ems=ems, **FULL)
    assert len(seen) == steps
    assert torch.equal(out, seen[-1]["denoised"])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_partial_schedule_is_the_rest_of_the_way(order, mixture, y_start, solve_exactly):
    """img2img: from the middle to a level above 0, against the exact solution over that stretch."""
    schedule = torch.linspace(math.log(2.0), math.log(0.4), 121, dtype=torch.float64).exp()
    exact = solve_exactly(mixture, y_start / 3, 2.0, 0.4)
    out = run(mixture, y_start / 3, schedule, order=order, corrector="none")
    torch.testing.assert_close(out, exact, rtol=0, atol={1: 2e-2, 2: 5e-4, 3: 1e-4}[order])


def test_split_sigmas_continue_each_other(mixture, y_start, sigmas, smooth_ems):
    """At order 1 there is no history to lose: two halves are the whole, exactly."""
    whole = run(mixture, y_start, sigmas(8), ems=smooth_ems, order=1, corrector="none")
    half = run(mixture, y_start, sigmas(8)[:5], ems=smooth_ems, order=1, corrector="none")
    torch.testing.assert_close(run(mixture, half, sigmas(8)[4:], ems=smooth_ems, order=1, corrector="none"), whole)


def test_repeated_sigmas_are_one_node(mixture, y_start, smooth_ems):
    model = Counting(mixture)
    found = run(model, y_start, levels(6, 6, 3, 1, 1, 1, 0.4, 0.4), ems=smooth_ems, **FULL)
    assert len(model.calls) == 3
    assert torch.equal(found, run(mixture, y_start, levels(6, 3, 1, 0.4), ems=smooth_ems, **FULL))


@pytest.mark.parametrize("form_name", ["plain", "flow"])
def test_a_rising_schedule_undoes_a_falling_one(form_name, form, mixture, y_start, sigmas, smooth_ems):
    host = form(form_name, mixture)
    options = {"ems": smooth_ems, "order": 3, "corrector": "raised", "lower_order_final": False}
    down = host.sample(sample_dpm_solver_v3, y_start, sigmas(400), **options)
    back = host.sample(sample_dpm_solver_v3, down, sigmas(400).flip(0), **options)
    assert (down - y_start).norm() > 1
    torch.testing.assert_close(back, y_start, rtol=0, atol=5e-3)


@pytest.mark.parametrize("with_ems", [False, True])
def test_a_flow_from_pure_noise_begins_with_the_exact_data_step(with_ems, form, mixture, y_start, smooth_ems):
    """x' = (t'/t) x + ((1 - t') - (1 - t) t'/t) D at t = 1, and nothing of that node is used later."""
    model = form("flow", mixture).model
    noise = y_start / 6
    ems = smooth_ems if with_ems else None
    t = levels(1.0, 0.8, 0.5, 0.2)
    first = 0.8 * noise + 0.2 * model(noise, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(run(model, noise, t[:2], ems=ems, space="flow", **FULL), first)
    whole = run(model, noise, t, ems=ems, space="flow", **FULL)
    torch.testing.assert_close(whole, run(model, first, t[1:], ems=ems, space="flow", **FULL))
    assert whole.isfinite().all()


def test_one_step_of_a_flow_from_1_to_0_is_the_prediction(form, mixture, y_start):
    model = form("flow", mixture).model
    expected = model(y_start / 6, torch.ones(2, dtype=torch.float64))
    assert torch.equal(run(model, y_start / 6, levels(1.0, 0.0), space="flow"), expected)


def test_sigmas_are_followed_as_given(mixture, y_start):
    model = Counting(mixture)
    schedule = levels(5.4321, 3.3333333, 0.987654321, 0.2)
    run(model, y_start, schedule)
    assert [c[1].tolist() for c in model.calls] == [[s, s] for s in schedule[:-1].tolist()]


@pytest.mark.parametrize(
    ("bad", "space", "message"),
    [
        (levels(3, 1, 2), "sigma", r"monotone: from sigmas\[1\] = 1 to sigmas\[2\] = 2 they turn round"),
        (levels(1, 2, 0.5), "sigma", r"monotone: from sigmas\[1\] = 2 to sigmas\[2\] = 0.5"),
        (levels(3, 1, -1), "sigma", r"sigmas\[2\] = -1, but noise levels must be >= 0"),
        (levels(3, math.nan, 1), "sigma", r"sigmas\[1\] is not finite"),
        (levels(math.inf, 1), "sigma", r"sigmas\[0\] is not finite"),
        (levels(0, 1, 2), "sigma", "start at 0, where there is no noise"),
        (
            levels(1.5, 0.5),
            "flow",
            r"sigmas\[0\] = 1.5, but noise levels must be in \[0, 1\] for a rectified-flow model",
        ),
        (torch.ones(2, 2), "sigma", r"must be a tensor \[n \+ 1\], not torch.Size\(\[2, 2\]\)"),
        ([3.0, 1.0], "sigma", r"must be a tensor \[n \+ 1\], not list"),
    ],
)
def test_a_bad_schedule_says_what_and_where(bad, space, message, mixture, y_start):
    model = Counting(mixture)
    with pytest.raises(ValueError, match=message):
        run(model, y_start, bad, space=space)
    assert not model.calls


# Tensors


def test_batches_equal_single_samples(mixture, y_start, sigmas, smooth_ems):
    together = run(mixture, y_start, sigmas(7), ems=smooth_ems, **FULL)
    alone = [run(mixture, y_start[i : i + 1], sigmas(7), ems=smooth_ems, **FULL) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2,), (2, 9), (2, 4, 4), (2, 3, 4, 4)], ids=["2-D", "3-D", "4-D", "5-D"])
def test_latents_of_any_rank(shape, make_mixture, sigmas, smooth_ems, solve_exactly):
    model = make_mixture(shape)
    x = 6 * torch.randn(2, *shape, dtype=torch.float64)
    exact = solve_exactly(model, x, 6.0, 0.15)
    out = run(model, x, sigmas(200), ems=smooth_ems, order=3, corrector="raised")
    assert out.shape == x.shape
    torch.testing.assert_close(out, exact, rtol=0, atol=5e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("with_ems", [False, True])
def test_latents_of_every_precision(with_ems, dtype, tolerance, mixture, y_start, sigmas, smooth_ems):
    """The model sees, and the caller gets back, its own dtype; the distance to float64 is that of the dtype."""
    ems = smooth_ems if with_ems else None
    model = Counting(mixture)
    out = run(model, y_start.to(dtype), sigmas(8), ems=ems, order=2, corrector="pseudo")
    assert out.dtype == dtype
    assert all(x.dtype == sigma.dtype == dtype for x, sigma, _ in model.calls)
    exact = run(mixture, y_start, sigmas(8), ems=ems, order=2, corrector="pseudo")
    assert (out.double() - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_what_the_cpu_gives(dtype, mixture, y_start, sigmas, smooth_ems):
    x, tolerance = y_start.to(dtype), 1e-4 if dtype == torch.float32 else 5e-2
    expected = run(mixture, x, sigmas(6), ems=smooth_ems, **FULL)
    found = run(mixture, x.cuda(), sigmas(6).cuda(), ems=smooth_ems, **FULL)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [0.0, 0.15])
def test_nothing_that_came_in_is_written_to(last, dtype, mixture, y_start, sigmas, smooth_ems):
    schedule = torch.cat([sigmas(5)[:-1], levels(last)])
    x = y_start.to(dtype)
    kept: list[Any] = []

    def model(y, sigma):
        out = mixture(y, sigma)
        kept.extend((t, t.clone()) for t in (y, sigma, out))
        return out

    before, schedule_before = x.clone(), schedule.clone()
    run(model, x, schedule, ems=smooth_ems, **FULL)
    assert torch.equal(x, before)
    assert torch.equal(schedule, schedule_before)
    assert all(torch.equal(now, then) for now, then in kept)


def test_no_gradient_graph_is_kept(mixture, y_start, sigmas):
    assert not run(mixture, y_start.clone().requires_grad_(), sigmas(3)).requires_grad


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("corrector", ["none", "true", "pseudo", "raised"])
def test_few_tensors_are_held_while_the_model_runs(order, corrector, mixture, sigmas, smooth_ems, new_tensors):
    """When memory is scarcest: x, the state before, and at most `order` past values. The model's own last output is
    one more, as a caller's callback may hold it."""
    x, counts = torch.ones(1, 2, 2, 2, dtype=torch.float64), []

    def model(y, sigma):
        counts.append(new_tensors(x.shape) - 1)  # the caller's own x
        return mixture(y, sigma)

    run(model, x, sigmas(9), ems=smooth_ems, order=order, corrector=corrector)
    assert len(counts) == 9
    assert max(counts) <= order + 2 + 1


# The model's side


@pytest.mark.parametrize("corrector", ["none", "true", "pseudo", "raised"])
@pytest.mark.parametrize("last", [0.0, 0.15])
def test_one_call_of_the_model_a_step(last, corrector, mixture, y_start, sigmas):
    model = Counting(mixture)
    run(model, y_start, torch.cat([sigmas(7)[:-1], levels(last)]), order=3, corrector=corrector)
    assert len(model.calls) == 7


def test_extra_args_reach_the_model_and_stay_as_they_are(mixture, y_start, sigmas):
    model, extra = Counting(mixture), {"cond": object(), "cond_scale": 7.0}
    run(model, y_start, sigmas(3), extra_args=extra)
    assert all(call[2] == extra for call in model.calls)
    assert list(extra) == ["cond", "cond_scale"]


def test_the_callback_is_told_what_k_diffusion_tells(mixture, y_start, sigmas):
    seen: list[Any] = []
    model = Counting(mixture)
    sample_dpm_solver_v3(model, y_start, sigmas(5), callback=lambda d: seen.append(dict(d)), disable=True)
    assert [d["i"] for d in seen] == list(range(5))
    for d, (x, sigma, _), level in zip(seen, model.calls, sigmas(5)):
        assert set(d) == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert d["sigma"] == d["sigma_hat"] == level == sigma[0]
        assert torch.equal(d["x"], x)
        assert torch.equal(d["denoised"], mixture(x, sigma))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_from_the_model_names_the_step(value, mixture, y_start, sigmas):
    def model(y, sigma):
        out = mixture(y, sigma)
        if sigma[0] < 1:
            out[0, 0, 0, 0] = value
        return out

    step = int((sigmas(8) >= 1).sum()) + 1
    sigma = f"{sigmas(8)[step - 1].item():.4g}"
    with pytest.raises(SamplingError, match=rf"1 of 16 values .* at step {step} of 8, sigma = {sigma}"):
        run(model, y_start, sigmas(8))


def test_large_finite_values_are_no_error(y_start, sigmas):
    """Their float32 sum overflows; only values that are not finite themselves count."""
    out = run(lambda y, sigma: torch.full_like(y, 1e38), y_start.float(), sigmas(2), order=1, corrector="none")
    assert out.isfinite().all()


@pytest.mark.parametrize("disable", [True, False])
def test_the_progress_bar_can_be_hidden(disable, mixture, y_start, sigmas, capsys):
    sample_dpm_solver_v3(mixture, y_start, sigmas(2), disable=disable)
    assert ("2/2" in capsys.readouterr().err) == (not disable)


def test_a_host_without_tqdm_samples_too(mixture, y_start, sigmas, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
    assert run(mixture, y_start, sigmas(3)).isfinite().all()


# Options


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"order": 4}, "order must be 1, 2 or 3"),
        ({"order": "two"}, "order must be 1, 2 or 3"),
        ({"predictor": "exact"}, "predictor must be one of true, pseudo"),
        ({"corrector": "half"}, "corrector must be one of none, true, pseudo, raised"),
        ({"corrector": None}, "corrector must be one of none, true, pseudo, raised"),
        ({"corrector_below": -1.0}, "corrector_below must be a sigma >= 0"),
        ({"corrector_below": math.nan}, "corrector_below must be a sigma >= 0"),
        ({"corrector_below": "half"}, "corrector_below must be a sigma >= 0"),
        ({"strength": 2.5}, r"strength must lie in \[0, 2\]"),
        ({"strength": math.nan}, r"strength must lie in \[0, 2\]"),
        ({"strength": "full"}, r"strength must lie in \[0, 2\]"),
        ({"lower_order_final": 1}, "lower_order_final must be True or False"),
        ({"space": "latent"}, "unknown space 'latent': choose one of 'sigma', 'flow'"),
    ],
)
def test_a_bad_option_is_named(option, message, mixture, y_start, sigmas):
    with pytest.raises(ValueError, match=message):
        run(mixture, y_start, sigmas(3), **option)


def test_statistics_of_another_model_are_refused(y_start, mixture, sigmas):
    three = EMS.degenerate(3)
    with pytest.raises(EMSError, match="3 channels and the latent has 2"):
        run(mixture, y_start, sigmas(3), ems=three)


@pytest.mark.parametrize("corrector", ["none", "true", "pseudo", "raised"])
def test_strength_0_is_data_prediction(corrector, mixture, y_start, sigmas, smooth_ems):
    options = {"order": 3, "corrector": corrector}
    found = run(mixture, y_start, sigmas(6), ems=smooth_ems, strength=0, **options)
    torch.testing.assert_close(found, run(mixture, y_start, sigmas(6), **options), rtol=1e-13, atol=1e-13)


def test_recommended_strength_0_is_no_file_at_all(mixture, y_start, sigmas, smooth_ems):
    """At "auto": the steps without statistics, of which the calibration knew; not the formula of the recommended order."""
    ems = recommending(smooth_ems, (lambdas_of(sigmas(6)), Settings(order=3, strength=0.0)))
    found = run(mixture, y_start, sigmas(6), ems=ems, guidance=4.0)
    assert torch.equal(found, run(mixture, y_start, sigmas(6), guidance=4.0))
    assert not torch.equal(found, run(mixture, y_start, sigmas(6), order=3))


def test_strength_scales_the_statistics(mixture, y_start, sigmas, smooth_ems):
    found = run(mixture, y_start, sigmas(6), ems=smooth_ems, strength=0.5, **FULL)
    assert torch.equal(found, run(mixture, y_start, sigmas(6), ems=smooth_ems.scaled(0.5), **FULL))


def test_corrector_below_restricts_the_corrector_to_low_noise(mixture, y_start, sigmas):
    """Nodes above it go uncorrected: 0 is no corrector, infinity is all nodes, trajectories part at the level."""
    schedule = sigmas(8)

    def states(**options):
        model = Counting(mixture)
        run(model, y_start, schedule, order=2, **options)
        return [call[0] for call in model.calls]

    without, below, always = (
        states(corrector="none"),
        states(corrector="pseudo", corrector_below=schedule[4].item() * 1.001),
        states(corrector="pseudo"),
    )
    same = [torch.equal(a, b) for a, b in zip(without, below)]
    assert same == [True] * 5 + [False] * 3  # node 4 is corrected first, and node 5 is the first to show it
    zero = states(corrector="pseudo", corrector_below=0)
    assert all(torch.equal(a, b) for a, b in zip(zero, without))
    assert not torch.equal(always[2], without[2])


def test_lower_order_final_lowers_the_last_steps_only(mixture, y_start, sigmas):
    def states(flag):
        model = Counting(mixture)
        out = run(model, y_start, sigmas(8), order=3, corrector="none", lower_order_final=flag)
        return [call[0] for call in model.calls] + [out]

    same = [torch.equal(a, b) for a, b in zip(states(True), states(False))]
    assert same == [True] * 7 + [False] * 2  # steps 7 and 8 are of orders 2 and 1


@pytest.mark.parametrize("form_name", ["plain", "flow"])
@pytest.mark.parametrize(("last", "counted"), [(0.03, False), (0.2, True)])
def test_a_step_to_0_from_next_to_nothing_is_not_the_last_one(last, counted, form_name, form, mixture, y_start, smooth_ems):
    """To a tiny sigma and then 0: what the run that ends at the tiny sigma gives, denoised. Elsewhere the step to 0 counts."""
    space = form(form_name, mixture)
    sigmas = levels(10.0, 4.0, 1.5, 0.6, last, 0.0)
    options = {"ems": smooth_ems, "order": 3, "corrector": "none"}
    whole = space.sample(sample_dpm_solver_v3, y_start, sigmas, **options)
    end = space.sample(sample_dpm_solver_v3, y_start, sigmas[:-1], **options)
    denoised = mixture(end, torch.full((len(end),), last, dtype=torch.float64))
    assert torch.allclose(whole, denoised, atol=1e-9) != counted
    free = {**options, "lower_order_final": False}
    end = space.sample(sample_dpm_solver_v3, y_start, sigmas[:-1], **free)
    denoised = mixture(end, torch.full((len(end),), last, dtype=torch.float64))
    assert torch.allclose(space.sample(sample_dpm_solver_v3, y_start, sigmas, **free), denoised, atol=1e-9)


def test_a_plan_is_made_once_a_schedule(mixture, y_start, sigmas, smooth_ems):
    """By content: hosts make new statistics objects from the same file for every picture."""
    same = replace(smooth_ems)
    assert plan_for(sigmas(6), ems=smooth_ems) is plan_for(sigmas(6), ems=same)
    assert plan_for(sigmas(6), ems=smooth_ems) is not plan_for(sigmas(7), ems=smooth_ems)
    assert plan_for(sigmas(6), ems=smooth_ems) is not plan_for(sigmas(6), ems=smooth_ems.scaled(0.5))


# What "auto" means


def recommending(ems, *entries):
    """`ems` with these (lambdas, settings) recommended."""
    return EMS(
        ems.lambdas,
        ems.l,
        ems.s,
        ems.b,
        recommendation=Recommendation(tuple(RecommendationEntry(tuple(a), b) for a, b in entries)),
    )


def lambdas_of(schedule):
    return (-schedule.log()).tolist()


def test_options_left_at_auto_beside_one_that_is_set_are_the_default(mixture, y_start, sigmas):
    some = run(mixture, y_start, sigmas(6), order=DEFAULTS.order)
    assert torch.equal(some, run(mixture, y_start, sigmas(6), **DEFAULTS.__dict__))


def test_auto_with_statistics_is_their_default(mixture, y_start, sigmas, smooth_ems):
    expected = run(mixture, y_start, sigmas(6), ems=smooth_ems, **DEFAULTS.__dict__)
    assert torch.equal(run(mixture, y_start, sigmas(6), ems=smooth_ems), expected)


@pytest.mark.parametrize("last", [0.0, 0.15])
def test_auto_follows_the_recommendation(last, mixture, y_start, sigmas, smooth_ems):
    advised = Settings(
        order=3, predictor="pseudo", corrector="true", corrector_below=2.0, lower_order_final=False, strength=0.4
    )
    schedule = torch.cat([sigmas(6)[:-1], levels(last)])
    ems = recommending(smooth_ems, ([v for v in lambdas_of(schedule) if v < math.inf], advised))
    expected = run(mixture, y_start, schedule, ems=smooth_ems, **advised.__dict__)
    assert torch.equal(run(mixture, y_start, schedule, ems=ems), expected)
    other = sigmas(7)  # measured elsewhere, statistics do nothing: the picture is that without them
    assert torch.equal(run(mixture, y_start, other, ems=ems), run(mixture, y_start, other))


def test_an_explicit_option_wins_over_the_recommendation(mixture, y_start, sigmas, smooth_ems):
    ems = recommending(smooth_ems, (lambdas_of(sigmas(6)), Settings(order=3, corrector="true", strength=0.4)))
    expected = run(mixture, y_start, sigmas(6), ems=smooth_ems, order=1, corrector="true", strength=0.4)
    assert torch.equal(run(mixture, y_start, sigmas(6), ems=ems, order=1), expected)


@pytest.mark.parametrize(("steps", "high", "expected"), [(5, 6.0, 1), (6, 6.0, 1), (12, 6.0, 2), (30, 6.0, 2), (10, 1.0, 3)])
def test_the_nearest_schedule_is_recommended(steps, high, expected, sigmas):
    """By the number of steps first, then by where the nodes lie."""
    advice = Recommendation(
        (
            RecommendationEntry(tuple(lambdas_of(sigmas(5))), Settings(order=1)),
            RecommendationEntry(tuple(lambdas_of(sigmas(10))), Settings(order=2)),
            RecommendationEntry(tuple(lambdas_of(sigmas(10, 1.0))), Settings(order=3)),
        )
    )
    assert advice.best_for(lambdas_of(sigmas(steps, high))).order == expected


def test_no_recommendation_where_there_is_nothing_to_compare(sigmas):
    assert Recommendation().best_for([0.0, 1.0]) is None
    entry = RecommendationEntry(tuple(lambdas_of(sigmas(5))), Settings())
    assert Recommendation((entry,)).best_for([0.0]) is None
    assert Recommendation((RecommendationEntry((0.0,), Settings(order=1)),)).best_for([0.0, 1.0]).order == 1


def wild_statistics(recommendation: Recommendation | None = None) -> EMS:
    """s of 6 everywhere: f grows by e^6 for each unit of lambda."""
    lambdas = torch.linspace(-5, 5, 41, dtype=torch.float64)
    ones = torch.ones(41, 3, dtype=torch.float64)
    return EMS(lambdas, ones, 6 * ones, 0 * ones, recommendation=recommendation)


def test_growth_is_the_largest_integral_of_s_over_a_step() -> None:
    assert wild_statistics().growth(torch.tensor([-4.0, -3.0, -1.5])) == pytest.approx(9.0)
    assert wild_statistics().growth(torch.tensor([-9.0, -4.5])) == pytest.approx(3.0)  # s = 0 outside the grid
    assert EMS.degenerate().growth(torch.tensor([-1.0, 1.0])) == 0
    assert wild_statistics().growth(torch.tensor([1.0])) == 0


def test_statistics_are_held_back_on_schedules_that_they_were_not_measured_on() -> None:
    sigmas = torch.tensor([10.0, 2.0, 0.5, 0.1, 0.0])
    auto = dict.fromkeys(("order", "predictor", "corrector", "corrector_below", "lower_order_final", "strength"), "auto")
    assert wild_statistics().growth(-sigmas[:-1].log()) > GROWTH_LIMIT
    assert settings_for(sigmas, Space.SIGMA, wild_statistics(), auto).strength == 0
    assert settings_for(sigmas, Space.SIGMA, replaced(wild_statistics(), 0.5), auto).strength == 1
    assert settings_for(sigmas, Space.SIGMA, wild_statistics(), {**auto, "strength": 1.0}).strength == 1.0
    measured = Recommendation((RecommendationEntry(tuple((-sigmas[:-1].log()).tolist()), Settings()),))
    assert settings_for(sigmas, Space.SIGMA, wild_statistics(measured), auto).strength == 1.0
    other = torch.tensor([10.0, 3.0, 0.5, 0.1, 0.0])
    assert settings_for(other, Space.SIGMA, wild_statistics(measured), auto).strength == 0


def test_the_defaults_without_statistics_depend_on_the_guidance() -> None:
    auto = dict.fromkeys(("order", "predictor", "corrector", "corrector_below", "lower_order_final", "strength"), "auto")
    found = [settings_for(torch.tensor([10.0, 1.0, 0.0]), Space.SIGMA, None, auto, g) for g in (None, 1.0, 4.0, 7.5)]
    assert [s.corrector for s in found] == ["pseudo", "pseudo", "pseudo", "none"]


def test_statistics_beyond_what_a_step_needs_are_left_out_and_named() -> None:
    sigmas = torch.tensor([80.0, 20.0, 5.0, 1.0, 0.2, 0.05, 0.01])
    x = torch.ones(1, 3, 4, 4) * 80
    with pytest.warns(RuntimeWarning, match=r"the statistics \(EMS\) would multiply the latent"):
        found = run(lambda x, sigma: x * 0.9, x, sigmas, ems=replaced(wild_statistics(), 200.0), strength=2.0)
    torch.testing.assert_close(found, run(lambda x, sigma: x * 0.9, x, sigmas, strength=0.0))


def test_an_l_of_minus_300_does_not_reach_the_picture(mixture, y_start) -> None:
    """One step: without the bound its result was NaN, and was returned."""
    ems = EMS(levels(-3, 3), torch.full((2, 1), -300.0), torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.warns(RuntimeWarning, match="sampling without them"):
        found = run(mixture, y_start, levels(6.0, 0.15), ems=ems)
    torch.testing.assert_close(found, run(mixture, y_start, levels(6.0, 0.15)))


def test_huge_fitted_coefficients_do_not_reach_the_picture(mixture, y_start) -> None:
    steps = FittedSteps((-1.7, 0.0), (0.5, 0.0), ((1e6,), (1e6, -1e6)))
    ems = replace(EMS.degenerate(), recommendation=Recommendation(fitted=(steps,)))
    sigmas = torch.cat([(-levels(*steps.lambdas)).exp(), levels(0.0)])
    with pytest.warns(RuntimeWarning, match="fitted coefficients would multiply the latent"):
        found = run(mixture, y_start, sigmas, ems=ems)
    torch.testing.assert_close(found, run(mixture, y_start, sigmas))


def test_a_result_that_is_not_finite_is_never_returned(mixture, y_start, monkeypatch) -> None:
    """Statistics that overflow on this model though their coefficients look harmless: the run is done again without."""
    monkeypatch.setattr(Plan, "is_sane", lambda plan, space: True)
    ems = EMS(levels(-3, 3), torch.full((2, 1), -300.0), torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.warns(RuntimeWarning, match=r"grew beyond all bounds before the end.*Sampling again without"):
        found = run(mixture, y_start, levels(6.0, 0.15), ems=ems)
    torch.testing.assert_close(found, run(mixture, y_start, levels(6.0, 0.15)))


def in_two_updates(plan: Plan, model, x: torch.Tensor) -> torch.Tensor:
    """The paper's algorithm 2 word by word: redo the last step with the new evaluation, then go on from there."""

    def wide(coefficient: torch.Tensor) -> torch.Tensor:
        return coefficient.reshape(-1, *(1,) * (x.ndim - 2)) if coefficient.ndim == 1 else coefficient

    def applied(update: Update, x: torch.Tensor) -> torch.Tensor:
        moved = sum((wide(w) * m[node] for w, node in zip(update.weights, update.nodes, strict=True)), wide(update.offset))
        return wide(update.decay) * x + moved

    before, m = x, {}
    for i, step in enumerate(plan.steps):
        denoised = model(x, levels(plan.levels[i]).expand(len(x)))
        m[i] = denoised - wide(step.slope) * x
        before = x if step.corrector is None else applied(step.corrector, before)
        x = applied(step.predictor, before)
    return x


@pytest.mark.parametrize("space", ["sigma", "flow"])
@pytest.mark.parametrize("options", [{}, {"order": 2, "corrector": "none"}, {"order": 2, "corrector": "pseudo"}, FULL])
@pytest.mark.parametrize("kind", ["none", "per channel", "per element"])
def test_correcting_and_going_on_in_one_update_is_both(kind, options, space, form, mixture, y_start, smooth_ems) -> None:
    statistics = {"none": None, "per channel": smooth_ems, "per element": per_element(smooth_ems, y_start.shape[2:])}
    schedule = levels(0.9, 0.7, 0.5, 0.3, 0.1, 0.03) * (1 if space == "flow" else 6)
    model = form("flow", mixture).model if space == "flow" else mixture
    found = run(model, y_start, schedule, ems=statistics[kind], space=space, **options)
    plan = plan_for(schedule, ems=statistics[kind], space=space, **options)
    torch.testing.assert_close(found, in_two_updates(plan, model, y_start), rtol=1e-12, atol=1e-12)


def per_element(ems: EMS, spatial: torch.Size) -> EMS:
    """Statistics of every element that differ from element to element."""
    share = torch.linspace(0.5, 1.5, spatial.numel(), dtype=torch.float64).reshape(spatial)
    l, s, b = (v.reshape(*v.shape, *(1,) * len(spatial)) * share for v in (ems.l, ems.s, ems.b))
    return EMS(ems.lambdas, l, s, b)


@pytest.mark.parametrize("options", [{}, {"order": 2, "corrector": "none"}, FULL])
def test_what_a_host_adds_between_steps_is_not_corrected_away(options, mixture, y_start, sigmas) -> None:
    """Of a model whose every answer is 0, x falls with sigma; what was added to it falls with it from there on."""
    plan = plan_for(sigmas(5), **options)
    found = Run(plan, y_start)
    while not found.done:
        if found.i == 3:
            found.move(torch.ones_like(y_start))
        found.observe(torch.zeros_like(y_start))
        found.advance()
    start, middle, end = (plan.levels[i] for i in (0, 3, -1))
    torch.testing.assert_close(found.x, y_start * (end / start) + end / middle)


def test_a_model_that_returns_another_shape_is_told(mixture, y_start, sigmas) -> None:
    with pytest.raises(SamplingError, match=r"returned a tensor of shape \(2, 1, 2, 2\) for a latent of shape \(2, 2, 2, 2\)"):
        run(lambda x, sigma: mixture(x, sigma)[:, :1], y_start, sigmas(4))


def test_a_model_that_writes_into_its_input_gives_the_same_picture(mixture, y_start, sigmas) -> None:
    def writes(x: Tensor, sigma: Tensor) -> Tensor:
        denoised = mixture(x, sigma)
        x.zero_()
        return denoised

    start = y_start.clone()
    for options in ({}, {"order": 3, "corrector": "pseudo"}):
        assert torch.equal(run(writes, start, sigmas(6), **options), run(mixture, y_start, sigmas(6), **options))
    assert torch.equal(start, y_start)


@pytest.mark.parametrize(("buffers", "first"), [(1, 0), (1, 2), (2, 0)])
def test_a_model_that_reuses_its_output_gives_the_same_picture(buffers, first, mixture, y_start, sigmas) -> None:
    """One buffer, one from the third call on (as after a warm-up), or two in turn."""
    kept = [torch.empty_like(y_start) for _ in range(buffers)]
    for options in ({}, FULL):
        calls = itertools.count()

        def model(x: torch.Tensor, sigma: torch.Tensor, calls: itertools.count[int] = calls) -> torch.Tensor:
            i, denoised = next(calls), mixture(x, sigma)
            return denoised if i < first else kept[i % buffers].copy_(denoised)

        assert torch.equal(run(model, y_start, sigmas(6), **options), run(mixture, y_start, sigmas(6), **options))


@pytest.mark.parametrize("share", [0.1, 1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("options", [{}, {"order": 2, "corrector": "pseudo"}, FULL])
def test_a_level_that_nearly_repeats_changes_little(options, share, mixture, y_start, sigmas, solve_exactly) -> None:
    """The corrected y there lies off the one that the model saw; divided by so short a step it passed for a slope."""
    plain = sigmas(8)
    doubled = torch.cat([plain[:4], plain[3:4] * (1 - share), plain[4:]])
    exact = solve_exactly(mixture, y_start, plain[0].item(), plain[-1].item())
    cases = ((plain, options), (doubled, options), (doubled, {**options, "corrector": "none"}))
    before, after, uncorrected = ((run(mixture, y_start, s, **o) - exact).square().mean().item() for s, o in cases)
    assert after < max(3 * before, uncorrected)


def test_unsampling_at_the_defaults_stays_bounded(mixture, y_start, sigmas, solve_exactly) -> None:
    """Up a schedule that begins, as ComfyUI's FlipSigmas does, with one huge step from next to nothing."""
    x0 = solve_exactly(mixture, y_start, 6.0, 1e-4)
    rising = torch.cat([levels(1e-4), sigmas(9).flip(0)])
    up = run(mixture, x0, rising)
    assert up.square().mean().sqrt() < 2 * y_start.square().mean().sqrt()
    assert torch.equal(up, run(mixture, x0, rising, corrector="none"))


def test_a_flow_can_be_unsampled_up_to_pure_noise(form, mixture, y_start) -> None:
    """The last step is the exact first-order one: at t = 1 x is (x - (1 - t) D) / t of the step before."""
    flow = form("flow", mixture)
    t = levels(0.2, 0.5, 0.8, 1.0)
    x = y_start / 7
    up = run(flow.model, x, t, space="flow", lower_order_final=False)
    before = run(flow.model, x, t[:-1], space="flow", lower_order_final=False)
    denoised = flow.model(before, t[2].expand(len(x)))
    torch.testing.assert_close(up, (before - 0.2 * denoised) / 0.8, rtol=1e-9, atol=1e-9)


def replaced(ems: EMS, s: float) -> EMS:
    return EMS(ems.lambdas, ems.l, torch.full_like(ems.s, s), ems.b)
