"""The estimator inside ComfyUI's own sampling session: guider, denoiser, progress. For the node "Compute EMS".

So memory management, LoRA, ControlNet, hooks and offloading are the host's. One session holds all guidance scales and
prompts: the guider below changes its scale and its positive conditioning between evaluations.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ems_tools.compute import EFFORTS, compute_ems, job_for, plan_for
from ..ems_tools.estimate.points import DivergedError
from ..ems_tools.estimate.run import EstimateError, Job, Progress
from ..ems_tools.estimate.source import Source
from ..ems_tools.file.contents import EMSFile
from ..ems_tools.hosting import Watch, place_for
from ..ems_tools.judge.calibrate import CalibrationPlan
from ..sampler import SamplingError, Space
from . import host

__all__ = ["Request", "measure"]

_PREVIEW_SECONDS = 1.0
_SCHEDULERS = {Space.SIGMA: ("normal", "karras"), Space.FLOW: ("simple", "beta")}


@dataclass(frozen=True)
class Request:
    """What to measure.

    Args:
        patcher: the MODEL.
        prompts, negative: CONDITIONINGs.
        shape: latent [C, ...].
        identity: of the model, for the file.
        scales: guidance scales.
        schedulers: host's names, () for the usual ones.
    """

    patcher: Any
    prompts: list[Any]
    negative: Any
    shape: tuple[int, ...]
    identity: dict[str, str]
    scales: tuple[float, ...]
    effort: str
    name: str
    batch: int
    seed: int
    keep_moments: bool
    schedulers: tuple[str, ...]
    node: str


def measure(r: Request) -> tuple[EMSFile, Path]:
    """The finished file, and where it lies. Raises HostError with what to do, and the host's interrupt."""
    sampling = host.model_sampling_of(r.patcher)
    table = host.level_table(sampling)
    session = _Session(_guider(r.patcher, r.prompts, r.negative), len(r.prompts))
    source = Source(
        models={g: _Denoiser(session, g) for g in r.scales},
        shape=r.shape,
        schedule=table,
        identity=r.identity,
        levels=table.levels if _rounds(sampling) else None,
        host_schedules=_host_schedules(r.schedulers, sampling, table.space),
    )
    job, plan = job_for(source, EFFORTS[r.effort], r.seed), plan_for(source, EFFORTS[r.effort])
    path, done = place_for(host.output_folder(), r.name, source, job, plan, host.LOG.info)
    if done is None:
        watch = _Watch(job, plan, session, r.node, r.patcher)
        work = partial(compute_ems, source, job, plan, path, batch=r.batch, keep_moments=r.keep_moments, progress=watch)
        done = _run(session, table.levels, r, path, work)
    return done, path


def _guider(patcher: Any, prompts: list[Any], negative: Any) -> Any:
    """The host's CFGGuider over several positive conditionings; `scale` and `rows` (prompt of each sample) choose."""
    import comfy.samplers

    class PromptGuider(comfy.samplers.CFGGuider):  # type: ignore[misc]
        rows: list[int] = []  # noqa: RUF012 - replaced, never changed

        def predict_noise(self, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            rows = self.rows if len(self.rows) == len(x) else [0] * len(x)
            out = None
            for prompt in sorted(set(rows)):
                chosen = torch.tensor([k for k, row in enumerate(rows) if row == prompt], device=x.device)
                self.conds["positive"] = self.conds[f"prompt {prompt}"]
                part = super().predict_noise(x[chosen], timestep[chosen], *args, **kwargs)
                out = torch.empty((len(x), *part.shape[1:]), dtype=part.dtype, device=part.device) if out is None else out
                out[chosen] = part
            assert out is not None
            return out

    guider = PromptGuider(patcher)
    named = {f"prompt {k}": cond for k, cond in enumerate(prompts)}
    guider.inner_set_conds({"positive": prompts[0], "negative": negative, **named})
    return guider


@dataclass
class _Denoiser:
    """D(x, level) at one guidance scale; `samples` tell which prompt each row has."""

    session: _Session
    scale: float
    samples: list[int] | None = None

    def for_samples(self, samples: list[int]) -> _Denoiser:
        """The same for these samples."""
        return _Denoiser(self.session, self.scale, samples)

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        s = self.session
        s.guider.set_cfg(self.scale)
        s.guider.rows = [k % s.prompts for k in self.samples] if self.samples else []
        s.denoised = s.model(x, level.to(x).expand(len(x)), **s.extra_args)
        return s.denoised


@dataclass
class _Session:
    """What the sampler function was called with; set for the time of the session."""

    guider: Any
    prompts: int
    model: Any = None
    extra_args: dict[str, Any] = field(default_factory=dict)
    denoised: Tensor | None = None

    def run(self, noise: Tensor, levels: Tensor, seed: int, work: Callable[[torch.device], EMSFile]) -> EMSFile:
        """`work(device)` within the host's sampling session."""
        import comfy.samplers

        result: list[EMSFile] = []

        def estimator(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, *_: Any, **__: Any) -> Tensor:
            self.model, self.extra_args = model, dict(extra_args or {})
            try:
                result.append(work(x.device))
            finally:
                self.model, self.denoised = None, None
            return torch.zeros_like(x)

        sampler = comfy.samplers.KSAMPLER(estimator)
        self.guider.sample(noise, torch.zeros_like(noise), sampler, levels, disable_pbar=True, seed=seed)
        return result[0]


def _run(session: _Session, levels: Tensor, r: Request, path: Path, work: Callable[..., EMSFile]) -> EMSFile:
    noise = torch.randn((r.batch, *r.shape), generator=torch.Generator().manual_seed(r.seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    ends = levels.sort().values[[-1, 0]].to(torch.float32)
    try:
        return session.run(noise, ends, r.seed, lambda device: work(device=device))
    except (EstimateError, SamplingError, DivergedError) as error:
        raise host.HostError(f"Compute EMS: {error}") from error
    except OSError as error:
        raise host.HostError(f"Compute EMS: {path} cannot be written ({error}): make room there, then queue again") from error
    except BaseException:
        host.LOG.info("Compute EMS stopped. What was measured is in %s.partial: queue the same again to go on", path)
        raise


def _rounds(sampling: Any) -> bool:
    """Whether the host rounds sigma to its table of time steps."""
    return any(c.__name__ == "ModelSamplingDiscrete" for c in type(sampling).__mro__)


def _host_schedules(given: tuple[str, ...], sampling: Any, space: Space) -> dict[str, Callable[[int], Tensor]]:
    import comfy.samplers

    known = list(getattr(comfy.samplers, "SCHEDULER_NAMES", ()))
    unknown = [n for n in given if n not in known]
    if unknown:
        raise host.HostError(f"unknown schedulers: {', '.join(unknown)}. Known: {', '.join(known)}")
    names = given or tuple(n for n in _SCHEDULERS[space] if n in known)
    return {n: partial(_levels_of, comfy.samplers.calculate_sigmas, sampling, n) for n in names}


def _levels_of(calculate: Callable[..., Tensor], sampling: Any, name: str, steps: int) -> Tensor:
    return calculate(sampling, name, steps).to("cpu", torch.float64)


class _Watch:
    """Progress bar, time left on the node, preview, and the host's cancel."""

    def __init__(self, job: Job, plan: CalibrationPlan, session: _Session, node: str, patcher: Any) -> None:
        self.session, self.node, self.watch = session, node, Watch(job, plan)
        self.bar = host.progress_bar(self.watch.total, node)
        self.preview = _previewer(patcher)
        self.shown = 0.0
        host.say(f"Compute EMS: {self.watch.total} evaluations", node)
        host.LOG.info("Compute EMS: %d evaluations", self.watch.total)

    def __call__(self, p: Progress) -> None:
        text, preview, now = self.watch.update(p), None, time.monotonic()
        if now - self.shown >= _PREVIEW_SECONDS:
            self.shown = now
            preview = self.preview(self.session.denoised)
            host.say(f"Compute EMS: {text}", self.node)
        self.bar(self.watch.done, preview)


def _previewer(patcher: Any) -> Callable[[Tensor | None], Any]:
    """Denoised -> the host's preview, or None where it makes none."""
    try:
        import latent_preview

        found = latent_preview.get_previewer(patcher.load_device, patcher.model.latent_format)
    except Exception as error:  # previews are a convenience
        host.LOG.debug("no previews: %s", error)
        found = None

    def preview(denoised: Tensor | None) -> Any:
        if found is None or denoised is None:
            return None
        try:
            return found.decode_latent_to_preview_image("JPEG", denoised)
        except Exception as error:
            host.LOG.debug("no preview: %s", error)
            return None

    return preview
