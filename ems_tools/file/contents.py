"""The statistics file `*.ems.safetensors`: what is in it, writing it, and reading it without trust.

A safetensors file (8 bytes of header length, a JSON header, raw tensors) with

| tensor                | shape                    | dtype            |                                             |
|-----------------------|--------------------------|------------------|---------------------------------------------|
| `lambdas`             | [N+1]                    | float64          | half log-SNR, increasing, in [-30, 30]      |
| `guidance`            | [G]                      | float64          | covered scales, increasing, in (0, 1000]    |
| `l`, `s`, `b`         | [G, N+1, C, (*spatial)]  | float32, float64 | within +-1e4                                |
| `l_se`, `s_se`, `b_se`| the same, or 1 for N+1   | float16 to 64    | standard errors, optional; see `compacted`  |
| `moments.<name>`      | any                      | float64          | to extend or merge the estimate, optional   |

and string metadata: `format`, `format_version`, `content_sha256`, `program`, `date`, and JSON in `model`, `noise`,
`grid`, `estimate`, `evidence`, `recommendation`, and where there is any, `fitted`. Keys that begin with `modelspec.` or `ss_`
are kept as they are.

Reading executes nothing. Size and header length are checked before anything is parsed, every type, shape, dtype, offset
and range before it is used. `content_sha256` covers names, dtypes, shapes, bytes and metadata, and the header must be
spelled exactly as `EMSFile.encode` spells it; so any changed bit is noticed, and equal content means equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal, NoReturn, TypeAlias, cast

import torch
from torch import Tensor

from ...sampler import EMS, EMSError, FittedSteps, Recommendation, RecommendationEntry, Settings, Space
from .storage import write_atomic

__all__ = [
    "MAX_FILE_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_LAMBDA",
    "SUFFIX",
    "EMSFile",
    "EMSFileError",
    "EMSMeta",
    "EvidenceRow",
    "Fact",
    "FittedRow",
    "RecommendedSetting",
    "advice_by_case",
    "decode_ems_file",
    "evidence_problems",
    "fitted_row",
    "fitted_values",
    "load_ems_file",
]

FORMAT, VERSION = "dpm-solver-v3-ems", "1"
SUFFIX = ".ems.safetensors"
MAX_FILE_BYTES, MAX_HEADER_BYTES = 256 * 2**20, 2**20
PER_CHANNEL_BYTES = 64 * 1024
"""What a per-channel file without moments is meant to stay below."""
MAX_LAMBDA, MAX_GUIDANCE, MAX_VALUE = 30.0, 1000.0, 1e4
MAX_SCALES, MAX_POINTS, MAX_TEXT = 64, 20_001, 4096
FITTED_REACH = 0.4, 1.5
"""Smallest and largest ratio of the guidance scale in use to the fitted one. Measured (`benchmarks/transfer.py`): at half the
fitted scale a fit keeps most of its gain; at twice it can lose all of it and more, as at a quarter."""
MAX_FITTED_STEPS, MAX_FITTED_ROWS, MAX_COEFFICIENT = 64, 1024, 1e6

Scalar: TypeAlias = "str | int | float | bool | None"
Fact: TypeAlias = "Scalar | tuple[Scalar, ...]"
Split: TypeAlias = Literal["calibration", "report"]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_STATISTICS = ("l", "s", "b")
_FOREIGN = re.compile(r"(modelspec\.|ss_)[\w.\-]{1,100}", re.ASCII)
_MOMENT = re.compile(r"[\w.'\-]{1,64}", re.ASCII)
_DAMAGED = "the file is damaged or was changed by another program: get it again, or compute it anew"


class EMSFileError(EMSError):
    """A statistics file that is refused. `path` is the file, `what` is wrong with it and what to do."""

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        super().__init__(str(path), what)
        self.path, self.what = str(path), what

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass(frozen=True)
class EvidenceRow:
    """Errors on one guidance scale, schedule and step count, on noise held out of the estimate; to 5 digits.

    Args:
        split: "calibration" noise chose the settings, "report" noise chose nothing.
        data_prediction: error of the best settings without EMS.
        ems: error of the recommended settings.
        full_strength: error with the statistics at strength 1.
    """

    guidance: float
    schedule: str
    steps: int
    split: Split
    data_prediction: float
    ems: float
    full_strength: float

    def __post_init__(self) -> None:
        _check_place(self.guidance, self.schedule)
        _check_count("steps", self.steps, 1, 10_000)
        if self.split not in ("calibration", "report"):
            raise EMSError(f"an evidence row's split must be 'calibration' or 'report', not {self.split!r:.40}")
        for name in ("data_prediction", "ems", "full_strength"):
            value = _number(f"an evidence row's {name}", getattr(self, name), 0, math.inf)
            object.__setattr__(self, name, float(f"{value:.4e}"))


@dataclass(frozen=True)
class RecommendedSetting:
    """The settings that won on one guidance scale and schedule.

    The schedule is given by its finite lambdas, kept to 4 decimals: they only tell which schedule it was.
    """

    guidance: float
    schedule: str
    lambdas: tuple[float, ...]
    settings: Settings

    def __post_init__(self) -> None:
        _check_place(self.guidance, self.schedule)
        if not isinstance(self.lambdas, tuple) or not 1 <= len(self.lambdas) <= 10_000:
            raise EMSError("a recommendation's lambdas must be a tuple of 1 to 10000 numbers")
        low, high = -2 * MAX_LAMBDA, 2 * MAX_LAMBDA
        rounded = tuple(round(_number("a recommendation's lambda", v, low, high), 4) for v in self.lambdas)
        object.__setattr__(self, "lambdas", rounded)
        if not isinstance(self.settings, Settings):
            raise EMSError("a recommendation's settings must be sampler.Settings")


@dataclass(frozen=True)
class FittedRow:
    """What `fit` found for one guidance scale and number of steps, and its worth on noise that took no part in it.

    Args:
        lambdas: of the evaluations; one more than `steps` where the schedule ends above sigma = 0.
        coefficients: those fitted on these lambdas; None where a fixed schedule won, whose lambdas then stand here.
        fitted, fixed: squared errors of the fit and of `fixed_schedule`, the best fixed one, on `noises` held-out noises:
            geometric mean, median, mean.
        ratio: the geometric means' ratio, and its bootstrap 95 % interval.
    """

    guidance: float
    steps: int
    lambdas: tuple[float, ...]
    coefficients: FittedSteps | None
    fitted: tuple[float, ...]
    fixed: tuple[float, ...]
    fixed_schedule: str
    ratio: tuple[float, ...]
    noises: int

    def __post_init__(self) -> None:
        _check_place(self.guidance, self.fixed_schedule)
        _check_count("a fitted row's steps", self.steps, 1, MAX_FITTED_STEPS)
        _check_count("a fitted row's noises", self.noises, 1, 10_000_000)
        _check_numbers("a fitted row's lambda", self.lambdas, -2 * MAX_LAMBDA, 2 * MAX_LAMBDA)
        rises = all(a < b for a, b in zip(self.lambdas, self.lambdas[1:]))
        if len(self.lambdas) not in (self.steps, self.steps + 1) or not rises:
            raise EMSError(f"a fitted row of {self.steps} steps needs as many lambdas, or one more, and they must increase")
        for name in ("fitted", "fixed", "ratio"):
            _check_numbers(f"a fitted row's {name}", getattr(self, name), 0, 1e31)
            if len(getattr(self, name)) != 3:
                raise EMSError(f"a fitted row's {name} must be three numbers")
        c = self.coefficients
        if c is not None:
            if not isinstance(c, FittedSteps) or c.lambdas != self.lambdas:
                raise EMSError("a fitted row's coefficients must be sampler.FittedSteps on its lambdas")
            for row in ((c.start,), c.decay, *c.weights):
                _check_numbers("a fitted row's coefficient", row, -MAX_COEFFICIENT, MAX_COEFFICIENT)


@dataclass(frozen=True)
class EMSMeta:
    """What is needed to judge and reproduce statistics. Mappings hold short plain values (`Fact`) under short names.

    Args:
        space, sigma_min, sigma_max, schedule: the model's noise range, in sigma = exp(-lambda), and its schedule.
        model: identity: name, prediction, hashes, ...
        grid: how the points in lambda were chosen.
        estimate: samples, probes, resolution, source of points, seed, evaluations, ...
        fitted: schedules and coefficients for few steps.
        program, date: version that made the file; ISO date, given by the caller so that equal content is equal bytes.
        foreign: metadata of other tools, keys `modelspec.*` and `ss_*`.
    """

    space: str
    sigma_min: float
    sigma_max: float
    schedule: str = ""
    model: Mapping[str, Fact] = field(default_factory=dict)
    grid: Mapping[str, Fact] = field(default_factory=dict)
    estimate: Mapping[str, Fact] = field(default_factory=dict)
    evidence: tuple[EvidenceRow, ...] = ()
    recommendation: tuple[RecommendedSetting, ...] = ()
    program: str = ""
    date: str = ""
    foreign: Mapping[str, str] = field(default_factory=dict)
    fitted: tuple[FittedRow, ...] = ()

    def __post_init__(self) -> None:
        if self.space not in [s.value for s in Space]:
            raise EMSError(f"noise.space must be one of {', '.join(s.value for s in Space)}, not {self.space!r:.40}")
        object.__setattr__(self, "space", Space(self.space).value)
        low = _number("noise.sigma_min", self.sigma_min, 1e-20, 1e20)
        high = _number("noise.sigma_max", self.sigma_max, 1e-20, 1e20)
        if low >= high:
            raise EMSError(f"noise.sigma_min ({low:g}) must be below noise.sigma_max ({high:g})")
        object.__setattr__(self, "sigma_min", low)
        object.__setattr__(self, "sigma_max", high)
        for name in ("schedule", "program", "date"):
            _check_text(name, getattr(self, name))
        for name in ("model", "grid", "estimate"):
            object.__setattr__(self, name, _facts(name, getattr(self, name)))
        for key, value in self.foreign.items():
            if not isinstance(key, str) or not _FOREIGN.fullmatch(key):
                raise EMSError(f"metadata key {key!r:.80} is not known; others' keys begin with 'modelspec.' or 'ss_'")
            _check_text(key, value)
        object.__setattr__(self, "foreign", MappingProxyType(dict(self.foreign)))
        cases = {(row.guidance, row.steps) for row in self.fitted}
        if len(cases) != len(self.fitted) or len(cases) > MAX_FITTED_ROWS:
            raise EMSError(f"fitted rows must be at most {MAX_FITTED_ROWS}, each for another guidance scale or number of steps")


@dataclass(frozen=True, eq=False)
class EMSFile:
    """Statistics for one or more guidance scales and all that is known of them; shapes as in the module's table.

    Args:
        errors: standard errors under "l", "s", "b", or None.
        moments: sums of the estimate by name; their meaning is `moments`' and `estimate`'s.

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

    def __post_init__(self) -> None:
        for name in ("lambdas", "guidance", *_STATISTICS):
            object.__setattr__(self, name, _own(name, getattr(self, name)))
        errors = self.errors or {}
        if errors and set(errors) != set(_STATISTICS):
            raise EMSError(f"standard errors must be those of l, s and b, not of {', '.join(sorted(errors))}")
        for name in self.moments:
            if not isinstance(name, str) or not _MOMENT.fullmatch(name):
                raise EMSError(f"tensor {f'moments.{name}'!r:.80} must have a short name of letters, digits, . ' _ and -")
        moments = {name: _own(f"moments.{name}", value) for name, value in self.moments.items()}
        kept = {name: _own(f"{name}_se", errors[name]) for name in _STATISTICS} if errors else None
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
        scales = self.guidance.tolist()
        if math.isnan(guidance):
            raise EMSError("the guidance scale is not a number")
        inside = min(max(float(guidance), scales[0]), scales[-1])
        if abs(inside - guidance) > 1e-4 * inside:
            covered = f"{scales[0]:g} to {scales[-1]:g}" if len(scales) > 1 else f"{scales[0]:g} only"
            message = f"these EMS cover guidance {covered}; using those of {inside:g} for guidance {guidance:g}"
            warnings.warn(message, stacklevel=2)
        nearest = self._nearest(inside, scales)
        found = [r for r in self.meta.recommendation if r.guidance == nearest]
        entries = tuple(RecommendationEntry(r.lambdas, r.settings, r.schedule) for r in found)
        facts = {"model": str(self.meta.model.get("name", "")), "space": self.meta.space, "guidance": f"{inside:g}"}
        fitted = tuple(r.coefficients for r in self._fitted_rows(guidance) if r.coefficients is not None)
        recommendation = Recommendation(entries, fitted) if entries or fitted else None
        l, s, b = (self._between(v, inside) for v in (self.l, self.s, self.b))
        return EMS(self.lambdas, l, s, b, facts, recommendation)

    def for_latents(self, guidance: float, shape: torch.Size | tuple[int, ...]) -> tuple[EMS, list[str]]:
        """`at(guidance)` for latents of `shape` [B, C, ...], and what `at` warned of. Raises EMSError if they do not fit."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ems = self.at(guidance)
        ems.check_fits(shape)
        return ems, [str(w.message) for w in caught]

    @staticmethod
    def _nearest(guidance: float, scales: list[float]) -> float:
        return min(scales, key=lambda g: abs(math.log(g / guidance)))

    def _fitted_rows(self, guidance: float) -> list[FittedRow]:
        """The rows of the nearest scale that is near enough."""
        low, high = FITTED_REACH
        scales = [g for g in sorted({r.guidance for r in self.meta.fitted}) if low <= guidance / g <= high]
        if not scales:
            return []
        nearest = self._nearest(guidance, scales)
        return [r for r in self.meta.fitted if r.guidance == nearest]

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
        return total, next((r for r in self._fitted_rows(guidance) if r.steps == total), None)

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
        values = {name: getattr(self, name).to(torch.float32) for name in _STATISTICS}
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
        tensors = _tensors_of(self)
        metadata = _metadata_of(self.meta)
        metadata["content_sha256"] = _content_hash(metadata, tensors)
        kinds = {name: (_DTYPE_NAMES[v.dtype], tuple(v.shape)) for name, v in tensors.items()}
        header = _header(metadata, kinds)
        if len(header) > MAX_HEADER_BYTES:
            raise EMSError(f"the metadata are too long: {len(header)} bytes, {MAX_HEADER_BYTES} are allowed")
        data = b"".join([len(header).to_bytes(8, "little"), header, *(_bytes(tensors[name]) for name in _order(kinds))])
        if len(data) > MAX_FILE_BYTES:
            size = f"{len(data) / 2**20:.0f} MiB, {MAX_FILE_BYTES >> 20} are allowed"
            raise EMSError(f"the file would have {size}: leave the moments out, or use per-channel statistics")
        return data

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, atomically. Raises EMSError if it is too large, OSError as the system reports it."""
        write_atomic(path, self.encode())


def load_ems_file(path: str | os.PathLike[str]) -> EMSFile:
    """Read a statistics file, checking all of it; executes nothing.

    Raises:
        EMSFileError: the file is missing, too large, damaged or not a statistics file; the message says what to do.
    """
    try:
        status = os.stat(path)
        regular, small = stat.S_ISREG(status.st_mode), status.st_size <= MAX_FILE_BYTES
        data = b""
        if regular and small:
            with open(path, "rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise EMSFileError(path, "there is no such file: check the name and the folder") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise EMSFileError(path, f"cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not regular:
        raise EMSFileError(path, f"is not a file: give the name of a *{SUFFIX} file")
    if not small:
        raise EMSFileError(path, _too_large(status.st_size))
    return decode_ems_file(data, path)


def decode_ems_file(data: bytes, path: str | os.PathLike[str] = "EMS") -> EMSFile:
    """The file whose bytes these are; `path` names it in messages. Raises EMSFileError."""
    try:
        return _decode(data)
    except EMSError as error:
        raise EMSFileError(path, str(error)) from error


def advice_by_case(meta: EMSMeta) -> dict[tuple[float, str, int], RecommendedSetting]:
    """The recommendation for every (guidance, schedule, steps) tried, where the two cover the same cases.

    A schedule of n lambdas has n - 1 steps, or n if it ends at sigma 0; all lengths of one schedule end alike.
    """
    found = {}
    for guidance, schedule in {(r.guidance, r.schedule) for r in meta.evidence}:
        place = (guidance, schedule)
        steps = {r.steps for r in meta.evidence if (r.guidance, r.schedule) == place and r.split == "calibration"}
        for offset in (1, 0):
            mine = {len(r.lambdas) - offset: r for r in meta.recommendation if (r.guidance, r.schedule) == place}
            if set(mine) == steps:
                found.update({(guidance, schedule, n): entry for n, entry in mine.items()})
    return found


def evidence_problems(file: EMSFile) -> list[str]:
    """What does not fit between a file's evidence and its recommendation; empty if all does.

    On calibration noise a recommendation never loses to data prediction, and the two cover the same cases.
    """
    rows, advice = file.meta.evidence, advice_by_case(file.meta)
    problems = []
    for row in rows:
        if row.split == "calibration" and row.ems > row.data_prediction:
            case = f"guidance {row.guidance:g}, {row.schedule}, {row.steps} steps"
            lost = f"loses to data prediction on calibration noise, {row.ems:g} against {row.data_prediction:g}"
            problems.append(f"{case}: the recommendation {lost}")
    judged = {(r.guidance, r.schedule) for r in rows}
    advised = {(r.guidance, r.schedule) for r in file.meta.recommendation}
    for guidance, schedule in sorted((judged | advised) - {(g, name) for g, name, _ in advice}):
        problems.append(f"guidance {guidance:g}, {schedule}: evidence and recommendation are not for the same steps")
    return problems


def _karras(first: float, last: float, steps: int) -> list[float]:
    """Lambdas of Karras steps (rho 7) from `first` to `last` and then to sigma = 0: what unfitted step counts get.

    Measured: fitted lambdas interpolated between step counts, without coefficients, are worse than these.
    """
    a, b = math.exp(-first / 7), math.exp(-last / 7)
    return [*(-7 * math.log(a + (b - a) * i / max(steps - 1, 1)) for i in range(steps)), math.inf]


# --- Checks shared by writing and reading


def _number(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise EMSError(f"{name} must be a number, not {type(value).__name__}")
    number = math.inf if abs(value) > 1e300 else float(value)  # a whole number may be too large to convert
    if not (math.isfinite(number) and low <= number <= high):
        raise EMSError(f"{name} is {number:g}, but must be finite and lie in [{low:g}, {high:g}]")
    return number


def _check_numbers(name: str, values: object, low: float, high: float) -> None:
    if not isinstance(values, tuple) or not 1 <= len(values) <= MAX_FITTED_STEPS + 1:
        raise EMSError(f"{name} must be one of a short tuple of numbers")
    for value in values:
        _number(name, value, low, high)


def _check_count(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise EMSError(f"{name} must be a whole number from {low} to {high}, not {value!r:.40}")


def _check_text(name: str, value: object) -> None:
    # Printable: a file's text reaches terminals and web pages, where control characters could act.
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise EMSError(f"metadata '{name}' must be one line of plain text of at most {MAX_TEXT} characters")


def _check_place(guidance: object, schedule: object) -> None:
    _number("guidance of an evidence or recommendation row", guidance, 0, MAX_GUIDANCE)
    _check_text("schedule", schedule)


def _facts(name: str, values: object) -> Mapping[str, Fact]:
    if not isinstance(values, Mapping):
        raise EMSError(f"metadata '{name}' must map names to values, not be a {type(values).__name__}")
    result: dict[str, Fact] = {}
    for key, value in values.items():
        _check_text(f"{name} name", key)
        parts = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        for part in parts:
            if isinstance(part, str):
                _check_text(f"{name}.{key:.60}", part)
            elif isinstance(part, float) and not math.isfinite(part):
                raise EMSError(f"metadata '{name}.{key:.60}' is not finite")
            elif not (part is None or isinstance(part, (bool, int, float))) or _huge(part):
                raise EMSError(f"metadata '{name}.{key:.60}' must be text, number, true, false, null, or their list")
        result[key] = parts if isinstance(value, (list, tuple)) else value
    return MappingProxyType(result)


def _huge(value: object) -> bool:
    return isinstance(value, int) and abs(value) >= 2**63


def _own(name: str, value: object) -> Tensor:
    """A copy that nobody else writes to."""
    if not isinstance(value, Tensor) or value.dtype not in _DTYPE_NAMES:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise EMSError(f"tensor '{name}' must be of float32 or float64, not {kind}")
    if 0 in value.shape:
        raise EMSError(f"tensor '{name}' is empty, its shape is {tuple(value.shape)}")
    if not torch.isfinite(value).all():
        at = (~torch.isfinite(value)).nonzero()[0].tolist()
        raise EMSError(f"tensor '{name}' holds values that are not finite, the first at {at}")
    return value.detach().to("cpu", copy=True).contiguous()


def _check_tensors(file: EMSFile) -> None:
    _check_axis("lambdas", file.lambdas, 2, MAX_POINTS, -MAX_LAMBDA, MAX_LAMBDA)
    _check_axis("guidance", file.guidance, 1, MAX_SCALES, 0, MAX_GUIDANCE)
    if file.guidance[0] <= 0:
        raise EMSError(f"tensor 'guidance' holds {file.guidance[0].item():g}, scales must be above 0")
    shape, expected = tuple(file.l.shape), (len(file.guidance), len(file.lambdas))
    if file.l.ndim < 3 or shape[:2] != expected or file.l.ndim > 8:
        raise EMSError(f"tensor 'l' has shape {shape}, but must have [{expected[0]}, {expected[1]}, C, ...]")
    for name in _STATISTICS:
        value = cast(Tensor, getattr(file, name))
        if tuple(value.shape) != shape or value.dtype != file.l.dtype or value.dtype is torch.float16:
            kind = f"shape {tuple(value.shape)} and {value.dtype}"
            raise EMSError(f"tensor '{name}' has {kind}; l, s, b must share {shape} and be all float32 or all float64")
        _check_values(name, value, -MAX_VALUE)
    for name, value in (file.errors or {}).items():
        if tuple(value.shape) not in (shape, (shape[0], 1, *shape[2:])):
            raise EMSError(f"tensor '{name}_se' has shape {tuple(value.shape)}, which does not go with {shape}")
        _check_values(f"{name}_se", value, 0)
    for name, value in file.moments.items():
        if value.dtype is not torch.float64 or value.ndim > 12:
            raise EMSError(f"tensor 'moments.{name}' must be of float64 and have at most 12 axes")


def _check_axis(name: str, value: Tensor, least: int, most: int, low: float, high: float) -> None:
    if value.dtype is not torch.float64 or value.ndim != 1 or not least <= len(value) <= most:
        what = f"{value.dtype} of shape {tuple(value.shape)}"
        raise EMSError(f"tensor '{name}' is {what}, but must be float64 with {least} to {most} values in one axis")
    _check_values(name, value, low, high)
    if not (value.diff() > 0).all():
        at = int((value.diff() <= 0).nonzero()[0].item())
        raise EMSError(f"tensor '{name}' must increase strictly, and does not at {at + 1}")


def _check_values(name: str, value: Tensor, low: float, high: float = MAX_VALUE) -> None:
    if value.min() < low or value.max() > high:
        found = f"{value.min().item():g} to {value.max().item():g}"
        raise EMSError(f"tensor '{name}' holds values from {found}, outside [{low:g}, {high:g}]")


def _check_scales(file: EMSFile) -> None:
    scales = set(file.guidance.tolist())
    judged = {row.guidance for row in file.meta.evidence} | {row.guidance for row in file.meta.recommendation}
    judged |= {row.guidance for row in file.meta.fitted}
    if judged - scales:
        covered = ", ".join(f"{g:g}" for g in sorted(scales))
        raise EMSError(f"evidence or recommendation for guidance {min(judged - scales):g}; the file covers {covered}")


# --- Writing


def _tensors_of(file: EMSFile) -> dict[str, Tensor]:
    tensors = {name: cast(Tensor, getattr(file, name)) for name in ("lambdas", "guidance", *_STATISTICS)}
    tensors.update({f"{name}_se": value for name, value in (file.errors or {}).items()})
    tensors.update({f"moments.{name}": value for name, value in file.moments.items()})
    return tensors


_SETTINGS = tuple(f.name for f in fields(Settings))
_EVIDENCE_COLUMNS = tuple(f.name for f in fields(EvidenceRow))
_ADVICE_COLUMNS = ("guidance", "schedule", "lambdas", *_SETTINGS)
_FITTED_COLUMNS = (
    *("guidance", "steps", "lambdas", "start", "decay", "weights"),
    *("fitted", "fixed", "fixed_schedule", "ratio", "noises"),
)


def _metadata_of(meta: EMSMeta) -> dict[str, str]:
    advice = [[r.guidance, r.schedule, r.lambdas, *_settings_values(r.settings)] for r in meta.recommendation]
    noise = {name: getattr(meta, name) for name in ("space", "sigma_min", "sigma_max", "schedule")}
    plain = {
        "model": dict(meta.model),
        "noise": noise,
        "grid": dict(meta.grid),
        "estimate": dict(meta.estimate),
        "evidence": {"columns": _EVIDENCE_COLUMNS, "rows": [list(asdict(row).values()) for row in meta.evidence]},
        "recommendation": {"columns": _ADVICE_COLUMNS, "rows": advice},
    }
    if meta.fitted:
        plain["fitted"] = {"columns": _FITTED_COLUMNS, "rows": [fitted_values(row) for row in meta.fitted]}
    texts = {"format": FORMAT, "format_version": VERSION, "program": meta.program, "date": meta.date}
    return {**meta.foreign, **texts, **{name: _json(value) for name, value in plain.items()}}


def fitted_values(row: FittedRow) -> list[object]:
    """A fitted row as JSON-serialisable values; no coefficients are three nulls."""
    c = row.coefficients
    parts: list[object] = [None, None, None] if c is None else [c.start, c.decay, c.weights]
    return [row.guidance, row.steps, row.lambdas, *parts, row.fitted, row.fixed, row.fixed_schedule, row.ratio, row.noises]


def _settings_values(settings: Settings) -> list[object]:
    """Values in the order of `_SETTINGS`; JSON has no infinity, so "no limit" is null."""
    return [None if v == math.inf else v for v in asdict(settings).values()]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=True)


_Kind: TypeAlias = "tuple[str, tuple[int, ...]]"  # dtype and shape as the header names them


def _order(kinds: Mapping[str, _Kind]) -> list[str]:
    """Wide dtypes first, which keeps every tensor aligned."""
    return sorted(kinds, key=lambda name: (-_DTYPES[kinds[name][0]].itemsize, name))


def _bytes(tensor: Tensor) -> bytes:
    array = tensor.numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _header(metadata: Mapping[str, str], kinds: Mapping[str, _Kind]) -> bytes:
    """The one spelling of a header: keys in a fixed order, no spaces but those that fill up to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in _order(kinds):
        dtype, shape = kinds[name]
        end = offset + math.prod(shape) * _DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _content_hash(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over metadata (but itself) and tensors, each part preceded by its length."""
    digest = hashlib.sha256()

    def feed(*parts: bytes) -> None:
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)

    for key in sorted(set(metadata) - {"content_sha256"}):
        feed(b"metadata", key.encode(), metadata[key].encode())
    for name in sorted(tensors):
        value = tensors[name]
        kind = f"{_DTYPE_NAMES[value.dtype]} {list(value.shape)}"
        feed(b"tensor", name.encode(), kind.encode(), _bytes(value))
    return digest.hexdigest()


# --- Reading


def _too_large(size: int) -> str:
    return f"has {size / 2**20:.0f} MiB, more than the {MAX_FILE_BYTES >> 20} that a statistics file may have"


def _decode(data: bytes) -> EMSFile:
    from safetensors import SafetensorError
    from safetensors.torch import load

    header, payload = _split(data)
    metadata, tensors = _parse_header(header)
    _check_version(metadata)
    _check_layout(header, payload, metadata, tensors)
    try:
        values = load(data)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise EMSError(f"is not a safetensors file ({error}); {_DAMAGED}") from error
    if _content_hash(metadata, values) != metadata.get("content_sha256"):
        raise EMSError(f"the content does not match its checksum (content_sha256); {_DAMAGED}")
    missing = [name for name in ("lambdas", "guidance", *_STATISTICS) if name not in values]
    if missing:
        raise EMSError(f"tensor '{missing[0]}' is missing; {_DAMAGED}")
    try:
        return _build(_parse_meta(metadata), values)
    except EMSError as error:
        raise EMSError(f"{error}; the file is not a valid statistics file: get another, or compute it anew") from error


def _build(meta: EMSMeta, values: dict[str, Tensor]) -> EMSFile:
    main = {name: values.pop(name) for name in ("lambdas", "guidance", *_STATISTICS)}
    errors = {name.removesuffix("_se"): values.pop(name) for name in list(values) if name in ("l_se", "s_se", "b_se")}
    moments = {name.removeprefix("moments."): values.pop(name) for name in list(values) if name.startswith("moments.")}
    if values:
        raise EMSError(f"tensor {min(values)!r:.80} does not belong in a statistics file")
    return EMSFile(**main, meta=meta, errors=errors or None, moments=moments)


def _split(data: bytes) -> tuple[bytes, memoryview]:
    if len(data) > MAX_FILE_BYTES:
        raise EMSError(_too_large(len(data)))
    if len(data) < 10:
        raise EMSError(f"has {len(data)} bytes, which is no statistics file; if a download was cut off, repeat it")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        kind = "not a safetensors file"
        if data[:4] == b"PK\3\4" or data[:1] == b"\x80" or data[:6] == b"\x93NUMPY":
            kind = "a zip, pickle or numpy file; the authors' l.npz and sb.npz go through 'ems convert'"
        raise EMSError(f"is no statistics file but {kind} (its header would have {length} bytes)")
    if length > len(data) - 8:
        raise EMSError(f"is cut off: {length} bytes of header announced, {len(data) - 8} there; get the file again")
    return data[8 : 8 + length], memoryview(data)[8 + length :]


def _parse_header(header: bytes) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...], tuple[int, int]]]]:
    try:
        text = header.decode()
    except UnicodeDecodeError as error:
        raise EMSError(f"is not a safetensors file: the header is not text (byte {error.start}); {_DAMAGED}") from error
    entries = _parse_json(text, "the header")
    if not isinstance(entries, dict):
        raise EMSError(f"is not a safetensors file: the header is no table of tensors; {_DAMAGED}")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise EMSError(f"the header's metadata do not map text to text; {_DAMAGED}")
    return metadata, {name: _parse_entry(name, entry) for name, entry in entries.items()}


def _parse_entry(name: str, entry: object) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise EMSError(f"tensor {name!r:.80} is not described by {', '.join(sorted(keys))}; {_DAMAGED}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise EMSError(f"tensor {name!r:.80} is of type {dtype!r:.40}; statistics are {', '.join(_DTYPES)}; {_DAMAGED}")
    for what, values in (("shape", shape), ("data_offsets", offsets)):
        fits = isinstance(values, list) and len(values) <= 16
        if not fits or not all(type(v) is int and 0 <= v < 2**40 for v in values):
            raise EMSError(f"tensor {name!r:.80} has a bad {what}: {values!s:.80}; {_DAMAGED}")
    if len(offsets) != 2:
        raise EMSError(f"tensor {name!r:.80} has bad data_offsets: {offsets!s:.80}; {_DAMAGED}")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _check_version(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        found = f"format is {metadata['format']!r:.60}" if "format" in metadata else "it names no format"
        raise EMSError(f"is a safetensors file but holds no EMS ({found}): choose a file made by 'ems compute'")
    version = metadata.get("format_version", "")
    if version != VERSION:
        if version.isascii() and version.isdigit() and len(version) < 6 and int(version) > int(VERSION):
            raise EMSError(f"has format version {version}, this program reads {VERSION}: update DPM-Solver-v3")
        raise EMSError(f"has format version {version!r:.40}, which does not exist; {_DAMAGED}")


def _check_layout(
    header: bytes,
    payload: memoryview,
    metadata: Mapping[str, str],
    tensors: Mapping[str, tuple[str, tuple[int, ...], tuple[int, int]]],
) -> None:
    """Tensors lie side by side from the first byte to the last, and the header is spelled as we spell it."""
    end = 0
    for name, (dtype, shape, (start, stop)) in sorted(tensors.items(), key=lambda item: item[1][2]):
        size = math.prod(shape) * _DTYPES[dtype].itemsize
        if start != end or stop - start != size:
            where = f"lies at bytes {start} to {stop}, its place is {end} to {end + size}"
            raise EMSError(f"tensor {name!r:.80} {where}; {_DAMAGED}")
        end = stop
    if end > len(payload):
        raise EMSError(f"is cut off: {end} bytes of tensors announced, {len(payload)} there; get the file again")
    if end < len(payload):
        raise EMSError(f"has {len(payload) - end} bytes after its last tensor; {_DAMAGED}")
    try:
        spelling = _header(metadata, {name: entry[:2] for name, entry in tensors.items()})
    except UnicodeEncodeError:  # a lone surrogate, which JSON can escape and UTF-8 cannot write
        spelling = b""
    if spelling != header:
        raise EMSError(f"the header is not spelled as a statistics file's; {_DAMAGED}")


def _parse_meta(metadata: dict[str, str]) -> EMSMeta:
    left = {k: v for k, v in metadata.items() if k not in ("format", "format_version", "content_sha256")}
    program, date = left.pop("program", ""), left.pop("date", "")
    plain: dict[str, Any] = {}
    for name in ("model", "noise", "grid", "estimate", "evidence", "recommendation"):
        if name not in left:
            raise EMSError(f"metadata '{name}' is missing")
        plain[name] = _parse_json(left.pop(name), f"metadata '{name}'")
    table = _parse_json(left.pop("fitted"), "metadata 'fitted'") if "fitted" in left else None
    fitted = () if table is None else tuple(map(fitted_row, _rows("fitted", table, _FITTED_COLUMNS)))
    noise = plain.pop("noise")
    if not isinstance(noise, dict) or set(noise) != {"space", "sigma_min", "sigma_max", "schedule"}:
        raise EMSError("metadata 'noise' must hold space, sigma_min, sigma_max and schedule")
    evidence = tuple(EvidenceRow(*row) for row in _rows("evidence", plain.pop("evidence"), _EVIDENCE_COLUMNS))
    advice = tuple(_advice(row) for row in _rows("recommendation", plain.pop("recommendation"), _ADVICE_COLUMNS))
    plain = {**plain, "evidence": evidence, "recommendation": advice, "fitted": fitted}
    return EMSMeta(**noise, **plain, program=program, date=date, foreign=left)


def _rows(name: str, table: object, columns: tuple[str, ...]) -> list[list[Any]]:
    if not isinstance(table, dict) or set(table) != {"columns", "rows"} or table["columns"] != list(columns):
        raise EMSError(f"metadata '{name}' must be a table with the columns {', '.join(columns)}")
    rows = table["rows"]
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == len(columns) for row in rows):
        raise EMSError(f"metadata '{name}' must be a table whose rows have {len(columns)} values")
    return rows


def _advice(row: list[Any]) -> RecommendedSetting:
    guidance, schedule, lambdas, *values = row
    chosen = dict(zip(_SETTINGS, values, strict=True))
    if chosen["corrector_below"] is None:
        chosen["corrector_below"] = math.inf
    _check_count("a recommendation's order", chosen["order"], 1, 3)
    for name in ("strength", "corrector_below"):
        if isinstance(chosen[name], bool):
            raise EMSError(f"a recommendation's {name} must be a number")
    try:
        settings = Settings(**chosen)
    except (ValueError, TypeError) as error:
        raise EMSError(f"a recommendation cannot be used: {error!s:.200}") from error
    return RecommendedSetting(guidance, schedule, tuple(lambdas) if isinstance(lambdas, list) else lambdas, settings)


def fitted_row(values: list[Any]) -> FittedRow:
    """The inverse of `fitted_values`. Raises EMSError on anything else."""
    guidance, steps, lambdas, start, decay, weights, fitted, fixed, schedule, ratio, noises = values

    def numbers(value: object) -> tuple[float, ...]:
        if not isinstance(value, (list, tuple)) or len(value) > MAX_FITTED_STEPS + 1:
            raise EMSError("a fitted row must hold short lists of numbers")
        return tuple(_number("a fitted row's number", v, -1e31, 1e31) for v in value)

    where, coefficients = numbers(lambdas), None
    if (start, decay, weights) != (None, None, None):
        if not isinstance(weights, (list, tuple)) or len(weights) > MAX_FITTED_STEPS:
            raise EMSError("a fitted row's weights must be a short list")
        try:
            coefficients = FittedSteps(where, numbers(decay), tuple(map(numbers, weights)), *numbers([start]))
        except ValueError as error:
            raise error if isinstance(error, EMSError) else EMSError(str(error)) from error
    return FittedRow(guidance, steps, where, coefficients, numbers(fitted), numbers(fixed), schedule, numbers(ratio), noises)


def _parse_json(text: str, what: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant, parse_int=_short_int, object_pairs_hook=_no_repeats)
    except RecursionError:
        raise EMSError(f"{what} is nested too deep; {_DAMAGED}") from None
    except ValueError as error:
        raise EMSError(f"{what} is not valid JSON ({error!s:.100}); {_DAMAGED}") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _short_int(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError("a number is too long")
    return int(digits)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found
