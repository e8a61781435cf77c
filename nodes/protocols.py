"""What the nodes expect of ComfyUI's objects: only the parts that they touch, whatever release or pack they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..sampler import StepInfo

__all__ = ["VAE", "Callback", "Clip", "Conditioning", "Guider", "Latent", "Model", "ModelSampling", "Options", "Patcher"]

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
    model_options: dict[str, object]
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
    conds: dict[str, object]
    original_conds: dict[str, object]
    rows: list[int]  # ours: which prompt each sample has, on a copy of the host's guider

    def inner_set_conds(self, conds: dict[str, Conditioning]) -> None:
        """Add conditionings by name."""
        ...

    def predict_noise(self, x: Tensor, timestep: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The denoised of x."""
        ...

    def sample(self, noise: Tensor, latent: Tensor, sampler: object, sigmas: Tensor, **kwargs: object) -> Tensor:
        """Run a sampler."""
        ...


class Clip(Protocol):
    """A CLIP in the graph: prompts to conditionings. Releases since 0.3 also have `encode_from_tokens_scheduled`."""

    def tokenize(self, text: str) -> object:
        """Tokens of one prompt."""
        ...

    def encode_from_tokens(self, tokens: object, return_pooled: bool = False) -> tuple[Tensor, Tensor | None]:
        """Conditioning and pooled output."""
        ...


class VAE(Protocol):
    """Latents to pixels."""

    def decode(self, samples: Tensor) -> Tensor:
        """Pixels [B, H, W, 3] or, of a video, [B, T, H, W, 3]."""
        ...
