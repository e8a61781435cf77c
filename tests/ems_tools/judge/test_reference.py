"""A finer solution from what a run evaluated and a few evaluations more."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dpm_solver_v3.ems_tools.judge.reference import Node, Reference, chosen_nodes, settled
from dpm_solver_v3.sampler import EDM, Space, karras, plan_for, sample_dpm_solver_v3

SCHEDULE, CLEAN = EDM(0.03, 14.6), -math.log(0.03)


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """D of two Gaussians of width 0.5 at +-1, for every element of x [B, C]."""
    s = sigma.reshape(-1, 1)
    total = 0.25 + s**2
    side = torch.tanh(x / total)
    return side + 0.25 / total * (x - side)


def run_of(steps: int, spoilt: float = 1.0) -> tuple[list[Node], Tensor, Tensor]:
    """The nodes of a run, its start and its picture; every D is seen `spoilt` times as large."""
    nodes: list[Node] = []

    def kept(x: Tensor, sigma: Tensor) -> Tensor:
        denoised = denoiser(x, sigma)
        nodes.append(Node(-math.log(float(sigma[0])), x.clone(), denoised))
        return spoilt * denoised

    levels = karras(SCHEDULE, steps, to_zero=True)
    x = torch.randn(4, 500, generator=torch.Generator().manual_seed(1)) * levels[0].float()
    return nodes, x, sample_dpm_solver_v3(kept, x, levels, disable=True)


def solution(nodes: list[Node], x: Tensor) -> tuple[Reference, Tensor]:
    """The finer solution, and the squared error of its picture."""
    found = Reference(chosen_nodes(nodes, CLEAN, 8), x, lambda y, lam: denoiser(y, y.new_full((len(y),), math.exp(-lam))))
    return found, found.end(math.inf)


@pytest.mark.parametrize(("steps", "spoilt", "most"), [(5, 1.0, 0.5), (5, 0.95, 0.5), (8, 1.0, 0.7), (8, 0.95, 0.5)])
def test_it_is_nearer_to_the_truth_than_the_run(steps: int, spoilt: float, most: float) -> None:
    """Less so beside an unspoilt run of 8 steps, which is near the truth itself."""
    nodes, x, picture = run_of(steps, spoilt)
    fine = karras(SCHEDULE, 200, to_zero=True)
    truth = sample_dpm_solver_v3(denoiser, x, fine, disable=True)
    found, end = solution(nodes, x)
    assert found.evaluations <= 8
    mine, theirs = ((v - truth).square().mean() for v in (end, picture))
    assert mine < most * theirs


def test_a_bad_run_settles_near_the_truth_without_new_evaluations() -> None:
    nodes, x, picture = run_of(8, 0.9)
    truth = sample_dpm_solver_v3(denoiser, x, karras(SCHEDULE, 200, to_zero=True), disable=True)
    seen = [(n.lam, n.y, n.denoised) for n in nodes if n.y is not None and n.denoised is not None]
    end = settled([lam for lam, _, _ in seen], [y for _, y, _ in seen], [d for _, _, d in seen])
    mine, theirs = ((v - truth).square().mean() for v in (end, picture))
    assert mine < theirs / 2


def test_another_run_is_followed_around_it() -> None:
    """The error of a run without evaluations is that of a real one, within a factor."""
    nodes, x, _ = run_of(6, 0.95)
    levels = karras(SCHEDULE, 6, to_zero=True)
    found, end = solution(nodes, x)
    real = sample_dpm_solver_v3(denoiser, x, levels, disable=True)
    truth = sample_dpm_solver_v3(denoiser, x, karras(SCHEDULE, 200, to_zero=True), disable=True)
    followed = (found.end_of(plan_for(levels), Space.SIGMA, x) - end).square().mean()
    assert 0.1 < followed / (real - truth).square().mean() < 10


def test_evaluations_go_into_the_widest_gaps_and_down_to_the_clean_end() -> None:
    nodes = [Node(lam, torch.zeros(1, 1), torch.zeros(1, 1)) for lam in (-2.0, -1.0, 1.0)]
    asked = [node.lam for node in chosen_nodes(nodes, 3.0, 3) if node.y is None]
    assert asked == [0.0, 2.0, 3.0]
