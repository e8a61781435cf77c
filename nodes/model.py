"""A model that samples, as far as the host says: its noise levels, its guidance scale, and what changes the guidance."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ems_tools.hosting import Run
from ..sampler import LevelTable, Space
from .host import LOG, HostError
from .protocols import Guider, Latent, ModelSampling, Options, Patcher

__all__ = [
    "Running",
    "changes_of",
    "is_plain",
    "latent_of",
    "level_table",
    "model_sampling_of",
    "run_of_guider",
    "running",
    "scale_name",
    "space_of",
    "start_of",
    "streams_of",
    "words_of_guider",
]

_FUNCTIONS = (
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "sampler_calc_cond_batch_function",
    "model_function_wrapper",
)
"""Keys of `model_options` whose functions stand between the network and the denoised."""
_WRAPPERS = ("predict_noise", "calc_cond_batch", "diffusion_model")
"""Kinds of wrappers that do; those around the whole run or around the loading do not change what is denoised."""
_MOST = 400


def model_sampling_of(patcher: Patcher | None) -> ModelSampling | None:
    """The model's `model_sampling`, patches (shift, ZSNR, ...) included; None if there is none."""
    get = getattr(patcher, "get_model_object", None)
    if callable(get):
        try:
            found: ModelSampling | None = get("model_sampling")
            return found
        except Exception as error:
            LOG.debug("get_model_object: %s", error)
    return getattr(getattr(patcher, "model", None), "model_sampling", None)


def space_of(model_sampling: ModelSampling | None) -> Space:
    """Rectified flow (CONST: x = (1 - t) x0 + t n), or x = x0 + sigma n for everything else."""
    return Space.FLOW if any(c.__name__ == "CONST" for c in type(model_sampling).__mro__) else Space.SIGMA


def level_table(model_sampling: ModelSampling | None) -> LevelTable:
    """The host's noise levels as a schedule. Raises HostError if the model has none."""
    levels = getattr(model_sampling, "sigmas", None)
    if not isinstance(levels, Tensor) or levels.ndim != 1 or len(levels) < 2:
        raise HostError("this model has no table of noise levels (model_sampling.sigmas): use one of ComfyUI's schedulers")
    values = levels.detach().to("cpu", torch.float64).sort().values.unique_consecutive()
    try:
        return LevelTable(values[values > 0], space_of(model_sampling))
    except ValueError as error:
        raise HostError(f"this model's noise levels cannot be used: {error}") from error


def start_of(model_sampling: ModelSampling | None, table: LevelTable) -> float:
    """What the host begins a run at its noisiest level with, over noise times that level; 1 where it does not say.

    For most models it is noise times sqrt(1 + sigma^2), and at any other level noise times sigma: steps that begin later have
    to make up for the difference, or they end in another picture than all other samplers.
    """
    scaled, level = getattr(model_sampling, "noise_scaling", None), table.level_at(torch.tensor([table.time_max]))
    if not callable(scaled):
        return 1.0
    try:
        found = float(scaled(level.float(), torch.ones(1), torch.zeros(1), True)) / float(level)
    except Exception as error:
        LOG.debug("noise_scaling: %s", error)
        return 1.0
    return found if 0.5 < found < 2 else 1.0


@dataclass(frozen=True)
class Running:
    """What a sampler function can know of the model it was given; None where the host does not say.

    Args:
        guider: the host's guider.
        patcher: the MODEL behind it.
        sampling: `model_sampling`, patches included.
        guidance: the guidance scale; 1 for guiders that have none.
    """

    guider: Guider | None
    patcher: Patcher | None
    sampling: ModelSampling | None
    guidance: float

    @property
    def space(self) -> Space:
        """What x and sigma are."""
        return space_of(self.sampling)

    def facts(self) -> Run:
        """The same for `hosting`. Raises HostError for a model without noise levels."""
        return Run(level_table(self.sampling), self.guidance, words_of_guider(self.guider, self.patcher))


def running(model: Any) -> Running:
    """From the `model` of a sampler function, through as many wrappers (`.inner_model`) as packs put around it."""
    guider, patcher, sampling = None, None, None
    for _ in range(8):
        if model is None:
            break
        patcher = patcher or getattr(model, "model_patcher", None)
        if guider is None and getattr(model, "model_patcher", None) is not None:
            guider = model
        sampling = sampling or getattr(model, "model_sampling", None)
        model = getattr(model, "inner_model", None)
    sampling = (model_sampling_of(patcher) if patcher is not None else None) or sampling
    return Running(guider, patcher, sampling, _scale(guider))


def streams_of(patcher: Patcher | None, x: Tensor) -> list[tuple[int, ...]]:
    """Shapes [C, ...] of the latents that the host has packed into x [B, 1, N] (video with sound, say); one for a plain latent.

    Releases from 0.30 on say it. Before, a single row of numbers is taken for a pack of unknown ones: () stands for each.
    """
    told = getattr(getattr(patcher, "model", None), "latent_shapes", None)
    shapes = [tuple(shape[1:]) for shape in told] if isinstance(told, (list, tuple)) else []
    if shapes and sum(map(math.prod, shapes)) == x[:1].numel():
        return shapes
    return [(), ()] if x.ndim == 3 and x.shape[1] == 1 else [tuple(x.shape[1:])]


def scale_name(guider: Guider | None) -> str:
    """The guider's attribute that holds its guidance scale: of a dual guider that of the outer one; its `cfg` is not set."""
    return "cfg1" if hasattr(guider, "cfg1") else "cfg"


def _scale(guider: Guider | None) -> float:
    scale = getattr(guider, scale_name(guider), None)
    return float(scale) if isinstance(scale, (int, float)) else 1.0


def run_of_guider(guider: Guider, sampler: str | None = None) -> Run:
    """What a GUIDER says of a run before it begins. Raises HostError for a model without noise levels."""
    patcher = guider.model_patcher
    return Run(level_table(model_sampling_of(patcher)), _scale(guider), words_of_guider(guider, patcher), sampler)


def words_of_guider(guider: Guider | None, patcher: Patcher | None) -> str:
    """What changes classifier-free guidance, in words that are the same whenever the same does: "" for nothing.

    A guider that predicts as core's CFGGuider does is plain guidance; any other is named with its numbers, and so are the
    patches of its MODEL.
    """
    named = (
        [] if guider is None or is_plain(guider) else [_name(type(guider).__name__, _numbers(vars(guider), scale_name(guider)))]
    )
    words = ", ".join([*named, *changes_of(patcher)])
    return words if len(words) <= _MOST else words[: _MOST - 3] + "..."


def is_plain(guider: Guider) -> bool:
    """Whether the guider predicts as core's CFGGuider does."""
    import comfy.samplers

    return getattr(type(guider), "predict_noise", None) is comfy.samplers.CFGGuider.predict_noise


def changes_of(patcher: Patcher | None) -> list[str]:
    """The MODEL's patches that change what is denoised (not LoRAs: weights are the identity's), each once, in their order."""
    options: Options = getattr(patcher, "model_options", None) or {}
    parts = [part for key in _FUNCTIONS for part in _listed(options.get(key))]
    wrappers: Options = getattr(patcher, "wrappers", None) or {}
    parts += [part for kind in _WRAPPERS for group in (wrappers.get(kind) or {}).values() for part in _listed(group)]
    transformer: Options = options.get("transformer_options") or {}
    for key in ("patches", "patches_replace"):
        for group in (transformer.get(key) or {}).values():
            parts += list(group.values()) if isinstance(group, Mapping) else _listed(group)
    return list(dict.fromkeys(map(_title, parts)))


def _listed(value: object) -> list[object]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _title(part: object) -> str:
    """The node that a patch comes from, as its function's name shows, and the numbers that it was made with."""
    while isinstance(part, functools.partial):
        part = part.func
    if not callable(getattr(part, "__code__", None)) and not hasattr(part, "__qualname__"):
        return _name(type(part).__name__, {})
    name = str(getattr(part, "__qualname__", type(part).__name__)).split(".")[0]
    return _name(name, dict(_captured(part)))


def _captured(function: object) -> Iterator[tuple[str, object]]:
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, getattr(function, "__closure__", None) or ()):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def _numbers(values: Mapping[str, object], leave: str) -> dict[str, object]:
    unset = "cfg" if leave == "cfg1" else ""
    return {k: v for k, v in values.items() if k not in (leave, unset) and not k.startswith("_")}


def _name(name: str, values: Mapping[str, object]) -> str:
    said = [f"{k}={v:g}" for k, v in sorted(values.items()) if isinstance(v, (bool, int, float))]
    words = " ".join([name.removeprefix("Guider_"), *said])
    return "".join(c if c.isprintable() else "?" for c in words)


def latent_of(patcher: Patcher, latent: Latent) -> Tensor:
    """The LATENT's tensor with as many channels and axes as the model wants (as core's samplers do)."""
    import comfy.sample

    samples: Tensor = latent["samples"]
    fix = getattr(comfy.sample, "fix_empty_latent_channels", None)
    if not callable(fix):
        return samples
    ratios = [latent.get(f"downscale_ratio_{kind}", None) for kind in ("spacial", "temporal")]
    for given in (ratios, ratios[:1], []):  # releases from 0.22 on, from 0.11 on, and before
        try:
            found: Tensor = fix(patcher, samples, *given)
        except TypeError:
            continue
        return found
    return samples
