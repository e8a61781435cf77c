"""What a plot shows, apart from how it is drawn: curves on panels, the limits and ticks of their axes.

`summary_of` is what a file gains, in one panel; `statistics_of` is everything in it, four panels for each guidance scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..file.contents import EMSFile
from ..file.rows import EvidenceRow, error_ratio

__all__ = ["COLOURS", "Curve", "Panel", "limits_of", "statistics_of", "style_of", "summary_of", "ticks_between"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Told apart by people who are colour-blind, too (Okabe and Ito's, black and grey)."""
DASHES = ("solid", "dashed", "dotted")
MAX_ROWS, MAX_CURVES, MAX_NAMED, MAX_SUMMARY = 6, 16, 16, 4


@dataclass(frozen=True)
class Curve:
    """A line through (x, y), with a band from `low` to `high` if given. Only curves with a name are in the legend."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    colour: str = COLOURS[0]
    dash: str = "solid"


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above the axes.
        x_label: below them.
        curves: what is drawn.
        level: a horizontal line for orientation, if any.
        note: a remark inside the axes.
        log: whether the y values are logarithms to base 10.
        legend: whether names are shown; False where a neighbour with the same colours shows them.
        from_zero: whether the y axis begins at 0.
    """

    title: str
    x_label: str
    curves: tuple[Curve, ...]
    level: float | None = None
    note: str = ""
    log: bool = False
    legend: bool = True
    from_zero: bool = False

    def y_tick(self, value: float) -> str:
        """The text at a tick of the y axis."""
        return f"{10**value:.3g}" if self.log else f"{value:g}"

    @property
    def named(self) -> list[Curve]:
        """The curves of the legend: none where there are too many to tell apart."""
        named = [c for c in self.curves if c.name] if self.legend else []
        return named if len(named) <= MAX_NAMED else []

    @property
    def x_ticks(self) -> list[float]:
        """The x values themselves where they are few whole numbers, such as numbers of steps; else round numbers."""
        values = sorted({v for c in self.curves for v in c.x})
        if values and len(values) <= 10 and all(float(v).is_integer() for v in values):
            return values
        return ticks_between(*limits_of(self)[0])

    @property
    def y_ticks(self) -> list[float]:
        """Round numbers on the y axis; on a logarithmic one their logarithms."""
        low, high = limits_of(self)[1]
        return _log_ticks(low, high) if self.log else ticks_between(low, high)


def _log_ticks(low: float, high: float) -> list[float]:
    """Logarithms of round numbers: powers of ten, with 2 and 5 times those where the axis is short."""
    factors = (1, 2, 5) if high - low < 2 else (1,)
    every = math.ceil((high - low) / 7)
    exponents = range(math.floor(low), math.ceil(high) + 1)
    values = [k + math.log10(f) for k in exponents if k % every == 0 for f in factors]
    return [v for v in values if low <= v <= high]


def style_of(k: int) -> tuple[str, str]:
    """Colour and dash of the k-th of many curves."""
    return COLOURS[k % len(COLOURS)], DASHES[k // len(COLOURS) % len(DASHES)]


def limits_of(panel: Panel) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ends of the x and of the y axis."""
    ys = [v for c in panel.curves for v in (*c.y, *c.low, *c.high)]
    low, high = _with_margin([*ys, *(() if panel.level is None else (panel.level,))])
    return _with_margin([v for c in panel.curves for v in c.x]), (0.0 if panel.from_zero else low, high)


def _with_margin(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
    return low - margin, high + margin


def ticks_between(low: float, high: float) -> list[float]:
    """About five round numbers between `low` and `high`."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of the indices below `count`, evenly spread, with both ends."""
    n = min(count, most)
    return sorted({round(i * (count - 1) / max(n - 1, 1)) for i in range(n)})


def summary_of(file: EMSFile) -> list[list[Panel]]:
    """One panel: the error with this file over the best one without it, and its 95 % interval, for each number of steps."""
    scales = file.guidance.tolist()
    curves = []
    for k, g in enumerate(_spread(len(scales), MAX_SUMMARY)):
        guidance = scales[g]
        fitted = sorted((r for r in file.meta.fitted if r.guidance == guidance), key=lambda r: r.steps)
        if fitted:
            steps = tuple(float(r.steps) for r in fitted)
            # An interval from few noises can be so wide that it would flatten the curves.
            ratios, low, high = (tuple(min(r.ratio[i], 2 * max(r.ratio[0], 1)) for r in fitted) for i in range(3))
            curves.append(Curve(f"CFG {guidance:g}, fitted steps", steps, ratios, low, high, colour=COLOURS[k]))
        points = _mean_ratios(r for r in file.meta.evidence if r.guidance == guidance)
        if points:
            name = f"CFG {guidance:g}, other schedulers"
            curves.append(Curve(name, tuple(points), tuple(points.values()), colour=COLOURS[k], dash="dashed"))
    note = "" if curves else "not tried yet: no evidence in this file"
    return [[Panel("error with this file, 1 = the best without it", "steps", tuple(curves), 1.0, note, from_zero=bool(curves))]]


def _mean_ratios(rows: Iterable[EvidenceRow]) -> dict[float, float]:
    """Steps to the geometric mean, over schedules, of the error with the statistics over that without them.

    Of noise that took no part in choosing the settings (split "report"), where there is such.
    """
    usable = [r for r in rows if r.data_prediction > 0 and r.ems > 0]
    usable = [r for r in usable if r.split == "report"] or usable
    logs: dict[float, list[float]] = {}
    for r in sorted(usable, key=lambda r: r.steps):
        logs.setdefault(float(r.steps), []).append(math.log(error_ratio(r)))
    return {steps: math.exp(sum(values) / len(values)) for steps, values in logs.items()}


def statistics_of(file: EMSFile) -> list[list[Panel]]:
    """Rows (guidance scales, at most 6 spread over those covered) of four panels: l, s, b, evidence."""
    scales = file.guidance.tolist()
    shown = _spread(len(scales), MAX_ROWS)
    return [[*(_statistic(file, name, g) for name in ("l", "s", "b")), _evidence(file, scales[g])] for g in shown]


def _statistic(file: EMSFile, name: str, g: int) -> Panel:
    values = getattr(file, name)[g].double()
    errors = file.errors[name][g].double() if file.errors else None
    x = tuple(file.lambdas.tolist())
    curves = []
    for c in range(min(file.channels, MAX_CURVES)):
        middle: Tensor = values[:, c]
        edges: tuple[Tensor, ...] = ()
        if file.per_element:
            flat = middle.flatten(1)
            middle, edges = flat.mean(1), (_quantile(flat, 0.1), _quantile(flat, 0.9))
        elif errors is not None:
            edges = (middle - 2 * errors[:, c], middle + 2 * errors[:, c])
        low, high = (tuple(v.tolist()) for v in edges) if edges else ((), ())
        curves.append(Curve(f"channel {c}", x, tuple(middle.tolist()), low, high, *style_of(c)))
    note = f"first {MAX_CURVES} of {file.channels} channels" if file.channels > MAX_CURVES else ""
    title = f"{name}, guidance {file.guidance[g].item():g}"
    level = 1.0 if name == "l" else 0.0  # data prediction, which is sampling without statistics
    return Panel(title, "lambda (noisy to clean)", tuple(curves), level, note, legend=name == "l")


def _quantile(flat: Tensor, q: float) -> Tensor:
    """Nearest-rank quantile over the last axis (torch.quantile refuses large inputs)."""
    return flat.sort(-1).values[:, min(int(q * flat.shape[1]), flat.shape[1] - 1)]


def _evidence(file: EMSFile, guidance: float) -> Panel:
    rows: dict[str, list[EvidenceRow]] = {}
    for row in file.meta.evidence:
        if row.guidance == guidance and row.data_prediction > 0:
            rows.setdefault(row.schedule, []).append(row)
    curves = []
    for k, (schedule, all_of_it) in enumerate(list(rows.items())[:MAX_CURVES]):
        for split, dash in (("report", "solid"), ("calibration", "dotted")):
            mine = sorted((r for r in all_of_it if r.split == split), key=lambda r: r.steps)
            points = [(float(r.steps), error_ratio(r)) for r in mine]
            if points:
                xs, ys = zip(*points, strict=True)
                name = schedule[:32] if split == "report" else ""  # the dotted curve has its schedule's colour
                curves.append(Curve(name, xs, ys, colour=COLOURS[k % len(COLOURS)], dash=dash))
    title = f"error with EMS / without, guidance {guidance:g}"
    return Panel(title, "steps (dotted: calibration noise)", tuple(curves), 1.0, "" if curves else "no evidence in this file")
