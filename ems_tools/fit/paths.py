"""A model's own trajectories in a few numbers, on which the sampler chooses the steps of any schedule (`sampler.typical`).

They cost no evaluation: the trajectories are those that the coefficients are fitted on, and how D answers to an error of y is
seen in the runs of the fit itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...sampler.trajectories import Trajectories as Paths
from ..trajectory import Trajectories

__all__ = ["DIRECTIONS", "answer", "own_paths"]

DIRECTIONS = 10
"""Main directions of the trajectories that are kept, of all samples and elements together."""
_WIDTH = 0.5
"""Of the Gaussian in lambda that smooths the answers."""
_LOWEST, _HIGHEST = -0.5, 1.0
_NEGLIGIBLE = 1e-9
"""Squared errors below this share of y's square say nothing of how D answers to them."""


def answer(teacher: Trajectories, lam: float, y: Tensor, D: Tensor) -> float | None:
    """How D answers to the error that a run has at `lam`: the median over samples of <D - D*, y - y*> / |y - y*|^2.

    y, D [K, P] on the teacher's elements; D*, y* of the teacher. None where the run has hardly any error.
    """
    error, change = y - teacher.at(lam), D - teacher.denoised_at(lam)
    size = error.square().sum(1)
    if not float(size.sum()) > _NEGLIGIBLE * float(y.square().sum()):
        return None
    value = ((change * error).sum(1) / size.clamp(min=1e-30)).median().item()
    return min(max(value, _LOWEST), _HIGHEST)


def own_paths(teacher: Trajectories, answers: Sequence[tuple[float, float]]) -> Paths:
    """The trajectories less their ends on `DIRECTIONS` main directions, in units of their size at the noisy end.

    `answers` are pairs of lambda and `answer`, at least one.
    """
    grid = torch.linspace(teacher.lambdas[0], teacher.lambdas[-1], len(teacher.lambdas), dtype=torch.float64)
    changes = torch.stack([teacher.denoised_at(lam) for lam in grid.tolist()]) - teacher.clean
    changes = changes.flatten(1)
    size = changes[0].square().sum().sqrt().clamp(min=1e-30)
    left, values, _ = torch.linalg.svd(changes / size, full_matrices=False)
    kept = min(DIRECTIONS, len(values))
    return Paths.of_model(grid, left[:, :kept] * values[:kept], _smoothed(grid, answers))


def _smoothed(grid: Tensor, answers: Sequence[tuple[float, float]]) -> Tensor:
    """The answers on the grid [K], by a Gaussian in lambda; constant outside of where there are any."""
    at, value = torch.tensor(sorted(answers), dtype=torch.float64).T
    weights = (-0.5 * ((grid[:, None].clamp(at[0], at[-1]) - at) / _WIDTH) ** 2).exp() + 1e-30
    return (weights @ value) / weights.sum(1)
