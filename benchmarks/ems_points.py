"""Where to measure statistics: trajectories or re-noised samples, the guided or the unguided denoiser; and the probe's step.

    python benchmarks/ems_points.py [--threads 2]

Few-step error on the embedded model with statistics of each kind over that of data prediction, same settings (see ems_cost.py),
on noise that no statistics have seen. On the analytic mixture both sources are compared with exact values in
tests/ems_tools/estimate/test_run.py.
"""

from __future__ import annotations

import argparse

import torch
from common import SIGMA_MAX, SIGMA_MIN, Problem
from ems_cost import few_step_error

from dpm_solver_v3.ems_tools.embedded import SHAPE, load_denoiser
from dpm_solver_v3.ems_tools.estimate.moments import Statistics
from dpm_solver_v3.ems_tools.estimate.run import Job, JobState, Model, estimate_moments, evaluations_of, uniform_grid
from dpm_solver_v3.sampler import EMS

LABELS = torch.arange(9)


def statistics(job: Job, measured: Model | None) -> Statistics:
    """Statistics at points of the guided model."""
    guidance = job.guidance[0]
    other = None if measured is None else {guidance: measured}
    models = {guidance: load_denoiser(LABELS, guidance)}
    return estimate_moments(models, job, JobState(), statistics_of=other, batch=18)[0].statistics()


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noises", type=int, default=18, help="held-out noises (18)")
    parser.add_argument("--samples", type=int, default=18, help="samples of every estimate (18)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    problem, grid = Problem(11, 100), uniform_grid(SIGMA_MIN, SIGMA_MAX, 40)
    print(
        "| guidance | points | denoiser measured | evaluations | error over data prediction |\n| --- | --- | --- | --- | --- |"
    )
    for guidance in (1.0, 4.0, 7.5):
        base = few_step_error(problem, None, args.noises, guidance)
        for source in ("trajectory", "renoised"):
            for kind in ("guided", "unguided") if guidance != 1 else ("the same",):
                job = Job(SHAPE, grid, samples=args.samples, guidance=(guidance,), source=source)
                st = statistics(job, load_denoiser(LABELS) if kind == "unguided" else None)
                error = few_step_error(
                    problem, EMS(torch.tensor(grid, dtype=torch.float64), st.l, st.s, st.b), args.noises, guidance
                )
                short = kind == "unguided" and source == "trajectory"
                cost = evaluations_of(job) + (3 * args.samples * len(grid) if short else 0)
                print(f"| {guidance:g} | {source} | {kind} | {cost} | {error / base:.3f} |", flush=True)
    forward = statistics(Job(SHAPE, grid, samples=9, probe_method="forward"), None)
    differences = statistics(Job(SHAPE, grid, samples=9), None)
    gap = (forward.l - differences.l).abs().max().item()
    error = forward.l_se.max().item()
    print(f"l by differences and in forward mode, same probes: at most {gap:.4f} apart (standard error {error:.4f})")


if __name__ == "__main__":
    main()
