"""What the extension adds to AUTOMATIC1111, Forge and reForge: entries of their lists, settings, events, and their folders.

This module, `model` (its model) and `passes` (its passes) are the only ones that reach for the host's objects. Facts from
AUTOMATIC1111 1.9 to 1.10.1, Forge (June 2025) and reForge (March 2026). Names differ between them and move between releases, so
everything goes by getattr with a fallback. Nothing of the host is replaced; lists are added to in place.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

__all__ = [
    "HostError",
    "add_option",
    "add_sampler",
    "add_schedule",
    "axis_module",
    "data_folder",
    "ems_folders",
    "log",
    "module",
    "on",
    "option",
    "output_folder",
    "refresh_button",
    "shared",
    "shown",
]

ROOT = Path(__file__).resolve().parents[1]
_MARK = "dpm_solver_v3"


class HostError(RuntimeError):
    """Something that the user should know; the message says what to do."""


def log(text: str) -> None:
    """One line in the host's console (its logging shows nothing unless the user configured it).

    Names and pasted texts come from strangers: what is not printable stands there as an escape, and so does what the console
    cannot show. A console that was closed, or whose reader went away, costs neither the picture nor a computation.
    """
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):
        print(f"[DPM-Solver-v3] {shown.encode(encoding, 'backslashreplace').decode(encoding)}", flush=True)


def module(name: str) -> ModuleType | None:
    """`modules.<name>` or any other module of the host; None if this host has none."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def shared(name: str) -> Any:
    """An entry of the host's `modules.shared`, whose kind depends on the host; None if it has none."""
    return getattr(module("modules.shared"), name, None)


# --- registration


def add_sampler(name: str, aliases: list[str], function: Callable[..., Tensor]) -> bool:
    """Put `function` into the sampler dropdowns, in place of our own entry of before Reload UI. False if `name` is foreign."""
    samplers = importlib.import_module("modules.sd_samplers")
    common = importlib.import_module("modules.sd_samplers_common")

    def construct(model: object) -> object:
        return importlib.import_module("modules.sd_samplers_kdiffusion").KDiffusionSampler(function, model)

    entry = common.SamplerData(name, construct, list(aliases), {_MARK: True})
    known = samplers.all_samplers
    mine = [i for i, other in enumerate(known) if other.name == name]
    if any(not (other.options or {}).get(_MARK) for other in (known[i] for i in mine)):
        log(f"another extension has a sampler called {name}: ours is left out")
        return False
    add = getattr(samplers, "add_sampler", None)
    if mine:
        known[mine[0]] = entry
    elif callable(add):
        add(entry)
    if not any(other is entry for other in samplers.all_samplers):
        samplers.all_samplers.append(entry)
    samplers.all_samplers_map[name] = entry
    samplers.set_samplers()
    _forget_names(samplers)
    return True


def add_schedule(name: str, label: str, function: Callable[..., Tensor]) -> bool:
    """Put `function(n, sigma_min, sigma_max, inner_model, device)` into the schedule types. False if the name is foreign.

    Raises ImportError or AttributeError on hosts before AUTOMATIC1111 1.9, which have no list of them.
    """
    schedules = importlib.import_module("modules.sd_schedulers")
    known = schedules.schedulers
    entry = schedules.Scheduler(name, label, function, need_inner_model=True)
    setattr(entry, _MARK, True)
    mine = [i for i, other in enumerate(known) if name == other.name or label == other.label]
    if any(not getattr(known[i], _MARK, False) for i in mine):
        log(f"another extension has a schedule type called {label}: ours is left out")
        return False
    if mine:
        known[mine[0]] = entry
    else:
        known.append(entry)
    schedules.schedulers_map.update({name: entry, label: entry})
    _forget_names(module("modules.sd_samplers"))
    return True


def _forget_names(samplers: ModuleType | None) -> None:
    """The host remembers what an unknown name was turned into."""
    forget = getattr(getattr(samplers, "get_sampler_and_scheduler", None), "cache_clear", None)
    if callable(forget):
        forget()


def on(event: str, function: Callable[..., object]) -> None:
    """Register a callback such as "ui_tabs". Raises AttributeError if the host has no such event."""
    getattr(importlib.import_module("modules.script_callbacks"), f"on_{event}")(function)


def add_option(
    key: str, default: object, label: str, component: object, arguments: Callable[[], dict[str, object]], info: str
) -> None:
    """An entry in Settings, page "DPM-Solver-v3"."""
    entry = shared("OptionInfo")(default, label, component, arguments, section=(_MARK, "DPM-Solver-v3"))
    explain = getattr(entry, "info", None)
    shared("opts").add_option(key, explain(info) if callable(explain) else entry)


def option(key: str, default: object) -> object:
    """What Settings say."""
    return getattr(shared("opts"), key, default)


def refresh_button(component: object, arguments: Callable[[], dict[str, object]], elem_id: str) -> None:
    """The host's button that reads a menu's choices again, where it has one."""
    make = getattr(module("modules.ui_common"), "create_refresh_button", None)
    if callable(make):
        make(component, lambda: None, arguments, elem_id)


def axis_module() -> ModuleType | None:
    """The X/Y/Z plot script, None if it is not loaded."""
    scripts = importlib.import_module("modules.scripts")
    for data in getattr(scripts, "scripts_data", []):
        if hasattr(data.module, "axis_options") and hasattr(data.module, "AxisOption"):
            found: ModuleType = data.module
            return found
    return None


# --- folders


def _path(name: str, fallback: Path) -> Path:
    return Path(
        getattr(module("modules.paths"), name, None) or getattr(module("modules.paths_internal"), name, None) or fallback
    )


def ems_folders() -> list[Path]:
    """Where statistics files are looked for: `models/ems`, then the extension's own `stats/`."""
    return [_path("models_path", ROOT) / "ems", ROOT / "stats"]


def output_folder() -> Path:
    """Where new files are written: `models/ems`, or the extension's `stats/` where models are read-only."""
    for folder in ems_folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise HostError(f"no folder for EMS files can be written: allow writing to {ems_folders()[0]}")


def data_folder() -> Path:
    """The host's own folder for data."""
    return _path("data_path", ROOT)


def shown(path: Path) -> str:
    """`path` as a page shows it: from the host's folder on, where it lies in there."""
    folder = data_folder()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
