"""Without a file, are we ever worse than the best built-in sampler on the same schedule? On the networks of the zoo.

    COMFYUI_PATH=... python benchmarks/defaults.py [--networks signals shapes latents] [--guidance 1 2 4 7.5] [--steps 5 8 20]
        [--spaces sigma "flow 3"] [--schedules karras ...] [--denoise 0.3 0.5 0.75] [--noises 8] [--weights FOLDER]

Prints, for every network, guidance scale, space, schedule of ComfyUI's and number of steps (`zoo.hosted`), our squared error
with every option at "auto" and that with the formula steps of `settings.defaults_for`, over the best of `rivals.RIVALS` and of
ComfyUI's samplers: geometric means over samples; the best is chosen in hindsight, cell by cell. Then median, 90 % and worst, of
all and by space, guidance scale, schedule and number of steps; and the same over each rival, as if a user always took that one.
With --denoise, runs begin as image to image does: at the last n + 1 levels of a schedule of n / denoise steps, from pictures of
the model with fresh noise.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import geometric_mean, per_sample_error
from entrants import comfyui
from torch import Tensor
from zoo import NETWORKS, WEIGHTS, load
from zoo.hosted import SCHEDULES, SPACES, Hosted

from dpm_solver_v3.sampler.settings import defaults_for

SEED = 21


@dataclass(frozen=True)
class Cell:
    """Our errors over the best rival's, and where.

    Args:
        guidance, space, schedule, steps: of the run; image to image stands behind the schedule's name.
        auto: with every option at "auto".
        formula: with the formula steps.
        rivals: errors of each rival over the best one's.
    """

    guidance: float
    space: str
    schedule: str
    steps: int
    auto: float
    formula: float
    rivals: Mapping[str, float]


def cells(hosted: Hosted, args: argparse.Namespace) -> Iterator[Cell]:
    """Every cell of this network, guidance scale and space, printed as it comes."""
    shape = hosted.network.entry.shape
    first, again = (torch.randn(args.noises, *shape, generator=torch.Generator().manual_seed(SEED + k)) for k in (0, 1))
    pictures: dict[float, Tensor] = {}
    rivals = hosted.rivals()
    for schedule, denoise, n in itertools.product(args.schedules, args.denoise, args.steps):
        levels = hosted.levels(schedule, n, denoise)
        top = levels[0].item()
        if top not in pictures:
            pictures[top] = hosted.converged(hosted.noised(0.0, first, top), top)
        x, exact = hosted.noised(0.0, first, top), pictures[top]
        if denoise != 1:
            x = hosted.noised(exact, again, top)
            exact = hosted.converged(x, top)
        error = {name: _error(run(hosted.denoiser, x, levels), exact) for name, run in rivals.items()}
        best = min(error, key=error.__getitem__)
        auto, formula = (
            _error(hosted.sample(x, levels, **options), exact) / error[best]
            for options in ({"guidance": hosted.guidance}, defaults_for(hosted.guidance).__dict__)
        )
        part = f"{schedule} {denoise:g}" if denoise != 1 else schedule
        where = f"{hosted.network.name:10} {hosted.guidance:4g} {hosted.kind:7} {part:16} {n:3}"
        print(f"{where} {auto:8.2f} {formula:8.2f}   {best} {error[best]:.3g}", flush=True)
        yield Cell(hosted.guidance, hosted.kind, part, n, auto, formula, {k: v / error[best] for k, v in error.items()})


def _error(x: Tensor, exact: Tensor) -> float:
    """Geometric mean of the mean squared differences; infinite where a run diverged."""
    value = geometric_mean(per_sample_error(x, exact)).item()
    return value if math.isfinite(value) else math.inf


def line(name: str, values: Sequence[float]) -> None:
    """Print what these ratios come to."""
    ratios = torch.tensor(values, dtype=torch.float64)
    middle, most = ratios.quantile(torch.tensor([0.5, 0.9], dtype=torch.float64)).tolist()
    above = sum(value > 1.1 for value in values)
    words = f"median {middle:.2f}, 90 % below {most:.2f}, worst {ratios.max():.2f}, {above} above 1.1 ({len(values)} cells)"
    print(f"{name}: {words}", flush=True)


def summary(found: Mapping[str, Sequence[Cell]]) -> None:
    """Print what the cells of each network, and all, come to."""
    every = [cell for some in found.values() for cell in some]
    for name, some in found.items():
        line(f"{name}, formula", [cell.formula for cell in some])
        line(name, [cell.auto for cell in some])
    for part in ("space", "guidance", "schedule", "steps"):
        for value in dict.fromkeys(getattr(cell, part) for cell in every):
            line(f"{part} {value}", [cell.auto for cell in every if getattr(cell, part) == value])
    line("all, formula", [cell.formula for cell in every])
    line("all", [cell.auto for cell in every])
    print("over each rival, always taken:")
    for rival in every[0].rivals:
        line(rival, [cell.auto / cell.rivals[rival] for cell in every])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=["signals", "shapes", "latents"])
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0, 2.0, 4.0, 7.5])
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 8, 12, 20, 30])
    parser.add_argument("--spaces", nargs="+", choices=SPACES, default=SPACES)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    parser.add_argument("--denoise", nargs="+", type=float, default=[1.0], help="of image to image")
    parser.add_argument("--noises", type=int, default=8)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="of the zoo (default: out/zoo)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if comfyui("samplers") is None:
        sys.exit("defaults.py runs ComfyUI's schedules and samplers: set COMFYUI_PATH to a checkout of ComfyUI")
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    print("network  guidance space schedule  steps     auto  formula   best rival, its error")
    found: dict[str, list[Cell]] = {}
    for name in args.networks:
        network = load(name, args.weights)
        for guidance in args.guidance if network.entry.classes else [1.0]:
            for space in args.spaces:
                found.setdefault(name, []).extend(cells(Hosted(network, guidance, space), args))
    summary(found)


if __name__ == "__main__":
    main()
