"""What is expected of diffusers' objects, which are typed in parts only: the parts that are touched here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Config", "Configured", "Pipeline", "Scheduler"]

Config = Mapping[str, Any]
"""A scheduler's configuration: diffusers promises no types for its values."""


class Configured(Protocol):
    """A class with a configuration that can be read from a folder or from a repository of the Hub."""

    def load_config(self, place: object, **options: object) -> Config:
        """The configuration in `place`."""
        ...


class Scheduler(Protocol):
    """Any scheduler."""

    config: Config
    timesteps: Tensor
    init_noise_sigma: float | Tensor

    def set_timesteps(self, num_inference_steps: int) -> object:
        """Begin a run of so many evaluations."""
        ...

    def register_to_config(self, **values: object) -> None:
        """Change the configuration."""
        ...


class Pipeline(Protocol):
    """Any pipeline with a scheduler."""

    scheduler: Scheduler
    _execution_device: torch.device

    def __call__(self, **inputs: object) -> Any:
        """The pictures, or the latents; a tuple where `return_dict` is False."""
        ...

    def set_progress_bar_config(self, **options: object) -> None:
        """How the progress bar looks."""
        ...
