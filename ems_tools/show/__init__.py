"""Show what a file holds: in words (`describe`) and as pictures (`panels`: what; `draw`: how; `svg`, `png`: the pens)."""

from .describe import facts_of, lines_of
from .draw import plot_ems, png_of, svg_of
from .panels import Curve, Panel, statistics_of, summary_of

__all__ = ["Curve", "Panel", "facts_of", "lines_of", "plot_ems", "png_of", "statistics_of", "summary_of", "svg_of"]
