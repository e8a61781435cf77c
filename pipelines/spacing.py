"""Which noise levels a schedule of n evaluations visits, as diffusers' options say.

Every function returns float64 levels [n] without the end, from the noisiest on. The options and their meaning are diffusers':
`timestep_spacing`, `use_karras_sigmas`, `flow_shift`, ... (Lin et al. 2023, table 2, for the spacing of trained time steps).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .noise import FlowNoise, Noise, VPNoise
from .protocols import Config

__all__ = ["SHAPES", "end_level", "flow_shift", "given_sigmas", "given_timesteps", "spaced_levels"]

SHAPES = ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas", "use_beta_sigmas")


def spaced_levels(noise: Noise, config: Config, n: int, mu: float | None) -> Tensor:
    """The levels of a schedule that is given by its number of evaluations alone. Raises ValueError."""
    chosen = [name for name in SHAPES if config[name]]
    if len(chosen) > 1:
        raise ValueError(f"only one of {', '.join(SHAPES)} can be used, not {' and '.join(chosen)}")
    if not 1 <= n <= 10_000:
        raise ValueError(f"num_inference_steps must lie in 1 .. 10000, not {n}")
    if isinstance(noise, FlowNoise):
        levels = _shifted(torch.linspace(1, 1 / n, n, dtype=torch.float64), config, mu)
        low, high = levels[-1].item(), levels[0].item()
    elif isinstance(noise, VPNoise) and not noise.continuous:
        low, high = (noise.level_of(torch.tensor([0, _last_step(noise, config) - 1]))).tolist()
        levels = noise.level_of(_spaced_steps(noise, config, n)) if not chosen else torch.empty(0)
    else:  # such models are never stepped along a table of time steps
        low, high = noise.schedule.level_at(torch.tensor([noise.schedule.time_min, noise.schedule.time_max])).tolist()
        karras = config["sigma_schedule"] in (None, "karras")
        chosen = chosen or ["use_karras_sigmas" if karras else "use_exponential_sigmas"]
        levels = torch.empty(0)
    if chosen:
        ends = (config["sigma_min"] or low, config["sigma_max"] or high)
        return _shaped(chosen[0], ends[0], ends[1], n)
    return levels


def given_sigmas(noise: Noise, config: Config, sigmas: Sequence[float], mu: float | None) -> tuple[Tensor, float]:
    """Levels and end from a caller's sigmas.

    A flow's are times t before shifting, and 0 follows them; others are a whole schedule, the end included, which is what
    diffusers' own schedulers expect.
    """
    values = torch.as_tensor(np.array(sigmas, dtype=np.float64))
    if values.ndim != 1 or not len(values):
        raise ValueError("sigmas must be a list of at least one noise level")
    if isinstance(noise, FlowNoise):
        return _shifted(values[:-1] if values[-1] == 0 else values, config, mu), 0.0
    if len(values) < 2:
        raise ValueError("sigmas must be a whole schedule: every level and the one at the end, which is 0 as a rule")
    return values[:-1], values[-1].item()


def given_timesteps(noise: Noise, timesteps: Sequence[float]) -> Tensor:
    """Levels at a caller's time steps of the model."""
    values = torch.as_tensor(np.array(timesteps, dtype=np.float64))
    if values.ndim != 1 or not len(values):
        raise ValueError("timesteps must be a list of at least one time step")
    return noise.level_of(values)


def end_level(noise: Noise, config: Config) -> float:
    """Where a schedule ends: at 0, or with final_sigmas_type "sigma_min" at the least trained level."""
    if config["final_sigmas_type"] == "zero" or isinstance(noise, FlowNoise):
        return 0.0
    if config["final_sigmas_type"] != "sigma_min":
        raise ValueError(f"final_sigmas_type must be 'zero' or 'sigma_min', not {config['final_sigmas_type']!r}")
    return noise.schedule.level_at(torch.tensor(noise.schedule.time_min, dtype=torch.float64)).item()


def _spaced_steps(noise: VPNoise, config: Config, n: int) -> Tensor:
    """Time steps [n], falling, of the trained ones below the clipped end. n + 1 points, of which the last becomes the end."""
    last = _last_step(noise, config)
    if config["timestep_spacing"] == "linspace":
        return torch.linspace(0, last - 1, n + 1, dtype=torch.float64).round().flip(0)[:-1]
    if config["timestep_spacing"] == "leading":
        return torch.arange(n, 0, -1) * (last // (n + 1)) + config["steps_offset"]
    if config["timestep_spacing"] == "trailing":
        return (last - torch.arange(n, dtype=torch.float64) * (len(noise.schedule.alphas_cumprod) / n)).round() - 1
    raise ValueError(f"timestep_spacing must be linspace, leading or trailing, not {config['timestep_spacing']!r}")


def _last_step(noise: VPNoise, config: Config) -> int:
    """How many trained steps have lambda above lambda_min_clipped: cosine schedules end too near to pure noise."""
    steps = torch.arange(len(noise.schedule.alphas_cumprod))
    return int((-noise.level_of(steps).log() >= config["lambda_min_clipped"]).sum())


def flow_shift(config: Config, mu: float | None) -> float:
    """The shift of a flow's times: the configured one, or with dynamic shifting what follows from `mu`. Raises ValueError."""
    if not config["use_dynamic_shifting"]:
        return float(config["flow_shift"])
    if mu is None:
        raise ValueError("use_dynamic_shifting needs `mu`, which depends on the size of the image: the pipeline passes it")
    return math.exp(mu) if config["time_shift_type"] == "exponential" else mu


def _shifted(t: Tensor, config: Config, mu: float | None) -> Tensor:
    """A flow's times moved towards noise, s t / (1 + (s - 1) t), then stretched to end at `shift_terminal`."""
    shift = flow_shift(config, mu)
    t = shift * t / (1 + (shift - 1) * t)
    if config["shift_terminal"]:
        t = 1 - (1 - t) * (1 - config["shift_terminal"]) / (1 - t[-1])
    return t


def _shaped(shape: str, low: float, high: float, n: int) -> Tensor:
    """Levels from `high` to `low`: Karras et al. 2022, eq. 5; uniform in log sigma; or quantiles of a beta distribution."""
    u = torch.linspace(0, 1, n, dtype=torch.float64)
    if shape == "use_karras_sigmas":
        return (high ** (1 / 7) + (low ** (1 / 7) - high ** (1 / 7)) * u) ** 7
    if shape == "use_beta_sigmas":
        from scipy.stats import beta

        return low + (high - low) * torch.from_numpy(beta.ppf(1 - u.numpy(), 0.6, 0.6))
    return torch.exp(math.log(high) + (math.log(low) - math.log(high)) * u)
