"""Which steps to take where none are fitted to the model: this sampler without statistics, on the embedded model.

    python benchmarks/unfitted_steps.py [--models eps flow flow3] [--guidance 1 4 7]

"flow3" is a flow of shift 3. A column is a schedule, a row a number of steps: error over that of the row's best.
`ems_tools.hosting.unfitted_steps` follows from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpm_solver_v3.ems_tools.embedded import FlowHost, load_denoiser
from dpm_solver_v3.sampler import (
    Flow,
    NoiseSchedule,
    Space,
    VPDiscrete,
    cosine_time,
    karras,
    quadratic_time,
    sample_dpm_solver_v3,
    uniform_lambda,
    uniform_time,
)

MODELS: dict[str, NoiseSchedule] = {"eps": VPDiscrete.linear(), "flow": Flow(1.0), "flow3": Flow(3.0)}
SCHEDULES: dict[str, Callable[[NoiseSchedule, int], Tensor]] = {
    "karras": lambda s, n: karras(s, n, to_zero=True),
    "time": lambda s, n: cosine_time(s, n, share=0.0, to_zero=True),
    "time-end": lambda s, n: uniform_time(s, n, to_zero=True),
    "quadratic": lambda s, n: quadratic_time(s, n, to_zero=True),
    "lambda": lambda s, n: uniform_lambda(s, n, to_zero=True),
    "cosine/2": lambda s, n: cosine_time(s, n, share=0.5, to_zero=True),
    "cosine": lambda s, n: cosine_time(s, n, to_zero=True),
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0, 4.0, 7.0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    noise = torch.randn((12, 3, 32, 32), generator=torch.Generator().manual_seed(11))
    for name in args.models:
        schedule = MODELS[name]
        for guidance in args.guidance:
            net = load_denoiser(labels=torch.arange(12) % 9, guidance=guidance)
            model = FlowHost(net) if schedule.space is Space.FLOW else net

            def run(levels: Tensor, model: Any = model, space: Space = schedule.space, **options: Any) -> Tensor:
                start = noise * float(levels[0])
                return sample_dpm_solver_v3(model, start, levels.float(), disable=True, space=space, **options)

            plain: dict[str, Any] = {"order": 3, "corrector": "none", "lower_order_final": False}
            exact = run(uniform_lambda(schedule, 60, to_zero=True), **plain)
            print(f"\n{name}, guidance {guidance:g}\nsteps     best  " + "".join(f"{title:>10}" for title in SCHEDULES))
            for n in (4, 5, 6, 8, 12, 20):
                ends = [run(make(schedule, n), guidance=guidance) for make in SCHEDULES.values()]
                errors = [float((x - exact).double().square().flatten(1).mean(1).log().mean().exp()) for x in ends]
                print(f"{n:5} {min(errors):8.2e}  " + "".join(f"{e / min(errors):10.2f}" for e in errors), flush=True)


if __name__ == "__main__":
    main()
