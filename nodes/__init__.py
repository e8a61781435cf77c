"""The ComfyUI pack: node classes by id. Ids are written into workflows and never change."""

from __future__ import annotations

from . import host

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "register"]

NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}

_NODES = {
    "DPMSolverV3_Sampler": ("sampling", "SamplerNode", "DPM-Solver-v3"),
    "DPMSolverV3_Scheduler": ("scheduler", "SchedulerNode", "DPM-Solver-v3 Scheduler"),
    "DPMSolverV3_ComputeEMS": ("compute", "ComputeNode", "Compute EMS"),
    "DPMSolverV3_LoadEMS": ("files", "LoadNode", "Load EMS"),
    "DPMSolverV3_ApplyEMS": ("files", "ApplyNode", "Apply EMS"),
    "DPMSolverV3_SaveEMS": ("files", "SaveNode", "Save EMS"),
    "DPMSolverV3_InspectEMS": ("files", "InspectNode", "Inspect EMS"),
    "DPMSolverV3_MergeEMS": ("files", "MergeNode", "Merge EMS"),
    "DPMSolverV3_FindEMS": ("share", "FindNode", "Find EMS"),
    "DPMSolverV3_CompareSamplers": ("compare", "CompareNode", "Compare samplers"),
}


def register() -> None:
    """Add everything to the host. What fails is named in the log and left out; the rest works."""
    from importlib import import_module

    lists = (("the sampler list", _add_sampler), ("the scheduler list", _add_scheduler))
    for what, step in (("the model folder 'ems'", host.register_folder), *lists):
        try:
            step()
        except Exception as error:
            host.LOG.warning("DPM-Solver-v3: %s: %s: %s", what, type(error).__name__, error)
    for name, (module, attribute, title) in _NODES.items():
        try:
            NODE_CLASS_MAPPINGS[name] = getattr(import_module(f".{module}", __name__), attribute)
            NODE_DISPLAY_NAME_MAPPINGS[name] = title
        except Exception as error:
            host.LOG.warning("DPM-Solver-v3: the node %s is left out: %s: %s", title, type(error).__name__, error)


def _add_sampler() -> None:
    from .sampling import NAME, sample_host

    host.add_sampler(NAME, sample_host)


def _add_scheduler() -> None:
    from .sampling import FITTED_NAME, PASSES_NAME, fitted_schedule, passes_schedule

    host.add_scheduler(FITTED_NAME, fitted_schedule)
    host.add_scheduler(PASSES_NAME, passes_schedule)
