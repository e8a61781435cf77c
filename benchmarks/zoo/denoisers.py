"""What the zoo's networks predict, as denoisers D(y, sigma), and their noise schedules in sigma space.

With y = x0 + sigma n and the network F(x, time, label), time between 0 and 1:

| prediction | schedule                         | x                   | F           | D                           |
|------------|----------------------------------|---------------------|-------------|-----------------------------|
| eps        | VP, linear beta                  | y / sqrt(1+sigma^2) | n           | y - sigma F                 |
| v          | VP, cosine: sigma = tan(pi t/2)  | y / sqrt(1+sigma^2) | a n - s x0  | a x - s F                   |
| edm        | sigma itself                     | c_in y              | see Karras  | c_skip y + c_out F          |
| flow       | t = sigma / (1 + sigma), shifted | (1 - t) y           | n - x0      | x - t F                     |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpm_solver_v3.sampler import EDM, NoiseSchedule, Space, VPContinuous

__all__ = ["CosineTime", "FlowTime", "ZooDenoiser", "training_loss"]


@dataclass(frozen=True)
class CosineTime:
    """The cosine schedule: sigma = tan(pi t / 2)."""

    space, time_min, time_max = Space.SIGMA, 0.01, 0.996

    def level_at(self, time: Tensor) -> Tensor:
        """sigma at `time`."""
        return (time.to(torch.float64) * (math.pi / 2)).tan()


@dataclass(frozen=True)
class FlowTime:
    """Rectified flow's time in sigma space, sigma = t / (1 - t), its steps shifted towards noise as in SD3."""

    shift: float = 1.0
    time_min: float = 0.01
    time_max: float = 0.99
    space = Space.SIGMA

    def level_at(self, time: Tensor) -> Tensor:
        """sigma at unshifted `time`."""
        u = time.to(torch.float64)
        return self.shift * u / (1 - u)


SIGMA_DATA = 0.5


def _time_of(prediction: str, sigma: Tensor) -> Tensor:
    """What the network is told, in [0, 1]."""
    if prediction == "eps":
        return VPContinuous().time_at(sigma)
    if prediction == "v":
        return sigma.atan() * (2 / math.pi)
    if prediction == "edm":
        return (sigma.log() - math.log(EDM.sigma_min)) / math.log(EDM.sigma_max / EDM.sigma_min)
    return sigma / (1 + sigma)


def _input_scale(prediction: str, sigma: Tensor) -> Tensor:
    if prediction == "flow":
        return 1 / (1 + sigma)
    return (sigma**2 + (SIGMA_DATA**2 if prediction == "edm" else 1)).rsqrt()


def _denoised(prediction: str, y: Tensor, sigma: Tensor, out: Tensor) -> Tensor:
    """D from what the network returned; sigma [B, 1, ...]."""
    if prediction == "eps":
        return y - sigma * out
    if prediction == "v":
        square = 1 + sigma**2
        return y / square - sigma * square.rsqrt() * out
    if prediction == "edm":
        square = sigma**2 + SIGMA_DATA**2
        return y * (SIGMA_DATA**2 / square) + out * (sigma * SIGMA_DATA * square.rsqrt())
    return (y - sigma * out) / (1 + sigma)


def _target(prediction: str, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """What the network should return."""
    if prediction == "eps":
        return noise
    if prediction == "v":
        return (noise - sigma * x0) * (1 + sigma**2).rsqrt()
    if prediction == "edm":
        y, square = x0 + sigma * noise, sigma**2 + SIGMA_DATA**2
        return (x0 - y * (SIGMA_DATA**2 / square)) / (sigma * SIGMA_DATA * square.rsqrt())
    return noise - x0


def _training_sigmas(prediction: str, schedule: NoiseSchedule, count: int) -> Tensor:
    if prediction == "edm":
        return (torch.randn(count) * 1.3 - 1.0).exp().clamp(EDM.sigma_min, EDM.sigma_max)
    if prediction == "flow":
        return torch.sigmoid(1.2 * torch.randn(count)).mul(0.998).add(0.001).logit().exp()
    low, high = schedule.time_min, schedule.time_max
    return schedule.level_at(low + (high - low) * torch.rand(count)).float()


def training_loss(network: nn.Module, prediction: str, schedule: NoiseSchedule, x0: Tensor, label: Tensor) -> Tensor:
    """The prediction's mean squared error on noise levels drawn as its inventors do."""
    sigma = _training_sigmas(prediction, schedule, len(x0))
    s = sigma.reshape(-1, *(1,) * (x0.ndim - 1))
    noise = torch.randn_like(x0)
    with torch.autocast("cpu", torch.bfloat16):
        out = network((x0 + s * noise) * _input_scale(prediction, s), _time_of(prediction, sigma), label).float()
    return (out - _target(prediction, x0, noise, s)).square().mean()


class ZooDenoiser(nn.Module):
    """D(y, sigma) for fixed labels: D_none + guidance (D_label - D_none), sample i having labels[i mod n].

    Args:
        network: F.
        prediction: eps, v, edm or flow.
        labels: [n] class of every sample.
        none: the label that stands for no class.
        guidance: 1 makes one pass through the network, anything else two.
    """

    def __init__(self, network: nn.Module, prediction: str, labels: Tensor, none: int, guidance: float = 1.0) -> None:
        super().__init__()
        self.network, self.prediction, self.labels, self.none, self.guidance = (
            network,
            prediction,
            labels,
            none,
            float(guidance),
        )

    def for_samples(self, samples: Sequence[int]) -> ZooDenoiser:
        """The denoiser for a batch made of these samples."""
        labels = self.labels[torch.tensor(list(samples)) % len(self.labels)]
        return ZooDenoiser(self.network, self.prediction, labels, self.none, self.guidance)

    def forward(self, y: Tensor, sigma: Tensor) -> Tensor:
        """y [B, C, ...], sigma [B] to x0."""
        label = self.labels[torch.arange(len(y)) % len(self.labels)]
        sigma = sigma.expand(len(y)).to(y.dtype)
        if self.guidance == 1.0:
            return self._predict(y, sigma, label)
        both = torch.cat([label, torch.full_like(label, self.none)])
        wanted, null = self._predict(torch.cat([y, y]), torch.cat([sigma, sigma]), both).chunk(2)
        return null + self.guidance * (wanted - null)

    def _predict(self, y: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        s = sigma.reshape(-1, *(1,) * (y.ndim - 1))
        out = self.network(y * _input_scale(self.prediction, s), _time_of(self.prediction, sigma), label)
        return _denoised(self.prediction, y, s, out)
