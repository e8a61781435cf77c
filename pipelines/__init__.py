"""DPM-Solver-v3 for diffusers: the scheduler for any pipeline, and the denoiser of any pipeline for `ems compute --diffusers`.

    from dpm_solver_v3.diffusers import DPMSolverV3Scheduler

The package is called `dpm_solver_v3.pipelines`, and `dpm_solver_v3.diffusers` is another name for it: the WebUIs put the
checkout itself on sys.path, where a folder called diffusers would be what `import diffusers` finds.
Importing this package needs diffusers; nothing else here does.
"""

try:
    import diffusers as _diffusers  # noqa: F401 - only whether it is there
except ImportError as _error:
    raise ImportError("dpm_solver_v3.diffusers needs the library diffusers: pip install diffusers") from _error

from .embedded import EmbeddedPipeline
from .scheduler import DPMSolverV3Scheduler, DPMSolverV3SchedulerOutput

__all__ = ["DPMSolverV3Scheduler", "DPMSolverV3SchedulerOutput", "EmbeddedPipeline"]
