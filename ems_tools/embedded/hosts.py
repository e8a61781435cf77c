"""One denoiser re-expressed exactly in the parameterisations of the hosts (no extra training).

With y = x0 + sigma n and D = D(y, sigma), alpha = 1 / sqrt(1 + sigma^2) on a VP schedule:

    EPS   eps = (y - D) / sigma                       on x = alpha y
    v     v   = alpha eps - sigma alpha D             on x = alpha y
    flow  u   = n - x0 = (x - D) / t                  on x = (1 - t) y, t = sigma / (1 + sigma)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...sampler import Space, VPDiscrete

__all__ = ["FlowHost", "VPHost"]

Denoiser = Callable[[Tensor, Tensor], Tensor]


class VPHost(nn.Module):
    """A VP-discrete network as CompVis wrote it: `apply_model(x, t)` with t [B] in 0 .. N - 1 (any real between).

    Args:
        denoiser: D(y, sigma).
        prediction: "eps" or "v".
        schedule: the trained time steps; Stable Diffusion's by default.
    """

    def __init__(self, denoiser: Denoiser, prediction: str = "eps", schedule: VPDiscrete | None = None) -> None:
        super().__init__()
        if prediction not in ("eps", "v"):
            raise ValueError(f"prediction must be 'eps' or 'v', not {prediction!r}")
        self.denoiser, self.prediction = denoiser, prediction
        self.schedule = schedule or VPDiscrete.linear()
        self.register_buffer("alphas_cumprod", self.schedule.alphas_cumprod.float())

    def apply_model(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        """The predicted eps or v for x [B, ...] at time steps t [B]."""
        time = (t.to(torch.float64) + 1) / len(self.schedule.alphas_cumprod)
        sigma = self.schedule.level_at(time.cpu()).to(x.device, x.dtype)
        s = sigma.reshape(-1, *(1,) * (x.ndim - 1))
        alpha = (1 + s**2).rsqrt()
        y = x / alpha
        denoised = self.denoiser(y, sigma)
        eps = (y - denoised) / s
        return eps if self.prediction == "eps" else alpha * eps - s * alpha * denoised

    def forward(self, x: Tensor, t: Tensor, **kwargs: object) -> Tensor:
        """The same as `apply_model` (k-diffusion's wrappers differ in which one they call)."""
        return self.apply_model(x, t)


class FlowHost(nn.Module):
    """A rectified-flow denoiser: x0 from x = (1 - t) x0 + t n, by way of the predicted velocity u = n - x0."""

    space = Space.FLOW

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity u at x [B, ...] and t [B] in (0, 1]; at t = 1 sigma is held at 1e4, where D no longer depends on it."""
        s = t.reshape(-1, *(1,) * (x.ndim - 1))
        scale = (1 - s).clamp(min=1e-4)
        y = x / scale
        return (x - self.denoiser(y, (t / (1 - t).clamp(min=1e-4)))) / s

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The denoised x0, x - t u."""
        return x - t.reshape(-1, *(1,) * (x.ndim - 1)) * self.velocity(x, t)
