"""The estimator inside the host's own generation of pictures: its loading, conditioning, LoRAs and denoiser. For the tab "EMS".

A pass of text to image with one prompt a row is begun; the sampler function then measures instead of sampling.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..ems_tools.compute import EFFORTS, compute_ems, job_for, plan_for
from ..ems_tools.estimate.points import DivergedError
from ..ems_tools.estimate.run import EstimateError, Progress
from ..ems_tools.estimate.source import Source
from ..ems_tools.file.contents import EMSFile
from ..ems_tools.hosting import Watch, place_for
from ..sampler import SamplingError
from . import host
from .sampling import MEASURE, NAME

__all__ = ["Request", "Work", "begin", "current"]


@dataclass(frozen=True)
class Request:
    """What to measure: prompts and sizes as in text to image, guidance scales, a name of EFFORTS, the file's name or ""."""

    prompts: tuple[str, ...]
    negative: str
    width: int
    height: int
    scales: tuple[float, ...]
    effort: str
    name: str = ""
    batch: int = 4
    seed: int = 0


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

    def run(self) -> None:
        """Measure; how it ended is in `message`."""
        try:
            with host.session("EMS") as call:
                call(self._generate)
            if self.file is not None:
                self.share, self.message = 1.0, f"Done: {self.path}"
            elif self.stopped:
                partial = self.path and self.path.with_name(self.path.name + ".partial")
                kept = f"What was measured is kept in {partial}" if partial and partial.exists() else "Nothing was measured yet"
                self.message = f"Stopped. {kept}: compute with the same settings again to go on."
            else:
                self.message = "The host ended the pass before anything was measured; its console says why."
        except Exception as error:
            known = (host.HostError, EstimateError, SamplingError, DivergedError)
            self.message = str(error) if isinstance(error, known) else f"{type(error).__name__}: {error}"
            if isinstance(error, OSError) and self.path is not None:
                self.message = f"{self.path} cannot be written ({error}): make room there, then compute again to go on"
        finally:
            host.log(f"EMS: {self.message}")
            self.over.set()

    def interrupt(self) -> None:
        """The next call of the denoiser ends it; while another job has its turn, that one is left alone."""
        if self.over.is_set():
            return
        self.stopped, self.message = True, "Stopping"
        if self.begun:
            host.interrupt()

    def _generate(self) -> None:
        self.begun = True
        if self.stopped:
            return
        r = self.request
        mark = {MEASURE: self._measure}
        host.generate(list(r.prompts), r.negative, r.width, r.height, NAME, mark, lambda: self.file is not None or self.stopped)

    def _measure(self, denoiser: Any, x: Tensor, extra_args: dict[str, Any]) -> Any:
        """What the sampler function does in this pass; x [prompts, C, h, w]."""
        try:
            self._compute(denoiser, x, extra_args)
        except BaseException:  # the host's interrupt is one
            if not host.interrupted():
                raise
            self.stopped = True
        return host.no_images(x)

    def _compute(self, denoiser: Any, x: Tensor, extra_args: dict[str, Any]) -> None:
        r, effort = self.request, EFFORTS[self.request.effort]
        run = host.running(denoiser)
        identity = host.identity_of(run)
        table = host.level_table(run)
        source = Source(
            models={g: _Denoiser(denoiser, extra_args, g, len(r.prompts)) for g in r.scales},
            shape=tuple(x.shape[1:]),
            schedule=table,
            identity={**identity.facts(), "prompts": f"{len(r.prompts)}, the first: {r.prompts[0]:.200}"},
            levels=table.levels if host.rounds_levels(run) else None,
            host_schedules=host.step_schedules(run),
        )
        job, plan = job_for(source, effort, r.seed), plan_for(source, effort)
        self.path, done = place_for(host.output_folder(), r.name or identity.name or "model", source, job, plan, host.log)
        if done is None:
            watch = Watch(job, plan)
            host.log(f"EMS: {watch.total} evaluations, into {self.path}")
            show = partial(self._show, watch)
            done = compute_ems(source, job, plan, self.path, batch=r.batch, device=x.device, progress=show)
        self.file = done

    def _show(self, watch: Watch, p: Progress) -> None:
        self.message = watch.update(p)
        self.share = watch.done / watch.total
        host.report_progress(watch.done, watch.total, self.message)


@dataclass
class _Denoiser:
    """D(x, level) at one guidance scale; `samples` tell which prompt each row has."""

    denoiser: Any
    extra_args: dict[str, Any]
    scale: float
    prompts: int
    samples: list[int] | None = None

    def for_samples(self, samples: list[int]) -> _Denoiser:
        """The same for these samples."""
        return _Denoiser(self.denoiser, self.extra_args, self.scale, self.prompts, samples)

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        rows = [k % self.prompts for k in self.samples] if self.samples and len(self.samples) == len(x) else [0] * len(x)
        return host.evaluate(self.denoiser, x, level, self.extra_args, rows, self.scale)


_CURRENT: list[Work] = []


def current() -> Work | None:
    """The latest computation of this process."""
    return _CURRENT[-1] if _CURRENT else None


def begin(request: Request) -> Work:
    """Start a computation; if one is under way, that one."""
    running = current()
    if running is not None and not running.over.is_set():
        return running
    work = Work(request)
    _CURRENT[:] = [work]
    threading.Thread(target=work.run, name="EMS", daemon=True).start()
    return work
