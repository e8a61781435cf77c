"""Without a file, are our pictures ever further off in kernel distance than the best built-in sampler's on the same schedule?

    COMFYUI_PATH=... python benchmarks/kernel.py [--network shapes] [--guidance 1 4] [--steps 5 8 20] [--pictures 32]
        [--spaces sigma "flow 3"] [--schedules karras ...] [--rivals dpmpp_2m ...]

`defaults.py` with the kernel distance of `eyes.py` in place of the squared error (its features are ImageNet's, so only
networks of pictures take part): in every cell ours with every option at "auto", the best of the rivals, and the difference with
its 95 % interval over the same start noises. The best rival is chosen in hindsight, by the same distance of the same pictures,
which flatters it. A ratio is given where its distance is told from 0.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from entrants import comfyui
from eyes import Features, kernel_pairs, over_pairs, pretrained_features
from torch import Tensor
from zoo import NETWORKS, WEIGHTS, load
from zoo.hosted import SCHEDULES, SPACES, Hosted

__all__ = ["Cell", "compared"]

SEED = 33


@dataclass(frozen=True)
class Cell:
    """Kernel distances of our pictures and of the best rival's; `ratio` is None where that is not told from 0.

    Args:
        name: of the best rival.
        ours, best: distances.
        ratio: ours over the best rival's.
        less, more: the 95 % interval of ours less the best rival's.
    """

    name: str
    ours: float
    best: float
    ratio: float | None
    less: float
    more: float


def compared(ours: Tensor, rivals: dict[str, Tensor], exact: Tensor) -> Cell:
    """From the features [n, d] of the pictures of each sampler, and of the exact ones, from the same n start noises."""
    pairs = {name: kernel_pairs(seen, exact) for name, seen in rivals.items()}
    best = min(pairs, key=lambda name: float(pairs[name].sum()))
    mine, (value, low, _) = kernel_pairs(ours, exact), over_pairs(pairs[best])
    distance = over_pairs(mine)[0]
    return Cell(best, distance, value, distance / value if low > 0 else None, *over_pairs(mine - pairs[best])[1:])


def cells(hosted: Hosted, features: Features, args: argparse.Namespace) -> Iterator[Cell]:
    """Every cell of this guidance scale and space, printed as it comes."""
    shape, known = hosted.network.entry.shape, hosted.rivals()
    first = torch.randn(args.pictures, *shape, generator=torch.Generator().manual_seed(SEED))
    converged: dict[float, Tensor] = {}
    for schedule, n in itertools.product(args.schedules, args.steps):
        levels = hosted.levels(schedule, n)
        top = levels[0].item()
        x = hosted.noised(0.0, first, top)
        if top not in converged:
            converged[top] = features(hosted.converged(x, top).float())
        theirs = {name: features(known[name](hosted.denoiser, x, levels).float()) for name in args.rivals or known}
        ours = features(hosted.sample(x, levels, guidance=hosted.guidance).float())
        cell = compared(ours, theirs, converged[top])
        kernel = " | ".join(f"{1000 * v:.3g}" for v in (cell.ours, cell.best))
        ratio = "-" if cell.ratio is None else f"{cell.ratio:.2f}"
        span = f"[{1000 * cell.less:.3g}, {1000 * cell.more:.3g}]"
        where = f"{hosted.guidance:g} | {hosted.kind} | {schedule} | {n}"
        print(f"| {where} | {kernel}, {cell.name} | {ratio} | {span} |", flush=True)
        yield cell


def main() -> None:
    """Print the table and what it comes to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(n for n, e in NETWORKS.items() if e.shape[0] == 3), default="shapes")
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0, 4.0])
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 8, 20])
    parser.add_argument("--spaces", nargs="+", choices=SPACES, default=SPACES)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    parser.add_argument("--rivals", nargs="+", help="some of them (default: all)")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="of the zoo (default: out/zoo)")
    args = parser.parse_args()
    if comfyui("samplers") is None:
        sys.exit("kernel.py runs ComfyUI's schedules and samplers: set COMFYUI_PATH to a checkout of ComfyUI")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    network, features = load(args.network, args.weights), pretrained_features()
    print("| guidance | space | schedule | steps | ours x 1000 | best rival x 1000 | ratio | difference x 1000, 95 % |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    places = itertools.product(args.guidance, args.spaces)
    found = [cell for scale, space in places for cell in cells(Hosted(network, scale, space), features, args)]
    nearer, further = sum(c.more < 0 for c in found), sum(c.less > 0 for c in found)
    print(f"\n{len(found)} cells: surely nearer than the best rival in {nearer}, surely further off in {further}")
    ratios = torch.tensor([c.ratio for c in found if c.ratio is not None], dtype=torch.float64)
    if len(ratios):
        middle, most = ratios.quantile(0.5).item(), ratios.max().item()
        print(f"where the rival's is told from 0, {len(ratios)} cells: median {middle:.2f}, worst {most:.2f}")


if __name__ == "__main__":
    main()
