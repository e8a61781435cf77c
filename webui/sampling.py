"""The sampler and the schedule type in the dropdowns: they find the statistics; the sampler records what it used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..sampler import AUTO, EMS, LevelTable, StepInfo, karras, sample_dpm_solver_v3, settings_for
from . import host
from .find import NONE, Found, find, find_entry
from .options import Choice, chosen, record

__all__ = ["ALIASES", "FITTED_LABEL", "FITTED_NAME", "MEASURE", "NAME", "fitted_schedule", "sample_host"]

NAME, ALIASES = "DPM-Solver-v3", ["dpm_solver_v3", "k_dpm_solver_v3"]
FITTED_NAME, FITTED_LABEL = "dpm_solver_v3_fitted", "DPM-Solver-v3 fitted"
MEASURE = "dpm_solver_v3_measure"
"""Attribute of the processing object: what to do instead of sampling, `(denoiser, x, extra_args) -> x`."""
_SAID: set[str] = set()


class _SwitchedError(Exception):
    """The host has changed the checkpoint within a call of its denoiser (refiner)."""

    def __init__(self, call: int, x: Tensor, denoised: Tensor) -> None:
        super().__init__("the checkpoint has changed")
        self.call, self.x, self.denoised = call, x, denoised


class _Watched:
    """The host's denoiser; raises _SwitchedError where its checkpoint is no longer the one that the EMS are for.

    `known` is the answer to the first call, where it was given before the switch was noticed.
    """

    def __init__(self, denoiser: Any, known: Tensor | None) -> None:
        self.denoiser, self.known, self.calls = denoiser, known, 0
        self.checkpoint = _checkpoint(denoiser)

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        self.calls += 1
        if self.known is not None:
            known, self.known = self.known, None
            return known
        denoised: Tensor = self.denoiser(x, sigma, **extra_args)
        if _checkpoint(self.denoiser) != self.checkpoint:
            raise _SwitchedError(self.calls - 1, x, denoised)
        return denoised


def _checkpoint(denoiser: Any) -> Any:
    return host.checkpoint_of(host.running(denoiser).model)


def sample_host(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[StepInfo], None] | None = None,
    disable: bool | None = None,
) -> Tensor:
    """What the host calls for "DPM-Solver-v3"; hosts give arguments by these names.

    Where the refiner takes over, sampling starts anew from there with the refiner's statistics: what was evaluated before is
    another model's and must not be extrapolated. No evaluation is lost.
    """
    run = host.running(model)
    measure = getattr(run.p, MEASURE, None)
    if measure is not None:
        return measure(model, x, extra_args or {})
    if len(sigmas) < 2:
        return x
    choice = chosen(run.p)
    options = choice.solver()
    sigmas = torch.unique_consecutive(sigmas)
    part = "hires" if getattr(run.p, "is_hr_pass", False) else ""
    start, known = 0, None
    while True:
        run, watched = host.running(model), _Watched(model, known)
        ems = _statistics(run, x, sigmas[start:], extra_args or {}, choice, options, part)
        told = _told(callback, start)
        arguments = {"ems": ems, "space": run.space, "guidance": run.guidance(extra_args or {}), **options}
        try:
            return sample_dpm_solver_v3(watched, x, sigmas[start:], extra_args, told, disable, **arguments)
        except _SwitchedError as switch:
            start, x, known, part = start + switch.call, switch.x, switch.denoised, "refiner"


def _told(callback: Callable[[StepInfo], None] | None, start: int) -> Callable[[StepInfo], None] | None:
    """`callback` for a run that begins at step `start`."""
    if callback is None:
        return None

    def later(info: StepInfo) -> None:
        info["i"] += start
        callback(info)

    return later


def _statistics(
    run: host.Running, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any], choice: Choice, options: dict[str, Any], part: str
) -> EMS | None:
    guidance = run.guidance(extra_args)
    try:
        found = find(run, x, guidance, choice.ems, choice.same_architecture)
    except Exception as error:  # the picture comes first
        found = Found(None, f"looking for EMS failed ({type(error).__name__}: {error}): sampling with data prediction", NONE)
    _say(found.message)
    levels = sigmas.detach().to("cpu", torch.float64)
    advice = found.ems and found.ems.recommendation
    fitted = advice and all(v == AUTO for v in options.values()) and advice.fitted_for(run.space.lambda_of(levels).tolist())
    record(run.p, found.title, None if fitted else settings_for(levels, run.space, found.ems, options, guidance), part)
    return found.ems


def _say(message: str) -> None:
    """In the log, once."""
    if message not in _SAID:
        _SAID.add(message)
        host.log(message)


def fitted_schedule(n: int, sigma_min: float, sigma_max: float, inner_model: Any, device: Any) -> Tensor:
    """What the host calls for the schedule type "DPM-Solver-v3 fitted"; hosts give arguments by these names.

    The steps that were fitted to the checkpoint for `n` steps at this CFG scale; Karras steps, said so, where it has none.
    """
    try:
        run = host.asking(inner_model)
        if (other := host.sampler_name(run.p)) not in (None, NAME):
            # Theirs are two to four times better than these (benchmarks/fit_ablation.py).
            _say(f"fitted steps suit the sampler {NAME} only, not {other}: Karras steps instead")
            return _karras_steps(n, sigma_min, sigma_max, device)
        choice, guidance = chosen(run.p), run.guidance({"cond_scale": getattr(run.p, "cfg_scale", 1.0)})
        entry, reason = find_entry(run, None, choice.ems, choice.same_architecture)
        file = None if entry is None else entry.file
        if entry is not None and file is not None and file.meta.space == run.space.value and file.covers_fit(n, guidance):
            _say(f"schedule fitted for {n} steps at CFG scale {guidance:g}, from {entry.name}, {reason}")
            return file.fitted_sigmas(n, guidance).to(device, torch.float32)
        if entry is not None:
            reason = f"{entry.name} has no schedule fitted for {n} steps at CFG scale {guidance:g}"
    except Exception as error:  # the picture comes first
        reason = f"looking for fitted schedules failed ({type(error).__name__}: {error})"
    _say(f"{reason.partition(': sampling')[0]}: Karras steps instead. The tab EMS fits schedules to the checkpoint")
    return _karras_steps(n, sigma_min, sigma_max, device)


def _karras_steps(n: int, sigma_min: float, sigma_max: float, device: Any) -> Tensor:
    ends = LevelTable(torch.tensor([sigma_min, sigma_max], dtype=torch.float64))
    return karras(ends, n, to_zero=True).to(device, torch.float32)
