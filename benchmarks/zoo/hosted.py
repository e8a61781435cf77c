"""A network of the zoo as ComfyUI runs it: in the host's space, on the host's own schedules, with the host's own samplers.

Needs COMFYUI_PATH. In the space "sigma" a network has its own noise range, 1,000 levels of its own schedule. In "flow 1" and
"flow 3" the same denoiser is a rectified flow of that shift: x = (1 - t) x0 + t n, from t = 1 on. Above the network's largest
sigma it answers there what it answers at that sigma to the same noise, so the flow's ODE has an exact solution of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from entrants import comfyui, comfyui_rivals
from rivals import RIVALS, Rival
from torch import Tensor, nn

from dpm_solver_v3.sampler import NoiseSchedule, Space, sample_dpm_solver_v3

from . import Loaded

__all__ = ["SCHEDULES", "SPACES", "Hosted"]

SPACES = ("sigma", "flow 1", "flow 3")
SCHEDULES = ("normal", "karras", "sgm_uniform", "simple", "beta", "kl_optimal", "exponential", "ddim_uniform")
_LEVELS = 1000
_FINE = 150
"""Steps of a converged solution."""


@dataclass(frozen=True)
class Hosted:
    """One network at one guidance scale in one of `SPACES`.

    Args:
        network: of the zoo.
        guidance: scale.
        kind: one of `SPACES`.
    """

    network: Loaded
    guidance: float
    kind: str

    @property
    def space(self) -> Space:
        """What x and levels are."""
        return Space.SIGMA if self.kind == "sigma" else Space.FLOW

    @cached_property
    def sampling(self) -> Any:
        """ComfyUI's model_sampling."""
        if self.space is Space.SIGMA:
            return _sigma_sampling(self.network.entry.schedule)
        return _flow_sampling(float(self.kind.split()[1]))

    @cached_property
    def _inner(self) -> nn.Module:
        return self.network.denoiser(self.guidance)

    def denoiser(self, x: Tensor, level: Tensor) -> Tensor:
        """D(x, level) in the host's space, x [B, C, ...], level [B]."""
        if self.space is Space.SIGMA:
            return self._inner(x, level)
        t = level.to(torch.float64).reshape(-1, *(1,) * (x.ndim - 1))
        sigma = (t / (1 - t)).clamp(max=self.network.ends[0])
        scale = torch.where(t / (1 - t) > self.network.ends[0], sigma / t, 1 / (1 - t))
        return self._inner((x * scale).to(x.dtype), sigma.flatten().to(x.dtype))

    def levels(self, schedule: str, steps: int, denoise: float = 1.0) -> Tensor:
        """[n + 1] as the host's KSampler asks for them."""
        samplers = comfyui("samplers")
        whole = samplers.calculate_sigmas(self.sampling, schedule, steps if denoise == 1 else int(steps / denoise))
        return whole[-steps - 1 :].to(torch.float64)

    def noised(self, x: Tensor | float, noise: Tensor, level: float) -> Tensor:
        """A picture x (0 for none) with noise, at this level."""
        return (1 - level) * x + level * noise if self.space is Space.FLOW else x + level * noise

    def converged(self, x: Tensor, top: float) -> Tensor:
        """The end of the ODE from x at level `top`."""
        low, high = min(self.network.ends[1], 0.006, top / 2), self.network.ends[0]
        known = self.space.level_of(torch.tensor(-math.log(high), dtype=torch.float64)).item()
        first = self.space.lambda_of(torch.tensor(min(top, known), dtype=torch.float64)).item()
        fine = self.space.level_of(torch.linspace(first, -math.log(low), _FINE, dtype=torch.float64))
        above = torch.linspace(top, known, 9, dtype=torch.float64)[:-1] if top > known * (1 + 1e-6) else fine[:0]
        levels = torch.cat([above, fine, fine.new_zeros(1)])
        return self.sample(x, levels, order=3, corrector="none")

    def sample(self, x: Tensor, levels: Tensor, **options: Any) -> Tensor:
        """Ours."""
        return sample_dpm_solver_v3(self.denoiser, x, levels, disable=True, space=self.space, **options)

    def rivals(self) -> dict[str, Rival]:
        """Library samplers, for which a flow is the ODE dx/dt = (x - D) / t like any other, and the host's own."""
        return {**RIVALS, **comfyui_rivals(self.sampling)}


def _sigma_sampling(schedule: NoiseSchedule) -> Any:
    times = torch.linspace(schedule.time_min, schedule.time_max, _LEVELS, dtype=torch.float64)
    sampling = comfyui("model_sampling").ModelSamplingDiscrete()
    sampling.set_sigmas(schedule.level_at(times).float())
    return sampling


def _flow_sampling(shift: float) -> Any:
    known = comfyui("model_sampling")
    sampling = type("FlowSampling", (known.ModelSamplingDiscreteFlow, known.CONST), {})()
    sampling.set_parameters(shift=shift)
    return sampling
