"""Panels drawn with Pillow, for hosts without matplotlib. Drawn at twice the size and reduced, for smooth lines."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plot import Curve, Panel

__all__ = ["font", "render"]

_SCALE = 2
_WIDTH, _HEIGHT = 420, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 30, 44
_GREY, _GRID = (120, 120, 120), (225, 225, 225)


def font(size: int) -> Any:
    """Pillow's own font at this size (a fixed small one in Pillow before 10.1)."""
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size)
    except (TypeError, OSError, ImportError):
        return ImageFont.load_default()


def render(rows: list[list[Panel]], title: str, zoom: float = 1.0) -> bytes:
    """A PNG of the panels. Raises ImportError without Pillow."""
    from PIL import Image, ImageDraw

    columns = max(len(row) for row in rows)
    size = (columns * _WIDTH * _SCALE, (len(rows) * _HEIGHT + 34) * _SCALE)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image, "RGBA")
    draw.text((size[0] / 2, 18 * _SCALE), title, fill="black", font=font(16 * _SCALE), anchor="mm")
    for r, row in enumerate(rows):
        for c, panel in enumerate(row):
            _Axes(draw, panel, c * _WIDTH, r * _HEIGHT + 34).draw()
    data = io.BytesIO()
    small = round(size[0] * zoom / _SCALE), round(size[1] * zoom / _SCALE)
    image.resize(small, Image.Resampling.LANCZOS).save(data, "PNG")
    return data.getvalue()


class _Axes:
    """One panel at (x0, y0) in unscaled pixels."""

    def __init__(self, pen: Any, panel: Panel, x0: int, y0: int) -> None:
        from .plot import limits_of

        self.pen, self.panel = pen, panel
        self.x_limits, self.y_limits = limits_of(panel)
        self.left, self.right = x0 + _LEFT, x0 + _WIDTH - _RIGHT
        self.top, self.bottom = y0 + _TOP, y0 + _HEIGHT - _BOTTOM

    def at(self, x: float, y: float) -> tuple[float, float]:
        (a, b), (c, d) = self.x_limits, self.y_limits
        u = self.left + (x - a) / (b - a) * (self.right - self.left)
        v = self.bottom - (y - c) / (d - c) * (self.bottom - self.top)
        return u * _SCALE, v * _SCALE

    def text(self, u: float, v: float, text: str, size: int, anchor: str, colour: Any = "black") -> None:
        self.pen.text((u * _SCALE, v * _SCALE), text, fill=colour, font=font(size * _SCALE), anchor=anchor)

    def line(self, points: Sequence[tuple[float, float]], colour: Any, width: float = 1.0, dash: str = "solid") -> None:
        thickness = max(1, round(width * _SCALE))
        if dash == "solid":
            self.pen.line(list(points), fill=colour, width=thickness, joint="curve")
            return
        on, period = (6 * _SCALE, 10 * _SCALE) if dash == "dashed" else (2 * _SCALE, 5 * _SCALE)
        for piece in _dashes(points, on, period):
            self.pen.line(piece, fill=colour, width=thickness)

    def draw(self) -> None:
        from .plot import ticks_between

        panel = self.panel
        middle = (self.left + self.right) / 2
        self.text(middle, self.top - 14, panel.title, 13, "mm")
        self.text(middle, self.bottom + 34, panel.x_label, 11, "mm")
        for value in ticks_between(*self.x_limits):
            u, _ = self.at(value, 0)
            self.pen.line([(u, self.top * _SCALE), (u, self.bottom * _SCALE)], fill=_GRID, width=_SCALE // 2)
            self.text(u / _SCALE, self.bottom + 12, f"{value:g}", 10, "mm")
        for value in ticks_between(*self.y_limits):
            _, v = self.at(0, value)
            self.pen.line([(self.left * _SCALE, v), (self.right * _SCALE, v)], fill=_GRID, width=_SCALE // 2)
            self.text(self.left - 5, v / _SCALE, panel.y_tick(value), 10, "rm")
        self.line([self.at(self.x_limits[0], panel.level), self.at(self.x_limits[1], panel.level)], _GREY, 0.7)
        for curve in panel.curves:
            self.curve(curve)
        box = [self.left * _SCALE, self.top * _SCALE, self.right * _SCALE, self.bottom * _SCALE]
        self.pen.rectangle(box, outline=_GREY, width=_SCALE // 2)
        if panel.note:
            self.text(middle, self.top + 14, panel.note, 11, "mm")
        if panel.legend:
            self.legend()

    def legend(self) -> None:
        curves = self.panel.named
        width = max(font(10 * _SCALE).getlength(c.name) for c in curves) / _SCALE + 36
        box = [self.right - width, self.top + 3, self.right - 3, self.top + 7 + 14 * len(curves)]
        self.pen.rectangle([v * _SCALE for v in box], fill=(255, 255, 255, 190))
        for k, curve in enumerate(curves):
            v = self.top + 12 + 14 * k
            sample = [((self.right - 24) * _SCALE, v * _SCALE), ((self.right - 6) * _SCALE, v * _SCALE)]
            self.line(sample, curve.colour, 1.5, curve.dash)
            self.text(self.right - 28, v, curve.name, 10, "rm")

    def curve(self, curve: Curve) -> None:
        from PIL import ImageColor

        points = [self.at(x, y) for x, y in zip(curve.x, curve.y, strict=True)]
        if curve.low:
            edge = [self.at(x, y) for x, y in zip(curve.x, curve.low, strict=True)]
            edge += [self.at(x, y) for x, y in reversed(list(zip(curve.x, curve.high, strict=True)))]
            self.pen.polygon(edge, fill=(*ImageColor.getrgb(curve.colour), 50))
        self.line(points, curve.colour, 1.5, curve.dash)
        if len(points) < 12:
            for u, v in points:
                self.pen.ellipse([u - 5, v - 5, u + 5, v + 5], fill=curve.colour)


def _dashes(points: Sequence[tuple[float, float]], on: float, period: float) -> list[list[tuple[float, float]]]:
    pieces, travelled = [], 0.0
    for (u, v), (p, q) in pairwise(points):
        length = math.hypot(p - u, q - v)
        while length > 0:
            phase = travelled % period
            drawing = phase < on
            part = min((on if drawing else period) - phase, length)
            end = (u + (p - u) * part / length, v + (q - v) * part / length)
            if drawing:
                pieces.append([(u, v), end])
            travelled, length, (u, v) = travelled + part, length - part, end
    return pieces
