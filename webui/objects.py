"""The host objects that the extension touches, as protocols: what AUTOMATIC1111, Forge and reForge have in common.

They say what is expected, not what is promised: an attribute can be missing in a release, so most are read with a fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from ..sampler import StepInfo

__all__ = ["CheckpointInfo", "Denoiser", "Model", "Processing", "StepTold", "Wrap"]


StepTold = Callable[[StepInfo], None]
"""A callback of k-diffusion's samplers: told "i", "x" [B, C, h, w], "sigma", "denoised" and more before each step."""


class CheckpointInfo(Protocol):
    """modules/sd_models.py: CheckpointInfo."""

    filename: str
    sha256: str | None


class Model(Protocol):
    """The checkpoint's model (`shared.sd_model`)."""

    sd_checkpoint_info: CheckpointInfo


class Wrap(Protocol):
    """What stands for the model in k-diffusion: noise levels [T] from clean to noisy, and the host's default steps."""

    sigmas: Tensor
    inner_model: Model

    def get_sigmas(self, n: int) -> Tensor:
        """Levels [n + 1]."""


class Processing(Protocol):
    """modules/processing.py: the picture that is being made (`p`)."""

    cfg_scale: float
    extra_generation_params: dict[str, object]
    extra_network_data: Mapping[str, list[object]]
    is_hr_pass: bool


class Denoiser(Protocol):
    """modules/sd_samplers_cfg_denoiser.py: CFGDenoiser, x [B, C, h, w] and sigma [B] -> x0 after guidance."""

    inner_model: Wrap
    p: Processing
    step: int
    total_steps: int | None

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: object) -> Tensor:
        """x0, of the shape of x."""
