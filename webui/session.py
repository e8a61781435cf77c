"""The estimator inside the host's own generation of pictures: its loading, conditioning, LoRAs and denoiser. For the tab "EMS".

A pass of text to image with one prompt a row is begun; the sampler function then measures instead of sampling.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from ..ems_tools.compute import EFFORTS, compute_ems, job_for, plan_for
from ..ems_tools.estimate.job import EstimateError, Progress
from ..ems_tools.estimate.source import Source
from ..ems_tools.file import EMSFile
from ..ems_tools.hosting import GUIDER, one_line
from ..ems_tools.hosting.jobs import PROMPTS, Watch, evaluations_of_effort, in_words, place_for, request_facts, scales_of
from ..ems_tools.share.identity import ModelIdentity, one_line_of
from ..ems_tools.show.describe import gain_of
from ..sampler import SamplingError
from . import host, model, passes
from .find import trust
from .objects import Denoiser
from .sampling import MEASURE, NAME

__all__ = ["BusyError", "Request", "Work", "begin", "cost_in_words", "current", "request_of", "steps_of"]

State = Literal["running", "done", "stopped", "failed"]


class _Stopped(BaseException):
    """Interrupt was pressed in the tab."""


class BusyError(RuntimeError):
    """Another computation is under way; the message says what to do."""

    def __init__(self) -> None:
        super().__init__(
            "A computation is under way, and this form was not used for it. Wait for it, or press Interrupt and then Compute."
        )


@dataclass(frozen=True)
class Request:
    """What to measure.

    Args:
        prompts: one for each sample, in turn.
        negative: the negative prompt of all of them.
        width, height: of the pictures, in pixels.
        scales: guidance scales.
        effort: a name of EFFORTS.
        steps: step counts to fit; those of the effort if empty.
        name: of the file; the checkpoint's if empty.
        batch: samples at once.
        seed: of the start noise.
        image_to_image: fit steps for image to image as well.
        fewer: fit steps in fewer passes as well.
    """

    prompts: tuple[str, ...]
    negative: str
    width: int
    height: int
    scales: tuple[float, ...]
    effort: str
    steps: tuple[int, ...] = ()
    name: str = ""
    batch: int = 4
    seed: int = 0
    image_to_image: bool = False
    fewer: bool = False


def request_of(  # noqa: PLR0913 - gradio hands over one argument for each field of the page
    prompt: str,
    more: bool,
    negative: str,
    width: float | None,
    height: float | None,
    scales: str,
    effort: str,
    steps: str,
    name: str,
    batch: float | None,
    seed: float | None,
    image_to_image: bool = False,
    fewer: bool = False,
) -> Request:
    """From the fields of the page, where a box of a number may be empty. Raises EstimateError with what to change."""
    prompts = (prompt.strip(), *(PROMPTS if more else ()))
    at_once = Request.batch if batch is None else int(batch)
    if not 1 <= at_once <= 1024:
        raise EstimateError(f"'Samples at once' must lie between 1 and 1024, not {at_once}")
    size = int(width or 512), int(height or 512)
    counts, more_fits = steps_of(steps), {"image_to_image": image_to_image, "fewer": fewer}
    return Request(
        prompts, negative, *size, scales_of(scales), effort, counts, name.strip(), at_once, int(seed or 0), **more_fits
    )


def steps_of(text: str) -> tuple[int, ...]:
    """Step counts of a line such as "4, 6, 8"; () for an empty one. Raises EstimateError."""
    parts = [part.strip() for part in text.replace(";", ",").split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() and len(part) < 4 for part in parts):
        raise EstimateError(f"step counts must be whole numbers with commas between them, such as '4, 6, 8', not {text!r}")
    return tuple(sorted({int(part) for part in parts}))


def cost_in_words(scales: str, effort: str, steps: str, image_to_image: bool = False, fewer: bool = False) -> str:
    """What a computation with these fields costs at most. Raises EstimateError for fields that cannot be used."""
    found, counts = scales_of(scales), steps_of(steps)
    evaluations = evaluations_of_effort(effort, found, counts, fewer, image_to_image)
    text = f"About {evaluations:,} evaluations of the model for {len(found)} CFG scale{'s' if len(found) > 1 else ''}"
    if _SPEED:
        return f"{text}: about {in_words(evaluations * _SPEED[-1])} at the speed of the last computation."
    return f"{text}. The time that is left is shown a few seconds after the start."


_SPEED: list[float] = []
"""Seconds for each evaluation of the latest computation, at most one."""


@dataclass
class Work:
    """A computation in a thread of its own, so that the page can be left and come back to."""

    request: Request
    message: str = "Waiting for the host; it may load the checkpoint first"
    share: float = 0.0
    path: Path | None = None
    file: EMSFile | None = None
    stopped: bool = False
    begun: bool = False
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def state(self) -> State:
        """Whether it runs, and how it ended."""
        if not self.over.is_set():
            return "running"
        return "done" if self.file is not None else "stopped" if self.stopped else "failed"

    def run(self) -> None:
        """Measure; how it ended is in `state` and `message`."""
        try:
            with passes.session("EMS") as call:
                call(self._generate)
            self.message = self._ending()
        except Exception as error:
            known = (host.HostError, EstimateError, SamplingError)
            self.message = str(error) if isinstance(error, known) else f"{type(error).__name__}: {error}"
            if isinstance(error, OSError) and self.path is not None:
                self.message = f"{self.path} cannot be written ({error}): make room there, then compute again to go on"
            self.stopped = False
        finally:
            host.log(f"EMS: {self.message}")
            self.over.set()

    def _ending(self) -> str:
        if self.file is not None:
            self.share = 1.0
            return one_line(f"Done: {host.shown(self.path)}" if self.path else "Done", gain_of(self.file))
        if self.stopped:
            kept = "Nothing was measured yet"
            if self.path and (partial := self.path.with_name(self.path.name + ".partial")).exists():
                kept = f"What was measured is kept in {host.shown(partial)}"
            return f"Stopped. {kept}: compute with the same settings again to go on."
        return "The host ended the pass before anything was measured; its console says why."

    def interrupt(self) -> None:
        """The next call of the denoiser ends it; while another job has its turn, that one is left alone."""
        if self.over.is_set():
            return
        self.stopped, self.message = True, "Stopping"
        if self.begun:
            passes.interrupt()

    def _generate(self) -> None:
        self.begun = True
        if self.stopped:
            return
        r = self.request
        mark = {MEASURE: self._measure}
        size = (r.width, r.height)
        passes.generate(list(r.prompts), r.negative, size, NAME, mark, lambda: self.file is not None or self.stopped)

    def _measure(self, denoiser: Denoiser, x: Tensor, extra_args: dict[str, object]) -> Tensor:
        """What the sampler function does in this pass; x [prompts, C, h, w]."""
        try:
            self._compute(denoiser, x, extra_args)
        except BaseException:  # the host's interrupt is one
            if not (self.stopped or passes.interrupted()):
                raise
            self.stopped = True
        return passes.no_images(x)

    def _compute(self, denoiser: Denoiser, x: Tensor, extra_args: dict[str, object]) -> None:
        r, effort = self.request, EFFORTS[self.request.effort]
        run = model.running(denoiser)
        identity = model.identity_of(run)
        table, schedules = model.level_table(run), model.step_schedules(run)
        source = Source(
            models={g: _Denoiser(denoiser, extra_args, g, len(r.prompts)) for g in r.scales},
            shape=tuple(x.shape[1:]),
            schedule=table,
            identity=self._identity(run, identity, list(schedules)),
            levels=table.levels if model.rounds_levels(run) else None,
            host_schedules=schedules,
            conditional=_Denoiser(denoiser, extra_args, 1.0, len(r.prompts)) if r.fewer and not model.guider_of(run) else None,
        )
        job, plan = job_for(source, effort, r.seed, r.steps), plan_for(source, effort, r.steps, r.fewer, r.image_to_image)
        self.path, done = place_for(host.output_folder(), r.name or identity.name or "model", source, job, plan, host.log)
        if done is None:
            watch = Watch(job, plan)
            host.log(f"EMS: {watch.total} evaluations, into {self.path}")
            show = partial(self._show, watch)
            done = compute_ems(source, job, plan, self.path, batch=r.batch, device=x.device, progress=show)
        trust().computed(done)
        self.file = done

    def _identity(self, run: model.Running, identity: ModelIdentity, schedules: list[str]) -> dict[str, str]:
        """What the file says of the model, and what tells this request from another one."""
        r, guider = self.request, model.guider_of(run)
        prompts = f"{len(r.prompts)}, the first: {one_line_of(r.prompts[0], 200)}"
        request = request_facts("\0".join((*r.prompts, r.negative)), schedules)
        return {**identity.facts(), "prompts": prompts, **request, **({GUIDER: one_line_of(guider)} if guider else {})}

    def _show(self, watch: Watch, p: Progress) -> None:
        if self.stopped:  # the host's own mark of it is gone once any other call of its page ends
            raise _Stopped
        self.message, each = watch.update(p), watch.seconds_each
        self.share = watch.done / watch.total
        if each is not None:
            _SPEED[:] = [each]
        passes.report_progress(watch.done, watch.total, self.message)


@dataclass
class _Denoiser:
    """D(x, level) at one guidance scale; `samples` tell which prompt each row has."""

    denoiser: Denoiser
    extra_args: dict[str, object]
    scale: float
    prompts: int
    samples: Sequence[int] | None = None

    def for_samples(self, samples: list[int]) -> _Denoiser:
        """The same for these samples."""
        return _Denoiser(self.denoiser, self.extra_args, self.scale, self.prompts, samples)

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        rows = [k % self.prompts for k in self.samples] if self.samples and len(self.samples) == len(x) else [0] * len(x)
        return passes.evaluate(self.denoiser, x, level, self.extra_args, rows, self.scale)


_CURRENT: list[Work] = []


def current() -> Work | None:
    """The latest computation of this process."""
    return _CURRENT[-1] if _CURRENT else None


def begin(request: Request) -> Work:
    """Start a computation. Raises BusyError while another one is under way."""
    running = current()
    if running is not None and running.state == "running":
        raise BusyError
    work = Work(request)
    _CURRENT[:] = [work]
    threading.Thread(target=work.run, name="EMS", daemon=True).start()
    return work
