"""The command line `ems`: compute, fit, inspect, verify, plot, merge, convert, share, pull, index."""

from .main import main

__all__ = ["main"]
