"""Fewer passes: patterns keep their budget, steps repeat the run of their fit, a predictable answer costs nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dpm_solver_v3.ems_tools.estimate.job import Job, uniform_grid
from dpm_solver_v3.ems_tools.fit.spacing import Range
from dpm_solver_v3.ems_tools.fit.steps import closed_loop, objective
from dpm_solver_v3.ems_tools.trajectory import Runner, few_steps, teach
from loading import benchmark

passes = benchmark("pass_steps")

GUIDANCE, SHAPE = 3.0, (2, 4, 4)
JOB = Job(shape=SHAPE, lambdas=uniform_grid(0.03, 10.0, 60), samples=8, guidance=(GUIDANCE,))
CENTRES = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))


class Counted:
    """Guidance over two answers; counts the passes, one for each answer and sample."""

    def __init__(self, conditional, unconditional) -> None:
        self.conditional, self.unconditional, self.passes = conditional, unconditional, 0

    def only(self, y: Tensor, sigma: Tensor) -> Tensor:
        self.passes += len(y)
        out: Tensor = self.conditional(y, sigma)
        return out

    def guided(self, y: Tensor, sigma: Tensor) -> Tensor:
        c = self.only(y, sigma)
        self.passes += len(y)
        u = self.unconditional(y, sigma)
        return c + (GUIDANCE - 1) * (c - u)

    def pair(self) -> Any:
        return passes.Pair(Runner(JOB, self.only), Runner(JOB, self.guided), GUIDANCE)


def mixture(centres: Tensor):
    """The exact denoiser of points at `centres` [n, ...], each with a spread of 0.3."""

    def denoise(y: Tensor, sigma: Tensor) -> Tensor:
        s2 = sigma.double().reshape(-1, 1) ** 2
        rows, points = y.double().flatten(1), centres.double().flatten(1)
        near = torch.softmax(-torch.cdist(rows, points).square() / (2 * (s2 + 0.09)), 1)
        mean = near @ points
        return (mean + 0.09 / (0.09 + s2) * (rows - mean)).reshape(y.shape).to(y.dtype)

    return denoise


@pytest.fixture
def network() -> Counted:
    """One class of two centres against all four."""
    return Counted(mixture(CENTRES[:2]), mixture(CENTRES))


def spaced(network: Counted, samples: range):
    teacher = teach(network.pair().guided, samples)
    span = Range.of(JOB.lambdas, None)
    return teacher, lambda spacing, n: [round(v, 6) for v in spacing.lambdas(n, span, teacher)]


@pytest.mark.parametrize("budget", [6, 8, 10, 12, 16])
def test_every_pattern_has_exactly_the_budget(budget: int) -> None:
    found = passes.patterns(budget)
    assert found and len(set(found)) == len(found)
    for guided in found:
        assert len(guided) + sum(guided) == budget and any(guided) and len(guided) > budget // 2


def test_a_run_repeats_the_fit_and_makes_the_passes_that_it_says(network: Counted) -> None:
    samples = range(6)
    teacher, at = spaced(network, samples)
    steps = passes.best_passes(network.pair(), samples, teacher, at, 8, few=3, spacings=2)
    assert steps is not None and steps.passes == 8
    network.passes = 0
    end = passes.run_passes(network.pair(), samples, steps)
    # the pair takes u from a guided evaluation, which makes the conditional pass a second time
    assert network.passes == len(samples) * (8 + sum(steps.guided))
    fitted, score = passes.fit_pattern(network.pair(), samples, teacher, steps.lambdas, steps.guided) or (steps, math.inf)
    again = passes.run_passes(network.pair(), samples, fitted)
    assert (end - again).abs().max() < 1e-4
    assert objective(teacher.errors(end)) < score + 0.5  # `score` is of noises left out


def test_an_unconditional_answer_that_follows_from_the_conditional_one_is_not_missed() -> None:
    """Where u = c / 2 the gap is c / 2: steps without any unconditional pass do as well as guided ones, at half the passes."""
    wanted = mixture(CENTRES[:2])
    network = Counted(wanted, lambda y, sigma: wanted(y, sigma) / 2)
    samples = range(6)
    teacher, _ = spaced(network, samples)
    lambdas = uniform_grid(0.1, 10.0, 5)
    guided, _ = closed_loop(network.pair().guided, samples, teacher, lambdas)
    steps, _ = passes.fit_pattern(network.pair(), samples, teacher, lambdas, (False,) * 6) or (None, 0.0)
    assert steps is not None and steps.passes == 6
    mine = objective(teacher.errors(passes.run_passes(network.pair(), samples, steps)))
    assert mine < objective(teacher.errors(few_steps(network.pair().guided, samples, guided))) + 0.1
