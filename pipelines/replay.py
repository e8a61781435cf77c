"""The guided denoiser of any pipeline, without knowing its parts: the pipeline itself is run, for one step at a time.

The pipeline gets a scheduler whose only time step is the one that is asked for, and whose `step` leaves the pipeline with the
model's output by an exception. Conditioning, guidance and packing are the pipeline's own work by then. So nothing here
knows Stable Diffusion from Flux, and nothing runs after the model.
Prompts are encoded once for each batch: what `encode_prompt` returns is kept.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from ..ems_tools.estimate.job import EstimateError
from .layout import Layout, layout_for
from .noise import FlowNoise, Noise
from .protocols import Config, Pipeline, Scheduler
from .scheduler import DPMSolverV3Scheduler
from .spacing import flow_shift

__all__ = ["PipelineDenoiser", "Replay", "inputs_of"]

Inputs = Callable[[list[int]], Mapping[str, object]]
_ENCODE = "encode_prompt"
_KEPT = 4
"""Encoded batches of prompts that are kept; a trajectory uses one."""


class _Answer(Exception):
    """The model's output, and the latents that it was called with."""

    def __init__(self, output: Tensor, sample: Tensor) -> None:
        super().__init__()
        self.output, self.sample = output, sample


class _OneStep(DPMSolverV3Scheduler):
    """A scheduler with one time step, at `level`, that leaves the pipeline with the model's output."""

    level = 1.0
    mu: float | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """The one step; what dynamic shifting would have been is kept."""
        self.mu = mu
        if isinstance(self._noise, FlowNoise) and mu is not None:
            self._noise = replace(self._noise, shift=flow_shift(self.config, mu))
        self._settle(torch.tensor([self.level], dtype=torch.float64), 0.0, device, 1.0)

    def step(self, model_output: Tensor, timestep: object, sample: Tensor, *args: object, **options: object) -> NoReturn:
        """Leave the pipeline."""
        raise _Answer(model_output, sample)


def inputs_of(
    pipe: Pipeline, prompts: Sequence[str], size: int | None = None, extra: Mapping[str, object] | None = None
) -> Inputs:
    """The arguments of a call for a batch of samples, sample k having the prompt k mod n, or the class k mod n.

    Raises EstimateError for a pipeline that takes no latents.
    """
    known = inspect.signature(pipe.__call__).parameters
    if "latents" not in known:
        raise EstimateError(f"{type(pipe).__name__} takes no latents, so that it cannot be asked for its denoiser")
    fixed: dict[str, object] = {} if size is None else {k: size for k in ("height", "width") if k in known}
    fixed |= dict(extra or {})
    unknown = sorted(set(fixed) - set(known))
    if unknown:
        raise EstimateError(f"{type(pipe).__name__} has no argument {', '.join(unknown)}")

    def inputs(samples: list[int]) -> Mapping[str, object]:
        if "prompt" in known:
            return {**fixed, "prompt": [prompts[k % len(prompts)] for k in samples]}
        if "class_labels" in known:
            classes = _classes(pipe)
            return {**fixed, "class_labels": [k % classes for k in samples]}
        return fixed

    return inputs


def _classes(pipe: object) -> int:
    config = getattr(getattr(pipe, "transformer", None) or getattr(pipe, "unet", None), "config", {})
    return int(config.get("num_classes") or config.get("num_embeds_ada_norm") or config.get("num_class_embeds") or 1)


@dataclass
class Replay:
    """A pipeline, asked for its denoised latents at any level.

    Args:
        pipe: a pipeline; its scheduler stays what it is.
        inputs: arguments of its call for a batch of samples, see `inputs_of`; guidance and latents come from here.
    """

    pipe: Pipeline
    inputs: Inputs
    _scheduler: _OneStep = field(init=False)
    _encoded: OrderedDict[str, object] = field(init=False, default_factory=OrderedDict)

    def __post_init__(self) -> None:
        config = {k: v for k, v in self.pipe.scheduler.config.items() if k != "ems"}
        self._scheduler = _OneStep.from_config(config)
        known = inspect.signature(self.pipe.__call__).parameters
        scales = [name for name in ("guidance_scale", "true_cfg_scale") if name in known]
        self._scale = scales[0] if scales else None
        answer = self._answer([0], None, 1.0, self.noise.schedule.level_at(torch.tensor(0.5)).item())
        self.native = tuple(answer.sample.shape[1:])
        self.layout: Layout = layout_for(answer.sample.shape, self._channels(answer.sample))
        self.shape = tuple(self.layout.channels_first(answer.sample).shape[1:])
        self.dtype: torch.dtype = answer.sample.dtype

    @property
    def noise(self) -> Noise:
        """The noise of the pipeline's model."""
        return self._scheduler._noise

    @property
    def config(self) -> Config:
        """Of a scheduler of ours for the pipeline's model."""
        config: Config = self._scheduler.config
        return config

    @property
    def mu(self) -> float | None:
        """What the pipeline passed for dynamic shifting."""
        return self._scheduler.mu

    def denoised(self, x: Tensor, level: float, guidance: float, samples: list[int]) -> Tensor:
        """D [B, C, ...] in x's dtype, of the solver's x [B, C, ...] at `level`."""
        host = self.layout.as_given(x * self.noise.scale(level)).to(self.dtype)
        output = self._answer(samples, host, guidance, level).output
        if self._scheduler.config.variance_type is not None and output.shape[1] == 2 * host.shape[1]:
            output = output.chunk(2, dim=1)[0]
        p, q = self.noise.factors(level, self._scheduler.config.prediction_type)
        return torch.add(p * x, self.layout.channels_first(output).to(x.dtype), alpha=q)

    def run(self, scheduler: Scheduler, latents: Tensor, guidance: float, steps: int, samples: list[int]) -> Tensor:
        """The pipeline's own final latents with another scheduler, from these native latents [B, ...]."""
        with self._in_place(scheduler):
            final: Tensor = self.pipe(**self._arguments(samples, latents, guidance, steps), return_dict=False)[0]
        return final

    def _answer(self, samples: list[int], latents: Tensor | None, guidance: float, level: float) -> _Answer:
        self._scheduler.level = level
        with self._in_place(self._scheduler):
            try:
                self.pipe(**self._arguments(samples, latents, guidance, 1))
            except _Answer as answer:
                return answer
        raise EstimateError(f"{type(self.pipe).__name__} ended without a step of its scheduler: it cannot be measured")

    def _arguments(self, samples: list[int], latents: Tensor | None, guidance: float, steps: int) -> dict[str, object]:
        scale = {self._scale: guidance} if self._scale else {}
        given = {"num_inference_steps": steps, "output_type": "latent", "latents": latents}
        return {**self.inputs(samples), **given, **scale}

    @contextmanager
    def _in_place(self, other: Scheduler) -> Iterator[None]:
        """The pipeline with another scheduler, without a progress bar, and with prompts encoded once."""
        pipe, scheduler, bar = self.pipe, self.pipe.scheduler, getattr(self.pipe, "_progress_bar_config", {})
        pipe.scheduler = other
        pipe.set_progress_bar_config(**{**bar, "disable": True})
        if hasattr(type(pipe), _ENCODE):
            vars(pipe)[_ENCODE] = self._encode
        try:
            yield
        finally:
            pipe.scheduler = scheduler
            pipe.set_progress_bar_config(**bar)
            vars(pipe).pop(_ENCODE, None)

    def _encode(self, *args: object, **options: object) -> object:
        """`encode_prompt`, unless it was asked the same before."""
        encode: Callable[..., object] = partial(getattr(type(self.pipe), _ENCODE), self.pipe)
        given = [*args, *options.values()]
        if any(isinstance(v, Tensor) for v in given):
            return encode(*args, **options)
        key = repr((args, sorted(options.items())))
        if key not in self._encoded:
            self._encoded[key] = encode(*args, **options)
            while len(self._encoded) > _KEPT:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(key)
        return self._encoded[key]

    def _channels(self, sample: Tensor) -> int:
        """Channels of the latents, by the autoencoder, else by where most pipelines have them."""
        config = getattr(getattr(self.pipe, "vae", None), "config", {})
        channels = config.get("latent_channels") or config.get("z_dim")
        return int(channels or sample.shape[1])


@dataclass(frozen=True)
class PipelineDenoiser:
    """D(x, level) of a pipeline at one guidance scale, for `ems_tools`: the solver's x [B, C, ...] to x0 [B, C, ...].

    `samples` are the indices in the job of the batch's samples, which choose the prompts.
    """

    replay: Replay
    guidance: float
    samples: tuple[int, ...] | None = None

    def for_samples(self, samples: list[int]) -> PipelineDenoiser:
        """The denoiser for a batch made of these samples."""
        return PipelineDenoiser(self.replay, self.guidance, tuple(samples))

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D of x at the host's levels [B], which are equal: a pipeline has one time step for a batch."""
        samples = list(range(len(x)) if self.samples is None else self.samples)[: len(x)]
        return self.replay.denoised(x, float(sigma.flatten()[0]), self.guidance, samples)
