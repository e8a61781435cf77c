"""A model's own trajectories in a few numbers, on which the sampler chooses the steps of any schedule (`sampler.typical`).

They cost no evaluation: the trajectories are those that the coefficients are fitted on, and how D answers to an error of y is
seen in the runs of the fit itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...sampler.trajectories import Trajectories as Paths
from ...sampler.trajectories import load_trajectories
from ..trajectory import Trajectories

__all__ = ["Answers", "own_paths"]

SAMPLES, DIRECTIONS, POINTS = 8, 4, 31
"""How many samples are kept, in so many main directions each, on so many points of lambda at most: some 4 kB a scale."""
_WIDTH, _PRIOR = 0.5, 0.05
"""Of the Gaussian in lambda that smooths the answers, and how much other models' answer counts against one of them."""
_LOWEST, _HIGHEST = -0.5, 1.0
_NEGLIGIBLE = 1e-5
"""Squared errors below this share of what D still lacks say nothing of how D answers to them."""


class Answers:
    """How D answers to the errors of a run, as it goes by: pairs of lambda and the median over samples.

    A run that starts below the noisy end carries an error of another kind, what it lacks of the picture there. Its part in the
    answer is taken out: D - D* = response (y - y*) + other (y - y*)_start, by least squares.
    """

    def __init__(self, teacher: Trajectories) -> None:
        self.teacher, self.found = teacher, list[tuple[float, float]]()
        self._start: Tensor | None = None

    def __call__(self, lam: float, y: Tensor, D: Tensor) -> None:
        """Take in y, D [K, P] on the teacher's elements at `lam`, one evaluation after the other."""
        error, change = y - self.teacher.at(lam), D - self.teacher.denoised_at(lam)
        if self._start is None:
            self._start = error
            return
        start = self._start * self._start.square().sum(1, keepdim=True).clamp(min=1e-30).rsqrt()
        error, change = (v - (v * start).sum(1, keepdim=True) * start for v in (error, change))
        size = error.square().sum(1)
        if float(size.sum()) > _NEGLIGIBLE * float((self.teacher.clean - D).square().sum()):
            value = ((change * error).sum(1) / size.clamp(min=1e-30)).median().item()
            self.found.append((round(lam, 4), round(min(max(value, _LOWEST), _HIGHEST), 4)))


def own_paths(teacher: Trajectories, answers: Sequence[tuple[float, float]]) -> Paths:
    """The first samples' trajectories less their ends on main directions, each in units of its size at the noisy end.

    `answers` are those of `Answers`. Where no run came near, other models' response stands in.
    """
    grid = torch.linspace(teacher.lambdas[0], teacher.lambdas[-1], min(len(teacher.lambdas), POINTS), dtype=torch.float64)
    changes = torch.stack([teacher.denoised_at(lam)[:SAMPLES] for lam in grid.tolist()]) - teacher.clean[:SAMPLES]
    rows = changes.transpose(0, 1)  # [S, K, P]
    size = rows[:, :1].square().sum(2, keepdim=True).sqrt().clamp(min=1e-30)
    left, values, _ = torch.linalg.svd(rows / size, full_matrices=False)
    kept = left[..., :DIRECTIONS] * values[:, None, :DIRECTIONS]
    return Paths.of_model(grid, kept.transpose(0, 1), _smoothed(grid, answers))


def _smoothed(grid: Tensor, answers: Sequence[tuple[float, float]]) -> Tensor:
    """The answers on the grid [K], by a Gaussian in lambda."""
    others = load_trajectories()
    prior = torch.stack([others.at(lam)[2].mean() for lam in grid.tolist()])
    at, value = torch.tensor(sorted(answers), dtype=torch.float64).reshape(-1, 2).T
    weights = (-0.5 * ((grid[:, None] - at) / _WIDTH) ** 2).exp()
    return (weights @ value + _PRIOR * prior) / (weights.sum(1) + _PRIOR)
