"""Where a flow schedule should start: at t = 1 as hosts give it, or a little below. Errors against the converged solution.

Prints, for the embedded model as rectified flow, the mean squared error (geometric mean over the noises) when the first level
t = 1 of uniform-time schedules (shift 1 and 3) is replaced by a smaller one, the noise staying as it is.
Default order and corrector.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from dpm_solver_v3.ems_tools.embedded import FlowHost, load_denoiser
from dpm_solver_v3.sampler import LevelTable, Space, sample_dpm_solver_v3, uniform_time

STARTS = (1.0, 0.9999, 0.999, 0.995, 0.99, 0.98)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noises", type=int, default=18)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    labels = torch.arange(options.noises) % 9
    noise = torch.randn((options.noises, 3, 32, 32), generator=torch.Generator().manual_seed(71))
    for guidance in (1.0, 4.0):
        model = FlowHost(load_denoiser(labels=labels, guidance=guidance))
        for shift in (1.0, 3.0):
            time = torch.arange(1, 1001, dtype=torch.float64) / 1000
            table = LevelTable(shift * time / (1 + (shift - 1) * time), Space.FLOW)
            exact = solve(model, noise, uniform_time(table, 200, to_zero=True), order=3, corrector="none")
            print(f"\nguidance {guidance:g}, shift {shift:g}: start" + "".join(f"{s:>10g}" for s in STARTS))
            for steps in (6, 8, 10, 20):
                levels = uniform_time(table, steps, to_zero=True)
                given = [torch.cat([levels.new_tensor([s]), levels[1:]]) for s in STARTS if s > levels[1]]
                line = [error(solve(model, noise, sigmas), exact) for sigmas in given]
                print(f"{steps:>3} steps{'':22}" + "".join(f"{e:>10.4f}" for e in line), flush=True)


@torch.no_grad()
def solve(model: FlowHost, noise: Tensor, levels: Tensor, **options: object) -> Tensor:
    return sample_dpm_solver_v3(model, noise, levels, disable=True, space=Space.FLOW, **options)  # type: ignore[arg-type]


def error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact.double()).square().flatten(1).mean(1).log().mean().exp())


if __name__ == "__main__":
    main()
