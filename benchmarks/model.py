"""Is the embedded model's ODE well-behaved? References of 200 and 400 steps, and the range of l(lambda).

python benchmarks/model.py
"""

from __future__ import annotations

import torch
from common import NOISE, Problem, per_sample_error

from dpm_solver_v3.ems_tools.embedded import SHAPE, load_denoiser
from dpm_solver_v3.ems_tools.estimate.run import Job, JobState, estimate_moments, uniform_grid


def main() -> None:
    """Print both checks."""
    problem, samples = Problem(3, 200), range(18)
    for guidance in (1.0, 4.0, 7.5):
        coarse, fine = (problem.reference(samples, guidance, n).clean for n in (200, 400))
        error = per_sample_error(coarse, fine)
        print(
            f"guidance {guidance:g}: 200 and 400 steps differ by {error.mean():.2g} in mean square, at most {error.max():.2g}"
        )
    low, high = NOISE.level_at(torch.tensor([NOISE.time_min, NOISE.time_max])).tolist()
    job = Job(SHAPE, uniform_grid(low, high, 60), samples=36)
    statistics = estimate_moments({1.0: load_denoiser(torch.arange(9))}, job, JobState(), batch=18)[0].statistics()
    print(f"l(lambda) lies within [{statistics.l.min():.4f}, {statistics.l.max():.4f}]")


if __name__ == "__main__":
    main()
