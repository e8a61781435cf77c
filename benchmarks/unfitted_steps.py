"""Which steps to take where none are fitted to the model: this sampler without statistics, on every family of models.

    python benchmarks/unfitted_steps.py [--models emoji waves digits mnist ddpm textures flow flow3] [--guidance 1 4 7.5]

"flow" and "flow3" are the embedded model as flows of shift 1 and 3; the others are networks of the zoo on schedules of their
own, "emoji" the embedded model on Stable Diffusion's. A column is a schedule, a row a number of steps: error over that of the
row's best.
`sampler.unfitted_steps`, the last column, follows from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zoo import NETWORKS, WEIGHTS, load

from dpm_solver_v3.ems_tools.embedded import FlowHost, load_denoiser
from dpm_solver_v3.sampler import (
    Flow,
    NoiseSchedule,
    VPContinuous,
    cosine_time,
    karras,
    quadratic_time,
    sample_dpm_solver_v3,
    unfitted_steps,
    uniform_lambda,
    uniform_time,
)


def _vp_cosine(schedule: NoiseSchedule, n: int) -> Tensor:
    low, high = schedule.level_at(torch.tensor([schedule.time_min, schedule.time_max], dtype=torch.float64)).tolist()
    return cosine_time(VPContinuous.between(low, high), n, to_zero=True)


FLOWS: dict[str, NoiseSchedule] = {"flow": Flow(1.0), "flow3": Flow(3.0)}
SCHEDULES: dict[str, Callable[[NoiseSchedule, int], Tensor]] = {
    "karras": lambda s, n: karras(s, n, to_zero=True),
    "time": lambda s, n: cosine_time(s, n, share=0.0, to_zero=True),
    "time-end": lambda s, n: uniform_time(s, n, to_zero=True),
    "quadratic": lambda s, n: quadratic_time(s, n, to_zero=True),
    "lambda": lambda s, n: uniform_lambda(s, n, to_zero=True),
    "cosine/2": lambda s, n: cosine_time(s, n, share=0.5, to_zero=True),
    "cosine": lambda s, n: cosine_time(s, n, to_zero=True),
    "vp cosine": _vp_cosine,
    "ours": lambda s, n: unfitted_steps(s, n)[1],
}
STEPS = (4, 5, 6, 8, 12, 20)
NOISES = 12


def _model(name: str, guidance: float, weights: Path) -> tuple[Any, NoiseSchedule, tuple[int, ...]]:
    """Denoiser, schedule and shape of a sample."""
    if name in FLOWS:
        return FlowHost(load_denoiser(labels=torch.arange(NOISES) % 9, guidance=guidance)), FLOWS[name], (3, 32, 32)
    network = load(name, weights)
    return network.denoiser(guidance), network.entry.schedule, network.entry.shape


@torch.no_grad()
def main() -> None:
    """Print one table for each model and guidance scale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["emoji", "waves", "digits", "mnist", "ddpm", "textures", *FLOWS]
    parser.add_argument("--models", nargs="+", choices=[*NETWORKS, *FLOWS], default=names)
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0, 4.0, 7.5])
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="of the zoo (default: out/zoo)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        classes = name in FLOWS or NETWORKS[name].classes
        for guidance in args.guidance if classes else [1.0]:
            model, schedule, shape = _model(name, guidance, args.weights)
            noise = torch.randn((NOISES, *shape), generator=torch.Generator().manual_seed(11))

            def run(
                levels: Tensor, start: Tensor = noise, model: Any = model, space: Any = schedule.space, **options: Any
            ) -> Tensor:
                return sample_dpm_solver_v3(model, start * float(levels[0]), levels, disable=True, space=space, **options)

            plain: dict[str, Any] = {"order": 3, "corrector": "none", "lower_order_final": False}
            exact = run(uniform_lambda(schedule, 120, to_zero=True), **plain)
            kinds = {title: make for title, make in SCHEDULES.items() if name not in FLOWS or make is not _vp_cosine}
            print(f"\n{name}, guidance {guidance:g}\nsteps     best  " + "".join(f"{title:>10}" for title in kinds))
            for n in STEPS:
                ends = [run(make(schedule, n), guidance=guidance) for make in kinds.values()]
                errors = [float((x - exact).double().square().flatten(1).mean(1).log().mean().exp()) for x in ends]
                print(f"{n:5} {min(errors):8.2e}  " + "".join(f"{e / min(errors):10.2f}" for e in errors), flush=True)


if __name__ == "__main__":
    main()
