"""Draw panels with one of two pens: SVG, which needs nothing, or PNG with Pillow, which every host brings.

The layout is here, once; a pen knows lines, areas and texts only. Legends stand below the axes, so that they cover no line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ...sampler import EMSError
from ..file.contents import EMSFile
from ..file.storage import write_atomic
from .panels import Curve, Panel, limits_of, statistics_of, summary_of
from .png import PNGPen
from .svg import SVGPen

__all__ = ["Pen", "plot_ems", "png_of", "svg_of"]

WIDTH, HEIGHT, HEAD = 420, 310, 36
"""Size of a panel without its legend, and height of the title over all of them."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 32, 48
_BIG, _NORMAL, _SMALL = 16, 14, 12
_LEGEND_LINE, _SAMPLE, _GAP = 18, 24, 14
_FRAME, _GRID, _LEVEL = "#777777", "#e2e2e2", "#888888"
BANDS = "bands: 2 standard errors"
BANDS_ELEMENT = "lines: mean over positions; bands: middle 80 % of positions"
Point = tuple[float, float]
Anchor = Literal["left", "middle", "right"]


class Pen(Protocol):
    """What draws on a page, in pixels from its upper left corner; colours are "#rrggbb"."""

    def line(self, points: Sequence[Point], colour: str, width: float, dash: str = "solid") -> None:
        """A line through the points."""

    def area(self, points: Sequence[Point], colour: str, opacity: float) -> None:
        """The inside of a polygon."""

    def dot(self, at: Point, radius: float, colour: str) -> None:
        """A filled circle."""

    def text(self, at: Point, text: str, size: int, anchor: Anchor = "middle") -> None:
        """One line of text, vertically centred."""

    def width_of(self, text: str, size: int) -> float:
        """Width of a text."""

    def finish(self) -> bytes:
        """The file's bytes."""


def plot_ems(file: EMSFile, path: str | os.PathLike[str], title: str = "", *, statistics: bool = True) -> None:
    """Draw `file` to `path`, an .svg or .png: its statistics and evidence, or only what it gains.

    Raises:
        EMSError: another ending, or .png without Pillow.
        OSError: as the system reports it.
    """
    ending = Path(path).suffix.lower()
    draw: dict[str, Callable[[list[list[Panel]], str], bytes]] = {".svg": svg_of, ".png": png_of}
    if ending not in draw:
        raise EMSError(f"{path}: a plot is an .svg or a .png file; choose such a name")
    name = title or str(file.meta.model.get("name") or "") or "EMS"
    if statistics and file.per_element:
        name = f"{name} ({BANDS_ELEMENT})"
    elif statistics and file.errors:
        name = f"{name} ({BANDS})"
    write_atomic(path, draw[ending](statistics_of(file) if statistics else summary_of(file), name))


def svg_of(rows: list[list[Panel]], title: str) -> bytes:
    """The panels as an SVG."""
    return _page(rows, title, SVGPen)


def png_of(rows: list[list[Panel]], title: str, zoom: float = 1.0) -> bytes:
    """The panels as a PNG, 420 pixels wide each at zoom 1. Raises EMSError without Pillow."""
    try:
        return _page(rows, title, lambda width, height: PNGPen(width, height, zoom))
    except ImportError:
        raise EMSError("a .png needs Pillow, which is not installed: give a name that ends in .svg") from None


def _page(rows: list[list[Panel]], title: str, new_pen: Callable[[int, int], Pen]) -> bytes:
    measure = new_pen(1, 1).width_of  # legends must be laid out before the height of the page is known
    legends = [[_legend_lines(panel, measure) for panel in row] for row in rows]
    heights = [HEIGHT + _LEGEND_LINE * max(map(len, row)) for row in legends]
    width = WIDTH * max(len(row) for row in rows)
    pen = new_pen(width, HEAD + sum(heights))
    _draw_title(pen, title, width)
    top = HEAD
    for row, lines, height in zip(rows, legends, heights, strict=True):
        for column, (panel, legend) in enumerate(zip(row, lines, strict=True)):
            _draw_panel(pen, _Axes.of(panel, column * WIDTH, top), legend)
        top += height
    return pen.finish()


def _draw_title(pen: Pen, title: str, width: int) -> None:
    """The whole title where it fits at some size, else its two ends: names of files differ at either."""
    room, sizes = width - 2 * _RIGHT, range(_BIG, _SMALL - 3, -1)
    size = next((size for size in sizes if pen.width_of(title, size) <= room), sizes[-1])
    kept = len(title)
    shown = title
    while kept > 2 and pen.width_of(shown, size) > room:
        kept -= 1
        shown = f"{title[: (kept + 1) // 2]}\u2026{title[len(title) - kept // 2 :]}"
    pen.text((width / 2, HEAD / 2 + 2), shown, size)


@dataclass(frozen=True)
class _Axes:
    """Where a panel's values lie on the page."""

    panel: Panel
    x_limits: tuple[float, float]
    y_limits: tuple[float, float]
    left: int
    right: int
    top: int
    bottom: int

    @classmethod
    def of(cls, panel: Panel, x0: int, y0: int) -> _Axes:
        edges = (x0 + _LEFT, x0 + WIDTH - _RIGHT, y0 + _TOP, y0 + HEIGHT - _BOTTOM)
        return cls(panel, *limits_of(panel), *edges)

    @property
    def middle(self) -> float:
        return (self.left + self.right) / 2

    def at(self, x: float, y: float) -> Point:
        (a, b), (c, d) = self.x_limits, self.y_limits
        u = self.left + (x - a) / (b - a) * (self.right - self.left)
        return u, self.bottom - (y - c) / (d - c) * (self.bottom - self.top)


def _draw_panel(pen: Pen, axes: _Axes, legend: list[list[Curve]]) -> None:
    panel = axes.panel
    pen.text((axes.middle, axes.top - 14), panel.title, _NORMAL)
    pen.text((axes.middle, axes.bottom + 34), panel.x_label, _SMALL)
    for value in panel.x_ticks:
        u, _ = axes.at(value, 0)
        pen.line([(u, axes.top), (u, axes.bottom)], _GRID, 0.7)
        pen.text((u, axes.bottom + 14), f"{value:g}", _SMALL)
    for value in panel.y_ticks:
        _, v = axes.at(0, value)
        pen.line([(axes.left, v), (axes.right, v)], _GRID, 0.7)
        pen.text((axes.left - 6, v), panel.y_tick(value), _SMALL, "right")
    if panel.level is not None:
        pen.line([axes.at(x, panel.level) for x in axes.x_limits], _LEVEL, 1.2)
    for curve in panel.curves:
        _draw_curve(pen, axes, curve)
    corners = [(axes.left, axes.top), (axes.right, axes.top), (axes.right, axes.bottom), (axes.left, axes.bottom)]
    pen.line([*corners, corners[0]], _FRAME, 0.7)
    if panel.note:
        pen.text((axes.middle, axes.top + 16), panel.note, _SMALL)
    _draw_legend(pen, axes, legend)


def _draw_curve(pen: Pen, axes: _Axes, curve: Curve) -> None:
    def line(ys: Sequence[float]) -> list[Point]:
        """A single point gets a piece of line, by whose dashes the legend names it, and so do the edges of its band."""
        points = [axes.at(x, y) for x, y in zip(curve.x, ys, strict=True)]
        return points if len(points) != 1 else [(points[0][0] + du, points[0][1]) for du in (-_SAMPLE / 2, _SAMPLE / 2)]

    if curve.low:
        pen.area([*line(curve.low), *reversed(line(curve.high))], curve.colour, 0.2)
    pen.line(line(curve.y), curve.colour, 1.8, curve.dash)
    points = [axes.at(x, y) for x, y in zip(curve.x, curve.y, strict=True)]
    if len(points) <= 12:
        for point in points:
            pen.dot(point, 2.8, curve.colour)


def _legend_lines(panel: Panel, measure: Callable[[str, int], float]) -> list[list[Curve]]:
    """The named curves in lines that fit below the panel, as many on each but the last."""
    named = panel.named
    columns = max(1, int((WIDTH - _RIGHT - _GAP) / _legend_width(named, measure)))
    return [named[k : k + columns] for k in range(0, len(named), columns)]


def _legend_width(curves: Sequence[Curve], measure: Callable[[str, int], float]) -> float:
    """Of a column of the legend."""
    return _SAMPLE + 6 + max((measure(curve.name, _SMALL) for curve in curves), default=0) + _GAP


def _draw_legend(pen: Pen, axes: _Axes, lines: list[list[Curve]]) -> None:
    width = _legend_width([curve for line in lines for curve in line], pen.width_of)
    for k, line in enumerate(lines):
        v = axes.bottom + _BOTTOM + _LEGEND_LINE * k + 4
        for column, curve in enumerate(line):
            u = axes.left - _LEFT + _GAP + round(column * width)
            pen.line([(u, v), (u + _SAMPLE, v)], curve.colour, 2.2, curve.dash)
            pen.text((u + _SAMPLE + 6, v), curve.name, _SMALL, "left")
