"""Empirical model statistics (EMS): the three functions l, s, b of lambda that steer DPM-Solver-v3.

Paper's symbols (arXiv 2310.13268, section 3) and ours: l_lambda = `l`, s_lambda = `s`, b_lambda = `b`,
lambda = `lambdas`. (l, s, b) = (1, 0, 0) is data prediction, i.e. DPM-Solver++; (0, -1, 0) noise prediction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from .settings import Recommendation

__all__ = ["EMS", "EMSError"]

_COLUMNS = 1024
"""Elements that `EMS.growth` looks at together."""


class EMSError(ValueError):
    """Statistics that cannot be used, or what handles their files cannot do; the message says what is wrong and what to do."""


@dataclass(frozen=True, eq=False)
class EMS:
    """l, s, b on a grid of lambda, linear in between. Immutable: tensors are copied in; do not write to them.

    Args:
        lambdas: [N+1] half log-SNR, strictly increasing, N >= 1.
        l, s, b: each [N+1, C] (per channel: fits [B, C, ...] of any size) or [N+1, C, *spatial] (per element:
            fits only that size). C = 1 fits any number of channels. float32 or float64, kept as given.
        metadata: free text about the origin.
        recommendation: settings measured for these statistics, followed by options left at "auto".

    Outside [lambdas[0], lambdas[-1]], l holds its end value and s = b = 0.

    Raises:
        EMSError: wrong shapes, dtypes, values that are not finite, or a grid that does not increase.
    """

    lambdas: Tensor
    l: Tensor
    s: Tensor
    b: Tensor
    metadata: Mapping[str, str] = field(default_factory=dict)
    recommendation: Recommendation | None = None

    def __post_init__(self) -> None:
        _validate(self)
        for name in ("lambdas", "l", "s", "b"):
            object.__setattr__(self, name, getattr(self, name).detach().to("cpu", copy=True).contiguous())
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))

    @classmethod
    def degenerate(cls, channels: int = 1) -> EMS:
        """(l, s, b) = (1, 0, 0): data prediction, the statistics of no model. Fits any lambda."""
        ones, zeros = torch.ones(2, channels, dtype=torch.float64), torch.zeros(2, channels, dtype=torch.float64)
        return cls(torch.tensor([-1.0, 1.0], dtype=torch.float64), ones, zeros, zeros)

    @property
    def channels(self) -> int:
        """C."""
        return self.l.shape[1]

    @property
    def per_element(self) -> bool:
        """Whether the statistics belong to latent elements (one size only) rather than to channels."""
        return self.l.ndim > 2

    def scaled(self, factor: float) -> EMS:
        """Statistics with l - 1, s and b times `factor`: 1 leaves them, 0 gives data prediction."""
        if not 0 <= factor <= 2:
            raise EMSError(f"the factor of EMS.scaled must lie in [0, 2], not {factor}")
        if factor == 1:
            return self
        return replace(self, l=1 + (self.l - 1) * factor, s=self.s * factor, b=self.b * factor)

    def columns(self, which: Tensor) -> EMS:
        """The statistics of some elements, by their index [K] in the flattened latent, as K channels."""
        l, s, b = (v.flatten(1)[:, which] for v in (self.l, self.s, self.b))
        return EMS(self.lambdas, l, s, b)

    @property
    def content(self) -> bytes:
        """A digest of lambdas, l, s and b: equal for equal statistics, whichever object holds them."""
        found: bytes | None = self.__dict__.get("_content")
        if found is None:
            digest = hashlib.sha1(usedforsecurity=False)
            for part in (self.lambdas, self.l, self.s, self.b):
                digest.update(part.numpy().data)  # no copy: statistics per element are tens of megabytes
            found = digest.digest()
            object.__setattr__(self, "_content", found)
        return found

    def growth(self, lambdas: Tensor) -> float:
        """The largest |integral of s| over a step between these lambdas, over all channels.

        Within a step f grows or decays by e to this power (paper, eq. 12); where it is far above 1, statistics of
        infinitesimal steps say nothing about so large a one. Trapezoidal over the grid's points and the steps' ends.
        """
        grid = self.lambdas.to(torch.float64)
        ends = lambdas.to(torch.float64).clamp(grid[0], grid[-1])  # s = 0 outside
        if len(ends) < 2:
            return 0.0
        points = torch.cat([grid, ends]).sort().values
        return max(_growth(grid, s, points, ends) for s in self.s.flatten(1).split(_COLUMNS, dim=1))

    def check_fits(self, shape: torch.Size | tuple[int, ...]) -> None:
        """Raise EMSError unless the statistics apply to latents of `shape` [B, C, ...]."""
        if len(shape) < 2:
            raise EMSError(f"EMS apply to latents [batch, channels, ...], not to shape {tuple(shape)}")
        if self.per_element and tuple(shape[1:]) != tuple(self.l.shape[1:]):
            raise EMSError(
                f"these EMS are per element of a latent of shape {tuple(self.l.shape[1:])} and do not fit "
                f"{tuple(shape[1:])}: sample at that size, or use per-channel statistics, which fit every size"
            )
        if self.channels not in (1, shape[1]):
            raise EMSError(f"these EMS have {self.channels} channels and the latent has {shape[1]}: they are another model's")

    def at(self, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """l, s, b interpolated at `lam` [M], each [M, C, ...] in float64; outside the grid as the class says."""
        grid = self.lambdas.to(torch.float64)
        lam = lam.to(torch.float64)
        index, weight = _places(grid, lam)
        inside = ((lam >= grid[0]) & (lam <= grid[-1])).to(torch.float64)
        column = (-1,) + (1,) * (self.l.ndim - 1)
        weight, inside = weight.reshape(column), inside.reshape(column)
        l, s, b = (torch.lerp(v[index - 1].double(), v[index].double(), weight) for v in (self.l, self.s, self.b))
        return l, s * inside, b * inside


def _places(grid: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """For every lambda the grid point after it, and where it lies between the one before and that, from 0 to 1."""
    index = torch.searchsorted(grid, lam, right=True).clamp(1, len(grid) - 1)
    return index, ((lam - grid[index - 1]) / (grid[index] - grid[index - 1])).clamp(0, 1)


def _growth(grid: Tensor, values: Tensor, points: Tensor, ends: Tensor) -> float:
    """`EMS.growth` of the columns `values` [N+1, K] of s, on `points`: the grid and the `ends`, sorted."""
    index, weight = _places(grid, points)
    s = torch.lerp(values[index - 1].double(), values[index].double(), weight[:, None])
    total = torch.cat([torch.zeros_like(s[:1]), torch.cumulative_trapezoid(s, points, dim=0)])
    return float(total[torch.searchsorted(points, ends)].diff(dim=0).abs().max())


def _validate(ems: EMS) -> None:
    for name in ("lambdas", "l", "s", "b"):
        value = getattr(ems, name)
        if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise EMSError(f"EMS tensor '{name}' must be a float32 or float64 tensor, not {kind}")
        if not torch.isfinite(value).all():
            raise EMSError(f"EMS tensor '{name}' holds values that are not finite")
    if ems.lambdas.ndim != 1 or len(ems.lambdas) < 2:
        raise EMSError(f"EMS tensor 'lambdas' must have shape [N+1] with N >= 1, not {tuple(ems.lambdas.shape)}")
    if not (ems.lambdas.diff() > 0).all():
        raise EMSError("EMS tensor 'lambdas' must increase strictly (from the noisy end to the clean end)")
    shape = tuple(ems.l.shape)
    if ems.l.ndim < 2 or shape[0] != len(ems.lambdas) or 0 in shape:
        raise EMSError(f"EMS tensor 'l' must have shape [{len(ems.lambdas)}, C, ...], not {shape}")
    for name in ("s", "b"):
        other = tuple(getattr(ems, name).shape)
        if other != shape:
            raise EMSError(f"EMS tensor '{name}' has shape {other}, 'l' has {shape}: they must agree")
