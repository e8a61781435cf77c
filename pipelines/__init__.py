"""DPM-Solver-v3 for diffusers: the scheduler for any pipeline, and the denoiser of any pipeline for `ems compute --diffusers`.

    from dpm_solver_v3.diffusers import DPMSolverV3Scheduler

The package is called `dpm_solver_v3.pipelines`, and `dpm_solver_v3.diffusers` is another name for it: the WebUIs put the
checkout itself on sys.path, where a folder called diffusers would be what `import diffusers` finds.
diffusers is imported when one of the names below is asked for, and nothing else here needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .embedded import EmbeddedPipeline
    from .scheduler import DPMSolverV3Scheduler, DPMSolverV3SchedulerOutput

__all__ = ["DPMSolverV3Scheduler", "DPMSolverV3SchedulerOutput", "EmbeddedPipeline"]

_HOMES = {"EmbeddedPipeline": "embedded", "DPMSolverV3Scheduler": "scheduler", "DPMSolverV3SchedulerOutput": "scheduler"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        importlib.import_module("diffusers")
    except ImportError as error:
        raise ImportError(f"{name} needs the library diffusers ({error}): pip install diffusers") from error
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
