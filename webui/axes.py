"""Axes of the X/Y/Z plot: EMS file, strength, order, corrector."""

from __future__ import annotations

from collections.abc import Callable

from . import host
from .find import AUTOMATIC, NONE, named, titles
from .objects import Processing
from .options import AXES, CORRECTORS, ORDERS, Choice

__all__ = ["add_axes"]

_PREFIX = "[DPM-Solver-v3] "


def add_axes() -> None:
    """Put the axes into the host's plot script; after Reload UI, in place of our own older ones."""
    grid = host.axis_module()
    if grid is None:
        return
    files = {"choices": lambda: [AUTOMATIC, NONE, *titles()], "confirm": _confirm("ems")}
    ours = [
        grid.AxisOption(f"{_PREFIX}EMS", str, _apply("ems"), **files),
        grid.AxisOption(f"{_PREFIX}Strength", float, _apply("strength"), confirm=_confirm("strength")),
        grid.AxisOption(f"{_PREFIX}Order", str, _apply("order"), choices=lambda: list(ORDERS), confirm=_confirm("order")),
        grid.AxisOption(
            f"{_PREFIX}Corrector", str, _apply("corrector"), choices=lambda: list(CORRECTORS), confirm=_confirm("corrector")
        ),
    ]
    grid.axis_options[:] = [o for o in grid.axis_options if not o.label.startswith(_PREFIX)] + ours


def _apply(name: str) -> Callable[[Processing, object, object], None]:
    def apply(p: Processing, value: object, values: object) -> None:
        setattr(p, AXES, {**getattr(p, AXES, {}), name: str(value)})  # a new one: the host copies p shallowly

    return apply


def _confirm(name: str) -> Callable[[Processing, list[object]], None]:
    """Raises HostError before the first picture is made."""

    def confirm(p: Processing, values: list[object]) -> None:
        for value in map(str, values):
            if name != "ems":
                Choice().with_values({name: value}).solver()
            elif value not in (AUTOMATIC, NONE):
                named(value)

    return confirm
