"""Draw a statistics file: l, s, b over lambda per channel, and what its evidence says, one row per guidance scale.

`panels_of` says what is drawn; two renderers draw it: SVG by hand, which needs nothing, and `raster` with Pillow, which every
host brings, for .png.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from torch import Tensor

from ..file.contents import EMSFile
from ..file.storage import write_atomic

__all__ = ["Curve", "Panel", "PlotError", "limits_of", "panels_of", "plot_ems", "png_of", "ticks_between"]

MAX_ROWS, MAX_CURVES = 6, 16
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
DASHES: dict[str, str] = {"solid": "", "dashed": "5,3", "dotted": "1.5,2.5"}
BANDS = "bands: 2 standard errors"
BANDS_ELEMENT = "lines: mean over positions; bands: middle 80 % of positions"


class PlotError(ValueError):
    """A plot that cannot be made; the message says what to do."""


@dataclass(frozen=True)
class Curve:
    """A line through (x, y), with a band from `low` to `high` if given."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    colour: str = COLOURS[0]
    dash: str = "solid"


@dataclass(frozen=True)
class Panel:
    """One pair of axes. `level` is a horizontal line for orientation."""

    title: str
    x_label: str
    curves: tuple[Curve, ...]
    level: float
    note: str = ""
    log: bool = False  # y values are logarithms to base 10

    def y_tick(self, value: float) -> str:
        """The text at a tick of the y axis."""
        return f"{10**value:.1g}" if self.log else f"{value:g}"

    @property
    def legend(self) -> bool:
        """Whether curves are named; the panels of s and b share their colours with that of l."""
        return 1 <= len(self.named) <= 8 and self.title[:2] not in ("s,", "b,")

    @property
    def named(self) -> list[Curve]:
        """The curves that a legend names."""
        return [c for c in self.curves if c.name]


def panels_of(file: EMSFile) -> list[list[Panel]]:
    """Rows (guidance scales, at most 6 spread over those covered) of four panels: l, s, b, evidence."""
    scales = file.guidance.tolist()
    n = min(len(scales), MAX_ROWS)
    shown = sorted({round(i * (len(scales) - 1) / max(n - 1, 1)) for i in range(n)})
    return [[*(_statistic(file, name, g) for name in ("l", "s", "b")), _evidence(file, scales[g])] for g in shown]


def _statistic(file: EMSFile, name: str, g: int) -> Panel:
    values = getattr(file, name)[g].double()
    spread = file.errors[name][g].double() if file.errors else None
    x = tuple(file.lambdas.tolist())
    curves = []
    for c in range(min(file.channels, MAX_CURVES)):
        middle: Tensor = values[:, c]
        edges: tuple[Tensor, ...] = ()
        if file.per_element:
            flat = middle.flatten(1)
            middle, edges = flat.mean(1), (_share(flat, 0.1), _share(flat, 0.9))
        elif spread is not None:
            edges = (middle - 2 * spread[:, c], middle + 2 * spread[:, c])
        low, high = (tuple(v.tolist()) for v in edges) if edges else ((), ())
        curves.append(Curve(f"channel {c}", x, tuple(middle.tolist()), low, high, COLOURS[c % len(COLOURS)]))
    note = f"first {MAX_CURVES} of {file.channels} channels" if file.channels > MAX_CURVES else ""
    title = f"{name}, guidance {file.guidance[g].item():g}"
    return Panel(title, "lambda (noisy to clean)", tuple(curves), 1.0 if name == "l" else 0.0, note)


def _share(flat: Tensor, q: float) -> Tensor:
    """Nearest-rank quantile over the last axis (torch.quantile refuses large inputs)."""
    return flat.sort(-1).values[:, min(int(q * flat.shape[1]), flat.shape[1] - 1)]


def _evidence(file: EMSFile, guidance: float) -> Panel:
    rows = [r for r in file.meta.evidence if r.guidance == guidance]
    curves = []
    for k, schedule in enumerate(dict.fromkeys(r.schedule for r in rows)):
        for split, dash in (("report", "solid"), ("calibration", "dotted")):
            mine = sorted((r for r in rows if (r.schedule, r.split) == (schedule, split)), key=lambda r: r.steps)
            mine = [r for r in mine if r.data_prediction > 0]
            points = [(float(r.steps), r.ems / r.data_prediction) for r in mine]
            if points:
                xs, ys = zip(*points, strict=True)
                name = schedule[:32] if split == "report" else ""  # told by its colour
                curves.append(Curve(name, xs, ys, colour=COLOURS[k % len(COLOURS)], dash=dash))
    title = f"error with EMS / without, guidance {guidance:g}"
    return Panel(title, "steps (dotted: calibration noise)", tuple(curves), 1.0, "" if curves else "no evidence in this file")


def plot_ems(file: EMSFile, path: str | os.PathLike[str], title: str = "") -> None:
    """Draw `file` to `path`, an .svg or .png.

    Raises:
        PlotError: another ending, or .png without Pillow.
        OSError: as the system reports it.
    """
    ending = Path(path).suffix.lower()
    draw: dict[str, Callable[[list[list[Panel]], str], bytes]] = {".svg": _svg, ".png": png_of}
    if ending not in draw:
        raise PlotError(f"{path}: a plot is an .svg or a .png file; choose such a name")
    name = title or str(file.meta.model.get("name") or "") or "EMS"
    if file.per_element:
        name = f"{name} ({BANDS_ELEMENT})"
    elif file.errors:
        name = f"{name} ({BANDS})"
    write_atomic(path, draw[ending](panels_of(file), name))


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
    return low - margin, high + margin


def limits_of(panel: Panel) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ends of the x and of the y axis."""
    ys = [panel.level, *(v for c in panel.curves for v in (*c.y, *c.low, *c.high))]
    return _limits([v for c in panel.curves for v in c.x]), _limits(ys)


def png_of(rows: list[list[Panel]], title: str, zoom: float = 1.0) -> bytes:
    """The panels as a PNG, 420 x 320 pixels each at zoom 1. Raises PlotError without Pillow."""
    from . import png

    try:
        return png.render(rows, title, zoom)
    except ImportError:
        raise PlotError("a .png needs Pillow, which is not installed: give a name that ends in .svg") from None


_WIDTH, _HEIGHT = 340, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 26, 38


def _svg(rows: list[list[Panel]], title: str) -> bytes:
    width, height = 4 * _WIDTH, len(rows) * _HEIGHT + 30
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    parts = [f'{head} font-family="sans-serif" font-size="11">', '<rect width="100%" height="100%" fill="white"/>']
    parts.append(f'<text x="{width / 2}" y="20" text-anchor="middle" font-size="14">{escape(title)}</text>')
    for r, panels in enumerate(rows):
        for c, panel in enumerate(panels):
            parts.append(f'<g transform="translate({c * _WIDTH},{r * _HEIGHT + 30})">{_svg_panel(panel)}</g>')
    return "\n".join([*parts, "</svg>\n"]).encode()


def _svg_panel(panel: Panel) -> str:
    (x_low, x_high), (y_low, y_high) = limits_of(panel)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x(v: float) -> str:
        return f"{_LEFT + (v - x_low) / (x_high - x_low) * (right - _LEFT):.1f}"

    def y(v: float) -> str:
        return f"{bottom - (v - y_low) / (y_high - y_low) * (bottom - _TOP):.1f}"

    def points(xs: Sequence[float], ys: Sequence[float]) -> str:
        return " ".join(f"{x(a)},{y(b)}" for a, b in zip(xs, ys, strict=True))

    box = f'x="{_LEFT}" y="{_TOP}" width="{right - _LEFT}" height="{bottom - _TOP}"'
    parts = [f'<rect {box} fill="none" stroke="#444"/>']
    for text, at in ((panel.title, 18), (panel.x_label, _HEIGHT - 6), (panel.note, _TOP + 20)):
        parts.append(f'<text x="{(_LEFT + right) / 2}" y="{at}" text-anchor="middle">{escape(text)}</text>')
    for v in ticks_between(x_low, x_high):
        parts.append(f'<path d="M{x(v)} {_TOP}V{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x(v)}" y="{bottom + 14}" text-anchor="middle">{v:g}</text>')
    for v in ticks_between(y_low, y_high):
        parts.append(f'<path d="M{_LEFT} {y(v)}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 4}" y="{float(y(v)) + 4:.1f}" text-anchor="end">{panel.y_tick(v)}</text>')
    parts.append(f'<path d="M{_LEFT} {y(panel.level)}H{right}" stroke="#888"/>')
    for curve in panel.curves:
        if curve.low:
            outline = points((*curve.x, *curve.x[::-1]), (*curve.low, *curve.high[::-1]))
            parts.append(f'<polygon points="{outline}" fill="{curve.colour}" fill-opacity="0.2"/>')
        line = f'fill="none" stroke="{curve.colour}" stroke-width="1.4" stroke-dasharray="{DASHES[curve.dash]}"'
        parts.append(f'<polyline points="{points(curve.x, curve.y)}" {line}/>')
        if len(curve.x) <= 12:
            dots = zip(curve.x, curve.y, strict=True)
            parts += [f'<circle cx="{x(a)}" cy="{y(b)}" r="2.2" fill="{curve.colour}"/>' for a, b in dots]
        if panel.legend and curve.name:
            at = bottom - 8 - 12 * (len(panel.named) - 1 - panel.named.index(curve))
            parts.append(f'<path d="M{right - 18} {at - 3}H{right - 4}" {line}/>')
            halo = 'text-anchor="end" font-size="9" stroke="white" stroke-width="3" paint-order="stroke"'
            parts.append(f'<text x="{right - 22}" y="{at}" {halo}>{escape(curve.name)}</text>')
    return "".join(parts)


def ticks_between(low: float, high: float) -> list[float]:
    """About five round numbers between `low` and `high`."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
