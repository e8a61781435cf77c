"""Where a fit evaluates. The choice of a spacing: few noises rank, all noises decide between the best few. Turning its
evaluations: it lowers the final error on noise that it has not seen, and stays where it may be."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

from dpm_solver_v3.ems_tools.estimate.job import Job, JobState, uniform_grid
from dpm_solver_v3.ems_tools.fit.candidates import Bench, best_spacing
from dpm_solver_v3.ems_tools.fit.plan import FitPlan, turned_steps
from dpm_solver_v3.ems_tools.fit.refine import turns_of
from dpm_solver_v3.ems_tools.fit.spacing import CANDIDATES, Range, Spacing
from dpm_solver_v3.ems_tools.fit.steps import closed_loop, objective
from dpm_solver_v3.ems_tools.fit.turn import Turned, best_turned, moved
from dpm_solver_v3.ems_tools.trajectory import Runner, few_steps, teach

CHOICE = FitPlan(noises=24, search=2, spacings=6, moves=0, finalists=3)
EVEN = Spacing("lambda", 1.0, 0.0)


def bench_of(mixture, plan: FitPlan, snap=list) -> Bench:
    job = Job((2, 2, 2), uniform_grid(0.05, 20.0, 40), samples=4)
    runner, samples = Runner(job, mixture, batch=32), range(plan.noises)
    return Bench(runner, plan, samples, teach(runner, samples), Range.of(job.lambdas, None), snap, JobState(), "1")


def test_all_noises_decide_between_the_finalists(mixture) -> None:
    bench, changed = bench_of(mixture, CHOICE), 0
    alone = dataclasses.replace(bench, plan=dataclasses.replace(CHOICE, finalists=1))

    def score(spacing: Spacing, steps: int, noises: int) -> float:
        return closed_loop(bench.runner, bench.samples[:noises], bench.teacher.part(noises), bench.lambdas(spacing, steps))[1]

    for steps in (4, 5, 6, 8):
        ranked = sorted(CANDIDATES[:6], key=lambda s: score(s, steps, 2))
        assert best_spacing(alone, steps) == ranked[0]
        chosen = best_spacing(bench, steps)
        assert chosen == min(ranked[:3], key=lambda s: score(s, steps, 24))
        changed += chosen != ranked[0]
    assert changed, "few noises chose as all of them: the test shows nothing"


@pytest.mark.parametrize(("spacing", "steps"), [(Spacing("vp", 2.0, 1.0), 4), (Spacing("sigma", 7.0, 0.0), 6)])
def test_turned_evaluations_lower_the_error_on_noise_not_seen(spacing, steps, mixture) -> None:
    """By a tenth in one round, and more in four; the fit is what a fit on the new lambdas is."""
    bench = bench_of(mixture, FitPlan(noises=24, turns=1, turn_noises=24))
    unseen = range(500, 600)
    truth = teach(bench.runner, unseen)
    error = lambda found: objective(truth.errors(few_steps(bench.runner, unseen, found)))  # noqa: E731
    plain, score = closed_loop(bench.runner, bench.samples, bench.teacher, bench.lambdas(spacing, steps))
    once = best_turned(bench, spacing, steps)
    more = best_turned(dataclasses.replace(bench, plan=dataclasses.replace(bench.plan, turns=4)), spacing, steps)
    assert once is not None and more is not None
    assert error(once.steps) < error(plain) - 0.1 and error(more.steps) < error(once.steps) - 0.1
    again, now = closed_loop(bench.runner, bench.samples, bench.teacher, once.steps.lambdas)
    assert now < score and again == once.steps


def test_damping_holds_the_lambdas(mixture) -> None:
    bench = bench_of(mixture, FitPlan(noises=8))
    steps, _ = closed_loop(bench.runner, bench.samples, bench.teacher, bench.lambdas(EVEN, 5))
    knobs = [("lambda", i, 0) for i in range(5)]
    freely, errors = turns_of(bench.runner, bench.samples, bench.teacher, steps, knobs)
    held, _ = turns_of(bench.runner, bench.samples, bench.teacher, steps, knobs, 10.0)
    assert errors.shape == (8,) and len(freely) == 5
    assert sum(v * v for v in held) < sum(v * v for v in freely) / 4


def test_other_step_counts_move_as_far_at_the_same_share_of_the_way() -> None:
    turned = Turned(None, (0.0, 0.4, -0.2))  # type: ignore[arg-type]
    assert turned.moves(3) == pytest.approx([0.0, 0.4, -0.2])
    assert turned.moves(5) == pytest.approx([0.0, 0.2, 0.4, 0.1, -0.2])
    assert turned.moves(2) == pytest.approx([0.0, -0.2]) and turned.moves(1) == [0.0]


def test_evaluations_stay_in_order_in_the_range_and_on_the_hosts_levels(mixture) -> None:
    own = torch.linspace(-2.9, 2.9, 60, dtype=torch.float64)
    snap = lambda lambdas: sorted({min(own.tolist(), key=lambda v: abs(v - w)) for w in lambdas})  # noqa: E731
    bench = bench_of(mixture, FitPlan(noises=4), snap)
    low, high = bench.span.low, bench.span.high
    lambdas = [low + 0.01, -1.0, 1.0, high - 0.01]
    found = moved(bench, lambdas, [-0.5, 0.1, 9.0, 0.5])
    assert len(found) == 4 and all(any(abs(v - w) < 1e-9 for w in own.tolist()) for v in found)
    assert found[2] == pytest.approx(1.6, abs=0.06), "no evaluation moves by more than 0.6"
    assert moved(bench, lambdas, [0.0, 0.6, -0.6, 0.0]) != [] and moved(bench, [0.0, 0.1], [0.1, 0.0]) == []
    wide = moved(dataclasses.replace(bench, snap=list), lambdas, [-0.5, 0.1, 0.1, 0.5])
    assert wide[0] == pytest.approx(low, abs=1e-6) and wide[-1] == pytest.approx(high, abs=1e-6)
    assert all(a < b for a, b in itertools.pairwise(wide))


def test_a_fit_on_few_levels_is_left_out(mixture) -> None:
    bench = bench_of(mixture, FitPlan(noises=4), lambda lambdas: list(lambdas)[:3])
    assert best_turned(bench, EVEN, 5) is None


def test_what_the_state_keeps_comes_back(mixture) -> None:
    """With every stage in the state, through JSON, no evaluation is made."""
    bench = bench_of(mixture, FitPlan(noises=6, turns=2))
    found = best_turned(bench, EVEN, 4)
    kept = JobState(facts=json.loads(json.dumps(bench.state.facts)))

    def silent(x, sigma):
        raise AssertionError("nothing is left to be evaluated")

    other = dataclasses.replace(bench, state=kept, runner=dataclasses.replace(bench.runner, model=silent))
    assert found is not None and best_turned(other, EVEN, 4) == found


def test_the_step_counts_that_are_turned() -> None:
    plan = FitPlan((4, 5, 6, 8, 10))
    assert turned_steps(dataclasses.replace(plan, turned=1)) == [6]
    assert turned_steps(dataclasses.replace(plan, turned=2)) == [5, 8]
    assert turned_steps(dataclasses.replace(plan, turned=9)) == list(plan.steps)
    assert turned_steps(dataclasses.replace(plan, turns=0)) == []
