"""What a scheduler's configuration says of the noise of its model: levels, time steps and the meaning of the model's output.

diffusers' x, the solver's x (see `sampler.Space`) and y = x0 + sigma n, with alpha = 1 / sqrt(1 + sigma^2):

| kind            | diffusers' x         | level | solver's x | time step that the model gets    |
|-----------------|----------------------|-------|------------|----------------------------------|
| `VPNoise`       | alpha y              | sigma | y          | index of the level in the table  |
| `FlowNoise`     | (1 - t) x0 + t n     | t     | the same   | t N                              |
| `EDMNoise`      | y                    | sigma | y          | log(sigma) / 4                   |

The denoised D is linear in the solver's x and the model's output; `factors` gives the two numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..sampler import EDM, Flow, NoiseSchedule, Space, VPDiscrete
from .protocols import Config

__all__ = ["EDMNoise", "FlowNoise", "Noise", "VPNoise", "noise_of"]

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


class Noise(Protocol):
    """How levels, time steps, latents and outputs of one kind of model belong together. Levels and times in float64."""

    @property
    def space(self) -> Space:
        """What the solver is told of the levels."""
        ...

    @property
    def schedule(self) -> NoiseSchedule:
        """The whole range of levels, as the library's tools want it."""
        ...

    def time_of(self, level: Tensor) -> Tensor:
        """The model's time steps at `level`, any shape."""
        ...

    def level_of(self, time: Tensor) -> Tensor:
        """The levels at the model's time steps, any shape; the inverse of `time_of`."""
        ...

    def scale(self, level: float) -> float:
        """What diffusers calls x, over the solver's x."""
        ...

    def parts(self, level: float) -> tuple[float, float]:
        """(a, s) of diffusers' x = a x0 + s n."""
        ...

    def input_scale(self, level: float) -> float:
        """The model's input over diffusers' x."""
        ...

    def factors(self, level: float, prediction: str) -> tuple[float, float]:
        """(p, q) of D = p x + q output, with the solver's x. Raises ValueError for an output that this kind cannot have."""
        ...


@dataclass(frozen=True, eq=False)
class VPNoise:
    """Stable Diffusion and DDPM. `continuous`: the model gets log(sigma) / 4 (Stable Video Diffusion)."""

    schedule: VPDiscrete
    continuous: bool = False
    space = Space.SIGMA

    def time_of(self, level: Tensor) -> Tensor:
        """Between table entries log sigma is linear in the time step."""
        if self.continuous:
            return level.to(torch.float64).log() / 4
        logs = self._logs()
        at = level.to(torch.float64).clamp(min=1e-10).log().contiguous()
        high = torch.searchsorted(logs, at).clamp(1, len(logs) - 1)
        low = high - 1
        return low + ((at - logs[low]) / (logs[high] - logs[low])).clamp(0, 1)

    def level_of(self, time: Tensor) -> Tensor:
        """Sigma at these time steps."""
        time = time.to(torch.float64)
        return (4 * time).exp() if self.continuous else self.schedule.level_at((time + 1) / len(self.schedule.alphas_cumprod))

    def scale(self, level: float) -> float:
        """The factor alpha."""
        return 1 / math.sqrt(1 + level**2)

    def parts(self, level: float) -> tuple[float, float]:
        """(alpha, sigma alpha)."""
        return self.scale(level), level * self.scale(level)

    def input_scale(self, level: float) -> float:
        """The model takes x as it is."""
        return 1.0

    def factors(self, level: float, prediction: str) -> tuple[float, float]:
        """Eps = (y - D) / sigma and v = alpha eps - sigma alpha D."""
        alpha = self.scale(level)
        if prediction == "epsilon":
            return 1.0, -level
        if prediction == "v_prediction":
            return alpha**2, -level * alpha
        if prediction == "sample":
            return 0.0, 1.0
        raise ValueError(f"prediction_type {prediction!r} needs use_flow_sigmas=True: this configuration has betas")

    def _logs(self) -> Tensor:
        a = self.schedule.alphas_cumprod.to(torch.float64)
        return ((1 - a) / a).log() / 2


@dataclass(frozen=True)
class FlowNoise:
    """Rectified flow: SD3, Flux, Wan. `steps` is N, the number of trained time steps; `shift` as in `sampler.Flow`."""

    steps: int = 1000
    shift: float = 1.0
    space = Space.FLOW

    @property
    def schedule(self) -> Flow:
        """From the shifted 1 / N to 1."""
        return Flow(self.shift, time_min=1 / self.steps)

    def time_of(self, level: Tensor) -> Tensor:
        """N t."""
        return level.to(torch.float64) * self.steps

    def level_of(self, time: Tensor) -> Tensor:
        """The level t of these time steps."""
        return time.to(torch.float64) / self.steps

    def scale(self, level: float) -> float:
        """The same x."""
        return 1.0

    def parts(self, level: float) -> tuple[float, float]:
        """(1 - t, t)."""
        return 1 - level, level

    def input_scale(self, level: float) -> float:
        """The model takes x as it is."""
        return 1.0

    def factors(self, level: float, prediction: str) -> tuple[float, float]:
        """The velocity u = n - x0; eps and v for models that were trained on a flow's levels with another target."""
        a, s = 1 - level, level
        if prediction == "flow_prediction":
            return 1.0, -s
        if prediction == "sample":
            return 0.0, 1.0
        if prediction == "v_prediction":
            return a / (a**2 + s**2), -s / (a**2 + s**2)
        if a == 0:
            raise ValueError("at t = 1 x holds nothing of x0, and x0 cannot be told from a predicted epsilon: begin below 1")
        return 1 / a, -s / a


@dataclass(frozen=True)
class EDMNoise:
    """Karras et al. 2022, table 1, with its preconditioning outside the network (Playground 2.5)."""

    schedule: EDM
    data: float = 0.5
    space = Space.SIGMA

    def time_of(self, level: Tensor) -> Tensor:
        """c_noise."""
        return level.to(torch.float64).log() / 4

    def level_of(self, time: Tensor) -> Tensor:
        """Sigma."""
        return (4 * time.to(torch.float64)).exp()

    def scale(self, level: float) -> float:
        """The same x."""
        return 1.0

    def parts(self, level: float) -> tuple[float, float]:
        """(1, sigma)."""
        return 1.0, level

    def input_scale(self, level: float) -> float:
        """c_in."""
        return 1 / math.sqrt(level**2 + self.data**2)

    def factors(self, level: float, prediction: str) -> tuple[float, float]:
        """c_skip and c_out, whose sign says whether the network was trained for noise or for v."""
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {prediction!r} cannot go with sigma_data, which is EDM's preconditioning")
        total = level**2 + self.data**2
        out = level * self.data / math.sqrt(total)
        return self.data**2 / total, out if prediction == "epsilon" else -out


def noise_of(config: Config) -> Noise:
    """The noise that a scheduler's configuration describes. Raises ValueError for values that it cannot have."""
    if config["prediction_type"] not in PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTIONS)}, not {config['prediction_type']!r}")
    if config["sigma_data"] is not None:
        low, high = config["sigma_min"] or 0.002, config["sigma_max"] or 80.0
        return EDMNoise(EDM(low, high), config["sigma_data"])
    if config["use_flow_sigmas"]:
        return FlowNoise(config["num_train_timesteps"], config["flow_shift"])
    return VPNoise(VPDiscrete(_alphas_cumprod(config)), config["timestep_type"] == "continuous")


def _alphas_cumprod(config: Config) -> Tensor:
    """[N] in float64: from betas, then what zero-terminal-SNR and CogVideoX do to them."""
    betas = _betas(config)
    if not ((betas > 0) & (betas < 1)).all():
        raise ValueError("betas must lie between 0 and 1")
    alphas = (1 - betas).cumprod(0)
    if config["snr_shift_scale"] is not None:
        alphas = alphas / (config["snr_shift_scale"] + (1 - config["snr_shift_scale"]) * alphas)
    if config["rescale_betas_zero_snr"]:
        root = alphas.sqrt()  # Lin et al. 2023, algorithm 1; the last value stays above 0, or sigma were infinite
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        alphas[-1] = 2.0**-24
    return alphas


def _betas(config: Config) -> Tensor:
    """[N] in float64. diffusers computes them in float32; the difference is below what a model can see."""
    n, low, high = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    if config["trained_betas"] is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    if config["beta_schedule"] == "linear":
        return torch.linspace(low, high, n, dtype=torch.float64)
    if config["beta_schedule"] == "scaled_linear":  # Stable Diffusion's
        return torch.linspace(low**0.5, high**0.5, n, dtype=torch.float64) ** 2
    if config["beta_schedule"] == "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, eq. 17
        bar = torch.cos((torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    names = "linear, scaled_linear, squaredcos_cap_v2"
    raise ValueError(f"beta_schedule must be one of {names}, not {config['beta_schedule']!r}")
