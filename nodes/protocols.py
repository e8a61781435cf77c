"""What the nodes expect of ComfyUI's objects: only the parts that they touch, whatever release or pack they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..sampler import StepInfo

__all__ = ["VAE", "Callback", "Conditioning", "Guider", "Latent", "Model", "ModelSampling", "Options", "Patcher"]

Options = Mapping[str, Any]
"""`model_options`: the host and every pack keep what they like in it."""
Conditioning = list[Any]
Latent = Mapping[str, Any]


Callback = Callable[[StepInfo], None]


class ModelSampling(Protocol):
    """Noise levels of a model; classes that it derives from say what x and sigma are."""

    sigmas: Tensor


class Model(Protocol):
    """The host's BaseModel."""

    model_sampling: ModelSampling
    diffusion_model: torch.nn.Module


class Patcher(Protocol):
    """A MODEL in the graph: the model, and what is patched on it."""

    model: Model
    model_options: dict[str, Any]
    load_device: torch.device

    def clone(self) -> Patcher:
        """A copy whose patches are its own."""
        ...

    def get_model_object(self, name: str) -> Any:
        """A part of the model with its patches."""
        ...


class Guider(Protocol):
    """A GUIDER in the graph: it combines the model's predictions, and samples."""

    model_patcher: Patcher
    conds: dict[str, Any]
    original_conds: dict[str, Any]
    rows: list[int]  # ours: which prompt each sample has, on a copy of the host's guider

    def inner_set_conds(self, conds: dict[str, Conditioning]) -> None:
        """Add conditionings by name."""
        ...

    def predict_noise(self, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The denoised of x."""
        ...

    def sample(self, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, **kwargs: Any) -> Tensor:
        """Run a sampler."""
        ...


class VAE(Protocol):
    """Latents to pixels."""

    def decode(self, samples: Tensor) -> Tensor:
        """Pixels [B, H, W, 3] or, of a video, [B, T, H, W, 3]."""
        ...
