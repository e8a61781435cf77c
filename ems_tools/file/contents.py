"""The contents of a statistics file: tensors for several guidance scales, and what is known of them."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from types import MappingProxyType
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...sampler import EMS, EMSError, FittedSteps, Recommendation, RecommendationEntry, Space
from .layout import DTYPE_NAMES, encoded
from .rows import MAX_GUIDANCE, MAX_LAMBDA, MIN_GUIDANCE, EMSMeta, FittedRow
from .storage import write_atomic

__all__ = ["STATISTICS", "EMSFile"]

STATISTICS = ("l", "s", "b")
MAX_VALUES = {"l": 6.0, "s": 20.0, "b": 1e4}
"""A model's l is about 0 to 1, on six networks never above 1.2 (`benchmarks/bounds.py`). Estimates are held to
`moments.L_LIMIT` and S_LIMIT, which s does reach (galaxies)."""
MAX_ERROR, MAX_SCALES, MAX_POINTS, LEAST_GAP = 1e4, 64, 4001, 1e-6
MAX_ELEMENTS = 2**20
"""Of a latent. On a grid of 21 points more would be larger than a file may be; the coefficients of the steps grow with it."""
PER_CHANNEL_BYTES = 64 * 1024
"""What a per-channel file without moments is meant to stay below."""
FITTED_REACH = 0.4, 1.5
"""Smallest and largest ratio of the guidance scale in use to the fitted one. Measured (`benchmarks/transfer.py`): at half the
fitted scale a fit keeps most of its gain; at twice it can lose all of it and more, as at a quarter."""

_MOMENT = re.compile(r"[\w.'\-]{1,64}", re.ASCII)


_MADE: WeakKeyDictionary[EMSFile, dict[float, EMS]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class EMSFile:
    """Statistics for one or more guidance scales and all that is known of them; shapes as in the module's table.

    Args:
        errors: standard errors under "l", "s", "b", or None.
        moments: sums of the estimate by name; their meaning is `moments`' and `estimate`'s.
        taken: the tensors are nobody else's and need no copy.

    Tensors are copied in. Raises EMSError for anything that the format does not allow.
    """

    lambdas: Tensor
    guidance: Tensor
    l: Tensor  # the paper's name
    s: Tensor
    b: Tensor
    meta: EMSMeta
    errors: Mapping[str, Tensor] | None = None
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    taken: InitVar[bool] = False

    def __post_init__(self, taken: bool) -> None:
        for name in ("lambdas", "guidance", *STATISTICS):
            object.__setattr__(self, name, _own(name, getattr(self, name), taken))
        errors = self.errors or {}
        if errors and set(errors) != set(STATISTICS):
            raise EMSError(f"standard errors must be those of l, s and b, not of {', '.join(sorted(errors))}")
        for name in self.moments:
            if not isinstance(name, str) or not _MOMENT.fullmatch(name):
                raise EMSError(f"tensor {f'moments.{name}'!r:.80} must have a short name of letters, digits, . ' _ and -")
        moments = {name: _own(f"moments.{name}", value, taken) for name, value in self.moments.items()}
        kept = {name: _own(f"{name}_se", errors[name], taken) for name in STATISTICS} if errors else None
        object.__setattr__(self, "errors", MappingProxyType(kept) if kept else None)
        object.__setattr__(self, "moments", MappingProxyType(moments))
        _check_tensors(self)
        _check_scales(self)

    @property
    def channels(self) -> int:
        """C."""
        return self.l.shape[2]

    @property
    def per_element(self) -> bool:
        """Whether positions are kept apart, so that the statistics fit one latent size only."""
        return self.l.ndim > 3

    def at(self, guidance: float) -> EMS:
        """The statistics for one guidance scale, with the recommendation made for the nearest covered one.

        l, s, b are linear between covered scales. Outside them the nearest one is used, with a warning. Which scale is
        nearest, for the recommendation, goes by the logarithm.
        """
        note = self._note(guidance)
        if note:
            warnings.warn(note, stacklevel=2)
        return self._cached(guidance)

    def _cached(self, guidance: float) -> EMS:
        """The same object for the same scale, by which the solver knows plans again; the latest few are kept."""
        made = _MADE.setdefault(self, {})
        found = made.pop(guidance, None) or self._ems(guidance)
        made[guidance] = found
        while len(made) > (1 if self.per_element else 8):
            made.pop(next(iter(made)), None)
        return found

    def _inside(self, guidance: float) -> float:
        if math.isnan(guidance):
            raise EMSError("the guidance scale is not a number")
        return min(max(float(guidance), self.guidance[0].item()), self.guidance[-1].item())

    def _note(self, guidance: float) -> str:
        """That the scale is not covered, "" if it is."""
        inside, scales = self._inside(guidance), self.guidance.tolist()
        if abs(inside - guidance) <= 1e-4 * inside:
            return ""
        covered = f"{scales[0]:g} to {scales[-1]:g}" if len(scales) > 1 else f"{scales[0]:g} only"
        return f"these EMS cover guidance {covered}; using those of {inside:g} for guidance {guidance:g}"

    def _ems(self, guidance: float) -> EMS:
        scales = self.guidance.tolist()
        inside = self._inside(guidance)
        nearest = self._nearest(inside, scales)
        found = [r for r in self.meta.recommendation if r.guidance == nearest]
        entries = tuple(RecommendationEntry(r.lambdas, r.settings, r.schedule) for r in found)
        facts = {"model": str(self.meta.model.get("name", "")), "space": self.meta.space, "guidance": f"{inside:g}"}
        rows = (*self._near(self.meta.fitted, guidance), *self._near(self.meta.passes, guidance))
        fitted = tuple(r.coefficients for r in rows if r.coefficients is not None)
        begun = self._near(self.meta.partial, guidance)
        partial = tuple(r.coefficients for r in begun if r.coefficients is not None)
        recommendation = Recommendation(entries, fitted, partial) if entries or fitted or partial else None
        l, s, b = (self._between(v, inside) for v in (self.l, self.s, self.b))
        return EMS(self.lambdas, l, s, b, facts, recommendation)

    def for_latents(self, guidance: float, shape: torch.Size | tuple[int, ...]) -> tuple[EMS, list[str]]:
        """`at(guidance)` for latents of `shape` [B, C, ...], and what `at` warned of. Raises EMSError if they do not fit."""
        note = self._note(guidance)
        ems = self._cached(guidance)
        ems.check_fits(shape)
        return ems, [note] if note else []

    @staticmethod
    def _nearest(guidance: float, scales: list[float]) -> float:
        return min(scales, key=lambda g: abs(math.log(g / guidance)))

    def _near(self, rows: Sequence[FittedRow], guidance: float) -> list[FittedRow]:
        """Those of the nearest scale with fitted steps, if it is near enough: a scale whose fewer passes lost has none."""
        low, high = FITTED_REACH
        scales = [
            g for g in sorted({r.guidance for r in (*self.meta.fitted, *self.meta.partial)}) if low <= guidance / g <= high
        ]
        if not scales:
            return []
        nearest = self._nearest(guidance, scales)
        return [r for r in rows if r.guidance == nearest]

    def passes_sigmas(self, passes: int, guidance: float) -> tuple[Tensor, FittedSteps] | None:
        """The schedule [n + 1] fitted in so many passes at this guidance scale, host levels in float64, and its steps.

        None where the file has none, because guided steps were better or none were tried.
        """
        row = next((r for r in self._near(self.meta.passes, guidance) if r.passes == passes), None)
        if row is None or row.coefficients is None or guidance == 1:
            return None
        lambdas = torch.tensor([*row.lambdas, math.inf], dtype=torch.float64)
        return Space(self.meta.space).level_of(lambdas), row.coefficients

    def has_images(self, guidance: float) -> bool:
        """Whether the file holds steps for image to image at this guidance scale."""
        return bool(self._near(self.meta.partial, guidance))

    def fitted_sigmas(self, steps: int, guidance: float, denoise: float = 1.0) -> Tensor:
        """The schedule fitted for `steps` evaluations at this guidance scale: host levels [steps + 1] in float64.

        Step counts that were not fitted, and scales far from all fitted ones, get Karras steps to 0. Below denoise 1 they
        are the last of a schedule of round(steps / denoise) steps, as hosts do it; coefficients do not apply there.

        Raises:
            EMSError: the file has no fitted schedules, or the arguments are out of range.
        """
        if not self.meta.fitted:
            raise EMSError("this file has no fitted schedules: 'ems fit' adds them, and so does computing it anew")
        if not (1 <= steps <= 10_000 and 0 < denoise <= 1 and 0 < guidance < math.inf):
            given = f"{steps}, {denoise} and {guidance}"
            raise EMSError(f"a fitted schedule needs at least 1 step, denoise in (0, 1] and guidance above 0, not {given}")
        total, row = self._fitted_row(steps, guidance, denoise)
        if row is None:
            lambdas = _karras(-math.log(self.meta.sigma_max), -math.log(self.meta.sigma_min), total)
        else:
            lambdas = [*row.lambdas, math.inf] if len(row.lambdas) == total else list(row.lambdas)
        levels = Space(self.meta.space).level_of(torch.tensor(lambdas, dtype=torch.float64))
        return levels[-(steps + 1) :]

    def covers_fit(self, steps: int, guidance: float, denoise: float = 1.0) -> bool:
        """Whether `fitted_sigmas` gives a schedule that was fitted, not Karras steps."""
        return self._fitted_row(steps, guidance, denoise)[1] is not None

    def _fitted_row(self, steps: int, guidance: float, denoise: float) -> tuple[int, FittedRow | None]:
        total = max(round(steps / denoise), steps)
        return total, next((r for r in self._near(self.meta.fitted, guidance) if r.steps == total), None)

    def _between(self, values: Tensor, guidance: float) -> Tensor:
        at = int(torch.searchsorted(self.guidance, guidance).item())
        if at == 0 or self.guidance[at].item() == guidance:
            return values[at]
        low, high = self.guidance[at - 1].item(), self.guidance[at].item()
        return torch.lerp(values[at - 1], values[at], (guidance - low) / (high - low))

    def compacted(self, limit: int = PER_CHANNEL_BYTES) -> EMSFile:
        """The file as it is meant to be shared: no moments, l, s, b in float32, standard errors as detailed as fits.

        Standard errors are a judgement of the statistics, not used in sampling; so they give way first: float16, and
        where that is above `limit` bytes their root mean square over the grid, [G, 1, C, ...] in float32.
        """
        values = {name: getattr(self, name).to(torch.float32) for name in STATISTICS}
        if self.errors is None:
            return replace(self, **values, moments={})
        half = {name: e.to(torch.float16) for name, e in self.errors.items()}
        small = replace(self, **values, errors=half, moments={})
        if len(small.encode()) <= limit:
            return small
        rms = {name: e.double().square().mean(1, keepdim=True).sqrt().float() for name, e in self.errors.items()}
        return replace(small, errors=rms)

    def encode(self) -> bytes:
        """The file's bytes; equal content gives equal bytes."""
        return encoded(self.meta, _tensors_of(self))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, atomically. Raises EMSError if it is too large, OSError as the system reports it."""
        write_atomic(path, self.encode())


def _karras(first: float, last: float, steps: int) -> list[float]:
    """Lambdas of Karras steps (rho 7) from `first` to `last` and then to sigma = 0: what unfitted step counts get.

    Measured: fitted lambdas interpolated between step counts, without coefficients, are worse than these.
    """
    a, b = math.exp(-first / 7), math.exp(-last / 7)
    return [*(-7 * math.log(a + (b - a) * i / max(steps - 1, 1)) for i in range(steps)), math.inf]


def _own(name: str, value: object, taken: bool) -> Tensor:
    """A copy that nobody else writes to; the tensor itself where it is `taken` over."""
    if not isinstance(value, Tensor) or value.dtype not in DTYPE_NAMES:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise EMSError(f"tensor '{name}' must be of float32 or float64, not {kind}")
    if 0 in value.shape:
        raise EMSError(f"tensor '{name}' is empty, its shape is {tuple(value.shape)}")
    if not math.isfinite(value.min()) or not math.isfinite(value.max()):  # no temporary of the tensor's size
        at = (~torch.isfinite(value)).nonzero()[0].tolist()
        raise EMSError(f"tensor '{name}' holds values that are not finite, the first at {at}")
    return value.detach().to("cpu", copy=not taken).contiguous()


def _check_tensors(file: EMSFile) -> None:
    _check_axis("lambdas", file.lambdas, 2, MAX_POINTS, -MAX_LAMBDA, MAX_LAMBDA)
    _check_axis("guidance", file.guidance, 1, MAX_SCALES, MIN_GUIDANCE, MAX_GUIDANCE)
    shape, expected = tuple(file.l.shape), (len(file.guidance), len(file.lambdas))
    if file.l.ndim < 3 or shape[:2] != expected or file.l.ndim > 8:
        raise EMSError(f"tensor 'l' has shape {shape}, but must have [{expected[0]}, {expected[1]}, C, ...]")
    if math.prod(shape[2:]) > MAX_ELEMENTS:
        raise EMSError(f"tensor 'l' is for latents of {math.prod(shape[2:])} elements; at most {MAX_ELEMENTS} are allowed")
    for name in STATISTICS:
        value = cast(Tensor, getattr(file, name))
        if tuple(value.shape) != shape or value.dtype != file.l.dtype or value.dtype is torch.float16:
            kind = f"shape {tuple(value.shape)} and {value.dtype}"
            raise EMSError(f"tensor '{name}' has {kind}; l, s, b must share {shape} and be all float32 or all float64")
        _check_values(name, value, -MAX_VALUES[name], MAX_VALUES[name])
    for name, value in (file.errors or {}).items():
        if tuple(value.shape) not in (shape, (shape[0], 1, *shape[2:])):
            raise EMSError(f"tensor '{name}_se' has shape {tuple(value.shape)}, which does not go with {shape}")
        _check_values(f"{name}_se", value, 0, MAX_ERROR)
    for name, value in file.moments.items():
        if value.dtype is not torch.float64 or value.ndim > 12:
            raise EMSError(f"tensor 'moments.{name}' must be of float64 and have at most 12 axes")


def _check_axis(name: str, value: Tensor, least: int, most: int, low: float, high: float) -> None:
    if value.dtype is not torch.float64 or value.ndim != 1 or not least <= len(value) <= most:
        what = f"{value.dtype} of shape {tuple(value.shape)}"
        raise EMSError(f"tensor '{name}' is {what}, but must be float64 with {least} to {most} values in one axis")
    _check_values(name, value, low, high)
    if not (value.diff() >= LEAST_GAP).all():
        at = int((value.diff() < LEAST_GAP).nonzero()[0].item())
        raise EMSError(f"tensor '{name}' must increase strictly, and does not at {at + 1}")


def _check_values(name: str, value: Tensor, low: float, high: float) -> None:
    if value.min() < low or value.max() > high:
        found = f"{value.min().item():g} to {value.max().item():g}"
        raise EMSError(f"tensor '{name}' holds values from {found}, outside [{low:g}, {high:g}]")


def _check_scales(file: EMSFile) -> None:
    scales = set(file.guidance.tolist())
    judged = {row.guidance for row in file.meta.evidence} | {row.guidance for row in file.meta.recommendation}
    judged |= {row.guidance for row in (*file.meta.fitted, *file.meta.passes, *file.meta.partial)}
    if judged - scales:
        covered = ", ".join(f"{g:g}" for g in sorted(scales))
        raise EMSError(f"evidence or recommendation for guidance {min(judged - scales):g}; the file covers {covered}")


def _tensors_of(file: EMSFile) -> dict[str, Tensor]:
    tensors = {name: cast(Tensor, getattr(file, name)) for name in ("lambdas", "guidance", *STATISTICS)}
    tensors.update({f"{name}_se": value for name, value in (file.errors or {}).items()})
    tensors.update({f"moments.{name}": value for name, value in file.moments.items()})
    return tensors
