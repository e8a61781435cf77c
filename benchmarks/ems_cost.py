"""What statistics cost: few-step error over evaluations spent, per channel against per element with K = 1024 samples.

    python benchmarks/ems_cost.py [--threads 2]

On the embedded model, unguided. Error: geometric mean over noises and over 5, 6, 8 and 10 steps (uniform lambda, order 2,
pseudo corrector), on noise that no statistics have seen. Per-channel estimates of few samples are repeated with other seeds.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import NOISE, SCHEDULES, SIGMA_MAX, SIGMA_MIN, Problem, geometric_mean, per_sample_error
from torch import Tensor
from tqdm import tqdm

from dpm_solver_v3.ems_tools.embedded import SHAPE, load_denoiser
from dpm_solver_v3.ems_tools.estimate.job import Job, JobState, Progress, evaluations_of, uniform_grid
from dpm_solver_v3.ems_tools.estimate.run import estimate_moments
from dpm_solver_v3.sampler import EMS, sample_dpm_solver_v3

STEPS = (5, 6, 8, 10)
SETTINGS: dict[str, Any] = {"order": 2, "corrector": "pseudo", "strength": 1.0, "disable": True}


def few_step_error(problem: Problem, ems: EMS | None, noises: int, guidance: float = 1.0) -> float:
    """Geometric mean over noises and step counts of the error at the schedule's end."""
    samples = range(noises)
    reference, start = problem.reference(samples, guidance), problem.start(samples)
    denoiser = problem.denoiser(samples, guidance)
    errors: list[Tensor] = []
    for steps in STEPS:
        sigmas = SCHEDULES["uniform_lambda"](steps)
        x = sample_dpm_solver_v3(denoiser, start, sigmas, ems=ems, **SETTINGS)
        errors.append(per_sample_error(x, reference.end_of(sigmas, "end")))
    return geometric_mean(torch.cat(errors)).item()


def estimate(job: Job, batch: int) -> EMS:
    """Statistics of the unguided embedded model."""
    with tqdm(total=evaluations_of(job), unit="eval", leave=False) as bar:

        def show(p: Progress) -> None:
            bar.update(p.done - bar.n)

        models = {1.0: load_denoiser(torch.arange(9))}
        moments = estimate_moments(models, job, JobState(), batch=batch, progress=show)[0]
    st = moments.statistics()
    return EMS(moments.lambdas, st.l, st.s, st.b)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noises", type=int, default=18, help="held-out noises (18)")
    parser.add_argument("--samples", type=int, default=1024, help="K of the per-element statistics (1024)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    problem = Problem(11, 100)
    base = few_step_error(problem, None, args.noises)
    print(f"data prediction, same settings: error {base:.3e}", flush=True)
    grid = uniform_grid(SIGMA_MIN, SIGMA_MAX, 30)
    print("| statistics | samples | evaluations | error | over data prediction |\n| --- | --- | --- | --- | --- |", flush=True)

    def row(kind: str, job: Job, errors: list[float]) -> None:
        error = sum(errors) / len(errors)
        spread = f" ({min(errors):.3e} to {max(errors):.3e})" if len(errors) > 1 else ""
        print(f"| {kind} | {job.samples} | {evaluations_of(job)} | {error:.3e}{spread} | {error / base:.3f} |", flush=True)

    for samples in (1, 2, 4, 8, 16, 32, 64):
        repeats = 3 if samples < 32 else 1
        jobs = [Job(SHAPE, grid, samples=samples, seed=seed) for seed in range(repeats)]
        row("per channel", jobs[0], [few_step_error(problem, estimate(job, 16), args.noises) for job in jobs])
    for samples in (args.samples // 16, args.samples):
        job = Job(SHAPE, grid, samples=samples, per_element=True, groups=4)
        row("per element", job, [few_step_error(problem, estimate(job, 32), args.noises)])
    print(f"range {NOISE.time_min:g} to 1 of the VP schedule, {len(grid)} points of lambda, {args.noises} held-out noises")


if __name__ == "__main__":
    main()
