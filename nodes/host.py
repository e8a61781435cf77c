"""What the nodes need of ComfyUI: every host object and name that the nodes use is reached for here, with fallbacks.

Facts in ComfyUI 0.3.60 to 0.29. Nothing of the host is replaced or reloaded; lists and dictionaries are added to in place.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..sampler import LevelTable, Space

__all__ = [
    "LOG",
    "HostError",
    "Place",
    "Running",
    "add_sampler",
    "add_scheduler",
    "all_links",
    "calling",
    "check_interrupt",
    "ems_folders",
    "executing",
    "input_path",
    "latent_of",
    "level_table",
    "model_sampling_of",
    "output_folder",
    "progress_bar",
    "register_folder",
    "running",
    "say",
    "space_of",
    "user_file",
]

LOG = logging.getLogger("DPM-Solver-v3")
_KEY = "ems"


class HostError(RuntimeError):
    """Something that the user should know; the message says what to do."""


def _host(module: str) -> Any:
    """A module of the host that is loaded already, or None."""
    return sys.modules.get(module)


# --- the sampler list


def add_sampler(name: str, function: Callable[..., Tensor]) -> bool:
    """Put `function` into every KSampler's list as `name`. False if another pack has the name."""
    import comfy.k_diffusion.sampling as sampling
    import comfy.samplers as samplers

    attribute = f"sample_{name}"
    other = getattr(sampling, attribute, None)
    if other is not None and getattr(other, "__qualname__", "") != function.__qualname__:
        LOG.warning("the sampler name %r is another pack's: the node 'DPM-Solver-v3' works, the list entry is theirs", name)
        return False
    setattr(sampling, attribute, function)
    lists = [getattr(getattr(samplers, "KSampler", None), "SAMPLERS", None), getattr(samplers, "SAMPLER_NAMES", None)]
    for names in lists:
        if isinstance(names, list) and name not in names:
            names.append(name)
    return True


def add_scheduler(name: str, function: Callable[[Any, int], Tensor]) -> bool:
    """Put `function(model_sampling, steps)` into every scheduler list as `name`. False if another pack has the name."""
    import comfy.samplers as samplers

    handlers = samplers.SCHEDULER_HANDLERS
    other = getattr(handlers.get(name), "handler", None)
    if other is not None and getattr(other, "__qualname__", "") != function.__qualname__:
        LOG.warning("the scheduler name %r is another pack's: the list entry is theirs", name)
        return False
    handlers[name] = samplers.SchedulerHandler(function)
    for names in (samplers.SCHEDULER_NAMES, getattr(samplers.KSampler, "SCHEDULERS", None)):
        if isinstance(names, list) and name not in names:
            names.append(name)
    return True


def calling() -> tuple[Any, float | None, str | None]:
    """The MODEL, the guidance scale and the sampler's name, as far as known, that the host's call of a scheduler is about.

    The host hands schedulers none of them; they are variables of the functions on the way from the node that runs.
    """
    frame = sys._getframe(1)
    patcher, scale, sampler = None, None, None
    for _ in range(24):
        for name, value in frame.f_locals.items():
            owner = getattr(value, "model", None) if name == "self" else value
            if patcher is None and name in ("self", "model") and hasattr(owner, "model_options"):
                patcher = owner
            if scale is None and name == "cfg" and isinstance(value, (int, float)):
                scale = float(value)
            if sampler is None and name == "sampler_name" and isinstance(value, str):
                sampler = value
        if frame.f_back is None:
            break
        frame = frame.f_back
    if scale is None:
        inputs = (node.get("inputs") or {} for node in executing().prompt.values() if isinstance(node, dict))
        scales = {float(i["cfg"]) for i in inputs if isinstance(i.get("cfg"), (int, float))}
        scale = scales.pop() if len(scales) == 1 else None
    return patcher, scale, sampler


# --- folders


def register_folder() -> None:
    """`models/ems` and `output/ems` as model folder "ems", beside those of extra_model_paths.yaml."""
    import folder_paths

    known = folder_paths.folder_names_and_paths
    paths, extensions = known.get(_KEY, ([], set()))
    paths, extensions = list(paths), set(extensions) | {".safetensors"}
    models = getattr(folder_paths, "models_dir", None)
    for folder in ([Path(models) / _KEY] if models else []) + [output_folder()]:
        if str(folder) not in paths:
            paths.append(str(folder))
    known[_KEY] = (paths, extensions)


def ems_folders() -> list[Path]:
    """Where statistics files are looked for: the host's folders, then the pack's own `stats/`."""
    import folder_paths

    paths = folder_paths.folder_names_and_paths.get(_KEY, ([], set()))[0]
    return [Path(p) for p in paths] + [Path(__file__).resolve().parents[1] / "stats"]


def output_folder() -> Path:
    """Where new files are written: models folders can be read-only."""
    import folder_paths

    return Path(folder_paths.get_output_directory()) / _KEY


def user_file(name: str) -> Path | None:
    """A file of ours in the host's user folder."""
    import folder_paths

    get = getattr(folder_paths, "get_user_directory", None)
    return Path(get()) / "dpm_solver_v3" / name if callable(get) else None


# --- what runs now


@dataclass(frozen=True)
class Place:
    """The node that is executed and the prompt (node id -> {"class_type", "inputs"}) that it belongs to."""

    prompt: Mapping[str, Any]
    node: str


def executing() -> Place:
    """Where the host stands in its graph; empty if it does not say."""
    server = getattr(getattr(_host("server"), "PromptServer", None), "instance", None)
    node = getattr(server, "last_node_id", None)
    context = getattr(_host("comfy_execution.utils"), "get_executing_context", lambda: None)()
    node = getattr(context, "node_id", None) or node
    running_now = getattr(getattr(server, "prompt_queue", None), "currently_running", None) or {}
    for item in list(running_now.values()):
        if len(item) > 2 and isinstance(item[2], dict) and (node is None or str(node) in item[2]):
            return Place(item[2], str(node or ""))
    return Place({}, str(node or ""))


def say(text: str, node: str = "") -> None:
    """Show `text` on the node in the front end, where the host can."""
    server = getattr(getattr(_host("server"), "PromptServer", None), "instance", None)
    send = getattr(server, "send_progress_text", None)
    if callable(send) and node:
        try:
            send(text, node)
        except Exception as error:  # a changed signature must not cost the user the work
            LOG.debug("no node status: %s", error)


def check_interrupt() -> None:
    """Raise the host's interrupt (a BaseException in some releases) if the user pressed cancel."""
    check = getattr(_host("comfy.model_management"), "throw_exception_if_processing_interrupted", None)
    if callable(check):
        check()


def progress_bar(total: int, node: str) -> Callable[[int, Any], None]:
    """update(done, preview or None); raises on interrupt."""
    import comfy.utils

    try:
        bar = comfy.utils.ProgressBar(total, node_id=node or None)
    except TypeError:
        bar = comfy.utils.ProgressBar(total)

    def update(done: int, preview: Any = None) -> None:
        check_interrupt()
        bar.update_absolute(done, total, preview)

    return update


def all_links(place: Place) -> Iterator[Mapping[str, Any]]:
    """Inputs of the nodes that the MODEL or GUIDER of `place`'s node comes from, nearest first, each once."""
    classes = getattr(_host("nodes"), "NODE_CLASS_MAPPINGS", {})
    queue, seen = [place.node], {place.node}
    while queue:
        inputs = (place.prompt.get(queue.pop(0)) or {}).get("inputs") or {}
        yield inputs
        for value in inputs.values():
            if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)):
                continue
            source = str(value[0])
            returned = getattr(classes.get((place.prompt.get(source) or {}).get("class_type")), "RETURN_TYPES", ())
            kind = returned[value[1]] if value[1] < len(returned) else "*"
            if source not in seen and kind in ("MODEL", "GUIDER", "*"):
                seen.add(source)
                queue.append(source)


def input_path(name: object, kinds: tuple[str, ...] = ("checkpoints", "diffusion_models", "unet", "unet_gguf")) -> str | None:
    """The model file of this name, None if the name is no model file's."""
    import folder_paths

    if not isinstance(name, str) or not name:
        return None
    for kind in kinds:
        try:
            found = folder_paths.get_full_path(kind, name)
        except Exception:  # an unknown kind of folder, in some releases
            continue
        if found:
            return str(found)
    return None


# --- a model that samples


def model_sampling_of(patcher: Any) -> Any:
    """The model's `model_sampling`, patches (shift, ZSNR, ...) included; None if there is none."""
    get = getattr(patcher, "get_model_object", None)
    if callable(get):
        try:
            return get("model_sampling")
        except Exception as error:
            LOG.debug("get_model_object: %s", error)
    return getattr(getattr(patcher, "model", None), "model_sampling", None)


def space_of(model_sampling: Any) -> Space:
    """Rectified flow (CONST: x = (1 - t) x0 + t n), or x = x0 + sigma n for everything else."""
    return Space.FLOW if any(c.__name__ == "CONST" for c in type(model_sampling).__mro__) else Space.SIGMA


def level_table(model_sampling: Any) -> LevelTable:
    """The host's noise levels as a schedule. Raises HostError if the model has none."""
    levels = getattr(model_sampling, "sigmas", None)
    if not isinstance(levels, Tensor) or levels.ndim != 1 or len(levels) < 2:
        raise HostError("this model has no table of noise levels (model_sampling.sigmas): use one of ComfyUI's schedulers")
    values = levels.detach().to("cpu", torch.float64).sort().values.unique_consecutive()
    try:
        return LevelTable(values[values > 0], space_of(model_sampling))
    except ValueError as error:
        raise HostError(f"this model's noise levels cannot be used: {error}") from error


@dataclass(frozen=True)
class Running:
    """What a sampler function can know of the model it was given; None where the host does not say.

    Args:
        guider: the host's guider.
        patcher: the ModelPatcher behind it.
        sampling: `model_sampling`, patches included.
        guidance: the guidance scale; 1 for guiders that have none.
    """

    guider: Any
    patcher: Any
    sampling: Any
    guidance: float

    @property
    def space(self) -> Space:
        """What x and sigma are."""
        return space_of(self.sampling)


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
    scale = getattr(guider, "cfg1", None)  # a dual guider's outer scale; its `cfg` is not set
    scale = getattr(guider, "cfg", None) if scale is None else scale
    return Running(guider, patcher, sampling, float(scale) if isinstance(scale, (int, float)) else 1.0)


def latent_of(patcher: Any, latent: Mapping[str, Any]) -> Tensor:
    """The LATENT's tensor with as many channels and axes as the model wants (as core's samplers do)."""
    import comfy.sample

    samples = latent["samples"]
    fix = getattr(comfy.sample, "fix_empty_latent_channels", None)
    if not callable(fix):
        return samples
    try:
        return fix(patcher, samples, latent.get("downscale_ratio_spacial", None))
    except TypeError:
        return fix(patcher, samples)
