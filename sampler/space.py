"""Where a host's noise levels meet the paper's lambda; no other module converts between them.

A host names a noise level by a number that it calls sigma. What that number means depends on its space:

| space | host's x           | level | alpha (x = alpha y) | y = x0 + sigma n | lambda = -log sigma  |
|-------|--------------------|-------|---------------------|------------------|----------------------|
| sigma | x0 + sigma n       | sigma | 1                   | x                | -log level           |
| flow  | (1 - t) x0 + t n   | t     | 1 - t               | x / (1 - t)      | log((1 - t) / t)     |

lambda is half the log-SNR of the paper (lambda_t = log(alpha_t / sigma_t)). EPS, v-prediction, EDM and X0 models
behind a k-diffusion denoiser live in `sigma`; SD3, Flux, Wan and other rectified-flow models in `flow`.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

__all__ = ["Space"]


class Space(str, Enum):
    """How a host's noise level and its x relate to sigma and y = x0 + sigma n."""

    SIGMA = "sigma"
    FLOW = "flow"

    @classmethod
    def of(cls, value: Space | str) -> Space:
        """The space named `value`. Raises ValueError that lists the names."""
        try:
            return cls(value)
        except ValueError:
            names = ", ".join(repr(s.value) for s in cls)
            raise ValueError(f"unknown space {value!r}: choose one of {names}") from None

    def lambda_of(self, level: Tensor) -> Tensor:
        """Half log-SNR in float64 of host levels; +inf at level 0, -inf at t = 1 of a flow."""
        level = level.to(torch.float64)
        sigma = level / (1 - level) if self is Space.FLOW else level
        return -sigma.log()

    def level_of(self, lam: Tensor) -> Tensor:
        """Host level in float64 of half log-SNR `lam`; the inverse of `lambda_of`."""
        lam = lam.to(torch.float64)
        return torch.sigmoid(-lam) if self is Space.FLOW else (-lam).exp()

    def alpha_of(self, level: Tensor) -> Tensor:
        """Alpha in x = alpha y, float64; 0 at t = 1 of a flow."""
        level = level.to(torch.float64)
        return 1 - level if self is Space.FLOW else torch.ones_like(level)
