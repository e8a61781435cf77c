"""The sampler and the fitted scheduler in the dropdowns, and the SAMPLER node with its options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from ..ems_tools.hosting import (
    Clock,
    Handed,
    Origin,
    Run,
    Steps,
    choose_steps,
    sample_on_trial,
    told_of_image,
    told_of_passes,
    unfitted_steps,
)
from ..sampler import half_corrector_sigma
from . import host
from .find import Found, find, find_file, identity_of, none_for, trust
from .graph import Asked, asked, executing
from .model import Running, level_table, run_of_guider, running, words_of_guider
from .passes import HostPasses, NotOfferedError, why_not
from .protocols import Callback, Guider, ModelSampling, Options

__all__ = [
    "AUTO",
    "FITTED_NAME",
    "NAME",
    "PASSES_NAME",
    "SamplerNode",
    "choice",
    "chosen_steps",
    "fitted_schedule",
    "passes_schedule",
    "sample_host",
    "told",
]

NAME = "dpm_solver_v3"
FITTED_NAME = "dpm_solver_v3_fitted"
PASSES_NAME = "dpm_solver_v3_fewer_passes"
AUTO = "auto"
EVERYWHERE, HALF = "everywhere", "half (paper)"
_SAID: set[str] = set()
_HANDED = Handed()
"""What the host's dropdown and the node Scheduler were given: the host keeps no word of which schedule it was."""


def sample_host(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: Options | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    dpm_solver_v3_options: Options | None = None,
    **ignored: object,
) -> Tensor:
    """What the host calls for "dpm_solver_v3": finds the statistics, then samples.

    Failing to find or read statistics never stops a run: it goes on without them, with a message.
    """
    if len(sigmas) < 2:
        return x
    run, passes = running(model), HostPasses(model)
    options = dict(dpm_solver_v3_options or {})
    model_options: Options = (extra_args or {}).get("model_options") or {}
    found = _statistics(run, x, model_options, options.pop("same_architecture", False))
    if options.get("strength", AUTO) == AUTO:
        options["strength"] = found.strength
    below = options.pop("corrector_region", AUTO)
    if below != AUTO:
        options["corrector_below"] = half_corrector_sigma(level_table(run.sampling)) if below == HALF else float("inf")
    clock = Clock(callback)
    given, inside = (trust(), found.origin, _tell, model, x, sigmas, extra_args, clock, disable), _HANDED.is_part(sigmas)
    sample = partial(sample_on_trial, *given, ems=found.ems, space=run.space, guidance=run.guidance, **options)
    sample = partial(sample, image_to_image=inside)
    if inside and (said := told_of_image(found.ems, sigmas, run.space)):
        host.log(said)
    reason = why_not(run, extra_args or {})
    try:
        out = sample(passes=None if reason else passes)
    except NotOfferedError:
        reason = "this ComfyUI evaluates its conditionings in another way"
        out = sample()
    if said := told_of_passes(passes.count, found.ems, sigmas, run.space, reason, FITTED_NAME):
        (_tell if reason else host.log)(said)
    if found.missing:
        _say_what_to_do(found, clock.cost(len(x)))
    return out


def _say_what_to_do(found: Found, spent: str) -> None:
    """Without a file the node says first what to do, and how long that takes where it is known: the rest may be cut off."""
    reason, _, advice = found.message.rpartition(": ")
    host.say(f"{advice}{f' (about {spent} a cfg)' if spent else ''}: {reason}", executing().node, first=True)


def _tell(message: str) -> None:
    host.log(message, warn=True)
    host.say(message, executing().node)


def _statistics(run: Running, x: Tensor, model_options: Options, same_architecture: bool) -> Found:
    node = executing().node
    try:
        found = find(run, x, model_options, same_architecture)
    except Exception as error:
        message = f"looking for EMS failed ({type(error).__name__}: {error}): sampling without statistics"
        found = Found(None, message, warn=True)
    if found.message not in _SAID:
        _SAID.add(found.message)
        host.log(found.message, warn=found.warn)
    if found.missing:
        _say_what_to_do(found, "")
    else:
        host.say(found.message, node)
    return found


def choice(values: list[str], tooltip: str, default: str = AUTO) -> tuple[list[str], dict[str, object]]:
    """A dropdown, as INPUT_TYPES says it."""
    return values, {"default": default, "tooltip": tooltip}


class SamplerNode:
    """DPM-Solver-v3 with its options, as a SAMPLER."""

    CATEGORY = host.category_of("KSamplerSelect", "sampling/custom_sampling/samplers")
    FUNCTION = "build"
    RETURN_TYPES = ("SAMPLER",)
    DESCRIPTION = (
        "DPM-Solver-v3 for few steps. Uses the empirical model statistics (EMS) attached to the model by Apply EMS, else those "
        "of its checkpoint in models/ems or output/ems, else none. Left at auto, options follow what was measured best."
    )
    SEARCH_ALIASES = ("dpm_solver_v3", "dpm solver v3 sampler", "dpm", "dpm++", "few steps")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, object]:
        return {
            "required": {
                "order": choice([AUTO, "1", "2", "3"], "Order of the predictor. 2 is the safe choice; 3 can win unguided."),
                "corrector": choice(
                    [AUTO, "none", "pseudo", "true", "raised"],
                    "Corrects each step with the next evaluation, at no extra cost. none: often best at high guidance and few "
                    "steps; pseudo: the paper's; true: of the predictor's order; raised: one order more.",
                ),
                "predictor": choice([AUTO, "true", "pseudo"], "How derivatives are estimated at order 3."),
                "corrector_region": choice(
                    [AUTO, EVERYWHERE, HALF], "half: correct only in the cleaner half of time, the paper's half corrector."
                ),
                "lower_order_final": choice([AUTO, "yes", "no"], "Lower the order in the last steps: steadier."),
                "strength": choice(
                    [AUTO, "0", "0.25", "0.5", "0.75", "1"],
                    "How much of the statistics (EMS) to use: 1 all, 0 none.",
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

    def build(self, same_architecture: bool = False, **chosen: str) -> tuple[object]:
        """The SAMPLER."""
        import comfy.samplers

        options: dict[str, object] = {k: v for k, v in chosen.items() if v != AUTO}
        if "order" in options:
            options["order"] = int(chosen["order"])
        if "strength" in options:
            options["strength"] = float(chosen["strength"])
        if "lower_order_final" in options:
            options["lower_order_final"] = options["lower_order_final"] == "yes"
        options["same_architecture"] = bool(same_architecture)
        return (comfy.samplers.KSAMPLER(sample_host, extra_options={"dpm_solver_v3_options": options}),)


def fitted_schedule(model_sampling: ModelSampling, steps: int) -> Tensor:
    """What the host calls for the scheduler "dpm_solver_v3_fitted": SIGMAS [steps + 1]. Never raises for a bad file."""
    return told(chosen_steps(model_sampling, steps, 1.0, asked()))


def passes_schedule(model_sampling: ModelSampling, steps: int) -> Tensor:
    """The same for the scheduler "dpm_solver_v3_fewer_passes": more SIGMAS, in as many passes as `steps` guided steps."""
    return told(chosen_steps(model_sampling, steps, 1.0, asked(), passes=True))


def told(chosen: Steps) -> Tensor:
    """The levels in float32; what they are is told on the node and in the log."""
    host.say_first(chosen.message, chosen.brief, executing().node)
    host.log(chosen.message, warn=not chosen.fitted)
    return _HANDED.give(chosen)


def chosen_steps(
    model_sampling: ModelSampling | None,
    steps: int,
    denoise: float,
    facts: Asked,
    guider: Guider | None = None,
    passes: bool = False,
) -> Steps:
    """The model's fitted steps, or unfitted ones with the reason.

    Args:
        model_sampling: the model's, patches included.
        steps: evaluations.
        denoise: below 1 the last part of a longer schedule.
        facts: what the steps are for.
        guider: of the run, if it is at hand: then it, not `facts`, says what the guidance is.
        passes: take steps in fewer passes, where the file has some that won and that no trial has refused.
    """
    table = level_table(model_sampling)
    try:
        patcher = facts.patcher if guider is None else guider.model_patcher
        if guider is None:
            words = facts.guider if facts.guider is None else words_of_guider(None, patcher)
            run = Run(table, facts.scale, words, facts.sampler, facts.unknown)
        else:
            run = replace(run_of_guider(guider, facts.sampler), schedule=table)
        handle = find_file(patcher) if getattr(patcher, "model", None) is not None else None
        missing = f"{none_for(identity_of(patcher, executing()))} for fitted steps" if handle is None else ""
        if handle is None:
            return choose_steps(None, missing, run, steps, denoise)
        refused = trust().guided_only(Origin(handle.file, handle.name))
        return choose_steps(handle.file, handle.name, run, steps, denoise, passes, refused)
    except Exception as error:
        title, levels = unfitted_steps(table, max(round(steps / denoise), steps))
        reason = f"looking for fitted steps failed ({type(error).__name__}: {error})"
        message = f"{reason}: {title} steps instead"
        return Steps(levels[-(steps + 1) :], False, message, message)
