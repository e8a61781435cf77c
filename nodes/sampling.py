"""The sampler in the dropdown, the SAMPLER node with its options, and the paper's step schedules as SIGMAS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..sampler import StepInfo, karras, quadratic_time, sample_dpm_solver_v3, uniform_lambda, uniform_time
from ..sampler.schedules import NoiseSchedule
from . import host

__all__ = ["FITTED_NAME", "NAME", "SamplerNode", "SchedulerNode", "fitted_schedule", "sample_host"]

NAME = "dpm_solver_v3"
FITTED, FITTED_NAME = "fitted", "dpm_solver_v3_fitted"
AUTO = "auto"
EVERYWHERE, HALF = "everywhere", "half (paper)"
_SAID: set[str] = set()


def sample_host(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[StepInfo], None] | None = None,
    disable: bool | None = None,
    dpm_solver_v3_options: dict[str, Any] | None = None,
    **ignored: Any,
) -> Tensor:
    """What the host calls for "dpm_solver_v3": finds the statistics, then samples.

    Failing to find or read statistics never stops a run: it goes on with data prediction and says so.
    """
    if len(sigmas) < 2:
        return x
    run = host.running(model)
    options = dict(dpm_solver_v3_options or {})
    ems, strength = _statistics(run, x, (extra_args or {}).get("model_options") or {}, options.pop("same_architecture", False))
    if options.get("strength", AUTO) == AUTO:
        options["strength"] = strength
    below = options.pop("corrector_region", AUTO)
    if below != AUTO:
        options["corrector_below"] = _half(run) if below == HALF else float("inf")
    return sample_dpm_solver_v3(
        model, x, sigmas, extra_args, callback, disable, ems=ems, space=run.space, guidance=run.guidance, **options
    )


def _statistics(run: host.Running, x: Tensor, model_options: dict[str, Any], same_architecture: bool) -> tuple[Any, Any]:
    from .find import find

    node = host.executing().node
    try:
        found = find(run, x, model_options, same_architecture)
    except Exception as error:  # another pack's model can be anything; the picture comes first
        host.LOG.warning("looking for EMS failed (%s: %s): sampling with data prediction", type(error).__name__, error)
        return None, AUTO
    if found.message not in _SAID:
        _SAID.add(found.message)
        host.LOG.log(30 if found.warn else 20, "%s", found.message)
    host.say(found.message, node)
    return found.ems, found.strength


def _half(run: host.Running) -> float:
    """Sigma = exp(-lambda) at half of the host's time."""
    table = host.level_table(run.sampling)
    level = table.level_at(torch.tensor(0.5, dtype=torch.float64))
    return float((-table.space.lambda_of(level)).exp())


def _choice(values: list[str], tooltip: str, default: str = AUTO) -> tuple[list[str], dict[str, Any]]:
    return values, {"default": default, "tooltip": tooltip}


class SamplerNode:
    """DPM-Solver-v3 with its options, as a SAMPLER."""

    CATEGORY = "sampling/custom_sampling/samplers"
    FUNCTION = "build"
    RETURN_TYPES = ("SAMPLER",)
    DESCRIPTION = (
        "DPM-Solver-v3 for few steps. Uses the statistics (EMS) attached to the model by Apply EMS, else those of its "
        "checkpoint in models/ems or output/ems, else data prediction. Left at auto, options follow what was measured best."
    )
    SEARCH_ALIASES = ("dpm_solver_v3", "dpm solver v3", "dpmpp", "ems", "few steps")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "order": _choice([AUTO, "1", "2", "3"], "Order of the predictor. 2 is the safe choice; 3 can win unguided."),
                "corrector": _choice(
                    [AUTO, "none", "pseudo", "true", "raised"],
                    "Corrects each step with the next evaluation, at no extra cost. none: often best at high guidance and few "
                    "steps; pseudo: the paper's; true: of the predictor's order; raised: one order more.",
                ),
                "predictor": _choice([AUTO, "true", "pseudo"], "How derivatives are estimated at order 3."),
                "corrector_region": _choice(
                    [AUTO, EVERYWHERE, HALF], "half: correct only in the cleaner half of time, the paper's half corrector."
                ),
                "lower_order_final": _choice([AUTO, "yes", "no"], "Lower the order in the last steps: steadier."),
                "strength": _choice(
                    [AUTO, "0", "0.25", "0.5", "0.75", "1"],
                    "How much of the statistics to use: 1 all, 0 none (data prediction).",
                ),
                "same_architecture": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "If there is no EMS for this checkpoint, use one of the same architecture (SDXL's for a "
                        "fine-tune of it). Better than nothing or worse: compare with Compare samplers.",
                    },
                ),
            }
        }

    def build(self, same_architecture: bool = False, **chosen: str) -> tuple[Any]:
        """The SAMPLER."""
        import comfy.samplers

        options: dict[str, Any] = {k: v for k, v in chosen.items() if v != AUTO}
        if "order" in options:
            options["order"] = int(options["order"])
        if "strength" in options:
            options["strength"] = float(options["strength"])
        if "lower_order_final" in options:
            options["lower_order_final"] = options["lower_order_final"] == "yes"
        options["same_architecture"] = bool(same_architecture)
        return (comfy.samplers.KSAMPLER(sample_host, extra_options={"dpm_solver_v3_options": options}),)


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "uniform lambda": uniform_lambda,
    "uniform time": uniform_time,
    "quadratic time": quadratic_time,
    "Karras": karras,
}


class SchedulerNode:
    """The paper's step schedules over the model's own noise range, as SIGMAS."""

    CATEGORY = "sampling/custom_sampling/schedulers"
    FUNCTION = "build"
    RETURN_TYPES = ("SIGMAS",)
    DESCRIPTION = "The step schedules of the DPM-Solver-v3 paper, for this model."
    SEARCH_ALIASES = ("dpm_solver_v3", "uniform lambda", "logsnr", "sigmas")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "schedule": _choice(
                    [*SCHEDULES, FITTED],
                    "fitted: the steps that Compute EMS fitted to this model, best for dpm_solver_v3 with few steps; "
                    "uniform lambda: equal steps in log-SNR, the paper's choice for small images; uniform time: its choice for "
                    "latent models with guidance; Karras: good with few steps.",
                    "uniform time",
                ),
                "steps": ("INT", {"default": 8, "min": 1, "max": 1000, "tooltip": "Model evaluations."}),
                "denoise": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "Below 1: img2img.",
                    },
                ),
                "end": _choice(
                    ["zero", "smallest sigma"],
                    "zero: the last step removes all noise, as the host's schedulers do; smallest sigma: as in the paper.",
                    "zero",
                ),
            },
            "optional": {
                "cfg": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.01,
                        "max": 100.0,
                        "step": 0.1,
                        "tooltip": "The CFG scale that you sample with; only the schedule fitted depends on it.",
                    },
                )
            },
        }

    def build(
        self, model: Any, schedule: str, steps: int, denoise: float, end: str = "zero", cfg: float = 1.0
    ) -> tuple[Tensor]:
        """SIGMAS [steps + 1], empty for denoise 0."""
        if schedule == FITTED:
            return (_fitted_levels(model, host.model_sampling_of(model), steps, cfg, denoise),)
        table = host.level_table(host.model_sampling_of(model))
        if denoise <= 0:
            return (torch.empty(0),)
        total = max(round(steps / denoise), steps)
        return (host_levels(table, schedule, total, end == "zero")[-(steps + 1) :],)


def fitted_schedule(model_sampling: Any, steps: int) -> Tensor:
    """What the host calls for the scheduler "dpm_solver_v3_fitted": SIGMAS [steps + 1]."""
    patcher, scale, sampler = host.calling()
    return _fitted_levels(patcher, model_sampling, steps, 1.0 if scale is None else scale, sampler=sampler or NAME)


def _fitted_levels(
    patcher: Any, model_sampling: Any, steps: int, guidance: float, denoise: float = 1.0, sampler: str = NAME
) -> Tensor:
    """The model's fitted schedule, or Karras steps with a message where it has none. Never raises for a bad file.

    Other samplers get Karras steps too: they do two to four times better on these (benchmarks/fit_ablation.py).
    """
    from .find import find_file

    if denoise <= 0 or steps < 1:
        return torch.empty(0)
    if sampler != NAME:
        return _karras_instead(f"fitted steps suit the sampler {NAME} only, not {sampler}", model_sampling, steps, denoise)
    try:
        handle = find_file(patcher) if getattr(patcher, "model", None) is not None else None
        if handle is not None and handle.file.covers_fit(steps, guidance, denoise):
            message = f"schedule fitted for {steps} steps at cfg {guidance:g}, from {handle.name}"
            host.say(message, host.executing().node)
            host.LOG.info("%s", message)
            return handle.file.fitted_sigmas(steps, guidance, denoise).to(torch.float32)
        fitted = f"{handle.name} has no schedule fitted for {steps} steps at cfg {guidance:g}" if handle else ""
        reason = f"{fitted or 'no EMS for this model'}; 'Compute EMS' fits schedules to the checkpoint"
    except Exception as error:  # another pack's model can be anything; the picture comes first
        reason = f"looking for fitted schedules failed ({type(error).__name__}: {error})"
    return _karras_instead(reason, model_sampling, steps, denoise)


def _karras_instead(reason: str, model_sampling: Any, steps: int, denoise: float) -> Tensor:
    message = f"{reason}: Karras steps instead"
    host.LOG.warning("%s", message)
    host.say(message, host.executing().node)
    total = max(round(steps / denoise), steps)
    return host_levels(host.level_table(model_sampling), "Karras", total, True)[-(steps + 1) :]


def host_levels(table: NoiseSchedule, schedule: str, steps: int, to_zero: bool) -> Tensor:
    """SIGMAS [steps + 1] in float32."""
    return SCHEDULES[schedule](table, steps, to_zero=to_zero).to(torch.float32)
