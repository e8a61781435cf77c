"""The estimator inside ComfyUI's own sampling session: guider, denoiser, progress. For the node "Compute EMS".

So memory management, LoRA, ControlNet, hooks and offloading are the host's. One session holds all guidance scales and
prompts: the guider below changes its scale and its positive conditioning between evaluations.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..ems_tools.compute import EFFORTS, compute_ems, job_for, plan_for
from ..ems_tools.estimate.job import EstimateError, Job, Progress
from ..ems_tools.estimate.source import Source
from ..ems_tools.file.contents import EMSFile
from ..ems_tools.hosting.jobs import Watch, place_for, request_facts
from ..ems_tools.judge.calibrate import CalibrationPlan
from ..sampler import SamplingError, Space
from . import host
from .model import is_plain, level_table, model_sampling_of, scale_name, start_of
from .protocols import Conditioning, Guider, ModelSampling, Options, Patcher

__all__ = ["Request", "measure", "prompted"]

_PREVIEW_SECONDS = 1.0
_SCHEDULERS = {Space.SIGMA: ("normal", "karras"), Space.FLOW: ("simple", "beta")}


@dataclass(frozen=True)
class Request:
    """What to measure.

    Args:
        guider: the run that is measured: its MODEL, its guidance, its other conditionings.
        prompts: CONDITIONINGs that take the place of its positive one.
        shape: latent [C, ...].
        identity: of the model, for the file.
        scales: guidance scales.
        effort: name of the effort.
        name: of the file.
        batch: samples at once.
        seed: of the samples.
        keep_moments: for Merge EMS.
        schedulers: host's names, () for the usual ones.
        steps: step counts to fit, () for the effort's.
        node: id of the node.
        passes: fit steps in fewer passes as well, which needs plain guidance.
        image_to_image: fit steps for image to image as well.
    """

    guider: Guider
    prompts: list[Conditioning]
    shape: tuple[int, ...]
    identity: dict[str, str]
    scales: tuple[float, ...]
    effort: str
    name: str
    batch: int
    seed: int
    keep_moments: bool
    schedulers: tuple[str, ...]
    steps: tuple[int, ...]
    node: str
    passes: bool = False
    image_to_image: bool = False


def measure(r: Request) -> tuple[EMSFile, Path]:
    """The finished file, and where it lies. Raises HostError with what to do, and the host's interrupt."""
    sampling = model_sampling_of(r.guider.model_patcher)
    table = level_table(sampling)
    session = _Session(prompted(r.guider, r.prompts), len(r.prompts))
    schedules = _host_schedules(r.schedulers, sampling, table.space)
    facts = {**r.identity, **request_facts(_digest([r.prompts, r.guider.original_conds]), tuple(schedules))}
    source = Source(
        models={g: _Denoiser(session, g) for g in r.scales},
        shape=r.shape,
        schedule=table,
        identity=facts,
        levels=table.levels if _rounds(sampling) else None,
        host_schedules=schedules,
        conditional=_Denoiser(session, 1.0) if is_plain(r.guider) else None,
        start=start_of(sampling, table),
    )
    job = job_for(source, EFFORTS[r.effort], r.seed, r.steps)
    plan = plan_for(source, EFFORTS[r.effort], r.steps, r.passes, r.image_to_image)
    folder = host.output_folder()
    path, done = place_for(folder, r.name, source, job, plan, host.log, keep_moments=r.keep_moments)
    if done is None:
        watch = _Watch(job, plan, session, r.node, r.guider.model_patcher)
        work = partial(compute_ems, source, job, plan, path, batch=r.batch, keep_moments=r.keep_moments, progress=watch)
        done = _run(session, table.levels, r, path, work)
    return done, path


def prompted(guider: Guider, prompts: list[Conditioning]) -> Guider:
    """A copy of the guider over several positive conditionings; its `rows` (prompt of each sample) choose.

    Its `predict_noise` is the guider's own for every prompt in turn, so whatever it does to the guidance is done here too.
    """
    own = copy.copy(guider)
    own.original_conds = dict(guider.original_conds)
    named = {f"prompt {k}": cond for k, cond in enumerate(prompts)}
    own.inner_set_conds({"positive": prompts[0], **named})
    plain = own.predict_noise

    def predict_noise(x: Tensor, timestep: Tensor, *args: object, **kwargs: object) -> Tensor:
        rows = own.rows if len(own.rows) == len(x) else [0] * len(x)
        out = None
        for prompt in sorted(set(rows)):
            chosen = torch.tensor([k for k, row in enumerate(rows) if row == prompt], device=x.device)
            own.conds["positive"] = own.conds[f"prompt {prompt}"]
            part = plain(x[chosen], timestep[chosen], *args, **kwargs)
            out = torch.empty((len(x), *part.shape[1:]), dtype=part.dtype, device=part.device) if out is None else out
            out[chosen] = part
        assert out is not None
        return out

    own.rows = []
    own.predict_noise = predict_noise  # type: ignore[method-assign]
    return own


def _digest(value: object) -> str:
    """Text that differs wherever tensors, numbers or texts in nested lists and dictionaries do."""
    if isinstance(value, Tensor):
        data = value.detach().to("cpu", torch.float32).contiguous()
        return f"{tuple(value.shape)}{hashlib.sha256(data.numpy().tobytes()).hexdigest()}"
    if isinstance(value, Mapping):
        return "".join(f"{k}:{_digest(v)};" for k, v in value.items() if not str(k).startswith("uuid"))
    if isinstance(value, (list, tuple)):
        return "".join(f"{_digest(v)}," for v in value)
    return repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__


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
        assert s.model is not None  # while the host's session runs
        setattr(s.guider, scale_name(s.guider), self.scale)
        s.guider.rows = [k % s.prompts for k in self.samples] if self.samples else []
        s.denoised = s.model(x, level.to(x).expand(len(x)), **s.extra_args)
        return s.denoised


@dataclass
class _Session:
    """What the sampler function was called with; set for the time of the session."""

    guider: Guider
    prompts: int
    model: Callable[..., Tensor] | None = None
    extra_args: dict[str, object] = field(default_factory=dict)
    denoised: Tensor | None = None

    def run(self, noise: Tensor, levels: Tensor, seed: int, work: Callable[[torch.device], EMSFile]) -> EMSFile:
        """`work(device)` within the host's sampling session."""
        import comfy.samplers

        result: list[EMSFile] = []

        def estimator(
            model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, extra_args: Options | None = None, *_: object, **__: object
        ) -> Tensor:
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
    except (EstimateError, SamplingError) as error:
        raise host.HostError(f"Compute EMS: {error}") from error
    except OSError as error:
        raise host.HostError(f"Compute EMS: {path} cannot be written ({error}): make room there, then queue again") from error
    except BaseException:
        host.log(f"Compute EMS stopped. What was measured is in {path}.partial: queue the same again to go on")
        raise


def _rounds(sampling: ModelSampling | None) -> bool:
    """Whether the host rounds sigma to its table of time steps."""
    return any(c.__name__ == "ModelSamplingDiscrete" for c in type(sampling).__mro__)


def _host_schedules(given: tuple[str, ...], sampling: ModelSampling | None, space: Space) -> dict[str, Callable[[int], Tensor]]:
    import comfy.samplers

    known = list(getattr(comfy.samplers, "SCHEDULER_NAMES", ()))
    unknown = [n for n in given if n not in known]
    if unknown:
        raise host.HostError(f"unknown schedulers: {', '.join(unknown)}. Known: {', '.join(known)}")
    names = given or tuple(n for n in _SCHEDULERS[space] if n in known)
    return {n: partial(_levels_of, comfy.samplers.calculate_sigmas, sampling, n) for n in names}


def _levels_of(calculate: Callable[..., Tensor], sampling: object, name: str, steps: int) -> Tensor:
    return calculate(sampling, name, steps).to("cpu", torch.float64)


class _Watch:
    """Progress bar, time left on the node, preview, and the host's cancel."""

    def __init__(self, job: Job, plan: CalibrationPlan, session: _Session, node: str, patcher: Patcher) -> None:
        self.session, self.node, self.watch = session, node, Watch(job, plan)
        self.bar = host.progress_bar(self.watch.total, node)
        self.preview = _previewer(patcher)
        self.shown = 0.0
        host.say(f"{self.watch.total:,} evaluations", node)
        host.log(f"Compute EMS: {self.watch.total} evaluations")

    def __call__(self, p: Progress) -> None:
        text, preview, now = self.watch.update(p), None, time.monotonic()
        if now - self.shown >= _PREVIEW_SECONDS:
            self.shown = now
            preview = self.preview(self.session.denoised)
            host.say(text, self.node)
        self.bar(self.watch.done, preview)


def _previewer(patcher: Patcher) -> Callable[[Tensor | None], object]:
    """Denoised -> the host's preview, or None where it makes none."""
    try:
        import latent_preview

        found = latent_preview.get_previewer(patcher.load_device, patcher.get_model_object("latent_format"))
    except Exception as error:  # previews are a convenience
        host.LOG.debug("no previews: %s", error)
        found = None

    def preview(denoised: Tensor | None) -> object:
        if found is None or denoised is None:
            return None
        try:
            return found.decode_latent_to_preview_image("JPEG", denoised)
        except Exception as error:
            host.LOG.debug("no preview: %s", error)
            return None

    return preview
