"""Time and peak memory of the samplers alone: what a step costs when the denoiser is free.

    python benchmarks/solver.py [--steps 20] [--repeats 15] [--json out/solver.json]

Time: the denoiser returns one fixed tensor. The samplers take turns within a round, so that a busy machine slows all
alike; shown are the median and the fastest time per step, and the median over rounds of the ratio to k-diffusion's
dpmpp_2m in the same round. Our coefficients are computed once per schedule and cached; their time is shown apart.

Memory: the denoiser returns a new tensor at every call, as models do. Shown is the highest sum of live tensors while
sampling, the start noise not counted, in units of one latent. On a CPU it is the running sum of torch.profiler's memory
events, which record every allocation of torch's CPU allocator; on a GPU torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rivals import RIVALS, _start
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import trange

from dpm_solver_v3.sampler import EMS, VPDiscrete, karras, sample_dpm_solver_v3
from dpm_solver_v3.sampler.plan import forget_plans

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler's own messages
SIZES = {"SD 1.5": (1, 4, 64, 64), "SDXL": (1, 4, 128, 128), "video": (1, 16, 21, 60, 104)}
BASE = "k-diffusion dpmpp_2m"
OURS: dict[str, dict[str, Any]] = {
    "v3 order 2, no corrector": {"order": 2, "corrector": "none"},
    "v3 default": {},
    "v3 order 3, pseudo corrector": {"order": 3, "corrector": "pseudo"},
}

Denoiser = Callable[[Tensor, Tensor], Tensor]
Sampler = Callable[[Denoiser, Tensor, Tensor], Tensor]


def some_statistics(channels: int) -> EMS:
    """Per-channel statistics of no model, smooth and of a usual size, on 121 grid points."""
    lambdas = torch.linspace(-2.7, 3.6, 121, dtype=torch.float64)
    phase = lambdas[:, None] + torch.arange(channels, dtype=torch.float64) / channels
    return EMS(lambdas, torch.sigmoid(phase), 0.1 * phase.cos(), 0.05 * phase.sin())


def samplers(channels: int) -> dict[str, Sampler]:
    """Name to sampler(denoiser, x, sigmas)."""
    table: dict[str, Sampler] = {BASE: RIVALS["dpmpp_2m"], "diffusers UniPC bh2": _unipc}
    for ending, ems in (("", None), (", EMS", some_statistics(channels))):
        for name, options in OURS.items():
            table[name + ending] = _ours(ems, options)
    return table


def _ours(ems: EMS | None, options: dict[str, Any]) -> Sampler:
    def sampler(denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
        return sample_dpm_solver_v3(denoiser, x, sigmas, disable=True, ems=ems, **options)

    return sampler


def _unipc(denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """diffusers' scheduler in its own loop and its own VP state, without the conversions of `rivals`."""
    from diffusers import UniPCMultistepScheduler

    scheduler: Any = UniPCMultistepScheduler(prediction_type="sample")
    _start(scheduler, sigmas.cpu())
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t), t, x).prev_sample
    return x


@torch.no_grad()
def time_per_step(table: dict[str, Sampler], x: Tensor, sigmas: Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds per step of every sampler in every round."""
    fixed = torch.randn_like(x)
    times: dict[str, list[float]] = {name: [] for name in table}
    names = list(table)
    for r in trange(-2, repeats, leave=False):  # two rounds to warm up
        for name in names[r % len(names) :] + names[: r % len(names)]:
            _synchronize(x)
            start = time.perf_counter()
            table[name](lambda x, sigma: fixed, x, sigmas)
            _synchronize(x)
            if r >= 0:
                times[name].append((time.perf_counter() - start) / (len(sigmas) - 1))
    return times


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


@torch.no_grad()
def peak_memory(sampler: Sampler, x: Tensor, sigmas: Tensor) -> float:
    """Highest sum of live tensors above what is there at the start, in latents."""

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return x * 0.5

    sampler(denoiser, x, sigmas)  # caches
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sampler(denoiser, x, sigmas)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            sampler(denoiser, x, sigmas)
        events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
    return peak / (x.numel() * x.element_size())


def planning_time(channels: int, sigmas: Tensor) -> float:
    """Seconds for the coefficients of one schedule: order 3, pseudo corrector, per-channel statistics."""
    sampler = _ours(some_statistics(channels), OURS["v3 order 3, pseudo corrector"])
    x = torch.zeros(1, channels, 1)
    seconds = []
    for _ in range(3):
        forget_plans()
        start = time.perf_counter()
        sampler(lambda x, sigma: x, x, sigmas)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(device: str, dtype: torch.dtype, size: str, steps: int, repeats: int) -> list[dict[str, Any]]:
    """The rows of the table for one device and latent size."""
    shape = SIZES[size]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    sigmas = karras(VPDiscrete.linear(), steps, to_zero=True).to(device, torch.float32)
    table = samplers(shape[1])
    times = time_per_step(table, x, sigmas, repeats)
    rows = []
    for name, sampler in table.items():
        ratio = statistics.median(a / b for a, b in zip(times[name], times[BASE], strict=True))
        rows.append(
            {
                "device": device,
                "dtype": str(dtype).removeprefix("torch."),
                "size": size,
                "shape": shape,
                "sampler": name,
                "median_ms": 1e3 * statistics.median(times[name]),
                "fastest_ms": 1e3 * min(times[name]),
                "ratio": ratio,
                "ratio_of_fastest": min(times[name]) / min(times[BASE]),
                "peak_latents": peak_memory(sampler, x, sigmas),
            }
        )
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """One device and latent size as text."""
    first = rows[0]
    print(f"\n{first['device']}, {first['size']} {tuple(first['shape'])}, {first['dtype']}")
    print(f"{'sampler':<36} {'ms a step':>10} {'fastest':>9} {'ratio':>7} {'of fastest':>11} {'peak latents':>13}")
    for row in rows:
        print(
            f"{row['sampler']:<36} {row['median_ms']:>10.3f} {row['fastest_ms']:>9.3f} {row['ratio']:>7.2f} "
            f"{row['ratio_of_fastest']:>11.2f} {row['peak_latents']:>13.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows = []
    for device in devices:
        for size in args.sizes:
            part = measure(device, getattr(torch, args.dtype), size, args.steps, args.repeats)
            print_rows(part)
            rows += part
    seconds = planning_time(16, karras(VPDiscrete.linear(), args.steps, to_zero=True))
    print(f"\nour coefficients for {args.steps} steps, order 3, 16 channels: {1e3 * seconds:.0f} ms, once per schedule")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "planning_s": seconds, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
