"""Time of one scheduler step in diffusers: ours beside UniPC and DPM-Solver++, when the model is free.

    python benchmarks/scheduler.py [--steps 20] [--repeats 15]

The model's output is one fixed tensor. The schedulers take turns within a round, so that a busy machine slows all alike; shown
are the median time per step, and the median over rounds of the ratio to UniPC's in the same round. What is worked out once
per schedule (our coefficients) is done before.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from dpm_solver_v3.pipelines import DPMSolverV3Scheduler

SIZES = {"SD 1.5": (1, 4, 64, 64), "SDXL": (1, 4, 128, 128), "video": (1, 16, 21, 60, 104)}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def seconds_per_step(scheduler: Any, shape: tuple[int, ...], steps: int) -> float:
    """Of one run."""
    scheduler.set_timesteps(steps)
    draw = torch.Generator().manual_seed(0)
    x, output = (torch.randn(shape, generator=draw) for _ in range(2))
    began = time.perf_counter()
    for t in scheduler.timesteps:
        x = scheduler.step(output, t, scheduler.scale_model_input(x, t), return_dict=False)[0]
    return (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, shape in SIZES.items():
        entrants = {
            "diffusers UniPC": UniPCMultistepScheduler(**SD),
            "diffusers DPM-Solver++ 2M": DPMSolverMultistepScheduler(**SD),
            "DPMSolverV3Scheduler": DPMSolverV3Scheduler(**SD),
            "DPMSolverV3Scheduler, order 3": DPMSolverV3Scheduler(**SD, order=3, corrector="pseudo"),
        }
        times: dict[str, list[float]] = {entrant: [] for entrant in entrants}
        for scheduler in entrants.values():
            seconds_per_step(scheduler, shape, args.steps)
        for _ in range(args.repeats):
            for entrant, scheduler in entrants.items():
                times[entrant].append(seconds_per_step(scheduler, shape, args.steps))
        print(f"\n{name}, latents {'x'.join(map(str, shape))}, {args.steps} steps on {torch.get_num_threads()} thread")
        for entrant, values in times.items():
            ratio = statistics.median(v / base for v, base in zip(values, times["diffusers UniPC"], strict=True))
            print(f"  {entrant:<32} {1e3 * statistics.median(values):8.3f} ms a step   {ratio:5.2f} of UniPC's")


if __name__ == "__main__":
    main()
