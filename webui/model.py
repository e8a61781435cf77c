"""The host's model as a sampler or a schedule sees it: its noise levels, its guidance, and which checkpoint it is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..ems_tools.share.identity import FingerprintCache, ModelIdentity, one_line_of
from ..sampler import LevelTable, Space
from . import host
from .objects import Denoiser, Model, Processing, Wrap

__all__ = [
    "Running",
    "asking",
    "channels_of",
    "checkpoint_of",
    "guider_of",
    "identity_of",
    "level_table",
    "rounds_levels",
    "running",
    "sampler_name",
    "step_schedules",
]

_SCHEDULERS = {Space.SIGMA: ("Automatic", "Karras"), Space.FLOW: ("Simple", "Beta")}
_GUIDANCE_PATCHES = ("sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function")
"""Entries of `unet.model_options` in Forge and reForge, by which extensions change what guidance returns."""


@dataclass(frozen=True)
class Running:
    """What a sampler function can know of the model that it was given (the host's CFGDenoiser).

    Args:
        p: the processing object (prompt, sizes, overrides); None where the host does not say.
        wrap: the k-diffusion wrapper with the noise levels.
        model: the checkpoint's model.
        predictor: what turns the network's output into x0, if the host has an object for it.
    """

    p: Processing | None
    wrap: Wrap | None
    model: Model | None
    predictor: object

    @property
    def space(self) -> Space:
        """Rectified flow, or x = x0 + sigma n for everything else."""
        kinds = [c.__name__ for c in type(self.predictor).__mro__]
        if getattr(self.predictor, "prediction_type", None) == "const" or "CONST" in kinds:
            return Space.FLOW
        if any("Flow" in name for name in kinds) or getattr(self.model, "is_sd3", False):
            return Space.FLOW
        return Space.SIGMA

    def guidance(self, asked: object) -> float:
        """The CFG scale of this pass, of which the host says `asked`; Forge's and reForge's hires pass has its own."""
        own = getattr(self.p, "hr_cfg", None) if getattr(self.p, "is_hr_pass", False) else None
        scale = own if isinstance(own, (int, float)) and own > 0 else asked
        return float(scale) if isinstance(scale, (int, float)) else 1.0


def running(denoiser: Denoiser) -> Running:
    """From the `model` argument of a sampler function."""
    return _running(getattr(denoiser, "inner_model", None), getattr(denoiser, "p", None))


def asking(wrap: Wrap) -> Running:
    """From the `inner_model` argument of a schedule's function. `p` is read from the caller's frame: no host hands it over."""
    frame = sys._getframe(1)
    for _ in range(12):
        p = frame.f_locals.get("p")
        if hasattr(p, "cfg_scale") or frame.f_back is None:
            break
        frame = frame.f_back
    return _running(wrap, p if hasattr(p, "cfg_scale") else None)


def _running(wrap: Wrap | None, p: Processing | None) -> Running:
    model = getattr(wrap, "inner_model", None) or host.shared("sd_model")
    places = (wrap, _chain(model, "forge_objects", "unet", "model"), _chain(model, "model"))
    names = ("predictor", "model_sampling")
    predictor = next((v for place in places for name in names if (v := getattr(place, name, None)) is not None), None)
    return Running(p, wrap, cast(Model, model), predictor)


def _chain(start: object, *names: str) -> object:
    for name in names:
        start = getattr(start, name, None)
    return start


def sampler_name(p: Processing | None) -> str | None:
    """Of the sampler that asks for a schedule, as the host's list has it; None if unknown."""
    name = _chain(p, "sampler", "config", "name")
    return name if isinstance(name, str) else None


def channels_of(p: Processing | None) -> int | None:
    """Latent channels of the picture, by the shape of its noise; None where the host does not say."""
    shape = _chain(p, "rng", "shape")
    first = shape[0] if isinstance(shape, (tuple, list, torch.Size)) and len(shape) > 0 else None
    return first if isinstance(first, int) else None


def guider_of(run: Running) -> str:
    """What changes classifier-free guidance in this pass, in words that a file keeps; "" for nothing."""
    options = _chain(run.model, "forge_objects", "unet", "model_options")
    found = []
    for key in _GUIDANCE_PATCHES:
        entry = options.get(key) if isinstance(options, dict) else None
        found += [_function_name(f) for f in (entry if isinstance(entry, (list, tuple)) else [entry]) if f is not None]
    if getattr(run.model, "use_distilled_cfg_scale", False):
        own = "hr_distilled_cfg" if getattr(run.p, "is_hr_pass", False) else "distilled_cfg_scale"
        scale = getattr(run.p, own, None)
        found += [f"distilled CFG {float(scale):g}"] if isinstance(scale, (int, float)) else []
    return one_line_of(", ".join(dict.fromkeys(found)))


def _function_name(function: object) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}.{name}".replace(".<locals>", "")[-100:].lstrip(".")


def checkpoint_of(model: Model | None) -> str | int:
    """What tells the loaded checkpoint from another one: its file, or the model object itself."""
    return getattr(getattr(model, "sd_checkpoint_info", None), "filename", None) or id(model)


_CACHES: dict[Path, FingerprintCache] = {}


def _fingerprints() -> FingerprintCache:
    path = host.data_folder() / "cache" / "dpm-solver-v3-fingerprints.json"
    return _CACHES.setdefault(path, FingerprintCache(path))


def identity_of(run: Running) -> ModelIdentity:
    """The checkpoint's: the host's SHA-256 where it has one (not with --no-hashing), our fingerprint, and its name."""
    info = getattr(run.model, "sd_checkpoint_info", None)
    path = getattr(info, "filename", None)
    content = ""
    if path:
        try:
            content = _fingerprints().fingerprint(path)
        except OSError as error:
            host.log(f"{path} cannot be read: {error}")
    return ModelIdentity(
        name=os.path.splitext(os.path.basename(path or ""))[0],
        content=content,
        sha256=str(getattr(info, "sha256", None) or ""),
        architecture=_architecture(run.model),
        prediction=_prediction(run),
        patches=_loras(run.p),
    )


def _architecture(model: object) -> str:
    """Named as in ComfyUI, so that files can be shared."""
    for config in (getattr(model, "model_config", None), _chain(model, "forge_objects", "unet", "model", "model_config")):
        if config is not None:
            return type(config).__name__
    flags = {"is_ssd": "SSD1B", "is_sdxl": "SDXL", "is_sd3": "SD3", "is_sd2": "SD20", "is_sd1": "SD15"}
    return next((name for flag, name in flags.items() if getattr(model, flag, False)), type(model).__name__)


def _prediction(run: Running) -> str:
    if run.space is Space.FLOW:
        return "FLUX" if "Flux" in type(run.predictor).__name__ else "FLOW"
    found = getattr(run.predictor, "prediction_type", None) or getattr(run.model, "parameterization", None)
    kinds = [c.__name__ for c in type(run.predictor).__mro__]
    names = {"epsilon": "EPS", "eps": "EPS", "v": "V_PREDICTION", "v_prediction": "V_PREDICTION", "edm": "EDM"}
    if "V_PREDICTION" in kinds:  # reForge: the predictor's class says it
        return "V_PREDICTION"
    return names.get(str(found), "EPS")


def _loras(p: Processing | None) -> str:
    networks = getattr(p, "extra_network_data", None) or {}
    found = [item for kind in ("lora", "lyco") for item in networks.get(kind, [])] if isinstance(networks, dict) else []
    return ", ".join(" ".join(str(part) for part in getattr(item, "items", [])) for item in found[:8])


def level_table(run: Running) -> LevelTable:
    """The host's noise levels as a schedule. Raises HostError if the model has none."""
    levels = getattr(run.wrap, "sigmas", None)
    if not isinstance(levels, Tensor) or levels.ndim != 1 or len(levels) < 2:
        raise host.HostError("this model has no table of noise levels: no EMS can be computed for it")
    values = levels.detach().to("cpu", torch.float64).sort().values.unique_consecutive()
    try:
        return LevelTable(values[values > 0], run.space)
    except ValueError as error:
        raise host.HostError(f"this model's noise levels cannot be used: {error}") from error


def rounds_levels(run: Running) -> bool:
    """Whether the host rounds a level to the nearest trained time step (Forge, reForge) or interpolates (AUTOMATIC1111)."""
    timestep, levels = getattr(run.predictor, "timestep", None), getattr(run.wrap, "sigmas", None)
    if not callable(timestep) or not isinstance(levels, Tensor):
        return False
    try:
        return not timestep(levels[len(levels) // 2][None] * 1.0001).is_floating_point()
    except Exception:
        return False


def step_schedules(run: Running) -> dict[str, Callable[[int], Tensor]]:
    """Two of the host's own step schedules, by the host's name for them."""
    known = getattr(host.module("modules.sd_schedulers"), "schedulers_map", {})
    found: dict[str, Callable[[int], Tensor]] = {}
    wrap = run.wrap
    if wrap is None:
        return found
    for label in _SCHEDULERS[run.space]:
        function = getattr(known.get(label), "function", None)
        if label == "Automatic":
            found[label] = partial(_levels, wrap.get_sigmas)
        elif function is not None:
            ends = {"sigma_min": float(wrap.sigmas.min()), "sigma_max": float(wrap.sigmas.max()), "device": "cpu"}
            inner = {"inner_model": wrap} if getattr(known[label], "need_inner_model", False) else {}
            found[label] = partial(_levels, partial(function, **ends, **inner))
    return found


def _levels(function: Callable[..., Tensor], steps: int) -> Tensor:
    return function(n=steps).detach().to("cpu", torch.float64)
