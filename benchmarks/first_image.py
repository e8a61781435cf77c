"""Does the first run tell right steps for image to image from wrong ones, where somebody else made the file?

    python benchmarks/first_image.py [--only waves digits] [--runs 60] [--effort quick]

As `first_passes.py` for steps in fewer passes: in every run one number of steps, one beginning within what was fitted, one
class and one noise, drawn at random. Wrong are all rows of a file with their decay or weights x 1.15 ("random weights": each by
a factor of its own from 0.5 to 1.5). "harm" is the squared error of the picture that the file's steps give, over that of Karras
steps without a file from the same beginning, against a fine solution.
"""

from __future__ import annotations

import argparse
import math
import random
from typing import Any

import torch
from first_passes import COLUMNS, Outcome, changed, counted
from image import fitted
from zoo import NETWORKS, Loaded, load

from dpm_solver_v3.ems_tools.file import EMSFile, FittedRow
from dpm_solver_v3.ems_tools.file.rows import EMSMeta
from dpm_solver_v3.ems_tools.fit.partial import fine_grid
from dpm_solver_v3.ems_tools.hosting import Origin, TrustBook, sample_on_trial
from dpm_solver_v3.sampler import EDM, karras, sample_dpm_solver_v3

KINDS = ("right", "decay x 1.15", "weights x 1.15", "random weights")
STEPS = (4, 5, 6, 8, 10)


def file_of(network: Loaded, guidance: float, rows: list[FittedRow]) -> EMSFile:
    """A file with these rows and statistics of nothing."""
    high, low = network.ends
    lambdas = torch.tensor([-math.log(high), -math.log(low)], dtype=torch.float64)
    ones = torch.ones(1, 2, network.entry.shape[0])
    meta = EMSMeta("sigma", low, high, partial=tuple(rows))
    return EMSFile(lambdas, torch.tensor([guidance], dtype=torch.float64), ones, 0 * ones, 0 * ones, meta)


def trial(file: EMSFile, guidance: float, network: Loaded, draw: random.Random) -> Outcome:
    """One first run with the file's steps for image to image."""
    high, low = network.ends
    label, seed = draw.randrange(network.entry.classes or 1), draw.randrange(2**31)
    model, made = network.denoiser(guidance, [label]), [0]
    noise = torch.randn(2, *network.entry.shape, generator=torch.Generator().manual_seed(seed))
    options: dict[str, Any] = {"disable": True, "guidance": guidance}

    def watched(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        made[0] += 1
        return model(x, sigma)

    def fine(x: torch.Tensor, top: float) -> torch.Tensor:
        grid = torch.tensor([*(math.exp(-v) for v in fine_grid(-math.log(top), -math.log(low), 80)), 0.0], dtype=torch.float64)
        return sample_dpm_solver_v3(model, x, grid, disable=True, order=3, corrector="none", lower_order_final=False)

    row = draw.choice(file.meta.partial)
    lam = row.lambdas[0] + draw.uniform(-0.2, 0.2)
    levels = karras(EDM(low, math.exp(-lam)), row.steps, to_zero=True)
    x = fine(noise[:1] * high, high) + noise[1:] * levels[0].item()
    told: list[str] = []
    ems, book = file.at(guidance), TrustBook(None)
    sample_on_trial(book, Origin(file, "theirs"), told.append, watched, x, levels, ems=ems, image_to_image=True, **options)
    exact = fine(x, levels[0].item())
    blind = sample_dpm_solver_v3(model, x, levels, ems=ems, image_to_image=True, **options)
    without = sample_dpm_solver_v3(model, x, levels, **options)
    harm = float((blind - exact).square().mean()) / max(float((without - exact).square().mean()), 1e-30)
    extra = made[0] - row.steps * (2 if told else 1)
    return Outcome(bool(told), extra, harm)


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(NETWORKS), default=["waves", "digits"], help="networks of the zoo")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--runs", type=int, default=60, help="of each kind and network")
    parser.add_argument("--effort", default="quick", help="of the fit")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    print(f"{'network':<10} {'rows':<15} {'runs':>5} " + " ".join(f"{name:>11}" for name in COLUMNS))
    for name in args.only:
        network = load(name)
        rows = {g: fitted(network, g, args.effort, STEPS) for g in args.guidance}
        for kind in KINDS:
            draw, found = random.Random(f"{args.seed} {name} {kind}"), list[Outcome]()
            for _ in range(args.runs):
                guidance = draw.choice([g for g in rows if rows[g]])
                bent = [row for r in rows[guidance] if (row := changed(r, kind, [], draw)) is not None]
                found.append(trial(file_of(network, guidance, bent), guidance, network, draw))
            print(f"{name:<10} {kind:<15} {counted(found)}", flush=True)


if __name__ == "__main__":
    main()
