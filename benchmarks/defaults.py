"""Which order and corrector to use when nothing is known: the measurement behind DEFAULTS and STRONG_GUIDANCE.

    python benchmarks/defaults.py [--noises 9] [--guidance 1,4,7.5] [--steps 5,6,8,10] [--threads 2]

On the embedded model, over all schedules of the quality benchmark, the error of each combination over that of order 2 without
corrector (same statistics, schedule, steps, noise): geometric mean, and in how many cells it is the lowest. Its noise is used
nowhere else.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from common import SCHEDULES, Problem, geometric_mean, per_sample_error
from quality import load_ems
from tqdm import tqdm

from dpm_solver_v3.sampler import EMS, sample_dpm_solver_v3

SEED = 3
COMBINATIONS: dict[str, dict[str, Any]] = {
    "order 2, none": {"order": 2, "corrector": "none"},
    "order 2, pseudo": {"order": 2, "corrector": "pseudo"},
    "order 2, raised": {"order": 2, "corrector": "raised"},
    "order 3, none": {"order": 3, "corrector": "none"},
    "order 3, pseudo": {"order": 3, "corrector": "pseudo"},
}


def main() -> None:
    """Print a table for each guidance scale, without and with statistics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noises", type=int, default=9)
    parser.add_argument("--guidance", default="1,4,5.5,7.5")
    parser.add_argument("--steps", default="5,6,8,10")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    counts = [int(n) for n in args.steps.split(",")]
    problem, statistics = Problem(SEED, 200), load_ems(None)
    scales = [float(g) for g in args.guidance.split(",")]
    bar = tqdm(total=len(scales) * 2 * len(SCHEDULES) * len(counts) * len(COMBINATIONS), unit="run")
    for guidance in scales:
        for kind, ems in (("without EMS", None), ("with EMS at strength 1", statistics(guidance))):
            report(problem, guidance, kind, ems, counts, args.noises, bar)
    bar.close()


def report(problem: Problem, guidance: float, kind: str, ems: EMS | None, counts: list[int], noises: int, bar: tqdm) -> None:
    """One table."""
    samples = range(noises)
    reference, start = problem.reference(samples, guidance), problem.start(samples)
    denoiser = problem.denoiser(samples, guidance)
    cells: list[dict[str, float]] = []
    for make in SCHEDULES.values():
        for n in counts:
            cell, sigmas = {}, make(n)
            for name, options in COMBINATIONS.items():
                x = sample_dpm_solver_v3(denoiser, start, sigmas, ems=ems, strength=1.0, disable=True, **options)
                cell[name] = geometric_mean(per_sample_error(x, reference.end_of(sigmas, "end"))).item()
                bar.update()
            cells.append(cell)
    base = next(iter(COMBINATIONS))
    print(f"\nguidance {guidance:g}, {kind}: error over '{base}', and lowest in how many of {len(cells)} cells")
    for name in COMBINATIONS:
        ratio = math.exp(sum(math.log(c[name] / c[base]) for c in cells) / len(cells))
        wins = sum(min(c, key=c.__getitem__) == name for c in cells)
        print(f"  {name:18} {ratio:6.3f}  {wins:3}", flush=True)


if __name__ == "__main__":
    main()
