"""What `quality.py` compares beyond library samplers on the paper's schedules: hosts' schedules and ComfyUI's own samplers.

Schedules here are given by formulas and tables of their publications, on any noise range; samplers are imported from a
ComfyUI checkout named by COMFYUI_PATH, in sigma space, with their noise switched off.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rivals import Denoiser, Rival
from torch import Tensor

from dpm_solver_v3.sampler import NoiseSchedule

__all__ = ["align_your_steps", "comfyui", "comfyui_rivals", "gits", "host_schedules", "two_calls"]

_AYS = {
    "ays_sd1": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}
"""Align Your Steps (Sabour et al. 2024): ten steps for Stable Diffusion's noise range, log-linear for other counts."""


def host_schedules(noise: NoiseSchedule) -> dict[str, Callable[[int], Tensor]]:
    """ComfyUI's schedules that are none of the paper's, and Align Your Steps where the range is the one it was made for."""
    low, high = noise.level_at(torch.tensor([noise.time_min, noise.time_max], dtype=torch.float64)).tolist()
    found: dict[str, Callable[[int], Tensor]] = {
        "sgm_uniform": lambda n: _to_zero(noise.level_at(_line(noise.time_max, noise.time_min, n + 1)[:-1])),
        "beta": lambda n: _to_zero(noise.level_at(_beta(noise, n))),
        "kl_optimal": lambda n: _to_zero(_line(math.atan(high), math.atan(low), n).tan()),
        "linear_quadratic": lambda n: _linear_quadratic(n) * high,
    }
    if abs(high - 14.61) < 0.1 and abs(low - 0.0292) < 0.001:
        for name, table in _AYS.items():
            ends = (high, *table[1:-1], low)
            found[name] = partial(_log_linear, ends)
            found[f"{name}_to_zero"] = partial(_log_linear_to_zero, ends)
    return found


def _line(start: float, end: float, points: int) -> Tensor:
    return torch.linspace(start, end, points, dtype=torch.float64)


def _to_zero(levels: Tensor) -> Tensor:
    return torch.cat([levels, levels.new_zeros(1)])


def _beta(noise: NoiseSchedule, n: int) -> Tensor:
    from scipy.stats import beta

    share = torch.from_numpy(beta.ppf(1 - torch.arange(n, dtype=torch.float64).numpy() / n, 0.6, 0.6))
    return noise.time_min + share * (noise.time_max - noise.time_min)


def _linear_quadratic(n: int, small: float = 0.025) -> Tensor:
    """Half of the steps in which sigma falls linearly by 2.5 %, then a parabola that joins on smoothly (Mochi)."""
    first = n // 2
    linear = [1 - small * i / first for i in range(first)]
    slope, rest = small / first, n - first
    bend = (1 - small - slope * rest) / rest**2
    return torch.tensor([*linear, *(1 - small - slope * i - bend * i**2 for i in range(rest)), 0.0], dtype=torch.float64)


def _log_linear(table: tuple[float, ...], n: int) -> Tensor:
    logs = torch.tensor(table, dtype=torch.float64).log()
    at = torch.linspace(0, len(table) - 1, n + 1, dtype=torch.float64)
    low = at.floor().long().clamp(max=len(table) - 2)
    return torch.lerp(logs[low], logs[low + 1], at - low).exp()


def _log_linear_to_zero(table: tuple[float, ...], n: int) -> Tensor:
    return _to_zero(_log_linear(table, n - 1))


def gits(lambdas: tuple[float, ...], y: Tensor, D: Tensor, steps: int, weight: float = 1.1) -> Tensor:
    """GITS (Chen et al. 2024): grid points that minimise the sum of Euler steps' local errors, by dynamic programming.

    Args:
        lambdas: [M] grid; y and D [M, K, P] on it, of reference trajectories.
        weight: of the errors before a step against its own (the paper's gamma).

    Returns:
        levels [steps + 1] from the first to the last grid point.
    """
    m = len(lambdas)
    cost = torch.full((m, m), math.inf, dtype=torch.float64)
    for i in range(m - 1):
        decay = torch.tensor([math.exp(lambdas[i] - v) for v in lambdas[i + 1 :]])[:, None, None]
        off = decay * y[i] + (1 - decay) * D[i] - y[i + 1 :]
        cost[i, i + 1 :] = off.double().square().mean(2).sqrt().mean(1)
    return _cheapest(lambdas, cost, steps, weight)


def align_your_steps(lambdas: tuple[float, ...], D: Tensor, steps: int) -> Tensor:
    """Align Your Steps' objective on trajectories of the model at hand, minimised exactly by dynamic programming.

    Its bound (Sabour et al. 2024, sec. 3.2) charges a step from i to j the integral of |D(lambda) - D_i|^2 e^(2 lambda) over
    lambda. Arguments and result as in `gits`.
    """
    m, at = len(lambdas), torch.tensor(lambdas, dtype=torch.float64)
    cost = torch.full((m, m), math.inf, dtype=torch.float64)
    for i in range(m - 1):
        density = (D[i:] - D[i]).double().square().mean((1, 2)) * (2 * at[i:]).exp()
        cost[i, i + 1 :] = (0.5 * (density[1:] + density[:-1]) * at[i:].diff()).cumsum(0)
    return _cheapest(lambdas, cost, steps, 1.0)


def _cheapest(lambdas: tuple[float, ...], cost: Tensor, steps: int, weight: float) -> Tensor:
    """Levels [steps + 1] of the cheapest path over the grid; what comes before a step counts `weight` times its own cost."""
    best, back = cost[0].clone(), []
    for _ in range(steps - 1):
        total = weight * best[:, None] + cost
        best, chosen = total.min(0)
        back.append(chosen)
    path = [len(lambdas) - 1]
    for chosen in reversed(back):
        path.append(int(chosen[path[-1]]))
    return torch.tensor([-lambdas[k] for k in [0, *reversed(path)]], dtype=torch.float64).exp()


def two_calls(name: str) -> Rival:
    """A sampler with two calls a step, given half as many steps of the same schedule: every second level and the last."""

    def run(denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
        from k_diffusion import sampling

        return getattr(sampling, f"sample_{name}")(denoiser, x, sigmas[::2].to(x.device, x.dtype), disable=True)

    return run


def comfyui(module: str) -> Any:
    """comfy.<module> of the checkout that COMFYUI_PATH names; None without one."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        return None
    if path not in sys.path:
        sys.path[:0] = [path, str(Path(path) / "site")]
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    return importlib.import_module(f"comfy.{module}")


def comfyui_rivals(model_sampling: Any = None) -> dict[str, Rival]:
    """ComfyUI's deterministic samplers with one call a step, UniPC being diffusers'; empty without COMFYUI_PATH.

    Args:
        model_sampling: the host's, which tells them of a flow; None for sigma space.
    """
    sampling = comfyui("k_diffusion.sampling")
    if sampling is None:
        return {}

    def run(name: str, options: dict[str, Any], denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
        model = _Model(denoiser, model_sampling or SimpleNamespace(sigma_max=None))
        return getattr(sampling, f"sample_{name}")(model, x, sigmas.to(x), extra_args={}, disable=True, **options)

    options: dict[str, dict[str, Any]] = {
        "ipndm": {},
        "ipndm_v": {},
        "deis": {},
        "res_multistep": {},
        "gradient_estimation": {},
        "er_sde": {"s_noise": 0.0},
        "sa_solver": {"tau_func": lambda sigma: 0.0},
    }
    return {f"comfy_{name}": partial(run, name, chosen) for name, chosen in options.items()}


class _Model:
    """A denoiser as ComfyUI's samplers see a model: D, and a model_sampling behind it that says in which space."""

    def __init__(self, denoiser: Denoiser, sampling: Any) -> None:
        self.denoiser = denoiser
        self.inner_model = SimpleNamespace(
            model_patcher=SimpleNamespace(get_model_object=lambda name: sampling), inner_model=SimpleNamespace()
        )

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        return self.denoiser(x, sigma)
