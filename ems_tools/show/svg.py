"""A pen that writes SVG with nothing but the standard library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["SVGPen"]

_DASHES = {"solid": "", "dashed": ' stroke-dasharray="6,4"', "dotted": ' stroke-dasharray="2,3"'}
_ANCHORS = {"left": "start", "middle": "middle", "right": "end"}
_LETTER = 0.56
"""Width of a letter of a sans-serif typeface over its size, on the wide side: viewers bring their own typeface."""


class SVGPen:
    """Draws on a white page of `width` x `height` pixels; see `draw.Pen`."""

    def __init__(self, width: int, height: int) -> None:
        size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        self._parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">']
        self._parts.append('<rect width="100%" height="100%" fill="white"/>')

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float, dash: str = "solid") -> None:
        """A line through the points."""
        style = f'fill="none" stroke="{colour}" stroke-width="{width:g}"{_DASHES[dash]}'
        self._parts.append(f'<polyline points="{_listed(points)}" {style}/>')

    def area(self, points: Sequence[tuple[float, float]], colour: str, opacity: float) -> None:
        """The inside of a polygon."""
        self._parts.append(f'<polygon points="{_listed(points)}" fill="{colour}" fill-opacity="{opacity:g}"/>')

    def dot(self, at: tuple[float, float], radius: float, colour: str) -> None:
        """A filled circle."""
        self._parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius:g}" fill="{colour}"/>')

    def text(self, at: tuple[float, float], text: str, size: int, anchor: str = "middle") -> None:
        """One line of text, vertically centred."""
        baseline = at[1] + 0.35 * size  # `dominant-baseline` is not understood everywhere
        place = f'x="{at[0]:.1f}" y="{baseline:.1f}" text-anchor="{_ANCHORS[anchor]}" font-size="{size}"'
        self._parts.append(f"<text {place}>{escape(text)}</text>")

    def width_of(self, text: str, size: int) -> float:
        """Width of a text, estimated."""
        return _LETTER * size * len(text)

    def finish(self) -> bytes:
        """The file's bytes."""
        return "\n".join([*self._parts, "</svg>\n"]).encode()


def _listed(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
