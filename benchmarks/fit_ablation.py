"""What each ingredient of a fit is worth, on the embedded model: the final error of v3 as they are added or taken away.

    python benchmarks/fit_ablation.py [--guidance 1 4] [--steps 6] [--noises 24] [--judge 16]

Fitted on classes 0, 2, 4, 6, 8, judged on other noise and the classes 1, 3, 5, 7. "lambdas" are where the model is evaluated,
"coefficients" how its values are combined. GITS and Align Your Steps choose lambdas by dynamic programming on local errors, or
on the paper's bound, along the same reference trajectories, at no evaluation.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from common import NOISE, bootstrap_ratio, geometric_mean
from entrants import align_your_steps, gits
from quality import load_ems
from rivals import RIVALS
from torch import Tensor

from dpm_solver_v3.ems_tools.compute import EFFORTS, job_for
from dpm_solver_v3.ems_tools.embedded import SHAPE, GuidedDenoiser, load_network
from dpm_solver_v3.ems_tools.estimate.source import Source
from dpm_solver_v3.ems_tools.fit import run as F
from dpm_solver_v3.sampler import FittedSteps, karras

SEED = 11
SEEN, UNSEEN = (0, 2, 4, 6, 8), (1, 3, 5, 7)


@contextmanager
def replaced(name: str, value: object) -> Iterator[None]:
    """`fit` with one of its functions exchanged."""
    kept = getattr(F, name)
    setattr(F, name, value)
    try:
        yield
    finally:
        setattr(F, name, kept)


def _plain_least_squares(features: Tensor, target: Tensor) -> Tensor:
    """Minimises the mean squared error instead of its geometric mean."""
    A = torch.einsum("kfp,kgp->fg", features, features)
    scale = A.diagonal().clamp(min=1e-30).sqrt()
    A = A / scale[:, None] / scale + F._RIDGE * torch.eye(len(scale), dtype=torch.float64)
    solution: Tensor = torch.linalg.solve(A, torch.einsum("kfp,kp->f", features, target) / scale) / scale
    return solution


def _short_memory(kept: Callable[..., tuple[float, list[float]]]) -> Callable[..., tuple[float, list[float]]]:
    """Coefficients of the last three evaluations only, as in the paper's third order."""

    def step(teacher: object, y: Tensor, history: list[Tensor], lam: float, then: float) -> tuple[float, list[float]]:
        decay, weights = kept(teacher, y, history[-3:], lam, then)
        return decay, [0.0] * (len(history) - len(weights)) + weights

    return step


def rival_errors(bench: F._Bench, samples: Sequence[int], teacher: F._Teacher, levels: Tensor) -> Tensor:
    """Errors [K] of the strongest rival on this schedule."""
    first = -levels[0].log().item()
    x = RIVALS["unipc_bh2_2"](
        lambda x, sigma: bench.denoise(samples, x, -sigma[0].log().item()), bench.start(samples, first), levels
    )
    return (x.flatten(1)[:, teacher.elements].double() - teacher.clean).square().mean(1)


def ablate(guidance: float, steps: int, noises: int, judges: int) -> None:
    """Print one table."""
    network = load_network()
    model, other = (GuidedDenoiser(network, torch.tensor(c), guidance) for c in (SEEN, UNSEEN))
    source = Source({guidance: model}, SHAPE, NOISE, {})
    job = job_for(source, EFFORTS["standard"], SEED)
    fit_bench, judge_bench = (F._Bench(job, m, "cpu", torch.float32, 32, lambda n: None) for m in (model, other))
    fit_on, judge_on = range(F.FIT_NOISE, F.FIT_NOISE + noises), range(F.FIT_NOISE + noises, F.FIT_NOISE + noises + judges)
    teacher, judge = F._teach(fit_bench, fit_on), F._teach(judge_bench, judge_on)
    ems = load_ems(None)(guidance)
    assert ems is not None
    base = F._fixed_errors(judge_bench, ems, judge_on, judge, karras(NOISE, steps))
    print(f"\nguidance {guidance:g}, {steps} steps: error on other noise and classes, over v3 + EMS on Karras steps")
    print(f"  {'v3 + EMS, Karras steps to sigma_min':<62} {geometric_mean(base).item():.3g}", flush=True)

    def show(what: str, errors: Tensor) -> None:
        value, low, high = bootstrap_ratio(errors, base)["geometric_mean"]
        print(f"  {what:<62} {geometric_mean(errors).item():.3g}  {value:.3f} [{low:.3f}, {high:.3f}]", flush=True)

    def judged(given: FittedSteps) -> Tensor:
        return F._solve(judge_bench, judge_on, judge, given.lambdas, given)[1]

    def fitted(lambdas: Sequence[float], count: int = noises) -> FittedSteps:
        return F._solve(fit_bench, fit_on[:count], teacher.part(count), lambdas)[0]

    few = min(16, noises)
    plan = F.FitPlan((steps,), noises=noises, search=few, moves=12)
    spacing = F._search(fit_bench, plan, fit_on[:few], teacher.part(few), steps, None)
    searched = spacing.lambdas(steps)
    found = {
        "Karras steps to sigma_min": (-karras(NOISE, steps).log()).tolist()[:-1],
        "GITS": (-gits(job.lambdas, teacher.y, teacher.D, steps).log()).tolist()[:-1],
        "Align Your Steps": (-align_your_steps(job.lambdas, teacher.D, steps).log()).tolist()[:-1],
        "searched, first evaluation at the noisy end": replace(spacing, first=job.lambdas[0]).lambdas(steps),
        "searched": searched,
    }
    levels = torch.tensor([*searched, math.inf], dtype=torch.float64).neg().exp()
    show("searched lambdas, v3 + EMS", F._fixed_errors(judge_bench, ems, judge_on, judge, levels))
    show("searched lambdas, UniPC bh2", rival_errors(judge_bench, judge_on, judge, levels))
    for name, lambdas in found.items():
        show(f"{name} lambdas, coefficients", judged(fitted(lambdas)))
    with replaced("_least_squares", _plain_least_squares):
        show("the same, mean squared error as the objective", judged(fitted(searched)))
    with replaced("_fit_step", _short_memory(F._fit_step)):
        show("the same, coefficients of three evaluations only", judged(fitted(searched)))
    if noises > 8:
        show("the same, fitted on 8 noises", judged(fitted(searched, 8)))
    whole = fitted(searched)

    def refined(rounds: int) -> FittedSteps:
        turned = F._refine(fit_bench, fit_on[:few], teacher.part(few), whole, rounds)
        return F._solve(fit_bench, fit_on, teacher, turned.lambdas, turned, steps - 1)[0]

    for rounds in (1, 4):
        show(f"searched lambdas, coefficients, {rounds} round(s) of refinement", judged(refined(rounds)))
    every = F._knobs
    for kind, name in {"start": "the start", "lambda": "lambdas", "y": "factors of y", "D": "factors of D"}.items():
        with replaced("_knobs", lambda n, kind=kind: [k for k in every(n) if k[0] != kind]):
            show(f"4 rounds that do not turn {name}", judged(refined(4)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[6])
    parser.add_argument("--noises", type=int, default=24)
    parser.add_argument("--judge", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for steps in args.steps:
        for guidance in args.guidance:
            ablate(guidance, steps, args.noises, args.judge)


if __name__ == "__main__":
    main()
