"""Any host's denoiser seen in the paper's variables: y = x0 + sigma n as a function of lambda."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .space import Space

__all__ = ["LambdaDenoiser"]


class LambdaDenoiser:
    """D(y, lambda) of any host denoiser D(x, level).

    Args:
        model: denoiser of host x [B, C, ...] and level [B], returning x0 [B, C, ...]; k-diffusion's denoisers,
            guided host models, plain functions.
        space: what the host's x and level are.
        extra_args: keyword arguments for every call.
    """

    def __init__(
        self, model: Callable[..., Tensor], space: Space | str = Space.SIGMA, extra_args: dict[str, object] | None = None
    ) -> None:
        self.model, self.space, self.extra_args = model, Space.of(space), dict(extra_args or {})

    def __call__(self, y: Tensor, lam: float) -> Tensor:
        """The denoised x0 at half log-SNR `lam`; y [B, C, ...] and the result in y's dtype."""
        level = self.space.level_of(torch.tensor(lam, dtype=torch.float64))
        alpha = self.space.alpha_of(level).item()
        return self.model(y * alpha, level.to(y.device, y.dtype) * y.new_ones(y.shape[0]), **self.extra_args)
