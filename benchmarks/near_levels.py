"""A level that nearly repeats the one before it: what it does to the solver, with and without the rule of `plan.SHORT_STEP`.

    python benchmarks/near_levels.py [--guidance 1] [--noises 8]

Karras steps of 8 on the embedded model, with one more level at sigma (1 - r) after the fourth, at order 2 with the paper's
corrector; geometric mean of the squared error to the converged picture. Schedules of hosts hold such levels where two lists of
sigmas are joined.
"""

from __future__ import annotations

import argparse

import torch
from common import NOISE, Problem, geometric_mean, per_sample_error
from rivals import RIVALS
from torch import Tensor

from dpm_solver_v3.sampler import karras, plan, sample_dpm_solver_v3

SEED = 7


def main() -> None:
    """Print one line for each r."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--noises", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    problem, samples = Problem(SEED, 60), range(args.noises)
    clean, start = problem.reference(samples, args.guidance).clean, problem.start(samples)
    steps = karras(NOISE, 8, to_zero=True)

    def error(sigmas: Tensor, rule: float | None) -> float:
        denoiser = problem.denoiser(samples, args.guidance)
        if rule is None:
            return geometric_mean(per_sample_error(RIVALS["dpmpp_2m"](denoiser, start, sigmas), clean)).item()
        plan.SHORT_STEP = rule
        plan.forget_plans()
        found = sample_dpm_solver_v3(denoiser, start, sigmas, disable=True, order=2, corrector="pseudo")
        return geometric_mean(per_sample_error(found, clean)).item()

    rule = plan.SHORT_STEP
    print("| r | with the rule | without it | dpmpp_2m |\n| --- | --- | --- | --- |")
    for share in (0.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4):
        sigmas = torch.cat([steps[:4], *([steps[3:4] * (1 - share)] if share else []), steps[4:]]).float()
        print(f"| {share:g} | " + " | ".join(f"{error(sigmas, r):.4f}" for r in (rule, 0.0, None)) + " |", flush=True)


if __name__ == "__main__":
    main()
