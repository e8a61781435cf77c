"""Which statistics and which steps a run uses, from plain facts that any host can give.

Fitted steps hold for the denoiser that they were fitted to: they are used only where the guidance scale, the noise space, the
noise range and what changes the guidance are known and agree with the file. Everything else gets the best schedule that needs
no fit (`unfitted_steps`), and a message that says why and what to do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...sampler import EMS, EMSError, NoiseSchedule, Recommendation, Space, unfitted_steps

if TYPE_CHECKING:
    from ..file import EMSFile

__all__ = [
    "GUIDER",
    "Run",
    "Statistics",
    "Steps",
    "choose_statistics",
    "choose_steps",
    "one_line",
    "printable",
    "told_of_image",
    "told_of_passes",
    "unfitted_steps",
]

GUIDER = "guider"
"""Key in a file's `meta.model`: what changed the guidance while its statistics were computed; absent for plain guidance."""
SAMPLER = "dpm_solver_v3"
_MARK = 2e-5
"""By which our schedule differs from a host's own of the same kind, that the sampler may know it again (see `handed`)."""
_NEAR = 0.05
"""Largest difference in lambda at the noisy end between a file's noise range and a model's."""


@dataclass(frozen=True)
class Run:
    """What a host knows of a run before its first evaluation; None where it does not say.

    Args:
        schedule: the model's noise levels as the host has them now, patches included.
        guidance: the guidance scale.
        guider: what changes classifier-free guidance ("" for nothing), in the words that `GUIDER` keeps in a file.
        sampler: name of the sampler that will follow the steps.
        unknown: why guidance or guider is not known, and what to do; a whole clause for the message.
    """

    schedule: NoiseSchedule
    guidance: float | None = None
    guider: str | None = ""
    sampler: str | None = None
    unknown: str = "the guidance scale of this run is not known"


@dataclass(frozen=True)
class Statistics:
    """Statistics for a run, or None. `message` says what was found, `warn` whether it needs attention."""

    ems: EMS | None
    message: str
    warn: bool = False


@dataclass(frozen=True)
class Steps:
    """Host levels [n + 1] in float64, whether they were fitted to the model, and what to tell the user.

    `brief` is for a place where another message says already that there is no file. `part`: the levels are the last part of a
    longer schedule, denoise is below 1. `images`: the file holds steps for image to image at this guidance scale.
    """

    levels: Tensor
    fitted: bool
    message: str
    brief: str = ""
    part: bool = False
    images: bool = False


def choose_statistics(file: EMSFile, name: str, reason: str, run: Run, shape: tuple[int, ...]) -> Statistics:
    """The statistics of `file` for a run, and their message. A file that does not fit is refused in words; nothing is raised.

    Args:
        file: found by the host.
        name: of the file, for the message.
        reason: why it was chosen, for the message.
        run: what is known of the run.
        shape: of the latents [B, C, ...].
    """
    why = _other_noise(file, run.schedule)
    if not why and run.guidance is None:
        why = run.unknown
    if why:
        return Statistics(None, f"EMS {name} not used: {why}. Sampling without statistics", True)
    assert run.guidance is not None
    try:
        ems, notes = file.for_latents(run.guidance, shape)
    except EMSError as error:
        return Statistics(None, f"EMS {name} does not fit: {error}. Sampling without statistics", True)
    other = _other_guider(file, run)
    if other:
        notes = [*notes, other]
        ems = _without_fit(ems)
    text = "".join(f"; {note}" for note in notes)
    return Statistics(ems, f"EMS {name}, {reason}, guidance {run.guidance:g}{text}", bool(notes))


def choose_steps(
    file: EMSFile | None,
    name: str,
    run: Run,
    steps: int,
    denoise: float = 1.0,
    passes: bool = False,
    guided_only: str = "",
) -> Steps:
    """The steps of a host's "fitted" schedule: those of `file`, or unfitted ones with the reason.

    Args:
        file: the model's statistics file, None if there is none.
        name: of the file; without one, why there is none.
        run: what is known of the run.
        steps: evaluations.
        denoise: below 1 the last part of a schedule of round(steps / denoise) steps, as hosts do it.
        passes: spend the passes of so many guided steps on more steps, some of them without the unconditional pass, where the
            file holds such a schedule. The result then has more than `steps` steps.
        guided_only: why the file's are not taken, "" if they may be.

    Raises:
        ValueError: `steps` below 1 or `denoise` not in (0, 1].
    """
    if steps < 1 or not 0 < denoise <= 1:
        raise ValueError(f"steps must be at least 1 and denoise in (0, 1], not {steps} and {denoise}")
    why = name if file is None else _why_not(file, name, run, steps, denoise)
    if file is not None and not why:
        assert run.guidance is not None
        fewer = file.passes_sigmas(2 * steps, run.guidance) if passes and denoise == 1 else None
        why = guided_only if fewer is not None else ""
        if not why and fewer is not None and not _beyond(fewer[0], name, run.schedule):
            n, guided = len(fewer[1].lambdas), sum(fewer[1].guided)
            told = f"{n} steps in the passes of {steps}, {guided} of them guided, fitted at cfg {run.guidance:g}, from {name}"
            return Steps(fewer[0], True, told, told)
        levels = file.fitted_sigmas(steps, run.guidance, denoise)
        told = one_line(f"schedule fitted for {steps} steps at cfg {run.guidance:g}, from {name}", why)
        return Steps(levels, True, told, told, denoise < 1, file.has_images(run.guidance))
    title, levels = unfitted_steps(run.schedule, max(round(steps / denoise), steps))
    message = f"{why}: {title} steps instead"
    if file is None or run.guidance is None or not file.has_images(run.guidance):
        return Steps(levels[-(steps + 1) :], False, message, f"{title} steps" if file is None else message, denoise < 1)
    message += "; image to image (denoise below 1) takes those fitted for that"
    levels[1:-1] *= 1 + _MARK
    return Steps(levels[-(steps + 1) :], False, message, message, denoise < 1, images=True)


def told_of_passes(made: int, ems: EMS | None, levels: Tensor, space: Space, reason: str, instead: str) -> str:
    """How many passes a run in fewer of them made, or why none was left out; "" where its steps were not meant for that.

    Args:
        made: passes for every picture.
        ems: of the run.
        levels: of the run, [n + 1].
        space: the host's.
        reason: why none could be left out, "" if they could.
        instead: what to take then.
    """
    lambdas = space.lambda_of(levels.detach().to("cpu", torch.float64)).tolist()
    advice = None if ems is None else ems.recommendation
    steps = advice.fitted_for(lambdas, passes=True) if advice is not None else None
    if made and not reason:
        more = steps is not None and made > steps.passes
        tried = " and those of a trial, which the first run with these steps makes" if more else ""
        return f"{made} passes of the network in {len(lambdas) - 1} steps{tried}"
    meant = advice is not None and steps is not None and advice.fitted_for(lambdas) is None
    return f"no pass was left out ({reason}): take {instead} with this" if meant and reason else ""


def told_of_image(ems: EMS | None, levels: Tensor, space: Space) -> str:
    """What a run of image to image with these `levels` [n + 1] takes; "" where nothing was fitted for it."""
    lambdas = space.lambda_of(levels.detach().to("cpu", torch.float64)).tolist()
    steps = None if ems is None or ems.recommendation is None else ems.recommendation.partial_for(lambdas)
    return f"image to image: {len(lambdas) - 1} steps fitted for it, from sigma {math.exp(-lambdas[0]):.3g} on" if steps else ""


def one_line(*messages: str) -> str:
    """Several messages to one place as one line, without repeating one."""
    return "; ".join(dict.fromkeys(text.strip() for text in messages if text.strip()))


def printable(text: str, encoding: str | None = None) -> str:
    """`text` as a console of this encoding can print it: no control characters, nothing that it has no sign for."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8", "replace")


def _why_not(file: EMSFile, name: str, run: Run, steps: int, denoise: float) -> str:
    """Why this file's fitted steps are not for this run, "" if they are."""
    if run.sampler is not None and run.sampler.casefold().replace("-", "_") != SAMPLER:
        return f"fitted steps suit the sampler {SAMPLER} only, not {run.sampler}"
    noise = _other_noise(file, run.schedule)
    if noise:
        return f"fitted steps of {name} are not for this model: {noise}"
    if run.guidance is None or run.guider is None:
        return run.unknown
    guider = _other_guider(file, run)
    if guider:
        return f"fitted steps of {name} are not used: {guider}"
    if not file.covers_fit(steps, run.guidance, denoise):
        return f"{name} has no schedule fitted for {steps} steps at cfg {run.guidance:g}"
    return _beyond(file.fitted_sigmas(steps, run.guidance, denoise), name, run.schedule)


def _other_noise(file: EMSFile, schedule: NoiseSchedule) -> str:
    """How the file's noise space or noisy end differs from the model's, "" if they agree.

    The clean end may differ: a shifted flow has the same network and another table, and ends elsewhere.
    """
    if file.meta.space != schedule.space.value:
        words = {"flow": "a rectified flow", "sigma": "a model of the EPS or v kind"}
        return f"it was made for {words[file.meta.space]}, this is {words[schedule.space.value]}"
    _, high = _ends(schedule)
    if abs(math.log(high) - math.log(file.meta.sigma_max)) > _NEAR:
        return f"it was made for noise up to sigma {file.meta.sigma_max:.4g}, this model's begins at {high:.4g}"
    return ""


def _beyond(levels: Tensor, name: str, schedule: NoiseSchedule) -> str:
    """What is wrong if a fitted level lies below the model's least noise, "" if none does."""
    low, _ = _ends(schedule)
    sigmas = (-schedule.space.lambda_of(levels[levels > 0])).exp()
    if float(sigmas.min()) < low * (1 - _NEAR):
        return f"the steps of {name} go down to sigma {float(sigmas.min()):.3g}, this model's noise ends at {low:.3g}"
    return ""


def _ends(schedule: NoiseSchedule) -> tuple[float, float]:
    """Smallest and largest sigma = exp(-lambda); a flow that begins at t = 1 counts from t = 0.999, as in files."""
    times = torch.tensor([schedule.time_min, schedule.time_max], dtype=torch.float64)
    levels = schedule.level_at(times)
    levels = levels.clamp(max=0.999) if schedule.space is Space.FLOW else levels
    low, high = (-schedule.space.lambda_of(levels)).exp().tolist()
    return low, high


def _other_guider(file: EMSFile, run: Run) -> str:
    """How the guidance differs from the one that the file was computed under, "" if it agrees or is not known."""
    if run.guider is None:
        return run.unknown
    made = file.meta.model.get(GUIDER, "")
    if made == run.guider:
        return ""
    return f"computed under {made or 'plain guidance'}, this run has {run.guider or 'plain guidance'}"


def _without_fit(ems: EMS) -> EMS:
    """The same statistics and settings without fitted coefficients."""
    advice = ems.recommendation
    return ems if advice is None else replace(ems, recommendation=Recommendation(advice.entries) if advice.entries else None)
