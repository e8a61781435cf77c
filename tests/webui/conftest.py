"""Stand-ins for the modules of AUTOMATIC1111, Forge and reForge: what the extension touches, with the hosts' names and shapes.

Each mirrors the interface of the release and files that it names; the insides are ours. Noise levels and denoisers are real
k-diffusion's; the model is a Gaussian around a mean for each prompt, whose denoiser is known in closed form.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import queue
import sys
import threading
import types
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import k_diffusion

ROOT = Path(__file__).resolve().parents[2]
ENTRY = ROOT / "scripts" / "dpm_solver_v3.py"
CHANNELS, SPREAD = 4, 0.5
SamplerTuple = namedtuple("SamplerTuple", ["name", "constructor", "aliases", "options"])


class SamplerData(SamplerTuple):
    """modules/sd_samplers_common.py of all three hosts."""

    def total_steps(self, steps: int) -> int:
        return steps


class InterruptedException(BaseException):
    """modules/sd_samplers_common.py of all three hosts."""


class Conditions:
    """modules/prompt_parser.py: MulticondLearnedConditioning."""

    def __init__(self, shape: tuple[int, ...], batch: list[list[str]]) -> None:
        self.shape, self.batch = shape, batch


class Prompt(str):
    """modules/prompt_parser.py: ComposableScheduledPromptConditioning, with the prompt's text for its conditioning."""

    weight = 1.0


def mean_of(prompt: str) -> Tensor:
    """[C, 1, 1], by the prompt's text."""
    seed = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16)
    return torch.randn(CHANNELS, 1, 1, generator=torch.Generator().manual_seed(seed))


class GaussianModel(nn.Module):
    """A checkpoint's network: predicts the noise in x = x0 + sigma n, x0 ~ N(mean of the prompt, SPREAD^2)."""

    def __init__(self, info: Any, shift: float = 0.0) -> None:
        super().__init__()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0).float())
        self.sd_checkpoint_info, self.shift, self.parameterization = info, shift, "eps"
        self.is_sd1, self.is_sdxl, self.evaluations = True, False, 0
        self.sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5

    def apply_model(self, scaled: Tensor, t: Tensor, cond: list[str]) -> Tensor:
        """Noise for scaled = x / sqrt(1 + sigma^2) at time steps t [B], whole or in between."""
        self.evaluations += 1
        low = t.floor().long().clamp(0, 998)
        sigma = torch.lerp(self.sigmas[low].log(), self.sigmas[low + 1].log(), t - low).exp().reshape(-1, 1, 1, 1)
        x = scaled * (1 + sigma**2).sqrt()
        means = torch.stack([mean_of(prompt) for prompt in cond]) + self.shift
        return (x - (SPREAD**2 * x + sigma**2 * means) / (SPREAD**2 + sigma**2)) / sigma


class Predictor:
    """backend/modules/k_prediction.py of Forge; ldm_patched/modules/model_sampling.py of reForge: whole time steps only."""

    prediction_type = "epsilon"

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas

    def timestep(self, sigma: Tensor) -> Tensor:
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(0).view(sigma.shape)


class Linker(k_diffusion.external.DiscreteSchedule):
    """k_diffusion/external.py of Forge, ForgeScheduleLinker: the schedule of a predictor."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__(predictor.sigmas, quantize=True)
        self.predictor = predictor


class Host:
    """One host's modules, installed into sys.modules; `start` runs what it does at start and at Reload UI."""

    def __init__(self, kind: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind, self.data = kind, data
        self.checkpoint = self.make_checkpoint("pretty", 1)
        self.callbacks: dict[str, list[Callable[..., Any]]] = {}
        self.modules: dict[str, types.ModuleType] = {}
        self._install(monkeypatch)

    # --- checkpoints

    def make_checkpoint(self, name: str, seed: int, hashed: bool = True) -> Any:
        """modules/sd_models.py: CheckpointInfo."""
        path = self.data / "models" / "Stable-diffusion" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(torch.randn(3000, generator=torch.Generator().manual_seed(seed)).numpy().tobytes())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return SimpleNamespace(filename=str(path), sha256=digest if hashed else None, shorthash=digest[:10] if hashed else None)

    def load(self, info: Any, shift: float = 0.0) -> None:
        """Make it the loaded model."""
        model = GaussianModel(info, shift)
        if self.kind != "A1111":
            inner = SimpleNamespace(predictor=Predictor(model.sigmas), model_config=SimpleNamespace())
            if self.kind == "reForge":
                inner = SimpleNamespace(model_sampling=Predictor(model.sigmas))
            model.forge_objects = SimpleNamespace(unet=SimpleNamespace(model=inner, model_options={}))
        self.modules["modules.shared"].sd_model = model

    @property
    def model(self) -> GaussianModel:
        return self.modules["modules.shared"].sd_model

    # --- modules

    def _module(self, name: str, **content: Any) -> types.ModuleType:
        module = self.modules[name] = types.ModuleType(name)
        module.__dict__.update(content)
        return module

    def _install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._module("modules")
        self._shared()
        self._samplers()
        self._scripts()
        self._module("modules.paths", models_path=str(self.data / "models"), data_path=str(self.data))
        self._module("modules.call_queue", queue_lock=threading.Lock())
        self._module("modules.ui_common", create_refresh_button=lambda *a: None)
        known = [
            Scheduler("automatic", "Automatic", None),
            Scheduler("karras", "Karras", k_diffusion.sampling.get_sigmas_karras),
        ]
        self.schedulers = {s.label: s for s in known}
        self._module("modules.sd_schedulers", Scheduler=Scheduler, schedulers=known, schedulers_map=self.schedulers)
        self._module("modules.processing", StableDiffusionProcessingTxt2Img=Processing, process_images=self.process_images)
        if self.kind != "reForge":  # any host may lack it
            self.modules["modules.processing"].DecodedSamples = type("DecodedSamples", (list,), {"already_decoded": True})
        if self.kind != "A1111":
            self._module("modules_forge")
            self._module("modules_forge.main_thread", run_and_wait_result=MainThread().run)
        if self.kind == "Forge":
            self._module("backend")
            self._module("backend.sampling")
            self._module("backend.sampling.sampling_function")
        self._module("gradio", **gradio_names())
        for name, module in self.modules.items():
            monkeypatch.setitem(sys.modules, name, module)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(self.modules[parent], child, module)
        self.load(self.checkpoint)

    def _shared(self) -> None:
        """modules/shared.py, modules/options.py, modules/shared_state.py."""
        opts = Options()
        state = SimpleNamespace(interrupted=False, skipped=False, sampling_step=0, sampling_steps=0, textinfo=None, jobs=[])
        state.begin = lambda job: (state.jobs.append(job), state.__dict__.update(interrupted=False, skipped=False))
        state.end = lambda: state.jobs.append("end")
        state.interrupt = lambda: setattr(state, "interrupted", True)
        cmd_opts = SimpleNamespace(no_gradio_queue=False)
        self._module("modules.shared", opts=opts, state=state, cmd_opts=cmd_opts, OptionInfo=OptionInfo)

    def _samplers(self) -> None:
        """modules/sd_samplers.py and modules/sd_samplers_kdiffusion.py: 1.10.1 and reForge 2026-03 have no `add_sampler`; Forge
        f2.0.1 has one, which makes a new `all_samplers_map`."""
        euler = SamplerData("Euler", lambda model: KDiffusionSampler(k_diffusion.sampling.sample_euler, self), [], {})
        module = self._module("modules.sd_samplers", all_samplers=[euler], all_samplers_map={"Euler": euler}, samplers_map={})

        def set_samplers() -> None:
            module.samplers = module.all_samplers
            module.samplers_map.clear()
            for sampler in module.all_samplers:
                module.samplers_map.update({name.lower(): sampler.name for name in [sampler.name, *sampler.aliases]})

        @functools.cache
        def get_sampler_and_scheduler(name: str, scheduler: str) -> tuple[str, str]:
            found = {s.name.lower(): s for s in module.all_samplers_map.values()}
            for label in self.schedulers:
                name = name.removesuffix(f" {label}")
            return found.get(name.lower(), module.samplers[0]).name, scheduler or "Automatic"

        def add_sampler(sampler: SamplerData) -> None:
            if sampler.name not in [s.name for s in module.all_samplers]:
                module.all_samplers.append(sampler)
                module.all_samplers_map = {s.name: s for s in module.all_samplers}
                set_samplers()

        module.__dict__.update(set_samplers=set_samplers, get_sampler_and_scheduler=get_sampler_and_scheduler)
        if self.kind == "Forge":
            module.add_sampler = add_sampler
        set_samplers()
        self._module("modules.sd_samplers_common", SamplerData=SamplerData, InterruptedException=InterruptedException)
        self._module(
            "modules.sd_samplers_kdiffusion", KDiffusionSampler=lambda function, model: KDiffusionSampler(function, self)
        )

    def _scripts(self) -> None:
        """modules/scripts.py, modules/script_callbacks.py, scripts/xyz_grid.py."""
        script = type("Script", (), {"infotext_fields": None, "paste_field_names": None})
        grid = types.ModuleType("xyz_grid.py")
        grid.AxisOption = AxisOption
        grid.axis_options = [AxisOption("Nothing", str, lambda p, x, xs: None), AxisOption("Steps", int, lambda p, x, xs: None)]
        self.grid = grid
        data = [SimpleNamespace(module=grid)]
        self._module("modules.scripts", Script=script, AlwaysVisible=object(), scripts_data=data, ScriptRunner=Runner)
        events = ("ui_settings", "before_ui", "ui_tabs")
        register = {f"on_{e}": functools.partial(lambda e, f: self.callbacks.setdefault(e, []).append(f), e) for e in events}
        self._module("modules.script_callbacks", **register)

    # --- start, Reload UI

    def start(self) -> None:
        """modules/initialize.py: load the scripts, then make the pages. Scripts loaded before are forgotten first."""
        self.callbacks.clear()
        spec = importlib.util.spec_from_file_location(ENTRY.name, ENTRY)
        assert spec is not None and spec.loader is not None
        self.script_module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.script_module)
        base = self.modules["modules.scripts"].Script
        self.scripts = [c for c in vars(self.script_module).values() if isinstance(c, type) and issubclass(c, base)]
        self.tabs = []
        for event in ("before_ui", "ui_settings", "ui_tabs"):
            for callback in self.callbacks.get(event, []):
                self.tabs += callback() or [] if event == "ui_tabs" else []
                if event != "ui_tabs":
                    callback()

    def accordion(self) -> Any:
        """The script as the page has it."""
        (made,) = [c() for c in self.scripts]
        made.controls = made.ui(False)
        return made

    # --- generating

    def process_images(self, p: Any) -> Any:
        """modules/processing.py: one batch; scripts first, then the sampler by its name."""
        assert self.kind != "reForge" or p.scripts.alwayson_scripts is not None  # it looks for some of its own by name
        for script, values in getattr(p, "script_values", []):
            script.before_process(p, *values)
        samplers = self.modules["modules.sd_samplers"]
        config = samplers.all_samplers_map[p.sampler_name]
        sampler = config.constructor(self.model)
        sampler.config = config
        prompts = p.prompt if isinstance(p.prompt, list) else [p.prompt]
        p.rng = SimpleNamespace(shape=(CHANNELS, p.height // 8, p.width // 8))  # modules/rng.py: ImageRNG
        p.conditions = (
            Conditions((len(prompts),), [[Prompt(prompt)] for prompt in prompts]),
            [[p.negative_prompt]] * len(prompts),
        )
        p.latents = sampler.sample(p, len(prompts))
        if not getattr(p.latents, "already_decoded", False):
            p.decoded = len(p.latents)
        return p

    def make(self, sampler: str = "DPM-Solver-v3", prompt: Any = "a fox", **values: Any) -> Any:
        """A picture; `p.latents` [B, C, 8, 8]."""
        p = Processing(
            prompt=prompt, negative_prompt="blurry", sampler_name=sampler, width=64, height=64, steps=6, cfg_scale=4.0
        )
        p.scripts = Runner()
        p.__dict__.update(values)
        return self.process_images(p)


class Runner:
    """modules/scripts.py: ScriptRunner."""

    def __init__(self) -> None:
        self.alwayson_scripts: list[Any] = []


class Processing:
    """modules/processing.py: StableDiffusionProcessingTxt2Img."""

    def __init__(self, **values: Any) -> None:
        self.seed, self.cfg_scale, self.scheduler, self.is_hr_pass = 0, 7.0, None, False
        self.refiner_switch_at, self.refiner, self.scripts = None, None, None
        self.extra_generation_params: dict[str, Any] = {}
        self.__dict__.update(values)

    def close(self) -> None:
        self.closed = True


@dataclasses.dataclass
class Scheduler:
    """modules/sd_schedulers.py of all three hosts."""

    name: str
    label: str
    function: Any
    default_rho: float = -1
    need_inner_model: bool = False
    aliases: Any = None


class KDiffusionSampler:
    """modules/sd_samplers_kdiffusion.py and modules/sd_samplers_common.py: calls the function with arguments by their names."""

    def __init__(self, function: Callable[..., Tensor], host: Host) -> None:
        self.function, self.host = function, host
        self.model_wrap_cfg = Denoiser(self, host)
        self.steps_seen: list[int] = []

    def get_sigmas(self, p: Any, steps: int) -> Tensor:
        wrap = self.model_wrap_cfg.inner_model
        scheduler = self.host.modules["modules.sd_schedulers"].schedulers_map.get(p.scheduler)
        if scheduler is None or scheduler.function is None:
            return wrap.get_sigmas(steps)
        ends = {"sigma_min": wrap.sigmas[0].item(), "sigma_max": wrap.sigmas[-1].item()}
        inner = {"inner_model": wrap} if scheduler.need_inner_model else {}
        return scheduler.function(n=steps, **ends, **inner, device=torch.device("cpu"))

    def sample(self, p: Any, batch: int) -> Any:
        sigmas, p.sampler = getattr(p, "sigmas", None), self
        sigmas = self.get_sigmas(p, p.steps) if sigmas is None else sigmas
        noise = torch.randn((batch, CHANNELS, p.height // 8, p.width // 8), generator=torch.Generator().manual_seed(p.seed))
        p.noise, p.used_sigmas = noise * sigmas[0], sigmas
        denoiser = self.model_wrap_cfg
        denoiser.p, denoiser.step, denoiser.total_steps = p, 0, self.config.total_steps(p.steps)
        cond, uncond = p.conditions
        self.last_latent = p.noise
        self.sampler_extra_args = {
            "cond": cond,
            "uncond": uncond,
            "image_cond": torch.zeros(batch, 5, 1, 1),
            "cond_scale": p.cfg_scale,
            "s_min_uncond": 0.0,
        }
        state = self.host.modules["modules.shared"].state
        with torch.inference_mode() if self.host.kind == "Forge" else torch.no_grad():
            try:
                return self.function(
                    denoiser,
                    p.noise,
                    sigmas=sigmas,
                    extra_args=self.sampler_extra_args,
                    disable=True,
                    callback=lambda d: (self.steps_seen.append(d["i"]), setattr(state, "sampling_step", d["i"])),
                )
            except InterruptedException:
                return self.last_latent


class Denoiser(nn.Module):
    """modules/sd_samplers_cfg_denoiser.py: CFGDenoiser, with the refiner's switch inside of its call."""

    masked = False

    def __init__(self, sampler: KDiffusionSampler, host: Host) -> None:
        super().__init__()
        self.sampler, self.host, self.p, self.step, self.total_steps, self.wrap = sampler, host, None, 0, None, None
        self.seen: list[tuple[list[str], float]] = []
        self.passes, self.need_last_noise_uncond = 0, False
        self.mask = torch.ones(1) if self.masked else None

    @property
    def inner_model(self) -> Any:
        if self.wrap is None:
            model = self.host.model
            if self.host.kind == "Forge":
                self.wrap = Linker(model.forge_objects.unet.model.predictor)
                self.wrap.inner_model = model
            else:  # k-diffusion's own
                self.wrap = k_diffusion.external.CompVisDenoiser(model)
        return self.wrap

    def forward(
        self, x: Tensor, sigma: Tensor, uncond: Any, cond: Any, cond_scale: float, s_min_uncond: float, image_cond: Tensor
    ) -> Tensor:
        state = self.host.modules["modules.shared"].state
        if state.interrupted or state.skipped:
            raise InterruptedException
        if self.p.refiner is not None and self.step / self.total_steps >= self.p.refiner_switch_at:
            self.host.load(*self.p.refiner)
            self.p.refiner, self.wrap = None, None
        if self.p.is_hr_pass and self.host.kind != "A1111":
            cond_scale = self.p.hr_cfg
        assert len(image_cond) == len(x) == len(uncond) == len(cond.batch)
        prompts, negatives = [c[0] for c in cond.batch], [u[0] for u in uncond]
        self.seen.append((prompts, cond_scale))
        self.step += 1
        wanted = self._denoise(x, sigma, prompts)
        self.passes += 1
        if self.host.kind == "Forge" and cond_scale == 1:
            return wanted
        unwanted = self._denoise(x, sigma, negatives)
        self.passes += 1
        if self.need_last_noise_uncond:
            self.last_noise_uncond = (x - unwanted) / sigma[:, None, None, None]
        return unwanted + cond_scale * (wanted - unwanted)

    def _denoise(self, x: Tensor, sigma: Tensor, prompts: list[str]) -> Tensor:
        if self.host.kind != "Forge":
            return self.inner_model(x, sigma, cond=prompts)
        model = self.host.model
        column = sigma.reshape(-1, 1, 1, 1)
        t = self.inner_model.predictor.timestep(sigma)
        return x - column * model.apply_model(x / (1 + column**2).sqrt(), t.float(), prompts)


class MainThread:
    """modules_forge/main_thread.py of Forge and reForge: jobs run in one thread; what they raise is lost."""

    def run(self, function: Callable[..., Any], *values: Any) -> Any:
        answer: queue.Queue[Any] = queue.Queue()

        def work() -> None:
            result = None
            with contextlib.suppress(Exception):
                result = function(*values)
            answer.put(result)

        threading.Thread(target=work).start()
        return answer.get()


class Options:
    """modules/options.py."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.data_labels: dict[str, OptionInfo] = {}

    def add_option(self, key: str, info: OptionInfo) -> None:
        self.data_labels[key] = info

    def __getattr__(self, key: str) -> Any:
        if key in self.data:
            return self.data[key]
        if key in self.data_labels:
            return self.data_labels[key].default
        raise AttributeError(key)


class OptionInfo:
    """modules/options.py."""

    def __init__(self, default: Any, label: str, component: Any, component_args: Any, section: tuple[str, str]) -> None:
        self.default, self.label, self.component, self.component_args, self.section = (
            default,
            label,
            component,
            component_args,
            section,
        )

    def info(self, text: str) -> OptionInfo:
        self.text = text
        return self


class AxisOption:
    """scripts/xyz_grid.py of all three hosts."""

    def __init__(self, label: str, type: Any, apply: Any, confirm: Any = None, cost: float = 0.0, choices: Any = None) -> None:
        self.label, self.type, self.apply, self.confirm, self.cost, self.choices = label, type, apply, confirm, cost, choices

    def applied(self, p: Any, value: Any) -> Any:
        """What the plot does for one picture."""
        made = copy.copy(p)
        self.apply(made, value, [value])
        return made


class Component:
    """Any component of gradio 3.41 (AUTOMATIC1111, reForge) and 4.40 (Forge)."""

    def __init__(self, *values: Any, **named: Any) -> None:
        self.values, self.named, self.clicks, self.loads, self.changes = values, named, [], [], []
        self.label = named.get("label")

    def click(self, function: Any, inputs: Any, outputs: Any, **named: Any) -> None:
        self.clicks.append((function, inputs, outputs))

    def load(self, function: Any, inputs: Any, outputs: Any, **named: Any) -> None:
        self.loads.append((function, inputs, outputs))

    def change(self, function: Any, inputs: Any, outputs: Any, **named: Any) -> None:
        self.changes.append((function, inputs, outputs))

    def __enter__(self) -> Component:
        return self

    def __exit__(self, *error: object) -> None:
        return None


def gradio_names() -> dict[str, Any]:
    names = ["Accordion", "Blocks", "Button", "Checkbox", "Column", "Dataframe", "Dropdown", "HTML", "Image", "Number", "Radio"]
    names += ["Row", "Slider", "Textbox"]
    return {
        **{name: type(name, (Component,), {}) for name in names},
        "update": lambda **values: {"__type__": "update", **values},
    }


@pytest.fixture(params=["A1111", "Forge", "reForge"])
def host(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """AUTOMATIC1111 1.10.1, Forge f2.0.1 (June 2025, dfdcbab), reForge (March 2026, 3b56b26); not yet started."""
    return Host(request.param, tmp_path, monkeypatch)


@pytest.fixture
def forget() -> Callable[[], None]:
    """Forget which lines were logged."""
    from dpm_solver_v3.webui import sampling

    return sampling._SAID.clear
