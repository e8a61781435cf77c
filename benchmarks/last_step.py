"""The step to sigma = 0, which costs no evaluation: rules for it and for the step before it, on every schedule that ends in 0.

    python benchmarks/last_step.py [--noises 18] [--steps 5 8 10] [--guidance 1 4 7.5]

Prints, on the embedded model, the geometric mean of the error of v3 at its defaults and, over it, that of other rules:

- "2nd before": the step before the last at full order, as multistep samplers do. The default lowers it where the last
  evaluation is at sigma 0.05 or less (`sampler.plan.TRIVIAL_SIGMA`), because the model then removes only a little noise.
- "1st before": that step at first order, wherever the last evaluation is.
- "half of linear": x0 = D_n + 0.5 (D_n - D_(n-1)) sigma_n / (sigma_(n-1) - sigma_n) instead of D_n.
- "best a, b": x0 = D_n + a (D_n - D_(n-1)) + b (y_n - D_n) with the a and b that are best on these very noises: a bound.

--threshold moves the last evaluation of Karras steps instead, and prints the error of "1st before" over "2nd before".
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import NOISE, SCHEDULES, Problem, geometric_mean, per_sample_error
from entrants import host_schedules
from quality import load_ems
from torch import Tensor

from dpm_solver_v3.sampler import EMS, LevelTable, StepInfo, karras, plan, sample_dpm_solver_v3
from dpm_solver_v3.sampler.settings import defaults_for

SEED, REFERENCE = 3, 100
Run = Callable[[Tensor], tuple[Tensor, list[Tensor], list[Tensor]]]


@contextmanager
def trivial(sigma: float) -> Iterator[None]:
    """The sampler with another threshold."""
    kept = plan.TRIVIAL_SIGMA
    plan.TRIVIAL_SIGMA = sigma
    plan.forget_plans()
    try:
        yield
    finally:
        plan.TRIVIAL_SIGMA = kept
        plan.forget_plans()


def run_on(problem: Problem, samples: list[int], guidance: float, ems: EMS | None) -> Run:
    """sigmas -> the result, and y and D at every evaluation."""
    denoiser = problem.denoiser(samples, guidance)

    def run(sigmas: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        ys: list[Tensor] = []
        Ds: list[Tensor] = []

        def keep(info: StepInfo) -> None:
            ys.append(info["x"])
            Ds.append(info["denoised"])

        start = problem.start(samples, sigmas[0].item())
        formula = defaults_for(
            guidance
        )  # the rule is the formula's: with every option at "auto" and no file other steps are taken
        options: dict[str, Any] = {"order": formula.order, "corrector": formula.corrector, "strength": 1.0}
        x = sample_dpm_solver_v3(denoiser, start, sigmas, callback=keep, disable=True, ems=ems, **options)
        return x, ys, Ds

    return run


def rules(run: Run, sigmas: Tensor, clean: Tensor) -> dict[str, float]:
    """Errors by rule."""

    def error(x: Tensor) -> float:
        return geometric_mean(per_sample_error(x, clean)).item()

    default, ys, Ds = run(sigmas)
    with trivial(0.0):
        second = run(sigmas)[0]
    with trivial(1e9):
        first = run(sigmas)[0]
    rise, noise = Ds[-1] - Ds[-2], ys[-1] - Ds[-1]
    linear = (sigmas[-2] / (sigmas[-3] - sigmas[-2])).item()
    features = torch.stack([rise.flatten(), noise.flatten()], 1).double()
    a, b = torch.linalg.lstsq(features, (clean - Ds[-1]).double().reshape(-1, 1)).solution.flatten().tolist()
    return {
        "default": error(default),
        "2nd before": error(second),
        "1st before": error(first),
        "half of linear": error(Ds[-1] + 0.5 * linear * rise),
        f"best a {a:.2f}, b {b:.2f}": error(Ds[-1] + a * rise + b * noise),
    }


def threshold(run: Run, clean: Tensor, steps: int, title: str) -> None:
    """One line per shape of the steps."""
    high = SCHEDULES["karras"](1)[0].item()
    for rho in (3.0, 7.0, 1000.0):
        cells = []
        for last in (0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.3):
            ends = LevelTable(torch.tensor([last, high], dtype=torch.float64))
            sigmas = karras(ends, steps, rho=rho, to_zero=True)
            errors = []
            for at in (1e9, 0.0):
                with trivial(at):
                    errors.append(geometric_mean(per_sample_error(run(sigmas)[0], clean)).item())
            cells.append(f"{last:g}: {errors[0] / errors[1]:.2f}")
        print(f"{title}, rho {rho:g}: {', '.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noises", type=int, default=18)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 4.0, 7.5])
    parser.add_argument("--threshold", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    problem, samples, file = Problem(SEED, REFERENCE), list(range(args.noises)), load_ems(None)
    schedules = {**SCHEDULES, **host_schedules(NOISE)}
    for guidance in args.guidance:
        clean = problem.reference(samples, guidance).clean
        for name, ems in (("without EMS", None), ("with EMS", file(guidance))):
            run = run_on(problem, samples, guidance, ems)
            for steps in args.steps:
                title = f"guidance {guidance:g}, {name}, {steps} steps"
                if args.threshold:
                    threshold(run, clean, steps, title)
                    continue
                print(f"\n{title}")
                for schedule, make in schedules.items():
                    if (sigmas := make(steps))[-1] == 0:
                        errors = rules(run, sigmas, clean)
                        base = errors.pop("default")
                        found = ", ".join(f"{rule}: {value / base:.2f}" for rule, value in errors.items())
                        print(f"  {schedule:<24} {base:.3g}; {found}", flush=True)


if __name__ == "__main__":
    main()
