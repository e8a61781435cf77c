"""The extension for AUTOMATIC1111 (1.9 and later), Forge and reForge. `scripts/dpm_solver_v3.py` is its entry.

`host` is the only module that reaches for the host's internals. Whatever fails is named in the log and left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from . import host

__all__ = ["register"]


_Found = TypeVar("_Found")


def register() -> type | None:
    """Add everything to the host; return the Script class that the host finds in the entry's namespace, if there is one."""
    steps: dict[str, Callable[[], object]] = {
        "the sampler": _sampler,
        "the schedule type": _schedule,
        "the settings": _settings,
        "the X/Y/Z axes": _axes,
        "the EMS tab": _tab,
    }
    for what, step in steps.items():
        _attempt(what, step)
    return _attempt("the accordion", _script)


def _attempt(what: str, step: Callable[[], _Found]) -> _Found | None:
    try:
        return step()
    except Exception as error:
        host.log(f"{what} is left out: {type(error).__name__}: {error}")
        return None


def _sampler() -> None:
    from .sampling import ALIASES, NAME, sample_host

    host.add_sampler(NAME, ALIASES, sample_host)


def _schedule() -> None:
    from .fewer import is_offered
    from .sampling import FITTED_LABEL, FITTED_NAME, PASSES_LABEL, PASSES_NAME, fitted_schedule, passes_schedule

    host.add_schedule(FITTED_NAME, FITTED_LABEL, fitted_schedule)
    if is_offered():
        host.add_schedule(PASSES_NAME, PASSES_LABEL, passes_schedule)


def _settings() -> None:
    from .options import add_settings

    host.on("ui_settings", lambda: _attempt("the settings", add_settings))


def _axes() -> None:
    from .axes import add_axes

    host.on("before_ui", lambda: _attempt("the X/Y/Z axes", add_axes))


def _tab() -> None:
    from .tab import make_tab

    host.on("ui_tabs", lambda: _attempt("the EMS tab", make_tab) or [])


def _script() -> type:
    from .options import script_class

    return script_class()
