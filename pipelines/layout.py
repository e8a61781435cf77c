"""Where the channels of a pipeline's latents are.

The statistics have one value per channel of the model's latents [B, C, ...]. Some pipelines hold them otherwise: Flux packs
patches of p values per channel into tokens, [B, tokens, C p], and some video models have frames first, [B, F, C, H, W].
Both are seen as [B, C, ...] here without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Layout", "layout_for"]


@dataclass(frozen=True)
class Layout:
    """How to see latents as [B, C, ...] and back."""

    kind: Literal["channels first", "packed", "frames first"] = "channels first"
    channels: int = 1

    def channels_first(self, x: Tensor) -> Tensor:
        """The pipeline's latents as [B, C, ...]: a view."""
        if self.kind == "packed":
            return x.unflatten(-1, (self.channels, -1)).movedim(2, 1)
        return x.transpose(1, 2) if self.kind == "frames first" else x

    def as_given(self, x: Tensor) -> Tensor:
        """[B, C, ...] as the pipeline holds it, contiguous."""
        if self.kind == "packed":
            return x.movedim(1, 2).flatten(-2)
        return x.transpose(1, 2).contiguous() if self.kind == "frames first" else x


def layout_for(shape: torch.Size | tuple[int, ...], channels: int) -> Layout:
    """The layout of latents of this shape for a model with so many channels; channels first where nothing else fits."""
    if channels == 1 or len(shape) < 3 or shape[1] == channels:
        return Layout()
    if len(shape) == 3 and shape[2] % channels == 0:
        return Layout("packed", channels)
    if len(shape) == 5 and shape[2] == channels:
        return Layout("frames first", channels)
    return Layout()
