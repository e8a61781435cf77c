"""A pen that draws with Pillow, for hosts without matplotlib. It draws at twice the size and reduces, for smooth lines."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

__all__ = ["PNGPen", "font"]

_SCALE = 2
_DASHES = {"dashed": (6.0, 10.0), "dotted": (2.0, 5.0)}
"""Length of the drawn part, and of a period."""
_ANCHORS = {"left": "lm", "middle": "mm", "right": "rm"}


def font(size: int) -> FreeTypeFont | ImageFont:
    """Pillow's own font at this size (a fixed small one in Pillow before 10.1)."""
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size)
    except (TypeError, OSError, ImportError):
        return ImageFont.load_default()


class PNGPen:
    """Draws on a white page of `width` x `height` pixels, `zoom` times as large in the file; see `draw.Pen`.

    Raises:
        ImportError: without Pillow.
    """

    def __init__(self, width: int, height: int, zoom: float = 1.0) -> None:
        from PIL import Image, ImageDraw

        self._size = round(width * zoom), round(height * zoom)
        self._scale = zoom * _SCALE
        self._image = Image.new("RGB", (self._size[0] * _SCALE, self._size[1] * _SCALE), "white")
        self._draw = ImageDraw.Draw(self._image, "RGBA")

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float, dash: str = "solid") -> None:
        """A line through the points."""
        thickness = max(1, round(width * self._scale))
        scaled = [self._at(point) for point in points]
        if dash == "solid":
            self._draw.line(scaled, fill=colour, width=thickness, joint="curve")
            return
        on, period = (length * self._scale for length in _DASHES[dash])
        for piece in _dashes(scaled, on, period):
            self._draw.line(piece, fill=colour, width=thickness)

    def area(self, points: Sequence[tuple[float, float]], colour: str, opacity: float) -> None:
        """The inside of a polygon."""
        from PIL import ImageColor

        red, green, blue = ImageColor.getrgb(colour)[:3]
        self._draw.polygon([self._at(point) for point in points], fill=(red, green, blue, round(255 * opacity)))

    def dot(self, at: tuple[float, float], radius: float, colour: str) -> None:
        """A filled circle."""
        (u, v), r = self._at(at), radius * self._scale
        self._draw.ellipse([u - r, v - r, u + r, v + r], fill=colour)

    def text(self, at: tuple[float, float], text: str, size: int, anchor: str = "middle") -> None:
        """One line of text, vertically centred."""
        self._draw.text(self._at(at), text, fill="black", font=self._font(size), anchor=_ANCHORS[anchor])

    def width_of(self, text: str, size: int) -> float:
        """Width of a text."""
        return self._font(size).getlength(text) / self._scale

    def finish(self) -> bytes:
        """The file's bytes."""
        from PIL import Image

        data = io.BytesIO()
        self._image.resize(self._size, Image.Resampling.LANCZOS).save(data, "PNG")
        return data.getvalue()

    def _at(self, point: tuple[float, float]) -> tuple[float, float]:
        return point[0] * self._scale, point[1] * self._scale

    def _font(self, size: int) -> FreeTypeFont | ImageFont:
        return font(round(size * self._scale))


def _dashes(points: Sequence[tuple[float, float]], on: float, period: float) -> list[list[tuple[float, float]]]:
    """The drawn pieces of a dashed line through the points; the pattern runs on across corners."""
    pieces, start = [], 0.0  # of the segment, along the line
    for (u, v), (p, q) in pairwise(points):
        length = math.hypot(p - u, q - v)
        for k in range(math.floor(start / period), math.ceil((start + length) / period)):
            ends = (max(k * period - start, 0.0), min(k * period + on - start, length))
            if ends[0] < ends[1]:
                pieces.append([(u + (p - u) * e / length, v + (q - v) * e / length) for e in ends])
        start += length
    return pieces
