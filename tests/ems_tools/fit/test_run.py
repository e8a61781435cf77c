"""Fitted few-step settings: the sampler follows them, the fit earns them on unseen noise, the file keeps and checks them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dpm_solver_v3.ems_tools.cli.main import main
from dpm_solver_v3.ems_tools.compute import EFFORTS, job_for, plan_for, with_fit
from dpm_solver_v3.ems_tools.estimate.job import Job, JobState, uniform_grid
from dpm_solver_v3.ems_tools.estimate.run import estimate_moments
from dpm_solver_v3.ems_tools.estimate.source import Source
from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.layout import fitted_row, fitted_values
from dpm_solver_v3.ems_tools.file.reader import decode_ems_file
from dpm_solver_v3.ems_tools.file.rows import MAX_DECAY, MAX_ROW, MAX_WEIGHT, EMSMeta, FittedRow
from dpm_solver_v3.ems_tools.fit import candidates
from dpm_solver_v3.ems_tools.fit import run as fit_module
from dpm_solver_v3.ems_tools.fit.formulas import FORMULAS, OWN, formula_steps
from dpm_solver_v3.ems_tools.fit.judge import Rivals, judged_row
from dpm_solver_v3.ems_tools.fit.panel import entrants
from dpm_solver_v3.ems_tools.fit.refine import refine
from dpm_solver_v3.ems_tools.fit.run import FitPlan, evaluations_of_fit, fit_steps, forget
from dpm_solver_v3.ems_tools.fit.spacing import CANDIDATES, Range, Spacing
from dpm_solver_v3.ems_tools.fit.steps import closed_loop, least_squares, objective, rounded
from dpm_solver_v3.ems_tools.trajectory import Runner, Trajectories, few_steps, teach
from dpm_solver_v3.sampler import (
    EDM,
    EMS,
    EMSError,
    FittedSteps,
    Recommendation,
    Space,
    VPContinuous,
    karras,
    sample_dpm_solver_v3,
    unfitted_steps,
    uniform_lambda,
)
from loading import benchmark

LAMBDAS = (-2.0, -0.5, 0.8)
DDIM = FittedSteps(
    LAMBDAS,
    (math.exp(-1.5), math.exp(-1.3), 0.0),
    ((1 - math.exp(-1.5),), (0.0, 1 - math.exp(-1.3)), (0.0, 0.0, 1.0)),
)
"""First-order steps, written as fitted ones."""


def ems_with(fitted: FittedSteps | None) -> EMS:
    recommendation = None if fitted is None else Recommendation((), (fitted,))
    return dataclasses.replace(EMS.degenerate(2), recommendation=recommendation)


def levels_of(lambdas, space=Space.SIGMA):
    return space.level_of(torch.tensor([*lambdas, math.inf], dtype=torch.float64))


# --- The sampler


@pytest.mark.parametrize("space", list(Space))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_sampler_follows_fitted_coefficients(mixture, space, dtype) -> None:
    """DDIM's coefficients give DDIM, in both spaces."""
    levels = levels_of(LAMBDAS, space)
    x = (torch.randn(2, 2, 2, 2, dtype=torch.float64) * levels[0]).to(dtype)
    model = mixture if space is Space.SIGMA else lambda x, t: mixture(x / (1 - t)[:, None, None, None], t / (1 - t))
    options = {"space": space, "disable": True}
    fitted = sample_dpm_solver_v3(model, x, levels, ems=ems_with(DDIM), **options)
    ddim = sample_dpm_solver_v3(model, x, levels, order=1, corrector="none", **options)
    assert fitted.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert (fitted - ddim).abs().max() < tolerance


def test_older_evaluations_are_used(mixture) -> None:
    """Every D of the run can enter every later step: against the formula written out."""
    steps = FittedSteps(LAMBDAS, (0.3, 0.2, 0.1), ((0.6,), (0.3, 0.4), (0.2, -0.3, 1.0)), 1.1)
    sigmas = levels_of(LAMBDAS)
    y = torch.randn(3, 2, 2, 2, dtype=torch.float64) * sigmas[0]
    found = sample_dpm_solver_v3(mixture, y, sigmas, ems=ems_with(steps), disable=True)
    y = y * 1.1
    seen: list[torch.Tensor] = []
    for i in range(3):
        seen.append(mixture(y, sigmas[i].expand(3)))
        y = steps.decay[i] * y + sum(w * D for w, D in zip(steps.weights[i], seen, strict=True))
    assert (found - y).abs().max() < 1e-12


@pytest.mark.parametrize("change", [{"order": 2}, {"strength": 1.0}, {"corrector": "pseudo"}])
def test_a_chosen_option_or_another_schedule_switches_them_off(mixture, change) -> None:
    """They apply with every option at "auto", and on their own schedule only; elsewhere all is as without a file."""
    steps = FittedSteps(LAMBDAS, (0.3, 0.2, 0.1), ((0.6,), (0.3, 0.4), (0.2, -0.3, 1.0)))
    x = torch.randn(1, 2, 2, 2, dtype=torch.float64) * 7
    sigmas = levels_of(LAMBDAS)
    other = torch.cat([sigmas[:1], sigmas[1:2] * 1.01, sigmas[2:]])
    cases = [(sigmas, change), (other, {}), (sigmas[:-1], {}), (sigmas[1:], {})]
    for levels, options in cases:
        found = sample_dpm_solver_v3(mixture, x, levels, ems=ems_with(steps), disable=True, **options)
        plain = sample_dpm_solver_v3(mixture, x, levels, disable=True, **options)
        assert torch.allclose(found, plain, atol=1e-12)
    used = sample_dpm_solver_v3(mixture, x, sigmas, ems=ems_with(steps), disable=True)
    assert not torch.allclose(used, sample_dpm_solver_v3(mixture, x, sigmas, ems=ems_with(None), disable=True))


@pytest.mark.parametrize(
    ("lambdas", "decay", "weights"),
    [
        ((), (), ()),
        ((0.0, 1.0), (0.5,), ((1.0,), (0.0, 1.0))),
        ((0.0, 1.0), (0.5, 0.0), ((1.0,), (1.0,))),
        ((1.0, 0.0), (0.5, 0.0), ((1.0,), (0.0, 1.0))),
        ((0.0, math.nan), (0.5, 0.0), ((1.0,), (0.0, 1.0))),
        ((0.0, 1.0), (0.5, 0.0), ((1.0,), (0.0, math.inf))),
    ],
)
def test_bad_coefficients_are_refused(lambdas, decay, weights) -> None:
    with pytest.raises(ValueError, match="fitted steps"):
        FittedSteps(lambdas, decay, weights)
    with pytest.raises(ValueError, match="fitted steps"):
        FittedSteps(LAMBDAS, DDIM.decay, DDIM.weights, math.nan)


# --- The fit


@pytest.fixture
def job() -> Job:
    return Job((2, 2, 2), uniform_grid(0.05, 20.0, 40), samples=4)


PLAN = FitPlan((3, 5), noises=16, held_out=16, search=8, spacings=4, searched=1, moves=2, panel=8, panel_noises=4, turned=1)
REFINED = dataclasses.replace(PLAN, rounds=1, refine_noises=8, refined=5)


def fitted(mixture, job, state=None, plan=PLAN, levels=None, **options):
    source = Source({1.0: mixture}, job.shape, EDM(0.05, 20.0), {}, levels)
    return fit_steps(source, job, 1.0, plan, state or JobState(), **options)


def errors_of(mixture, steps, x, exact, sigma=20.0):
    """Squared errors [K] of the sampler with these coefficients, from noise x of this sigma."""
    levels = levels_of(steps.lambdas)
    found = sample_dpm_solver_v3(mixture, x / sigma * levels[0], levels, ems=ems_with(steps), disable=True)
    return (found - exact).square().flatten(1).mean(1)


def test_it_wins_on_noise_that_it_has_not_seen(mixture, job) -> None:
    """Below the best of the panel on held-out noise, and on noise of this test's own, as much as it says."""
    rows = fitted(mixture, job)
    assert [r.steps for r in rows] == [3, 5]
    x = torch.randn(200, 2, 2, 2, generator=torch.Generator().manual_seed(99), dtype=torch.float64) * 20
    fine: dict[str, Any] = {"order": 3, "corrector": "none", "disable": True}
    exact = sample_dpm_solver_v3(mixture, x, uniform_lambda(EDM(0.05, 20.0), 200, to_zero=True), **fine)
    span = Range.of(job.lambdas, None)
    panel = {e.name: e for e in entrants(PLAN.panel, span, {})}
    for row in rows:
        assert row.ratio[0] < 0.9 and row.fitted[0] < row.fixed[0]
        theirs = errors_of(mixture, panel[row.fixed_schedule].steps(row.steps, list), x, exact)
        ratio = (errors_of(mixture, row.coefficients, x, exact) / theirs).log().mean().exp()
        assert ratio < 1 and abs(ratio.log() - math.log(row.ratio[0])) < 1.0


def test_a_fit_of_many_steps_is_judged_by_a_finer_solution(mixture) -> None:
    """On the grid of quick, 25 points, the solution is no nearer the truth than 20 steps are, and the file said a tenth."""
    source, quick = Source({1.0: mixture}, (2, 2, 2), EDM(0.05, 20.0), {}), EFFORTS["quick"]
    plan = plan_for(source, quick, (20,)).fit
    assert plan is not None
    (row,) = fit_steps(source, job_for(source, quick, steps=(20,)), 1.0, plan, JobState())
    x = torch.randn(100, 2, 2, 2, generator=torch.Generator().manual_seed(99), dtype=torch.float64) * 20
    fine: dict[str, Any] = {"order": 3, "corrector": "none", "disable": True}
    exact = sample_dpm_solver_v3(mixture, x, uniform_lambda(EDM(0.05, 20.0), 300, to_zero=True), **fine)
    true = errors_of(mixture, row.coefficients, x, exact)
    assert row.fitted[0] > true.log().mean().exp() / 4


def test_refinement_never_ends_above_where_it_began(mixture, job) -> None:
    runner = Runner(job, mixture, batch=16)
    samples = range(16)
    teacher = teach(runner, samples)
    begun, _ = closed_loop(runner, samples, teacher, CANDIDATES[0].lambdas(4, Range.of(job.lambdas, None), teacher))
    refined = refine(runner, samples, teacher, begun, 2)
    values = [objective(teacher.errors(few_steps(runner, samples, steps))) for steps in (begun, refined)]
    assert values[1] < values[0]


def test_what_does_not_carry_over_is_not_learnt() -> None:
    """Random features stay out however many; a real one comes in with its factor, and noises left out show both."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(6, 5, 8, generator=draw, dtype=torch.float64)
    target = torch.randn(6, 8, generator=draw, dtype=torch.float64)
    c, alone = least_squares(noise, target)
    assert c.abs().max() < 0.15
    signal = torch.cat([noise, 2 * target[:, None] + 0.1 * noise[:, :1]], 1)
    c, known = least_squares(signal, target)
    assert c[-1] == pytest.approx(0.5, abs=0.05) and known < alone - 3


LIKE = {
    "DPM-Solver++ 2M": "dpmpp_2m",
    "UniPC 2": "unipc_bh2_2",
    "UniPC 3": "unipc_bh2_3",
    "DEIS 2": "deis_2",
    "DEIS 3": "deis_3",
    "iPNDM": "ipndm",
}
"""Formulas of the panel and the samplers of k-diffusion and diffusers that they are."""


@pytest.mark.parametrize("to_zero", [True, False])
@pytest.mark.parametrize("formula", sorted(LIKE))
def test_a_formula_is_the_librarys_sampler(mixture, formula, to_zero) -> None:
    """To the last digit, whether it ends at sigma = 0 or above. diffusers' iPNDM knows no end at 0."""
    if formula == "iPNDM" and to_zero:
        pytest.skip("ComfyUI's ends with a first-order step there, diffusers' does not")
    lambdas, end = (-3.0, -1.5, -0.2, 1.0, 2.2), math.inf if to_zero else 3.0
    steps = formula_steps(lambdas, end, formula)
    levels = levels_of((*lambdas, end))[: len(lambdas) + 1]
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64) * levels[0]
    found = benchmark("rivals").RIVALS[LIKE[formula]](mixture, x, levels)
    assert errors_of(mixture, steps, x, found, levels[0]).max() < 1e-16


@pytest.mark.parametrize("formula", sorted(FORMULAS))
def test_a_formula_keeps_what_never_changes(formula) -> None:
    """Where D is the same everywhere, each formula is exact on any steps: y is D and a share of the noise."""
    for lambdas, end in (((-3.0, -1.5, -0.2, 1.0, 2.2), 3.0), ((-2.0, 0.0, 0.1, 4.0), math.inf)):
        steps = formula_steps(lambdas, end, formula)
        y, D = 7.0, -0.4
        for decay, weights in zip(steps.decay, steps.weights):
            y = decay * y + sum(weights) * D
        assert y == pytest.approx(D + (7.0 - D) * math.exp(lambdas[0] - end), abs=1e-9)


def test_ipndm_is_adams_and_bashforths_method() -> None:
    """On given slopes the last of four steps is Adams and Bashforth's of order 4."""
    sigmas = [5.0, 4.0, 3.0, 2.0]
    steps = formula_steps(tuple(-math.log(v) for v in sigmas), 0.0, "iPNDM")
    slope = lambda sigma: sigma**3 - 2 * sigma  # noqa: E731
    y = [torch.tensor(1.0, dtype=torch.float64)]
    D: list[torch.Tensor] = []
    for i, sigma in enumerate(sigmas):
        D.append(y[-1] - sigma * slope(sigma))
        y.append(steps.decay[i] * y[-1] + sum(w * d for w, d in zip(steps.weights[i], D)))
    slopes = [slope(v) for v in sigmas]
    expected = y[3] - (55 * slopes[3] - 59 * slopes[2] + 37 * slopes[1] - 9 * slopes[0]) / 24
    assert y[4].item() == pytest.approx(expected.item(), rel=1e-9)


def test_spacings(job) -> None:
    """Increasing, between the ends; known ones are what they claim."""
    span = Range.of(job.lambdas, VPContinuous(time_min=0.05))
    for spacing in CANDIDATES:
        for n in (2, 4, 9):
            found = spacing.lambdas(n, span)
            assert len(found) == n and all(a < b for a, b in itertools.pairwise(found))
            assert found[0] == pytest.approx(job.lambdas[0]) and found[-1] <= job.lambdas[-1] + 1e-9
    known = Spacing("sigma", 7.0, 0.0).lambdas(6, span)
    assert levels_of(known)[:-1].tolist() == pytest.approx(karras(EDM(0.05, 20.0), 6, to_zero=True)[:-1].tolist())
    vp = VPContinuous(time_min=0.02)
    ends = -vp.level_at(torch.tensor([1.0, 0.02], dtype=torch.float64)).log()
    whole = Range.of(tuple(ends.tolist()), vp)
    own = Spacing("model", 2.0, 1.0).lambdas(5, whole)
    assert own == pytest.approx(Spacing("vp", 2.0, 1.0).lambdas(5, whole), abs=1e-3)


def test_where_the_model_knows_how_much(mixture, job) -> None:
    """Against D itself: at the noisy end all is left, and what is left falls to any share asked for."""
    teacher = teach(Runner(job, mixture, batch=16), range(32))
    gap = (teacher.D.double() - teacher.clean).square().mean(2).log().mean(1)
    assert teacher.lambda_where_left(1.0) == job.lambdas[0]
    found = [teacher.lambda_where_left(share) for share in (0.9, 0.5, 0.1, 0.01)]
    assert found == sorted(found) and found[-1] < job.lambdas[-1]
    for lam, share in zip(found, (0.9, 0.5, 0.1, 0.01), strict=True):
        after = next(i for i, v in enumerate(job.lambdas) if v >= lam)
        assert gap[after] - gap[0] <= math.log(share) + 1e-9
    assert teacher.lambda_where_left(1e-30) == job.lambdas[-2]


def test_statistics_leave_their_trajectories_to_the_fit(mixture, job) -> None:
    """The same as those solved for the purpose, whatever the batch; and the fit then pays for the others only."""
    state = JobState()
    estimate_moments({1.0: mixture}, job, state, batch=3, keep=16)
    own = teach(Runner(job, mixture, batch=16), range(4))
    assert torch.allclose(state.tensors["fit.1.y"], own.y, atol=1e-5) and torch.allclose(
        state.tensors["fit.1.D"], own.D, atol=1e-5
    )
    counted = [0]

    def model(x, sigma):
        counted[0] += len(x)
        return mixture(x, sigma)

    fitted(model, job, state)
    announced = evaluations_of_fit(PLAN, len(job.lambdas), 1, 4)
    assert 0.7 * announced < counted[0] <= announced
    assert "fit.1.y" in state.tensors  # for steps in fewer passes, which come after
    forget(state, 1.0)
    assert not [key for key in state.tensors if key.startswith(("fit.", "judge."))]


def test_same_seed_same_result_whatever_the_batch(mixture, job) -> None:
    first, second = fitted(mixture, job, batch=16), fitted(mixture, job, batch=5)
    for a, b in zip(first, second, strict=True):
        assert a.lambdas == pytest.approx(b.lambdas, abs=1e-3)
        assert a.fitted[0] == pytest.approx(b.fitted[0], rel=0.02)
    assert fitted(mixture, job, batch=16) == first


def test_killed_and_resumed_ends_the_same(mixture, job, tmp_path) -> None:
    """Stopped at any evaluation, the same rows come out, and no finished run is made again."""
    calls = [0]

    def dies_at(limit):
        def model(x, sigma):
            calls[0] += 1
            if calls[0] == limit:
                raise KeyboardInterrupt
            return mixture(x, sigma)

        return model

    whole = fitted(dies_at(-1), job, plan=REFINED)
    total, calls[0] = calls[0], 0
    path = tmp_path / "fit.partial"
    spent = 0
    for limit in (total // 5, total // 2, total // 4):
        with pytest.raises(KeyboardInterrupt):
            fitted(dies_at(limit), job, JobState.open(path, job), REFINED)
        spent, calls[0] = spent + calls[0], 0
    assert fitted(dies_at(-1), job, JobState.open(path, job), REFINED) == whole
    assert spent + calls[0] < 1.5 * total  # a run of few steps at most is lost each time, and a refinement
    calls[0] = 0
    assert fitted(dies_at(-1), job, JobState.open(path, job), REFINED) == whole and calls[0] == 0


@pytest.mark.parametrize("plan", [PLAN, REFINED])
def test_the_cost_is_what_was_announced(mixture, job, plan) -> None:
    """At most the plan, and not far below it."""
    counted = [0]

    def model(x, sigma):
        counted[0] += len(x)
        return mixture(x, sigma)

    fitted(model, job, plan=plan)
    announced = evaluations_of_fit(plan, len(job.lambdas), 1)
    assert 0.5 * announced < counted[0] <= announced


def learns_nothing(runner, samples, teacher, lambdas):
    """In place of `closed_loop`: first-order steps."""
    ends = [*lambdas[1:], math.inf]
    decay = [math.exp(a - b) for a, b in zip(lambdas, ends, strict=True)]
    rows = [(0.0,) * i + (1 - d,) for i, d in enumerate(decay)]
    return FittedSteps(tuple(lambdas), tuple(decay), tuple(rows)), 0.0


def test_a_file_is_never_worse_than_none(mixture, job, monkeypatch) -> None:
    """With nothing learnt and no other sampler tried, the file holds what the sampler does without it, to eight digits."""
    monkeypatch.setattr(candidates, "closed_loop", learns_nothing)
    monkeypatch.setattr(fit_module, "entrants", lambda *_: [])
    (row,) = fitted(mixture, job, plan=FitPlan((8,), noises=4, held_out=8, search=0, panel=0, panel_noises=1, turns=0))
    assert row.fixed_schedule.startswith(OWN) and row.ratio == (1.0, 1.0, 1.0) and row.coefficients is not None
    levels = unfitted_steps(EDM(0.05, 20.0), 8)[1]
    x = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * levels[0]
    none = sample_dpm_solver_v3(mixture, x, levels, guidance=1.0, disable=True)
    assert errors_of(mixture, row.coefficients, x, none, levels[0]).max() < 1e-9


def test_the_panel_stands_in_for_a_fit_that_loses(mixture, job, monkeypatch) -> None:
    """A fit that learns nothing loses to the panel's best, which is then what the file holds."""
    monkeypatch.setattr(candidates, "closed_loop", learns_nothing)
    fixed = {"own": lambda n: karras(EDM(0.05, 20.0), n, to_zero=True)}
    plan = FitPlan((8,), 8, 16, fixed, search=2, spacings=1, moves=0, panel=30, panel_noises=8, turns=0)
    (row,) = fitted(mixture, job, plan=plan)
    assert row.ratio == (1.0, 1.0, 1.0) and row.fitted == row.fixed
    span = Range.of(job.lambdas, None)
    panel = {e.name: e for e in entrants(30, span, {"own": lambda n: ([0.0], 1.0)})}
    assert "UniPC 2 on own" in panel
    if "own" not in row.fixed_schedule:
        assert row.coefficients == rounded(panel[row.fixed_schedule].steps(8, list))


def test_known_formulas_stay_far_below_the_bounds_of_a_file() -> None:
    """On the widest noise range of the zoo; a formula beyond them could not be the rival of a fit."""
    found = [e.steps(n, list) for e in entrants(1000, Range(-6.9, 4.6), {}) for n in (8, 14, 20)]
    assert max(abs(w) for steps in found for row in steps.weights for w in row) < MAX_WEIGHT / 2
    assert max(sum(map(abs, row)) for steps in found for row in steps.weights) < MAX_ROW / 2
    assert max(map(abs, (d for steps in found for d in steps.decay))) < MAX_DECAY / 2


def test_the_best_rival_on_the_first_noises_runs_on_all(mixture, job) -> None:
    """And on no noise twice; a fit that is worse is left out."""
    counted = [0]

    def model(x, sigma):
        counted[0] += len(x)
        return mixture(x, sigma)

    runner, samples = Runner(job, model, batch=16), range(12)
    judge = teach(runner, samples)
    lambdas = CANDIDATES[0].lambdas(5, Range.of(job.lambdas, None))
    good = formula_steps(tuple(lambdas), -math.log(0.05), "UniPC 2")
    bad, _ = learns_nothing(runner, samples, judge, lambdas)
    counted[0] = 0
    row = judged_row(runner, samples, judge, 1.0, bad, Rivals({"bad": bad, "good": good}, 3))
    assert counted[0] == 5 * (12 + 3 + 12)
    errors = judge.errors(few_steps(runner, samples, good))
    assert row.fixed_schedule == "good" and row.coefficients == good and row.ratio == (1.0, 1.0, 1.0)
    assert row.fixed[2] == pytest.approx(errors.mean().item(), rel=1e-3)


@pytest.mark.parametrize(("better_by", "taken"), [(0.9, "none"), (0.7, "other")])
def test_without_a_clear_winner_the_file_holds_what_a_run_without_it_does(better_by, taken, mixture, job) -> None:
    runner, samples = Runner(job, mixture, batch=16), range(6)
    judge = teach(runner, samples)
    none = formula_steps(tuple(CANDIDATES[0].lambdas(5, Range.of(job.lambdas, None))), -math.log(0.05), "UniPC 2")

    def error(by: float) -> float:
        return objective(judge.errors(few_steps(runner, samples, moved(by))))

    def moved(by: float) -> FittedSteps:
        return dataclasses.replace(none, decay=(*none.decay[:-1], none.decay[-1] + by))

    wrong = next(by for by in torch.linspace(0, 0.5, 2001).tolist() if error(by) > error(0) - math.log(better_by))
    row = judged_row(runner, samples, judge, 1.0, None, Rivals({"other": none, "none": moved(wrong)}, 6, "none"))
    assert row.fixed_schedule == taken


def test_a_fit_that_begins_late_ends_where_the_hosts_own_start_leads(mixture, job) -> None:
    """ComfyUI begins with more than sigma times the noise at the noisiest level, and with that at all others."""
    host = dataclasses.replace(job, start=1.1)
    runner, samples = Runner(host, mixture, batch=16), range(500, 540)
    truth = teach(runner, samples)
    first, later = runner.start(samples, host.lambdas[0]), runner.start(samples, host.lambdas[3])
    assert torch.allclose(first, truth.y[0].reshape(first.shape), rtol=1e-5)
    assert torch.allclose(first * math.exp(host.lambdas[0] - host.lambdas[3]), 1.1 * later)
    plan = dataclasses.replace(PLAN, steps=(8,), noises=24)
    (mine,), (other,) = fitted(mixture, host, plan=plan), fitted(mixture, job, plan=plan)
    assert mine.lambdas[0] > host.lambdas[0] + 0.1, "it does not begin late: the test shows nothing"

    def error(row) -> float:
        return objective(truth.errors(few_steps(runner, samples, row.coefficients)))

    assert error(mine) < error(other) - 0.7


def test_hosts_that_round_sigma_get_their_own_levels(mixture, job) -> None:
    table = torch.linspace(-math.log(20.0), -math.log(0.05), 50, dtype=torch.float64).neg().exp()
    own = -table.log()
    for rounds in (0, 1):
        plan = dataclasses.replace(REFINED, steps=(4,), rounds=rounds)
        (row,) = fitted(mixture, job, plan=plan, levels=table)
        assert len(row.lambdas) == 4 and all((own - v).abs().min() < 1e-5 for v in row.lambdas)


def test_a_flow_is_fitted_in_its_own_space(mixture) -> None:
    flow = dataclasses.replace(Job((2, 2, 2), uniform_grid(0.05, 20.0, 40), samples=4), space=Space.FLOW)
    model = lambda x, t: mixture(x / (1 - t)[:, None, None, None], t / (1 - t))  # noqa: E731
    plan = dataclasses.replace(PLAN, steps=(4,))
    sigma = Job((2, 2, 2), uniform_grid(0.05, 20.0, 40), samples=4)
    (a,), (b,) = fitted(model, flow, plan=plan), fitted(mixture, sigma, plan=plan)
    assert a.lambdas == pytest.approx(b.lambdas, abs=1e-3) and a.fitted[0] == pytest.approx(b.fitted[0], rel=0.05)


def test_trajectories_between_grid_points(mixture) -> None:
    """The cubic through the teacher's points is far nearer than any few-step error."""
    errors = []
    for intervals in (20, 40):
        grid = Job((2, 2, 2), uniform_grid(0.05, 20.0, 240), samples=4)
        fine = teach(Runner(grid, mixture, dtype=torch.float64), range(8))
        keep = slice(None, None, 240 // intervals)
        coarse = Trajectories(fine.lambdas[keep], fine.elements, fine.y[keep], fine.D[keep])
        middle = fine.lambdas[120 + 240 // intervals // 2]
        errors.append((coarse.at(middle) - fine.at(middle)).abs().max().item())
    assert errors[1] < errors[0] / 8 and errors[1] < 1e-4


# --- The file


def _example() -> EMSFile:
    example: EMSFile = benchmark("corrupt").example()
    return example


def row(guidance=1.0, steps=3, lambdas=LAMBDAS, coefficients=DDIM, **changes) -> FittedRow:
    values = {
        "fitted": (1.0, 1.1, 1.2),
        "fixed": (2.0, 2.1, 2.2),
        "fixed_schedule": "karras",
        "ratio": (0.5, 0.4, 0.6),
        "noises": 16,
    }
    return FittedRow(guidance, steps, lambdas, coefficients, **{**values, **changes})


def file_with(*rows: FittedRow, **meta) -> EMSFile:
    example = _example()
    scales = sorted({r.guidance for r in rows})
    one = {name: getattr(example, name)[:1].expand(len(scales), *getattr(example, name).shape[1:]) for name in "lsb"}
    kept = {"space": "sigma", "sigma_min": 0.03, "sigma_max": 14.6, **meta}
    return EMSFile(example.lambdas, torch.tensor(scales, dtype=torch.float64), **one, meta=EMSMeta(**kept, fitted=tuple(rows)))


FIVE = (-2.0, -1.2, -0.3, 0.6, 1.4)


def test_the_file_keeps_fitted_rows_exactly() -> None:
    fixed = row(steps=5, lambdas=FIVE, coefficients=None)
    file = file_with(row(), fixed, row(guidance=7.5))
    again = decode_ems_file(file.encode())
    assert again.meta.fitted == file.meta.fitted and again.encode() == file.encode()
    assert again.at(1.0).recommendation.fitted == (DDIM,)
    assert fitted_row(fitted_values(fixed)) == fixed


def test_files_without_a_fit_are_as_before() -> None:
    example = _example()
    example = dataclasses.replace(example, meta=dataclasses.replace(example.meta, partial=()))
    assert b"fitted" not in example.encode()
    with pytest.raises(EMSError, match="no fitted schedules"):
        example.fitted_sigmas(5, 1.0)


def test_fitted_sigmas() -> None:
    """Its own step counts as they are, Karras steps else; the nearest guidance scale; the tail for denoise below 1."""
    guided = row(guidance=7.5, lambdas=(-2.0, 0.0, 1.0), coefficients=None)
    file = file_with(row(), row(steps=5, lambdas=FIVE, coefficients=None), guided)
    assert file.fitted_sigmas(3, 1.0).tolist() == pytest.approx(levels_of(LAMBDAS).tolist())
    assert file.fitted_sigmas(3, 6.0).tolist() == pytest.approx(levels_of((-2.0, 0.0, 1.0)).tolist())
    for n in (1, 2, 3, 4, 5, 7, 12, 40):
        sigmas = file.fitted_sigmas(n, 1.0)
        assert len(sigmas) == n + 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
        assert sigmas[0].item() == pytest.approx(math.exp(2.0) if n in (3, 5) else 14.6)
    expected = karras(EDM(0.03, 14.6), 12, to_zero=True)
    assert file.fitted_sigmas(12, 1.0).tolist() == pytest.approx(expected.tolist())
    assert all(file.covers_fit(3, g) for g in (0.4, 1.5, 3.0, 11.0))
    assert not any(file.covers_fit(3, g) for g in (0.3, 1.6, 2.9, 11.5))
    far = file.fitted_sigmas(3, 40.0)
    assert far.tolist() == pytest.approx(karras(EDM(0.03, 14.6), 3, to_zero=True).tolist())
    with pytest.warns(UserWarning, match="cover guidance"):
        assert file.at(40.0).recommendation is None
    with pytest.warns(UserWarning, match="cover guidance"):
        assert file.at(0.0).recommendation is None
    assert torch.equal(file.fitted_sigmas(5, 1.0, denoise=0.5), file.fitted_sigmas(10, 1.0)[-6:])
    for steps, guidance, denoise in ((0, 1.0, 1.0), (5, 1.0, 0.0), (5, 1.0, 1.5), (5, -1.0, 1.0)):
        with pytest.raises(EMSError):
            file.fitted_sigmas(steps, guidance, denoise)


def test_schedules_that_end_above_zero() -> None:
    """Kept fixed schedules may."""
    sigmas = file_with(row(lambdas=(-2.0, 0.0, 1.0, 3.0), coefficients=None)).fitted_sigmas(3, 1.0)
    assert len(sigmas) == 4 and sigmas[-1].item() == pytest.approx(math.exp(-3.0))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"steps": 65},
        {"steps": 5},
        {"guidance": -1.0},
        {"noises": 0},
        {"fixed_schedule": "x" * 5000},
        {"fitted": (1.0, 2.0)},
        {"fitted": (1.0, math.nan, 2.0)},
        {"ratio": (1.0, 2.0, -1.0)},
        {"lambdas": (0.0, 0.0, 1.0), "coefficients": None},
        {"lambdas": (0.0, 1.0, 100.0), "coefficients": None},
        {"lambdas": (-2.0, -0.5, 0.9)},
        {"coefficients": "none"},
        {"coefficients": FittedSteps(LAMBDAS, (1e9, 0.0, 0.0), DDIM.weights)},
        {"coefficients": FittedSteps(LAMBDAS, DDIM.decay, DDIM.weights, 1e9)},
    ],
)
def test_bad_rows_are_refused(change) -> None:
    with pytest.raises(EMSError):
        row(**change)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (2, "text"),
        (2, [0.0] * 100),
        (3, None),
        (3, "1"),
        (4, None),
        (4, [0.1]),
        (5, 7),
        (5, [[1.0]] * 70),
        (5, [[1.0], [0.0, True], [0.0, 0.0, 1.0]]),
        (7, None),
    ],
)
def test_bad_json_is_refused(place, value) -> None:
    values = fitted_values(row())
    values[place] = value
    with pytest.raises(EMSError):
        fitted_row(values)


def test_repeated_or_foreign_rows_are_refused() -> None:
    with pytest.raises(EMSError, match="each for another"):
        file_with(row(), row())
    example = _example()
    with pytest.raises(EMSError, match="covers"):
        dataclasses.replace(example, meta=dataclasses.replace(example.meta, fitted=(row(guidance=9.0),)))


# --- From end to end


def test_a_fit_is_added_to_a_file(mixture, job) -> None:
    """`with_fit` keeps everything else, notes the cost, and the sampler then uses it by way of the file."""
    ems = EMS.degenerate(2)
    values = {name: getattr(ems, name)[None] for name in "lsb"}
    file = EMSFile(ems.lambdas, torch.tensor([1.0], dtype=torch.float64), **values, meta=EMSMeta("sigma", 0.05, 20.0))
    source = Source({1.0: mixture}, (2, 2, 2), EDM(0.05, 20.0), {"name": "mixture"})
    done = decode_ems_file(with_fit(file, source, job, PLAN, JobState()).encode())
    assert done.meta.estimate["fit_noises"] == 16 and torch.equal(done.l, file.l)
    noise = torch.randn(50, 2, 2, 2, dtype=torch.float64)
    x = noise * 20
    exact = sample_dpm_solver_v3(mixture, x, uniform_lambda(EDM(0.05, 20.0), 200, to_zero=True), order=3, disable=True)

    def error(sigmas, ems):
        return (sample_dpm_solver_v3(mixture, noise * sigmas[0], sigmas, ems=ems, disable=True) - exact).square().mean()

    assert error(done.fitted_sigmas(5, 1.0), done.at(1.0)) < error(karras(EDM(0.05, 20.0), 5), None)


TOY = """
import torch
def denoiser(guidance):
    return lambda x, sigma: torch.tanh(x / (1 + sigma.reshape(-1, 1, 1, 1))) * guidance / (1 + 0.3 * sigma.reshape(-1, 1, 1, 1))
def stopped(guidance):
    def D(x, sigma):
        raise KeyboardInterrupt
    return D
"""


def test_ems_fit(tmp_path, monkeypatch, capsys) -> None:
    """`ems compute --no-fit`, then `ems fit`: the plan is shown, the file has the rows, an interrupt says how to go on."""
    (tmp_path / "fit_toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    model = "--model fit_toy:{} --shape 2,4,4 --sigma-min 0.05 --sigma-max 20 --effort quick --device cpu"
    compute = ["compute", *model.format("denoiser").split(), "--samples", "4", "--intervals", "12", "--guidance", "1,3"]
    assert main([*compute, "--no-fit", "--out", "a.ems.safetensors"]) == 0
    assert "fit for" not in capsys.readouterr().out
    fit = ["fit", "a.ems.safetensors", *model.format("denoiser").split(), "--steps", "4,5"]
    assert main([*fit, "--dry-run"]) == 0
    assert "denoiser evaluations" in capsys.readouterr().out
    assert main([*fit, "--out", "b.ems.safetensors"]) == 0
    assert "fitted, 5 steps: error" in capsys.readouterr().out
    file = decode_ems_file(Path("b.ems.safetensors").read_bytes())
    assert {(r.guidance, r.steps) for r in file.meta.fitted} == {(g, n) for g in (1.0, 3.0) for n in (4, 5)}
    assert not list(tmp_path.glob("*.partial"))
    flow = [*fit, "--space", "flow"]
    flow[flow.index("20")], flow[flow.index("0.05")] = "0.99", "0.01"
    assert main(flow) == 1 and "space" in capsys.readouterr().err
