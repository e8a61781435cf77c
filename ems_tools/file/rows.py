"""The records of a statistics file's metadata, and the checks that writing and reading share.

Every record checks itself when it is made, so that whoever holds one holds a valid one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

from ...sampler import EMSError, FittedSteps, Settings, Space

__all__ = [
    "MAX_FITTED_STEPS",
    "MAX_GUIDANCE",
    "MAX_LAMBDA",
    "MAX_TEXT",
    "EMSMeta",
    "EvidenceRow",
    "Fact",
    "FittedRow",
    "RecommendedSetting",
    "advice_by_case",
    "check_count",
    "clean_text",
    "error_ratio",
    "insane",
    "number",
]

MAX_LAMBDA, MIN_GUIDANCE, MAX_GUIDANCE, MAX_TEXT = 30.0, 1e-3, 1000.0, 4096
MAX_EVIDENCE, MAX_ADVICE, MAX_FITTED_STEPS, MAX_FITTED_ROWS = 8192, 4096, 64, 1024
MAX_ERROR = 1e31
"""Errors are squared differences; a run that blew up is counted as 1e30."""
MAX_START, MAX_DECAY, MAX_WEIGHT, MAX_ROW, MAX_EXCESS = 1.5, 5.0, 12.0, 80.0, 4.0
"""What a sane fitted step can need: the start factor or its inverse, the sizes of decay and of one weight, the sum of a row's
sizes, and how far decay and weights add up to another number than 1, as they must where y = D = c. At least twice what
`benchmarks/bounds.py` finds: 2.2, 4.8 and 1.8 for decay, weight and the rest, on six networks at 2 to 20 steps and guidance
scales from 1 to 7.5; the rows of known formulas sum up to 38.5 (iPNDM, 14 Karras steps). The shipped file begins at 1.13."""
MARGIN, LATEST = 0.5, 0.75
"""How far in lambda a fitted schedule may lie outside the noise range of its file, and which share of it may be over when it
begins: a fit looks for its beginning in the first half (`fit.spacing`), from where refining may move it."""

Scalar: TypeAlias = "str | int | float | bool | None"
Fact: TypeAlias = "Scalar | tuple[Scalar, ...]"
Split: TypeAlias = Literal["calibration", "report"]

_FOREIGN = re.compile(r"(modelspec\.|ss_)[\w.\-]{1,100}", re.ASCII)


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
        check_count("steps", self.steps, 1, 10_000)
        if self.split not in ("calibration", "report"):
            raise EMSError(f"an evidence row's split must be 'calibration' or 'report', not {self.split!r:.40}")
        for name in ("data_prediction", "ems", "full_strength"):
            value = number(f"an evidence row's {name}", getattr(self, name), 0, MAX_ERROR)
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
        rounded = tuple(round(number("a recommendation's lambda", v, low, high), 4) for v in self.lambdas)
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

    A row of steps in fewer passes has coefficients with `guided`; what it has to beat are the guided steps, fitted or not, that
    cost as many passes of the network.
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
        check_count("a fitted row's steps", self.steps, 1, MAX_FITTED_STEPS)
        check_count("a fitted row's noises", self.noises, 1, 10_000_000)
        _check_numbers("a fitted row's lambda", self.lambdas, -2 * MAX_LAMBDA, 2 * MAX_LAMBDA)
        rises = all(a < b for a, b in zip(self.lambdas, self.lambdas[1:]))
        if len(self.lambdas) not in (self.steps, self.steps + 1) or not rises:
            raise EMSError(f"a fitted row of {self.steps} steps needs as many lambdas, or one more, and they must increase")
        for name in ("fitted", "fixed", "ratio"):
            _check_numbers(f"a fitted row's {name}", getattr(self, name), 0, MAX_ERROR)
            if len(getattr(self, name)) != 3:
                raise EMSError(f"a fitted row's {name} must be three numbers")
        c = self.coefficients
        if c is not None:
            if not isinstance(c, FittedSteps) or c.lambdas != self.lambdas:
                raise EMSError("a fitted row's coefficients must be sampler.FittedSteps on its lambdas")
            wrong = insane(c)
            if wrong:
                raise EMSError(f"a fitted row's coefficients are none that a step can need: {wrong}")

    @property
    def passes(self) -> int:
        """Of the network, for a picture under guidance."""
        return 2 * self.steps if self.coefficients is None else self.coefficients.passes


@dataclass(frozen=True)
class EMSMeta:
    """What is needed to judge and reproduce statistics. Mappings hold short plain values (`Fact`) under short names.

    Args:
        space, sigma_min, sigma_max, schedule: the model's noise range, in sigma = exp(-lambda), and its schedule.
        model: identity: name, prediction, hashes, ...
        grid: how the points in lambda were chosen.
        estimate: samples, probes, resolution, source of points, seed, evaluations, ...
        fitted: schedules and coefficients for few steps.
        passes: the same in fewer passes of the network, for guidance; each row for another number of passes.
        partial: the same for runs that begin inside the noise range, image to image; each row for another number of steps or
            another beginning.
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
    passes: tuple[FittedRow, ...] = ()
    partial: tuple[FittedRow, ...] = ()

    def __post_init__(self) -> None:
        if self.space not in [s.value for s in Space]:
            raise EMSError(f"noise.space must be one of {', '.join(s.value for s in Space)}, not {self.space!r:.40}")
        object.__setattr__(self, "space", Space(self.space).value)
        low = number("noise.sigma_min", self.sigma_min, 1e-20, 1e20)
        high = number("noise.sigma_max", self.sigma_max, 1e-20, 1e20)
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
        if len(self.evidence) > MAX_EVIDENCE or len(self.recommendation) > MAX_ADVICE:
            raise EMSError(f"at most {MAX_EVIDENCE} rows of evidence and {MAX_ADVICE} of recommendation are allowed")
        cases = {(row.guidance, row.steps) for row in self.fitted}
        if len(cases) != len(self.fitted) or len(cases) > MAX_FITTED_ROWS:
            raise EMSError(f"fitted rows must be at most {MAX_FITTED_ROWS}, each for another guidance scale or number of steps")
        _check_passes(self)
        _check_partial(self)
        first, last = -math.log(high) - MARGIN, -math.log(low) + MARGIN
        for row in (*self.fitted, *self.passes, *self.partial):
            if row.lambdas[0] < first or row.lambdas[-1] > last:
                span = f"from lambda {row.lambdas[0]:g} to {row.lambdas[-1]:g}"
                raise EMSError(f"a fitted row goes {span}, outside the file's noise range, {first:.3g} to {last:.3g}")
        for row in (*self.fitted, *self.passes):
            if row.lambdas[0] > first + LATEST * (last - first):
                raise EMSError(f"a fitted row begins at lambda {row.lambdas[0]:g}, where most of the noise range is over")


def _check_passes(meta: EMSMeta) -> None:
    """Which table a row is in says what its answers are. Raises EMSError."""
    if any(row.coefficients is not None and row.coefficients.guided for row in meta.fitted):
        raise EMSError("a fitted row's coefficients leave out passes: such rows have a table of their own")
    kept = [row.coefficients for row in meta.passes]
    if any(c is None or not c.guided for c in kept):
        raise EMSError("a row of fewer passes must say which of its evaluations are guided")
    cases = {(row.guidance, row.passes) for row in meta.passes}
    if len(cases) != len(meta.passes) or len(cases) > MAX_FITTED_ROWS:
        raise EMSError(f"rows of fewer passes must be at most {MAX_FITTED_ROWS}, each for another scale or number of passes")


def _check_partial(meta: EMSMeta) -> None:
    """Rows for image to image are fitted steps, each for another case. Raises EMSError."""
    if any(row.coefficients is None or row.coefficients.guided or row.steps < 2 for row in meta.partial):
        raise EMSError("a row for image to image must hold coefficients of at least 2 steps, and leave out no passes")
    if any(row.coefficients.start != 1 for row in meta.partial if row.coefficients is not None):
        raise EMSError("a row for image to image begins with the picture as it is: its start factor is 1")
    cases = {(row.guidance, row.steps, round(row.lambdas[0], 2)) for row in meta.partial}
    if len(cases) != len(meta.partial) or len(cases) > MAX_FITTED_ROWS:
        raise EMSError(
            f"rows for image to image must be at most {MAX_FITTED_ROWS}, each for another scale, number or beginning"
        )


def error_ratio(row: EvidenceRow) -> float:
    """Error with EMS over that without, held to [1e-9, 1e9]: beyond that one of the two is no error at all."""
    return min(max(max(row.ems, 1e-30) / max(row.data_prediction, 1e-30), 1e-9), 1e9)


def insane(c: FittedSteps) -> str:
    """Which coefficient is none that a step can need, in words; "" if all are sane."""
    if not 1 / MAX_START <= c.start <= MAX_START:
        return f"the start factor is {c.start:g}, not within {1 / MAX_START:g} and {MAX_START:g}"
    for k, (decay, weights) in enumerate(zip(c.decay, c.weights, strict=True), 1):
        sizes, excess = [abs(w) for w in weights], decay + sum(weights) - 1
        if abs(decay) > MAX_DECAY or max(sizes) > MAX_WEIGHT or sum(sizes) > MAX_ROW or abs(excess) > MAX_EXCESS:
            return f"step {k} has decay {decay:g}, weights up to {max(sizes):g}, and together they exceed 1 by {excess:g}"
    return ""


def advice_by_case(meta: EMSMeta) -> dict[tuple[float, str, int], RecommendedSetting]:
    """The recommendation for every (guidance, schedule, steps) tried, where the two cover the same cases.

    A schedule of n lambdas has n - 1 steps, or n if it ends at sigma 0; all lengths of one schedule end alike.
    """
    steps: dict[tuple[float, str], set[int]] = {}
    entries: dict[tuple[float, str], list[RecommendedSetting]] = {}
    for row in meta.evidence:
        tried = steps.setdefault((row.guidance, row.schedule), set())
        if row.split == "calibration":
            tried.add(row.steps)
    for entry in meta.recommendation:
        entries.setdefault((entry.guidance, entry.schedule), []).append(entry)
    found = {}
    for (guidance, schedule), tried in steps.items():
        for offset in (1, 0):
            mine = {len(entry.lambdas) - offset: entry for entry in entries.get((guidance, schedule), ())}
            if set(mine) == tried:
                found.update({(guidance, schedule, n): entry for n, entry in mine.items()})
    return found


def clean_text(text: str) -> str:
    """Any text as a file can hold it: one line, every kind of white space a plain space, no sign that is not printed."""
    line = " ".join(text.split())
    return "".join(c for c in line if c.isprintable())[:MAX_TEXT]


def number(name: str, value: object, low: float, high: float) -> float:
    """The value as a finite number in [low, high]; `name` is for the message. Raises EMSError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise EMSError(f"{name} must be a number, not {type(value).__name__}")
    found = math.inf if abs(value) > 1e300 else float(value)  # a whole number may be too large to convert
    if not (math.isfinite(found) and low <= found <= high):
        raise EMSError(f"{name} is {found:g}, but must be finite and lie in [{low:g}, {high:g}]")
    return found


def _check_numbers(name: str, values: object, low: float, high: float) -> None:
    if not isinstance(values, tuple) or not 1 <= len(values) <= MAX_FITTED_STEPS + 1:
        raise EMSError(f"{name} must be one of a short tuple of numbers")
    for value in values:
        number(name, value, low, high)


def check_count(name: str, value: object, low: int, high: int) -> None:
    """Raise EMSError unless the value is a whole number in [low, high]; `name` is for the message."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise EMSError(f"{name} must be a whole number from {low} to {high}, not {value!r:.40}")


def _check_text(name: str, value: object) -> None:
    # Printable: a file's text reaches terminals and web pages, where control characters could act.
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise EMSError(f"metadata '{name}' must be one line of plain text of at most {MAX_TEXT} characters")


def _check_place(guidance: object, schedule: object) -> None:
    number("guidance of an evidence or recommendation row", guidance, 0, MAX_GUIDANCE)
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
