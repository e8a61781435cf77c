"""AUTOMATIC1111, Forge and reForge, seen through one window: every host object that the extension uses is reached for here.

Facts from AUTOMATIC1111 1.9 to 1.10.1, Forge (June 2025) and reForge (March 2026). Names differ between them and move between
releases, so everything goes by getattr with a fallback. Nothing of the host is replaced; lists are added to in place.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ems_tools.share.identity import FingerprintCache, ModelIdentity
from ..sampler import LevelTable, Space

__all__ = [
    "HostError",
    "Running",
    "add_option",
    "add_sampler",
    "add_schedule",
    "asking",
    "axis_module",
    "checkpoint_of",
    "ems_folders",
    "evaluate",
    "generate",
    "identity_of",
    "interrupt",
    "interrupted",
    "level_table",
    "log",
    "module",
    "no_images",
    "on",
    "option",
    "output_folder",
    "refresh_button",
    "report_progress",
    "rounds_levels",
    "running",
    "sampler_name",
    "session",
    "step_schedules",
    "streams",
]

ROOT = Path(__file__).resolve().parents[1]
_MARK = "dpm_solver_v3"
_SCHEDULERS = {Space.SIGMA: ("Automatic", "Karras"), Space.FLOW: ("Simple", "Beta")}


class HostError(RuntimeError):
    """Something that the user should know; the message says what to do."""


def log(text: str) -> None:
    """One line in the host's console (its logging shows nothing unless the user configured it)."""
    print(f"[DPM-Solver-v3] {text}", flush=True)


def module(name: str) -> Any:
    """`modules.<name>` or any other module of the host; None if this host has none."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _shared() -> Any:
    return module("modules.shared")


# --- registration


def add_sampler(name: str, aliases: list[str], function: Callable[..., Tensor]) -> bool:
    """Put `function` into the sampler dropdowns, in place of our own entry of before Reload UI. False if `name` is foreign."""
    samplers = importlib.import_module("modules.sd_samplers")
    common = importlib.import_module("modules.sd_samplers_common")

    def construct(model: Any) -> Any:
        return importlib.import_module("modules.sd_samplers_kdiffusion").KDiffusionSampler(function, model)

    entry = common.SamplerData(name, construct, list(aliases), {_MARK: True})
    known: list[Any] = samplers.all_samplers
    mine = [i for i, other in enumerate(known) if other.name == name]
    if any(not (other.options or {}).get(_MARK) for other in (known[i] for i in mine)):
        log(f"another extension has a sampler called {name}: ours is left out")
        return False
    add = getattr(samplers, "add_sampler", None)
    if mine:
        known[mine[0]] = entry
    elif callable(add):
        add(entry)
    if not any(other is entry for other in samplers.all_samplers):
        samplers.all_samplers.append(entry)
    samplers.all_samplers_map[name] = entry
    samplers.set_samplers()
    _forget_names(samplers)
    return True


def add_schedule(name: str, label: str, function: Callable[..., Tensor]) -> bool:
    """Put `function(n, sigma_min, sigma_max, inner_model, device)` into the schedule types. False if the name is foreign.

    Raises ImportError or AttributeError on hosts before AUTOMATIC1111 1.9, which have no list of them.
    """
    schedules = importlib.import_module("modules.sd_schedulers")
    known: list[Any] = schedules.schedulers
    entry = schedules.Scheduler(name, label, function, need_inner_model=True)
    setattr(entry, _MARK, True)
    mine = [i for i, other in enumerate(known) if name == other.name or label == other.label]
    if any(not getattr(known[i], _MARK, False) for i in mine):
        log(f"another extension has a schedule type called {label}: ours is left out")
        return False
    if mine:
        known[mine[0]] = entry
    else:
        known.append(entry)
    schedules.schedulers_map.update({name: entry, label: entry})
    _forget_names(module("modules.sd_samplers"))
    return True


def _forget_names(samplers: Any) -> None:
    """The host remembers what an unknown name was turned into."""
    forget = getattr(getattr(samplers, "get_sampler_and_scheduler", None), "cache_clear", None)
    if callable(forget):
        forget()


def on(event: str, function: Callable[..., Any]) -> None:
    """Register a callback such as "ui_tabs". Raises AttributeError if the host has no such event."""
    getattr(importlib.import_module("modules.script_callbacks"), f"on_{event}")(function)


def add_option(key: str, default: Any, label: str, component: Any, arguments: Callable[[], dict[str, Any]], info: str) -> None:
    """An entry in Settings, page "DPM-Solver-v3"."""
    entry = _shared().OptionInfo(default, label, component, arguments, section=(_MARK, "DPM-Solver-v3"))
    explain = getattr(entry, "info", None)
    _shared().opts.add_option(key, explain(info) if callable(explain) else entry)


def option(key: str, default: Any) -> Any:
    """What Settings say."""
    return getattr(getattr(_shared(), "opts", None), key, default)


def refresh_button(component: Any, arguments: Callable[[], dict[str, Any]], elem_id: str) -> None:
    """The host's button that reads a menu's choices again, where it has one."""
    make = getattr(module("modules.ui_common"), "create_refresh_button", None)
    if callable(make):
        make(component, lambda: None, arguments, elem_id)


def axis_module() -> Any:
    """The X/Y/Z plot script, None if it is not loaded."""
    scripts = importlib.import_module("modules.scripts")
    for data in getattr(scripts, "scripts_data", []):
        if hasattr(data.module, "axis_options") and hasattr(data.module, "AxisOption"):
            return data.module
    return None


# --- folders


def _path(name: str, fallback: Path) -> Path:
    return Path(
        getattr(module("modules.paths"), name, None) or getattr(module("modules.paths_internal"), name, None) or fallback
    )


def ems_folders() -> list[Path]:
    """Where statistics files are looked for: `models/ems`, then the extension's own `stats/`."""
    return [_path("models_path", ROOT) / "ems", ROOT / "stats"]


def output_folder() -> Path:
    """Where new files are written: `models/ems`, or the extension's `stats/` where models are read-only."""
    for folder in ems_folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise HostError(f"no folder for EMS files can be written: allow writing to {ems_folders()[0]}")


_CACHES: dict[Path, FingerprintCache] = {}


def _fingerprints() -> FingerprintCache:
    path = _path("data_path", ROOT) / "cache" / "dpm-solver-v3-fingerprints.json"
    return _CACHES.setdefault(path, FingerprintCache(path))


# --- the model


@dataclass(frozen=True)
class Running:
    """What a sampler function can know of the model that it was given (the host's CFGDenoiser).

    Args:
        p: the processing object (prompt, sizes, overrides); None where the host does not say.
        wrap: the k-diffusion wrapper with the noise levels.
        model: the checkpoint's model.
        predictor: what turns the network's output into x0, if the host has an object for it.
    """

    p: Any
    wrap: Any
    model: Any
    predictor: Any

    @property
    def space(self) -> Space:
        """Rectified flow, or x = x0 + sigma n for everything else."""
        kinds = [c.__name__ for c in type(self.predictor).__mro__]
        if getattr(self.predictor, "prediction_type", None) == "const" or "CONST" in kinds:
            return Space.FLOW
        if any("Flow" in name for name in kinds) or getattr(self.model, "is_sd3", False):
            return Space.FLOW
        return Space.SIGMA

    def guidance(self, extra_args: dict[str, Any]) -> float:
        """The CFG scale of this pass; Forge's and reForge's hires pass has its own."""
        own = getattr(self.p, "hr_cfg", None) if getattr(self.p, "is_hr_pass", False) else None
        scale = own if isinstance(own, (int, float)) and own > 0 else extra_args.get("cond_scale", 1.0)
        return float(scale) if isinstance(scale, (int, float)) else 1.0


def running(denoiser: Any) -> Running:
    """From the `model` argument of a sampler function."""
    return _running(getattr(denoiser, "inner_model", None), getattr(denoiser, "p", None))


def asking(wrap: Any) -> Running:
    """From the `inner_model` argument of a schedule's function; whose picture it is stands in the function that calls it."""
    frame = sys._getframe(1)
    for _ in range(12):
        p = frame.f_locals.get("p")
        if hasattr(p, "cfg_scale") or frame.f_back is None:
            break
        frame = frame.f_back
    return _running(wrap, p if hasattr(p, "cfg_scale") else None)


def sampler_name(p: Any) -> str | None:
    """Of the sampler that asks for a schedule, as the host's list has it; None if unknown."""
    name = getattr(getattr(getattr(p, "sampler", None), "config", None), "name", None)
    return name if isinstance(name, str) else None


def _running(wrap: Any, p: Any) -> Running:
    model = getattr(wrap, "inner_model", None) or getattr(_shared(), "sd_model", None)
    places = (wrap, _chain(model, "forge_objects", "unet", "model"), _chain(model, "model"))
    names = ("predictor", "model_sampling")
    predictor = next((v for place in places for name in names if (v := getattr(place, name, None)) is not None), None)
    return Running(p, wrap, model, predictor)


def _chain(start: Any, *names: str) -> Any:
    for name in names:
        start = getattr(start, name, None)
    return start


def checkpoint_of(model: Any) -> Any:
    """What tells the loaded checkpoint from another one: its file, or the model object itself."""
    info = getattr(model, "sd_checkpoint_info", None)
    return getattr(info, "filename", None) or id(model)


def identity_of(run: Running) -> ModelIdentity:
    """The checkpoint's: the host's SHA-256 where it has one (not with --no-hashing), our fingerprint, and its name."""
    info = getattr(run.model, "sd_checkpoint_info", None)
    path = getattr(info, "filename", None)
    content = ""
    if path:
        try:
            content = _fingerprints().fingerprint(path)
        except OSError as error:
            log(f"{path} cannot be read: {error}")
    return ModelIdentity(
        name=os.path.splitext(os.path.basename(path or ""))[0],
        content=content,
        sha256=str(getattr(info, "sha256", None) or ""),
        architecture=_architecture(run.model),
        prediction=_prediction(run),
        patches=_loras(run.p),
    )


def _architecture(model: Any) -> str:
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


def _loras(p: Any) -> str:
    networks = getattr(p, "extra_network_data", None) or {}
    found = [item for kind in ("lora", "lyco") for item in networks.get(kind, [])] if isinstance(networks, dict) else []
    return ", ".join(" ".join(str(part) for part in getattr(item, "items", [])) for item in found[:8])


def level_table(run: Running) -> LevelTable:
    """The host's noise levels as a schedule. Raises HostError if the model has none."""
    levels = getattr(run.wrap, "sigmas", None)
    if not isinstance(levels, Tensor) or levels.ndim != 1 or len(levels) < 2:
        raise HostError("this model has no table of noise levels: no EMS can be computed for it")
    values = levels.detach().to("cpu", torch.float64).sort().values.unique_consecutive()
    try:
        return LevelTable(values[values > 0], run.space)
    except ValueError as error:
        raise HostError(f"this model's noise levels cannot be used: {error}") from error


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
    known = getattr(module("modules.sd_schedulers"), "schedulers_map", {})
    found: dict[str, Callable[[int], Tensor]] = {}
    for label in _SCHEDULERS[run.space]:
        function = getattr(known.get(label), "function", None)
        if label == "Automatic":
            found[label] = partial(_levels, run.wrap.get_sigmas)
        elif function is not None:
            ends = {"sigma_min": float(run.wrap.sigmas.min()), "sigma_max": float(run.wrap.sigmas.max()), "device": "cpu"}
            inner = {"inner_model": run.wrap} if getattr(known[label], "need_inner_model", False) else {}
            found[label] = partial(_levels, partial(function, **ends, **inner))
    return found


def _levels(function: Callable[..., Tensor], steps: int) -> Tensor:
    return function(n=steps).detach().to("cpu", torch.float64)


# --- generating


def generate(
    prompts: list[str], negative: str, width: int, height: int, sampler: str, mark: dict[str, Any], finished: Callable[[], bool]
) -> None:
    """One pass of text to image with one prompt an image, through the host's own loading, conditioning and denoiser.

    `mark` becomes attributes of the processing object, by which the sampler function knows what to do instead of sampling. Once
    `finished()`, what goes wrong afterwards (decoding) is of no interest.
    """
    processing = importlib.import_module("modules.processing")
    p = processing.StableDiffusionProcessingTxt2Img(
        outpath_samples="",
        outpath_grids="",
        prompt=list(prompts),
        negative_prompt=negative,
        seed=0,
        sampler_name=sampler,
        batch_size=len(prompts),
        n_iter=1,
        steps=20,
        cfg_scale=7.0,  # not 1: hosts then leave the negative prompt out; the scales asked for are set at every call
        width=width,
        height=height,
        do_not_save_samples=True,
        do_not_save_grid=True,
    )
    runner = getattr(module("modules.scripts"), "ScriptRunner", None)
    if callable(runner):  # without scripts; reForge fails where there is no runner at all
        p.scripts = runner()
    for name, value in mark.items():
        setattr(p, name, value)
    try:
        processing.process_images(p)
    except Exception:
        if not finished():
            raise
    finally:
        close = getattr(p, "close", None)
        if callable(close):
            close()


def evaluate(denoiser: Any, x: Tensor, level: Tensor, extra_args: dict[str, Any], rows: list[int], scale: float) -> Tensor:
    """D(x, level) by the host's CFGDenoiser at this CFG scale; `rows` name each image's place in the pass's batch."""
    chosen = {name: _of_rows(value, rows) for name, value in extra_args.items()}
    chosen.update(cond_scale=scale, s_min_uncond=0.0)
    # It counts its calls as steps. At the last one edited prompts have come to their end, and no early-step rule holds.
    denoiser.step = max((getattr(denoiser, "total_steps", None) or 1) - 1, 0)
    return denoiser(x, level.to(x).expand(len(x)), **chosen)


def _of_rows(value: Any, rows: list[int]) -> Any:
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, list):
        return [value[row] for row in rows]
    if hasattr(value, "batch"):
        return type(value)(shape=(len(rows),), batch=[value.batch[row] for row in rows])
    return value


def no_images(x: Tensor) -> Any:
    """What a sampler function returns for latents x [B, C, h, w] that nobody wants: one black image, decoded already."""
    decoded = getattr(module("modules.processing"), "DecodedSamples", None)
    if decoded is None:
        return torch.zeros_like(x[:1])
    return decoded([torch.zeros(3, 8 * x.shape[-2], 8 * x.shape[-1])])


@contextmanager
def session(title: str) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """The host's turn for one GPU job; gives `call(function)`, which runs it where this host runs such jobs.

    Forge does all of them in its main thread. Exceptions are raised here either way.
    """
    queue, state = importlib.import_module("modules.call_queue"), _shared().state
    elsewhere = getattr(module("modules_forge.main_thread"), "run_and_wait_result", None)

    def call(function: Callable[[], Any]) -> Any:
        raised: list[BaseException] = []

        def guarded() -> Any:
            try:
                return function()
            except BaseException as error:
                raised.append(error)
                return None

        result = elsewhere(guarded) if callable(elsewhere) else guarded()
        if raised:
            raise raised[0]
        return result

    with queue.queue_lock:
        state.begin(job=title)
        try:
            yield call
        finally:
            state.end()
            state.skipped = state.interrupted = False
            collect = getattr(module("modules.devices"), "torch_gc", None)
            if callable(collect):
                collect()


def interrupt() -> None:
    """The host's "Interrupt": the next call of its denoiser ends the pass."""
    _shared().state.interrupt()


def interrupted() -> bool:
    """Whether someone pressed it."""
    state = _shared().state
    return bool(state.interrupted or getattr(state, "skipped", False))


def report_progress(done: int, total: int, text: str) -> None:
    """For the host's own progress display."""
    state = _shared().state
    state.sampling_step, state.sampling_steps, state.textinfo = done, total, text


def streams() -> bool:
    """Whether the UI can show values while a handler runs."""
    return not getattr(getattr(_shared(), "cmd_opts", None), "no_gradio_queue", False)
