"""Show what a statistics file holds: in words, and as pictures with or without Pillow."""

from .describe import facts_of, lines_of
from .plot import PlotError, plot_ems

__all__ = ["PlotError", "facts_of", "lines_of", "plot_ems"]
