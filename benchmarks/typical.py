"""Make `sampler/typical.safetensors`: the trajectories on which steps without statistics are chosen (`sampler/typical.py`).

    python benchmarks/typical.py [--networks digits galaxies ...] [--weights FOLDER] [--noises 12] [--to FILE]

For every network and guidance scale: converged trajectories on a grid of lambda, and along four coarse runs of the solver how
the denoiser answers to the error that the run has there, median over samples of <D - D*, y - y*> / |y - y*|^2. Trajectories
are taken less their ends, which every step keeps exactly, scaled to unit variance and projected on main directions. The
zoo's development networks take part, except "photographs": its samples leave the range of the data (deviation 18).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from zoo import WEIGHTS, Loaded, load

from dpm_solver_v3.sampler import karras, plan_for, sample_dpm_solver_v3, uniform_time
from dpm_solver_v3.sampler.solver import Run
from dpm_solver_v3.sampler.typical import FILE

NETWORKS = ("digits", "galaxies", "mnist", "emoji", "ddpm", "waves", "textures")
GRID = torch.arange(-52, 67, dtype=torch.float64) / 10
"""Lambda from sigma = 181 to 0.0014."""
DIRECTIONS = 12
"""Of the trajectories of one network and guidance scale, all samples and pixels together."""
STEPS, KEPT, SEED = 110, 128, 11

Curve = Callable[[Tensor], Tensor]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="of the zoo (default: out/zoo)")
    parser.add_argument("--noises", type=int, default=12)
    parser.add_argument("--to", type=Path, default=FILE)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    make(args.networks, args.weights, args.noises, args.to)


def make(networks: Sequence[str], weights: Path, noises: int, to: Path) -> None:
    """Write the trajectories of these networks, at every guidance scale that they know."""
    parts: list[tuple[Tensor, Tensor]] = []
    scales: list[float] = []
    for name in networks:
        network = load(name, weights)
        for guidance in network.entry.guidances:
            parts.append(trajectories_of(network, guidance, noises))
            scales.append(guidance)
            print(f"{name}, guidance {guidance:g}: response {[round(v, 2) for v in parts[-1][1][::20].tolist()]}", flush=True)
    denoised = torch.cat([D for D, _ in parts], 1).float().contiguous()
    response = torch.stack([answers for _, answers in parts], 1).float().contiguous()
    owner = torch.arange(len(parts), dtype=torch.int32).repeat_interleave(DIRECTIONS)
    values = {
        "lambdas": GRID.float(),
        "denoised": denoised,
        "response": response,
        "owner": owner,
        "guidance": torch.tensor(scales),
    }
    save_file(values, to)


def trajectories_of(network: Loaded, guidance: float, noises: int) -> tuple[Tensor, Tensor]:
    """`denoised` [K, DIRECTIONS] and `response` [K] of `Trajectories` for one network and guidance scale."""
    denoiser, (high, low) = network.denoiser(guidance), network.ends
    draw = torch.Generator().manual_seed(SEED)
    start = torch.randn(noises, *network.entry.shape, generator=draw, dtype=torch.float64) * high
    sigmas = torch.linspace(math.log(high), math.log(min(low, 0.006)), STEPS, dtype=torch.float64).exp()
    y, D, end = _follow(denoiser, start, torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)]))
    lambdas = -sigmas.log()
    response = _response(network, denoiser, _curve(lambdas, y), _curve(lambdas, D), start.shape)
    pixels = end.numel() // noises
    if pixels > KEPT:  # a random projection keeps lengths and angles
        mix = torch.randn(pixels, KEPT, generator=draw, dtype=torch.float64) / math.sqrt(KEPT)
        D, end = ((v.unflatten(-1, (noises, pixels)) @ mix).flatten(-2) for v in (D, end))
    inside = GRID.clamp(lambdas[0], lambdas[-1])
    fade = (inside - GRID).clamp(max=0).exp()[:, None]  # beyond the last node D goes to the end like sigma
    denoised = (_curve(lambdas, D)(inside) - end) * fade
    left, values, _ = torch.linalg.svd(denoised / denoised[0].square().sum().sqrt(), full_matrices=False)
    return left[:, :DIRECTIONS] * values[:DIRECTIONS], response


def _follow(denoiser: Callable[..., Tensor], x: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States and denoised [n, P] at the nodes of a fine schedule, and the end [P]."""
    run = Run(plan_for(sigmas, order=3, corrector="none", lower_order_final=False), x)
    states, outputs = [], []
    while not run.done:
        states.append(run.x.flatten())
        outputs.append(_call(denoiser, run.x, run.level))
        run.observe(outputs[-1])
        run.advance()
    return torch.stack(states), torch.stack([v.flatten() for v in outputs]), run.x.flatten()


def _call(denoiser: Callable[..., Tensor], x: Tensor, level: Tensor) -> Tensor:
    return denoiser(x.float(), level.float() * torch.ones(len(x))).double()


def _curve(lambdas: Tensor, values: Tensor) -> Curve:
    from scipy.interpolate import CubicSpline

    spline = CubicSpline(lambdas.numpy(), values.numpy())
    return lambda at: torch.from_numpy(spline(at.numpy()))


def _response(network: Loaded, denoiser: Callable[..., Tensor], y: Curve, D: Curve, shape: torch.Size) -> Tensor:
    """The answer [K] of D to errors of y along four coarse runs, smoothed with a Gaussian of half a unit of lambda."""
    high, low = network.ends
    points: list[tuple[float, float]] = []

    def watched(x: Tensor, sigma: Tensor) -> Tensor:
        out = _call(denoiser, x, sigma[0])
        lam = -sigma[:1].double().log()
        error, change = ((v - c(lam)[0].reshape(shape)).flatten(1) for v, c in ((x, y), (out, D)))
        if error.square().mean() > 1e-12 * x.square().mean():
            points.append((lam.item(), ((change * error).sum(1) / error.square().sum(1)).median().item()))
        return out

    for sigmas in (
        karras(network.entry.schedule, 7, to_zero=True),
        uniform_time(network.entry.schedule, 8, to_zero=True),
        torch.cat([torch.linspace(math.atan(high), math.atan(low), 9, dtype=torch.float64).tan(), torch.zeros(1)]),
        _flow_steps(high, 6),
    ):
        start = y(-sigmas[:1].log())[0].reshape(shape)
        sample_dpm_solver_v3(watched, start, sigmas, disable=True, order=2, corrector="none", lower_order_final=False)
    at, value = torch.tensor(sorted(points), dtype=torch.float64).T
    weights = (-0.5 * ((GRID[:, None].clamp(at[0], at[-1]) - at) / 0.5) ** 2).exp()
    return (weights @ value / weights.sum(1)).clamp(-0.3, 1)


def _flow_steps(high: float, n: int) -> Tensor:
    """Sigmas t / (1 - t) with t uniform from that of `high` to 0."""
    t = torch.linspace(high / (1 + high), 0, n + 1, dtype=torch.float64)
    return t / (1 - t)


if __name__ == "__main__":
    main()
