"""What packages above `ems_tools` add to the command line. They are found by name: nothing here imports upward.

A plug is a module that offers `add_model_options(parser)`, `source_of(args)`, which returns a `Source`, or None if its options
are not given, and `COMMANDS`, functions that register one command each. It imports its heavy parts when they are used.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Protocol, TypeAlias, cast

from ..estimate.source import Source

__all__ = ["Commands", "Plug", "plugs"]

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Where a command is registered: what `ArgumentParser.add_subparsers` returns, for which argparse has no public name."""

NAMES = ("pipelines.cli",)


class Plug(Protocol):
    """A module with what the command line asks for."""

    COMMANDS: tuple[Callable[[Commands], None], ...]

    def add_model_options(self, p: argparse.ArgumentParser) -> None:
        """Add the options that name a model of its kind."""
        ...

    def source_of(self, args: argparse.Namespace) -> Source | None:
        """The model that they name, None if they are not given. Raises EstimateError."""
        ...


def plugs() -> list[Plug]:
    """The plugs of this package, under whatever name it was imported."""
    root = __name__.removesuffix(".ems_tools.cli.plugs")
    return [cast(Plug, importlib.import_module(f"{root}.{name}")) for name in NAMES]
