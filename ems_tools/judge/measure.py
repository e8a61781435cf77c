"""Fresh trajectories of a model on part of a file's grid, with the moments by which its statistics are judged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..estimate.job import Evaluating, Job, Model, denoiser_for, in_batches, sample_noise
from ..estimate.points import PROBE_STEP, difference_weights
from ..trajectory import Runner, solve_finely

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SAMPLES", "Measured", "measure", "nodes_of"]

SAMPLES, PLACES = 16, 6


@dataclass(frozen=True)
class Measured:
    """K fresh trajectories of one guidance scale.

    Args:
        guidance: the scale.
        samples: their indices; `job` says what noise they begin with.
        places: indices of the file's grid where moments were taken.
        moments: [9, K, places, C, ...], as `points.sample_moments` gives them.
        ends: (x at the clean end of the grid, D there), [K, C, ...] each.
        evaluations: of the denoiser.
    """

    guidance: float
    job: Job
    samples: tuple[int, ...]
    places: tuple[int, ...]
    moments: Tensor
    ends: tuple[Tensor, Tensor]
    evaluations: int


def measure(
    model: Model,
    job: Job,
    guidance: float,
    *,
    samples: int = SAMPLES,
    tick: Callable[[int], None] = lambda evaluations: None,
    **options: Unpack[Evaluating],
) -> Measured:
    """Trajectories on part of `job.lambdas`, with what `judge` needs of them. Raises SamplingError, EstimateError."""
    runner = Runner(job, model, tick=tick, **options)
    nodes, places = nodes_of(len(job.lambdas))
    kept: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []

    def run(part: list[int]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return _trajectories(runner, part, nodes, places)

    indices = list(range(samples))
    for _, found in in_batches(indices, runner.batch, run):
        kept.append(found)
    moments = torch.cat([m for m, _ in kept], 1)
    ends = torch.cat([e[0] for _, e in kept]), torch.cat([e[1] for _, e in kept])
    return Measured(guidance, job, tuple(indices), places, moments, ends, samples * (len(nodes) + len(places)))


def nodes_of(points: int) -> tuple[list[int], tuple[int, ...]]:
    """Grid indices to solve on, and those among them (with both neighbours) to measure at; all of a small grid."""
    last = points - 1
    count = min(PLACES, max((points - 2) // 3, 1))
    places = [round(1 + (last - 2) * (2 * k + 1) / (2 * count)) for k in range(count)]
    nodes = {0, last, *(i + d for i in places for d in (-1, 0, 1))}
    ordered = sorted(nodes)
    nodes |= {(a + b) // 2 for a, b in itertools.pairwise(ordered) if b - a > 3}
    return sorted(nodes), tuple(places)


def _trajectories(
    runner: Runner, samples: list[int], nodes: list[int], places: tuple[int, ...]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Moments [9, B, places, C, ...] and the ends (x, D) of these samples, on the CPU."""
    job = runner.job
    noise, generators = sample_noise(job, samples)
    denoiser = denoiser_for(runner.model, samples, job.space)
    lambdas = torch.tensor(job.lambdas, dtype=torch.float64)[nodes]
    points: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        start = noise.to(runner.device, runner.dtype)
        solve_finely(denoiser, lambdas, start, lambda i, y, D: points.append((y, D)), runner.tick)
        rows = []
        for place in places:
            at = nodes.index(place)
            y, D = (v.to(torch.float64) for v in points[at])
            weights = difference_weights(lambdas[at - 1 : at + 2])[1][1].tolist()
            slope = sum((w * points[at + k - 1][1].to(torch.float64) for k, w in enumerate(weights)), torch.zeros_like(D))
            v = torch.stack([torch.randint(0, 2, job.shape, generator=g, dtype=torch.int8) for g in generators])
            v = v.to(start) * 2 - 1
            step = PROBE_STEP * math.exp(-lambdas[at].item())
            jv = (denoiser(points[at][0] + step * v, lambdas[at].item()) - points[at][1]) / step
            runner.tick(len(v))
            products = (y, D, slope, y * y, y * D, D * D, y * slope, D * slope, v.double() * jv.double())
            rows.append(torch.stack([_pooled(p, job.per_element) for p in products]))
    y, D = points[-1]
    alpha = job.space.alpha_of(job.space.level_of(lambdas[-1])).item()
    return torch.stack(rows, 2).cpu(), ((y * alpha).cpu(), D.cpu())


def _pooled(v: Tensor, per_element: bool) -> Tensor:
    return v if per_element or v.ndim == 2 else v.flatten(2).mean(2)
