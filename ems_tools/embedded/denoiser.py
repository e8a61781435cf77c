"""Load the embedded weights as a denoiser D(x, sigma), with classifier-free guidance."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from .unet import UNet, UNetConfig

__all__ = [
    "CLASSES",
    "NULL_CLASS",
    "SHAPE",
    "SIGMA_MAX",
    "SIGMA_MIN",
    "WEIGHTS",
    "GuidedDenoiser",
    "load_denoiser",
    "load_network",
]

CLASSES = (
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
NULL_CLASS = len(CLASSES)
SHAPE = (3, 32, 32)
SIGMA_MIN, SIGMA_MAX = 0.03, 14.6
"""The noise range it is used on: Stable Diffusion's, rounded."""
WEIGHTS = Path(__file__).with_name("emoji.safetensors")


def load_network(path: Path | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> UNet:
    """The network with its weights (stored in float16), in evaluation mode, frozen.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: a file that is not this network's.
    """
    from safetensors import SafetensorError, safe_open

    path = path or WEIGHTS
    try:
        with safe_open(path, "pt", device="cpu") as file:
            config = json.loads((file.metadata() or {})["config"])
            state = {name: file.get_tensor(name).to(dtype) for name in file.keys()}
        network = UNet(UNetConfig(**{**config, "channels": tuple(config["channels"])}))
        network.load_state_dict(state)
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the embedded model's weights: {error}") from error
    network = network.to(device, dtype).eval().requires_grad_(False)
    if torch.device(device).type == "cpu":
        network = network.to(memory_format=torch.channels_last)
    return network


class GuidedDenoiser(nn.Module):
    """D(x, sigma) of one network for fixed labels: D_null + guidance (D_label - D_null).

    Args:
        network: D(x, sigma, label).
        labels: [n] class indices (null is `NULL_CLASS`), or None for the null class. A batch [B, ...] uses
            labels[i mod n] for its i-th sample.
        guidance: classifier-free guidance scale; 1 costs one network call, others two in one batch.
    """

    def __init__(self, network: nn.Module, labels: Tensor | None = None, guidance: float = 1.0) -> None:
        super().__init__()
        self.network, self.guidance = network, float(guidance)
        self.register_buffer("labels", torch.tensor([NULL_CLASS]) if labels is None else labels.clone())
        self.labels: Tensor

    def for_samples(self, samples: list[int]) -> GuidedDenoiser:
        """The denoiser for a batch made of these samples, sample k having labels[k mod n]."""
        return GuidedDenoiser(self.network, self.labels[torch.tensor(samples) % len(self.labels)], self.guidance)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The clean picture x0 [B, 3, 32, 32] for x [B, 3, 32, 32] and sigma [B]."""
        n = len(x)
        labels = self.labels.to(x.device)[torch.arange(n, device=x.device) % len(self.labels)]
        sigma = sigma.expand(n)
        if self.guidance == 1.0:
            out: Tensor = self.network(x, sigma, labels)
            return out
        both = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])
        cond, null = self.network(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return null + self.guidance * (cond - null)


def load_denoiser(
    labels: Tensor | None = None,
    guidance: float = 1.0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    path: Path | None = None,
) -> GuidedDenoiser:
    """`GuidedDenoiser` around the embedded network. Raises as `load_network` does."""
    return GuidedDenoiser(load_network(path, device, dtype), labels, guidance)
