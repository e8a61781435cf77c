"""A pipeline as something to measure: loaded by a path or a name, identified so that other hosts find its statistics."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..ems_tools.embedded.denoiser import WEIGHTS
from ..ems_tools.estimate.job import EstimateError
from ..ems_tools.estimate.source import Source
from ..ems_tools.hosting.jobs import request_facts
from ..ems_tools.share.identity import ModelIdentity
from ..ems_tools.share.index import Hashes
from .embedded import EmbeddedPipeline
from .protocols import Pipeline
from .replay import PipelineDenoiser, Replay, inputs_of
from .spacing import end_level, spaced_levels

__all__ = ["PipelineRequest", "identity_of", "load_pipeline", "replay_of", "source_for"]

EMBEDDED = "embedded"
_ARCHITECTURES = {
    "StableDiffusionXL": "SDXL",
    "StableDiffusion3": "SD3",
    "StableDiffusion": "SD15",
    "Flux": "Flux",
    "PixArtAlpha": "PixArtAlpha",
    "PixArtSigma": "PixArtSigma",
    "Wan": "WAN21_T2V",
    "SanaPipeline": "Sana",
}
"""ComfyUI's names, by how the pipeline's name begins; the first that fits."""
_PREDICTIONS = {"epsilon": "EPS", "v_prediction": "V_PREDICTION", "sample": "X0", "flow_prediction": "FLOW"}


@dataclass(frozen=True)
class PipelineRequest:
    """Which pipeline, and how it is loaded and called.

    Args:
        place: a folder, a one-file checkpoint, a repository of the Hub, "embedded", or module:function that makes a pipeline.
        prompts: of the samples in turn.
        variant: of the weights' files, such as "fp16".
        dtype: of the weights.
        device: where it runs.
        size: height and width in pixels; None for the pipeline's own.
        offload: "" or "model" or "sequential": weights wait in main memory until they are used (needs accelerate).
        checkpoint: the same model as one file, as ComfyUI and the WebUIs load it: they find statistics by its hashes.
        extra: further arguments of the pipeline's call.
        name: of the model; "" for the place's.
    """

    place: str
    prompts: tuple[str, ...]
    variant: str | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    size: int | None = None
    offload: str = ""
    checkpoint: Path | None = None
    extra: Mapping[str, object] | None = None
    name: str = ""


def load_pipeline(request: PipelineRequest) -> Pipeline:
    """The pipeline, on its device. Raises EstimateError that says what cannot be loaded, and why."""
    place = request.place
    try:
        if place == EMBEDDED:
            pipe: Any = EmbeddedPipeline.load()
        elif ":" in place and not Path(place).exists():
            pipe = _made(place)
        elif Path(place).is_file():
            pipe = _single_file(place, request.dtype)
        else:
            pipe = DiffusionPipeline.from_pretrained(place, variant=request.variant, torch_dtype=request.dtype)
    except (OSError, ValueError, ImportError, AttributeError, KeyError) as error:
        raise EstimateError(f"--diffusers {place} cannot be loaded: {error}") from error
    if not isinstance(pipe, DiffusionPipeline) or not hasattr(pipe, "scheduler"):
        raise EstimateError(f"--diffusers {place} is {type(pipe).__name__}, no pipeline with a scheduler")
    if request.offload:
        try:
            offload = {"model": pipe.enable_model_cpu_offload, "sequential": pipe.enable_sequential_cpu_offload}[
                request.offload
            ]
            offload(device=request.device)
        except (ImportError, RuntimeError, ValueError) as error:
            raise EstimateError(f"--offload {request.offload} is not possible here: {error}") from error
        return pipe
    return pipe.to(request.device)  # its dtype is what it was loaded or made with


def _made(place: str) -> object:
    """What module:function returns; the current folder is searched first."""
    module, _, function = place.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), function)()
    finally:
        sys.path.pop(0)


def _single_file(place: str, dtype: torch.dtype) -> object:
    """A pipeline from one checkpoint file. Which pipeline it is stands in the file's keys; diffusers tells by trying."""
    import diffusers

    problems = []
    for name in ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionPipeline"):
        try:
            return getattr(diffusers, name).from_single_file(place, torch_dtype=dtype)
        except Exception as error:  # it fails in many ways, and all of them mean: another pipeline
            problems.append(f"{name}: {error}")
    raise ValueError("; ".join(problems))


def source_for(pipe: Pipeline, request: PipelineRequest, scales: Sequence[float]) -> Source:
    """What `ems_tools` measures: the pipeline's denoisers at these guidance scales. Raises EstimateError."""
    replay = replay_of(pipe, request)
    models = {float(g): PipelineDenoiser(replay, float(g)) for g in scales}
    facts = {**identity_of(pipe, request).facts(), **request_facts("\0".join(request.prompts))}
    return Source(models, replay.shape, replay.noise.schedule, facts, host_schedules={"diffusers": own_schedule(replay)})


def replay_of(pipe: Pipeline, request: PipelineRequest) -> Replay:
    """The pipeline, ready to be asked for its denoiser. Raises EstimateError."""
    return Replay(pipe, inputs_of(pipe, request.prompts, request.size, request.extra))


def own_schedule(replay: Replay) -> Callable[[int], Tensor]:
    """The steps that the pipeline takes by itself: n to host levels [n + 1] that fall strictly."""
    config, noise, mu = replay.config, replay.noise, replay.mu

    def levels(n: int) -> Tensor:
        end = torch.tensor([end_level(noise, config)], dtype=torch.float64)
        return torch.unique_consecutive(torch.cat([spaced_levels(noise, config, n, mu), end]))

    return levels


def identity_of(pipe: Pipeline, request: PipelineRequest) -> ModelIdentity:
    """What is known of the model: of the one-file checkpoint where there is one, else of the denoising network's own file.

    A repository's folder may hold the checkpoint that it was converted from; if it is the only such file, it is taken.
    """
    place, kind = Path(request.place), type(pipe).__name__
    architecture = next((name for start, name in _ARCHITECTURES.items() if kind.startswith(start)), kind)
    prediction = str(pipe.scheduler.config.get("prediction_type", "flow_prediction"))
    file = request.checkpoint or (place if place.is_file() else _only(place, "*.safetensors"))
    file = file or next(filter(None, (_only(place / part, "*.safetensors") for part in ("transformer", "unet"))), None)
    name = request.name or (file.stem if file is not None and file.parent == place else place.name.split(":")[-1])
    identity = ModelIdentity(name=name, architecture=architecture, prediction=_PREDICTIONS.get(prediction, prediction))
    if file is None and request.place == EMBEDDED:
        file = WEIGHTS
    if file is None:
        return identity
    try:
        hashes = Hashes.of_checkpoint(file)
    except OSError as error:
        raise EstimateError(f"{file} cannot be read: {error}") from error
    return ModelIdentity(name, hashes.content, "", hashes.sha256, architecture, identity.prediction)


def _only(folder: Path, pattern: str) -> Path | None:
    """The one file of this pattern, None if there are more, or none."""
    found = sorted(folder.glob(pattern)) if folder.is_dir() else []
    return found[0] if len(found) == 1 else None
