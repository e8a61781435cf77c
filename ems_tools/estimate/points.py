"""Where statistics are measured: points y at each lambda of a grid, with D, its total derivative D' and v * (J v).

The points are those of the model's own ODE trajectories, solved on the grid itself. D along a trajectory is a tabulated
function of lambda, so D' is its difference quotient and costs nothing. (Version 0.1.0 could also measure at clean samples
with fresh noise, for more evaluations; under strong guidance that gained, but less than fitted steps do.)

The Jacobian's diagonal comes from Hutchinson probes v of random signs: v * (J v), J v by a one-sided difference of D (its bias
is odd in v and so vanishes in the mean up to the square of the step). That never differentiates through the host's time input
and calls D on grid levels only: on a grid of a host's own levels, a host that rounds sigma rounds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ...sampler import LambdaDenoiser, SamplingError
from ..trajectory import solve_finely
from .job import Job, probed_points
from .moments import MOMENTS

__all__ = ["PROBE_STEP", "difference_weights", "sample_moments"]

PROBE_STEP = 0.1
"""Length of the finite-difference step for J v, in units of sigma per element."""


@dataclass
class _Sums:
    """Per-sample moments [9, B, N+1, C, ...] on the model's device, filled point by point."""

    values: Tensor
    per_element: bool

    def mean(self, v: Tensor) -> Tensor:
        """[B, C] over positions, or [B, C, ...] per element, in float64."""
        v = v.to(torch.float64)
        return v if self.per_element or v.ndim == 2 else v.flatten(2).mean(2)

    def put(self, i: int, y: Tensor, D: Tensor, Dp: Tensor) -> None:
        products = (y, D, Dp, y * y, y * D, D * D, y * Dp, D * Dp)
        for row, product in enumerate(products):
            self.values[row, :, i] = self.mean(product)

    def put_probe(self, i: int, v_jv: Tensor, share: float) -> None:
        self.values[MOMENTS.index("vJv"), :, i] += share * self.mean(v_jv)


def difference_weights(lambdas: Tensor) -> tuple[Tensor, Tensor]:
    """First node [N+1] and weights [N+1, 3] of the three-point derivative at every grid point (second order)."""
    n = len(lambdas)
    first = (torch.arange(n) - 1).clamp(0, n - 3)
    h = lambdas[first[:, None] + torch.arange(3)] - lambdas[:, None]
    weights = torch.empty(n, 3, dtype=torch.float64)
    for j in range(3):
        a, b = (k for k in range(3) if k != j)
        weights[:, j] = -(h[:, a] + h[:, b]) / ((h[:, j] - h[:, a]) * (h[:, j] - h[:, b]))
    return first, weights


def sample_moments(
    denoiser: LambdaDenoiser,
    job: Job,
    noise: Tensor,
    generators: list[torch.Generator],
    tick: Callable[[int], None] = lambda evaluations: None,
    watch: Callable[[int, Tensor, Tensor], None] = lambda i, y, D: None,
) -> Tensor:
    """Moments [9, B, N+1, C, ...] of a batch of samples, one trajectory each.

    Args:
        denoiser: D(y, lambda) that is measured along its own trajectories.
        job: its grid of lambda [N+1]; `probes`, Hutchinson probes a point; `probe_every`, probe at every so many grid points
            (and the last): v * (J v) is linear in lambda in between; `per_element`, keep positions apart.
        noise: [B, C, ...] unit start noise.
        generators: one per sample, for its probes: a sample's result does not depend on its batch.
        tick: called with the number of samples just evaluated (one per sample and call), for progress and cancelling.
        watch: called with (i, y, D) at every point of the trajectories.

    Raises:
        SamplingError: the model returned NaN, or a trajectory left the region of plausible values; names sigma.
    """
    lambdas, probes = torch.tensor(job.lambdas, dtype=torch.float64), job.probes
    kept = noise.shape[1:] if job.per_element else noise.shape[1:2]
    values = torch.zeros(len(MOMENTS), len(noise), len(lambdas), *kept, dtype=torch.float64, device=noise.device)
    sums = _Sums(values, job.per_element)
    probed = probed_points(len(lambdas), job.probe_every)

    def probe(i: int, y: Tensor, D: Tensor) -> None:
        watch(i, y, D)
        for _ in range(probes if i in probed else 0):
            v = _signs(y, generators)
            jv = _jacobian_product(denoiser, y, lambdas[i].item(), v, D)
            tick(len(y))
            sums.put_probe(i, v * jv, 1 / probes)

    _along_trajectory(denoiser, lambdas, noise, sums, probe, tick)
    _between_probes(sums.values[MOMENTS.index("vJv")], lambdas, probed)
    return sums.values


def _between_probes(values: Tensor, lambdas: Tensor, probed: list[int]) -> None:
    """Fill values [B, N+1, C, ...] between the probed points, linearly in lambda, in place."""
    for a, b in pairwise(probed):
        for i in range(a + 1, b):
            share = ((lambdas[i] - lambdas[a]) / (lambdas[b] - lambdas[a])).item()
            values[:, i] = torch.lerp(values[:, a], values[:, b], share)


def _along_trajectory(
    denoiser: LambdaDenoiser,
    lambdas: Tensor,
    noise: Tensor,
    sums: _Sums,
    probe: Callable[[int, Tensor, Tensor], None],
    tick: Callable[[int], None],
) -> None:
    """Fill `sums` while solving, with a call of `probe` at every point; D' from the last three values of D."""
    first, weights = difference_weights(lambdas)
    window: dict[int, tuple[Tensor, Tensor]] = {}

    def settle(i: int) -> None:
        nodes = range(int(first[i]), int(first[i]) + 3)
        Dp = sum((window[j][1].to(torch.float64) * weights[i, k].item() for k, j in enumerate(nodes)), torch.tensor(0.0))
        y, D = window[i]
        sums.put(i, y.to(torch.float64), D.to(torch.float64), Dp.to(noise.device))

    def visit(i: int, y: Tensor, D: Tensor) -> None:
        _check_plausible(y, D, lambdas[i].item())
        window[i] = (y, D)
        probe(i, y, D)
        if i >= 2:
            settle(i - 1)
            if i == 2:
                settle(0)
            if i == len(lambdas) - 1:
                settle(i)
            del window[i - 2]

    solve_finely(denoiser, lambdas, noise, visit, tick)


def _check_plausible(y: Tensor, D: Tensor, lam: float) -> None:
    """A denoiser that works removes about sigma of noise; ten times that, and the ODE runs away."""
    sigma = 2.718281828459045**-lam
    residual = (y - D).float().square().mean().sqrt().item()
    if not residual <= 30 * max(sigma, 0.02):
        raise SamplingError(
            f"the trajectory diverges at sigma = {sigma:.4g} (lambda = {lam:.3f}): the model moves x by {residual:.3g}, where "
            f"about {sigma:.3g} of noise is left. Check the prediction type, the noise range and the guidance scale"
        )


def _jacobian_product(denoiser: LambdaDenoiser, y: Tensor, lam: float, v: Tensor, D: Tensor) -> Tensor:
    """J v = (dD/dy) v at y [B, C, ...]."""
    step = PROBE_STEP * 2.718281828459045**-lam
    return (denoiser(y + step * v, lam) - D) / step


def _signs(like: Tensor, generators: list[torch.Generator]) -> Tensor:
    draws = [torch.randint(0, 2, like.shape[1:], generator=g, dtype=torch.int8) for g in generators]
    return torch.stack(draws).to(like.device, like.dtype) * 2 - 1
