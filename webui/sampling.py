"""The sampler and the schedule type in the dropdowns: they find the statistics; the sampler records what it used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ..ems_tools.hosting import (
    Clock,
    Handed,
    Origin,
    Steps,
    choose_steps,
    sample_on_trial,
    told_of_image,
    told_of_passes,
    unfitted_steps,
)
from ..sampler import AUTO, LevelTable, Space, StepInfo, settings_for, takes_typical_steps
from ..sampler.choice import fitted_for
from ..sampler.settings import OPTIONS
from . import fewer, host, model
from .find import NONE, Found, facts_of, find, find_entry, trust
from .objects import Denoiser, StepTold, Wrap
from .options import Choice, chosen, record

__all__ = [
    "ALIASES",
    "FITTED_LABEL",
    "FITTED_NAME",
    "MEASURE",
    "NAME",
    "PASSES_LABEL",
    "PASSES_NAME",
    "fitted_schedule",
    "passes_schedule",
    "sample_host",
]

NAME, ALIASES = "DPM-Solver-v3", ["dpm_solver_v3", "k_dpm_solver_v3"]
FITTED_NAME, FITTED_LABEL = "dpm_solver_v3_fitted", "DPM-Solver-v3 fitted"
PASSES_NAME, PASSES_LABEL = "dpm_solver_v3_fewer_passes", "DPM-Solver-v3 fewer passes"
MEASURE = "dpm_solver_v3_measure"
"""Attribute of the processing object: what to do instead of sampling, `(denoiser, x, extra_args) -> x`."""
_SAID: dict[str, str] = {}
"""What was said last about each topic."""
_HANDED = Handed()
"""What the schedule types were given: the host tells the sampler neither which one it is nor that the run is image to image."""


class _SwitchedError(Exception):
    """The host has changed the checkpoint within a call of its denoiser (refiner)."""

    def __init__(self, call: int, x: Tensor, denoised: Tensor) -> None:
        super().__init__("the checkpoint has changed")
        self.call, self.x, self.denoised = call, x, denoised


class _Watched:
    """The host's denoiser; raises _SwitchedError where its checkpoint is no longer the one that the EMS are for.

    `known` is the answer to the first call, where it was given before the switch was noticed.
    """

    def __init__(self, denoiser: Denoiser, known: Tensor | None) -> None:
        self.denoiser, self.known, self.calls = denoiser, known, 0
        self.checkpoint = _checkpoint(denoiser)

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: object) -> Tensor:
        self.calls += 1
        if self.known is not None:
            known, self.known = self.known, None
            return known
        denoised: Tensor = self.denoiser(x, sigma, **extra_args)
        if _checkpoint(self.denoiser) != self.checkpoint:
            raise _SwitchedError(self.calls - 1, x, denoised)
        return denoised


def _checkpoint(denoiser: Denoiser) -> str | int:
    return model.checkpoint_of(model.running(denoiser).model)


def sample_host(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, object] | None = None,
    callback: StepTold | None = None,
    disable: bool | None = None,
) -> Tensor:
    """What the host calls for "DPM-Solver-v3"; hosts give arguments by these names.

    Where the refiner takes over, sampling starts anew from there with the refiner's statistics: what was evaluated before is
    another model's and must not be extrapolated. No evaluation is lost.
    """
    return _sample(model, x, sigmas, dict(extra_args or {}), callback, bool(disable))


def _sample(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, extra_args: dict[str, object], callback: StepTold | None, quiet: bool
) -> Tensor:
    run = model.running(denoiser)
    measure = getattr(run.p, MEASURE, None)
    if measure is not None:
        return cast(Tensor, measure(denoiser, x, extra_args))
    if len(sigmas) < 2:
        return x
    if run.space is Space.FLOW and float(sigmas.max()) > 1:  # Forge gives its time steps there, up to 9999, to any sampler
        raise host.HostError(f"this schedule type has no noise levels for this model: choose Simple, Beta or {FITTED_LABEL}")
    choice = chosen(run.p)
    options = choice.solver()
    sigmas, inside = torch.unique_consecutive(sigmas), _HANDED.is_part(sigmas)
    part = "hires" if getattr(run.p, "is_hr_pass", False) else ""
    start, known = 0, None
    while True:
        run, watched = model.running(denoiser), _Watched(denoiser, known)
        passes, reason = fewer.HostPasses(denoiser, watched), fewer.why_not(denoiser, run, extra_args)
        guidance = run.guidance(extra_args.get("cond_scale"))
        found = _statistics(run, x, sigmas[start:], guidance, choice, part, inside)
        clock = Clock(_told(callback, start))
        try:
            out = sample_on_trial(
                trust(),
                found.origin,
                partial(_dropped, denoiser, run, choice, part),
                watched,
                x,
                sigmas[start:],
                extra_args,
                clock,
                quiet,
                ems=found.ems,
                space=run.space,
                guidance=guidance,
                passes=None if reason else passes,
                image_to_image=inside,
                **options,
            )
            if found.missing:
                _say_cost(watched.checkpoint, clock.cost(len(x)))
            instead = f"the schedule type {FITTED_LABEL}"
            if said := told_of_passes(passes.count, found.ems, sigmas[start:], run.space, reason, instead):
                host.log(said)
            return out
        except _SwitchedError as switch:
            start, x, known, part = start + switch.call, switch.x, switch.denoised, "refiner"


def _told(callback: StepTold | None, start: int) -> StepTold | None:
    """`callback` for a run that begins at step `start`."""
    if callback is None:
        return None

    def later(info: StepInfo) -> None:
        info["i"] += start
        callback(info)

    return later


def _statistics(
    run: model.Running,
    x: Tensor,
    sigmas: Tensor,
    guidance: float,
    choice: Choice,
    part: str,
    inside: bool,
) -> Found:
    options = choice.solver()
    try:
        found = find(run, x, guidance, choice.ems, choice.same_architecture)
    except Exception as error:  # the picture comes first
        found = Found(None, f"looking for EMS failed ({type(error).__name__}: {error}): sampling without statistics", NONE)
    _say(f"statistics {part}", found.message)
    levels = sigmas.detach().to("cpu", torch.float64)
    set_ones = {**dict.fromkeys(OPTIONS, AUTO), **options}
    fitted = fitted_for(levels, run.space, found.ems, set_ones, image_to_image=inside)
    if inside and (said := told_of_image(found.ems, levels, run.space)):
        _say(f"image {part}", said)
    own_steps = fitted is not None or takes_typical_steps(levels, run.space, found.ems, options)
    used = None if own_steps else settings_for(levels, run.space, found.ems, options, guidance)
    record(run.p, choice, found.title, used, part)
    return found


def _dropped(denoiser: Denoiser, run: model.Running, choice: Choice, part: str, message: str) -> None:
    """A file turned out to be wrong, and the picture is made anew: the host counts its steps from the start again."""
    _say("trial", message)
    record(run.p, choice, NONE, None, part)
    if hasattr(denoiser, "step"):
        denoiser.step = 0


def _say(topic: str, message: str) -> None:
    """In the log, unless it was the last thing said about this topic: the last line is always what holds now."""
    if _SAID.get(topic) != message:
        _SAID[topic] = message
        host.log(message)


def _say_cost(checkpoint: str | int, spent: str) -> None:
    """Once for a checkpoint: it is a little different each time."""
    topic = f"cost {checkpoint}"
    if spent and topic not in _SAID:
        _say(topic, f"computing them in the tab EMS takes about {spent} for one CFG scale")


def fitted_schedule(n: int, sigma_min: float, sigma_max: float, inner_model: Wrap, device: torch.device | str) -> Tensor:
    """What the host calls for the schedule type "DPM-Solver-v3 fitted"; hosts give arguments by these names.

    The steps that were fitted to the checkpoint for `n` steps at this CFG scale, or the best unfitted ones with a message.
    """
    return _schedule(n, sigma_min, sigma_max, model.asking(inner_model), device, False)


def passes_schedule(n: int, sigma_min: float, sigma_max: float, inner_model: Wrap, device: torch.device | str) -> Tensor:
    """The same for "DPM-Solver-v3 fewer passes": more steps, in as many passes of the network as `n` guided ones."""
    return _schedule(n, sigma_min, sigma_max, model.asking(inner_model), device, True)


def _schedule(
    n: int, sigma_min: float, sigma_max: float, run: model.Running, device: torch.device | str, passes: bool
) -> Tensor:
    try:
        chosen = _steps(run, n, passes)
    except Exception as error:  # the picture comes first
        title, levels = unfitted_steps(_any_schedule(run, sigma_min, sigma_max), n)
        message = f"looking for fitted steps failed ({type(error).__name__}: {error}): {title} steps instead"
        chosen = Steps(levels, False, message)
    _say(f"schedule {'hires' if getattr(run.p, 'is_hr_pass', False) else ''}", chosen.message)
    return _HANDED.give(chosen).to(device)


def _any_schedule(run: model.Running, sigma_min: float, sigma_max: float) -> LevelTable:
    """The host's noise levels, or what their ends say where it has no table."""
    try:
        return model.level_table(run)
    except host.HostError:
        space = Space.FLOW if sigma_max <= 1 else Space.SIGMA
        high = min(sigma_max, 0.999) if space is Space.FLOW else sigma_max
        return LevelTable(torch.tensor([sigma_min, high], dtype=torch.float64), space)


def _steps(run: model.Running, n: int, passes: bool) -> Steps:
    """The levels [n + 1], and what to tell the user."""
    choice, guidance = chosen(run.p), None if run.p is None else run.guidance(getattr(run.p, "cfg_scale", None))
    entry, reason = find_entry(run, model.channels_of(run.p), choice.ems, choice.same_architecture)
    file, name = (None, reason.partition(": sampling")[0]) if entry is None else (entry.file, entry.name)
    refused = "" if file is None else trust().guided_only(Origin(file, name))
    facts = facts_of(run, guidance, model.sampler_name(run.p))
    steps = choose_steps(file, name, facts, n, passes=passes, guided_only=refused)
    advice = f", {reason}" if steps.fitted else ". The tab EMS fits steps to the checkpoint"
    return replace(steps, message=steps.message + advice)
