"""Without a file, are we ever worse than the best built-in sampler on the same schedule? On the networks of the zoo.

    COMFYUI_PATH=... python benchmarks/defaults.py [--networks signals shapes latents] [--guidance 1 4 7.5] [--steps 5 8 20]
        [--schedules karras time ...] [--denoise 0.3 0.5 0.75] [--noises 12] [--weights FOLDER] [--threads 2]

Prints, for every network, guidance scale, schedule and number of steps, our squared error with every option at "auto" and that
with the formula steps of `settings.defaults_for`, over the best of `rivals.RIVALS` and of ComfyUI's samplers (`entrants`, where
COMFYUI_PATH is set): geometric means over samples; the best is chosen in hindsight, cell by cell. Then median, 90 % and worst.
With --denoise, runs begin as image to image does: at the last n + 1 levels of a schedule of n / denoise steps, from pictures of
the model with fresh noise.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from common import geometric_mean, per_sample_error
from entrants import comfyui_rivals, host_schedules
from rivals import RIVALS
from torch import Tensor
from zoo import NETWORKS, WEIGHTS, Loaded, load

from dpm_solver_v3.sampler import karras, sample_dpm_solver_v3, uniform_lambda, uniform_time
from dpm_solver_v3.sampler.settings import defaults_for

SEED = 21


def schedules_of(network: Loaded) -> dict[str, Callable[[int], Tensor]]:
    """Host schedules on the network's range, all of which end at 0."""
    noise = network.entry.schedule
    found: dict[str, Callable[[int], Tensor]] = {
        "karras": lambda n: karras(noise, n, to_zero=True),
        "lambda": lambda n: uniform_lambda(noise, n, to_zero=True),
        "time": lambda n: uniform_time(noise, n, to_zero=True),
        "flow": lambda n: _flow(network.ends[0], n),
    }
    hosts = host_schedules(noise)
    return {**found, **{name: hosts[name] for name in ("sgm_uniform", "beta", "kl_optimal")}}


def _flow(high: float, n: int) -> Tensor:
    t = torch.linspace(high / (1 + high), 0, n + 1, dtype=torch.float64)
    return t / (1 - t)


def cells(network: Loaded, guidance: float, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Ratios (auto, formula) to the best rival in every cell of this network and guidance scale, printed as they come."""
    denoiser, (high, _) = network.denoiser(guidance), network.ends
    first, again = (
        torch.randn(args.noises, *network.entry.shape, generator=torch.Generator().manual_seed(SEED + k)) for k in (0, 1)
    )
    pictures = converged(network, guidance, first * high, high)
    rivals = {**RIVALS, **comfyui_rivals()}
    ratios = []
    for name, schedule in schedules_of(network).items():
        if args.schedules and name not in args.schedules:
            continue
        for denoise, n in itertools.product(args.denoise, args.steps):
            sigmas = schedule(n) if denoise == 1 else schedule(int(n / denoise))[-n - 1 :]
            top = sigmas[0].item()
            x = first * top if denoise == 1 else pictures + again * top
            exact = pictures if denoise == 1 else converged(network, guidance, x, top)
            error = {r: _error(run(denoiser, x, sigmas), exact) for r, run in rivals.items()}
            best = min(error, key=error.__getitem__)
            auto, formula = (
                _error(sample_dpm_solver_v3(denoiser, x, sigmas, disable=True, **options), exact) / error[best]
                for options in ({"guidance": guidance}, defaults_for(guidance).__dict__)
            )
            ratios.append((auto, formula))
            part = f"{name} {denoise:g}" if denoise != 1 else name
            print(f"{network.name:10} {guidance:4g} {part:16} {n:3} {auto:8.2f} {formula:8.2f}   {best}", flush=True)
    return ratios


def converged(network: Loaded, guidance: float, x: Tensor, top: float) -> Tensor:
    """The end of the ODE from x at sigma `top`."""
    fine = torch.linspace(math.log(top), math.log(min(network.ends[1], 0.006)), 140, dtype=torch.float64).exp()
    fine = torch.cat([fine, torch.zeros(1, dtype=torch.float64)])
    return sample_dpm_solver_v3(network.denoiser(guidance), x, fine, disable=True, order=3, corrector="none")


def _error(x: Tensor, exact: Tensor) -> float:
    return geometric_mean(per_sample_error(x, exact)).item()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=["signals", "shapes", "latents"])
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0, 4.0, 7.5])
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 8, 12, 20, 30])
    parser.add_argument("--schedules", nargs="+", help="some of them (default: all)")
    parser.add_argument("--denoise", nargs="+", type=float, default=[1.0], help="of image to image")
    parser.add_argument("--noises", type=int, default=12)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="of the zoo (default: out/zoo)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    print("network  guidance schedule  steps     auto  formula   best rival")
    ratios: list[tuple[float, float]] = []
    for name in args.networks:
        network = load(name, args.weights)
        for guidance in args.guidance if network.entry.classes else [1.0]:
            ratios += cells(network, guidance, args)
    for label, values in zip(("auto", "formula"), torch.tensor(ratios, dtype=torch.float64).T):
        middle, most = values.quantile(torch.tensor([0.5, 0.9], dtype=torch.float64)).tolist()
        print(f"{label}: median {middle:.2f}, 90 % below {most:.2f}, worst {values.max():.2f} ({len(values)} cells)")


if __name__ == "__main__":
    main()
