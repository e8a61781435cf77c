"""`DPMSolverV3Scheduler`: the sampler of this project as a scheduler of diffusers.

The steps are the sampler's own (`sampler.Run`, by `stepping`). diffusers' conventions are turned into the sampler's: latents
and outputs in `noise`, schedules in `spacing`, places of channels in `layout`; `beside` keeps the statistics file.

A pipeline saved with this scheduler names this module: its path, and the class's name, are for ever.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput, logging
from torch import Tensor

from ..ems_tools.file.contents import EMSFile
from ..ems_tools.file.reader import load_ems_file
from ..ems_tools.hosting.runs import Run, choose_statistics, choose_steps, unfitted_steps
from ..sampler import AUTO, EMS, SolverOptions, plan_for
from . import beside
from .layout import layout_for
from .noise import EDMNoise, FlowNoise, VPNoise, noise_of
from .spacing import SHAPES, end_level, flow_shift, given_sigmas, given_timesteps, spaced_levels
from .stepping import Stepping

__all__ = ["DPMSolverV3Scheduler", "DPMSolverV3SchedulerOutput"]

logger = logging.get_logger(__name__)
_OTHERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "EDMDPMSolverMultistepScheduler",
    "SASolverScheduler",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
)
_OPTIONS = {name: name for name in ("order", "predictor", "corrector", "corrector_below", "strength")}
_OPTIONS["lower_order_final"] = "lower_order_at_end"
"""The sampler's options by its names, and ours; `lower_order_final` means another thing in other schedulers' configurations."""

_FLOW_START = 0.03
"""How far from 1 the first factor of fitted steps may be for a flow's pipeline, which cannot be told of it."""


@dataclass
class DPMSolverV3SchedulerOutput(BaseOutput):
    """What `step` returns: the latents for the next step, and the denoised latents that the model predicted in this one."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class DPMSolverV3Scheduler(SchedulerMixin, ConfigMixin):
    """DPM-Solver-v3 (arXiv 2310.13268) for diffusers' pipelines: one model call a step, deterministic.

        pipe.scheduler = DPMSolverV3Scheduler.from_config(pipe.scheduler.config, ems="my.ems.safetensors", guidance_scale=7.5)

    Without statistics it is multistep DPM-Solver++ with a corrector. Latents are scaled as DPMSolverMultistepScheduler's are.

    Args:
        ems: path of the model's statistics file (`ems compute --diffusers` makes one), kept absolute in the configuration.
        guidance_scale: the scale that the pipeline is called with; statistics and fitted steps are chosen by it. Not needed for
            a file with one scale.
        order, predictor, corrector, corrector_below, strength: see `sampler.Settings`; "auto" follows the file.
        lower_order_at_end: `Settings.lower_order_final`.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction".
        use_flow_sigmas: a rectified flow; levels are times t.
        flow_shift: of a flow's times, where use_dynamic_shifting does not set it from the image's size.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: read by pipelines, which compute `mu` of them.
        sigma_data: not None for EDM's preconditioning.
        snr_shift_scale: CogVideoX's change of the betas.
        Others: as in diffusers' DPMSolverMultistepScheduler and EulerDiscreteScheduler.

    Raises:
        ValueError: a value that a configuration cannot have.
        EMSFileError: a statistics file that is not there or not whole.
    """

    _compatibles: ClassVar[list[str]] = [*(e.name for e in KarrasDiffusionSchedulers), *_OTHERS]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float | None = None,
        prediction_type: str = "epsilon",
        variance_type: str | None = None,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "linspace",
        timestep_type: str = "discrete",
        steps_offset: int = 0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -float("inf"),
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sigma_data: float | None = None,
        sigma_schedule: str | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        ems: str | None = None,
        guidance_scale: float | None = None,
        order: int | str = AUTO,
        predictor: str = AUTO,
        corrector: str = AUTO,
        corrector_below: float | str = AUTO,
        lower_order_at_end: bool | str = AUTO,
        strength: float | str = AUTO,
    ) -> None:
        self._begin()

    def _begin(self) -> None:
        """Take up the configuration: read its statistics file, and stand at the steps that the model was trained on."""
        config = self.config
        if config.prediction_type == "flow_prediction":
            self.register_to_config(use_flow_sigmas=True)
        self._file: EMSFile | None = None if config.ems is None else load_ems_file(config.ems)
        self.register_to_config(ems=beside.absolute(config.ems))
        self._noise = noise_of(self.config)
        count = config.num_train_timesteps
        trained = torch.arange(count, 0, -1, dtype=torch.float64) / count
        schedule = self._noise.schedule
        self._settle(schedule.level_at(trained.clamp(schedule.time_min, schedule.time_max)), 0.0, None)
        self.num_inference_steps: int | None = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The scheduler for the model that another scheduler's `config` describes; `kwargs` override it, as in diffusers.

        The configurations of flow-matching and EDM schedulers are told by their names for the shift and the data's deviation.
        """
        if isinstance(config, Mapping) and "beta_schedule" not in config:
            if config.get("invert_sigmas"):
                raise ValueError("invert_sigmas (Mochi) is not supported: its times run backwards")
            if "shift" in config:
                kwargs = {"prediction_type": "flow_prediction", "flow_shift": float(config["shift"] or 1.0), **kwargs}
            elif "sigma_data" in config:  # a default value counts as not given
                kwargs = {"sigma_data": config["sigma_data"], **kwargs}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As in diffusers, from a folder or a repository of the Hub, together with the statistics file that lies there."""
        if "ems" not in kwargs:
            found = beside.find(cls, pretrained_model_name_or_path, subfolder, kwargs)
            kwargs |= {} if found is None else {"ems": found}
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: object) -> None:
        """Write the configuration, and the statistics file beside it (see `beside`). Raises OSError."""
        with beside.saved(self, save_directory, self._file):
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    # --- the schedule

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the steps of the next run, and forget the last one.

        Args:
            num_inference_steps: model calls. With statistics that hold a schedule fitted for this count and the guidance scale,
                that one is used; with others the best steps that need no fit; without any, or with use_karras_sigmas and
                its like, the configured spacing.
            device: of `timesteps`.
            sigmas: the caller's own levels, for a flow before shifting and without the end (see `spacing.given_sigmas`).
            timesteps: the caller's own time steps of the model.
            mu: of dynamic shifting; pipelines pass it.

        Raises:
            ValueError: nothing or contradictory things are given, or levels that cannot be a schedule.
        """
        if sum(v is not None for v in (sigmas, timesteps)) > 1 or all(
            v is None for v in (sigmas, timesteps, num_inference_steps)
        ):
            raise ValueError("give num_inference_steps, or timesteps, or sigmas")
        if isinstance(self._noise, FlowNoise) and self.config.use_dynamic_shifting and mu is not None:
            self._noise = replace(self._noise, shift=flow_shift(self.config, mu))
        config, noise, start = self.config, self._noise, None
        end = end_level(noise, config)
        if sigmas is not None:
            levels, end = given_sigmas(noise, config, sigmas, mu)
        elif timesteps is not None:
            levels = given_timesteps(noise, timesteps)
        else:
            assert num_inference_steps is not None
            start, advised = self._steps_of_file(num_inference_steps)
            levels = spaced_levels(noise, config, num_inference_steps, mu) if advised is None else advised[:-1]
            end = end if advised is None else advised[-1].item()
        if num_inference_steps is not None and num_inference_steps != len(levels):
            raise ValueError(f"num_inference_steps is {num_inference_steps}, but {len(levels)} sigmas or timesteps are given")
        self._settle(levels, end, device, start)

    def _settle(self, levels: Tensor, end: float, device: torch.device | str | None, start: float | None = None) -> None:
        """Begin anew with these levels; `start`: standard deviation of the first latents, if not the kind's own."""
        times = self._noise.time_of(levels)
        whole = times.round()
        if isinstance(self._noise, VPNoise) and not self._noise.continuous and bool(((times - whole).abs() < 1e-4).all()):
            times = whole.to(torch.int64)  # as the model was trained, and as pipelines that index by it expect
        self._levels = torch.cat([levels, levels.new_tensor([end])])
        self.sigmas = self._levels.float()
        self.timesteps = times.to(device, times.dtype if times.dtype == torch.int64 else torch.float32)
        self.num_inference_steps = len(levels)
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._stepping: Stepping | None = None
        self._start = start

    def _run(self) -> Run:
        """What is known of the coming run, for the choice of statistics and steps."""
        guidance = self.config.guidance_scale
        if guidance is None and self._file is not None and len(self._file.guidance) == 1:
            guidance = self._file.guidance.item()
        unknown = (
            "the guidance scale is not known: give the scheduler guidance_scale=..., the one that you call the pipeline with"
        )
        return Run(self._noise.schedule, guidance, unknown=unknown)

    def _steps_of_file(self, n: int) -> tuple[float | None, Tensor | None]:
        """Start and levels [n + 1] that the statistics file advises: fitted for n steps, or the best that need no fit.

        None where there is no file, or the configuration names a shape of steps. Fitted steps begin with unit noise times a
        number; pipelines of flows begin with unit noise itself, which is near enough, or not.
        """
        run = self._run()
        if self._file is None or any(self.config[name] for name in SHAPES):
            return None, None
        steps = choose_steps(self._file, str(self.config.ems), run, n)
        if not steps.fitted or run.guidance is None or any(self.config[name] != AUTO for name in _OPTIONS.values()):
            return None, unfitted_steps(run.schedule, n)[1]
        advice = self._file.at(run.guidance).recommendation
        found = advice and advice.fitted_for(self._noise.space.lambda_of(steps.levels).tolist())
        first = steps.levels[0].item()
        start = first * self._noise.scale(first) * (found.start if found else 1.0)
        if isinstance(self._noise, FlowNoise) and abs(start - 1) > _FLOW_START:
            logger.info(f"fitted steps begin at {start:.3f} times the noise, and a flow's pipeline begins at 1: not used")
            return None, unfitted_steps(run.schedule, n)[1]
        return start, steps.levels

    @property
    def step_index(self) -> int | None:
        """Steps done since the schedule's beginning; None before the first of a run."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where in the schedule the run begins, if the pipeline said so."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the run at this step (image to image, a refiner)."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor | None, schedule_timesteps: Tensor | None = None) -> int:
        """The step at `timestep`; of several equal ones the second, so that none is left out; of none the last."""
        steps = self.timesteps if schedule_timesteps is None else schedule_timesteps
        found = (steps == torch.as_tensor(timestep, device=steps.device)).nonzero().flatten().tolist()
        return int(found[min(1, len(found) - 1)]) if found else len(steps) - 1

    # --- the run

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the latents that a run begins with."""
        if self._start is not None:
            return self._start
        return (self._levels.max().item() ** 2 + 1) ** 0.5 if isinstance(self._noise, EDMNoise) else 1.0

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The model's input for these latents: the same, but for EDM models."""
        if not isinstance(self._noise, EDMNoise):
            return sample
        return sample * self._noise.input_scale(self._levels[self._index(timestep)].item())

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: object = None,
        return_dict: bool = True,
    ) -> DPMSolverV3SchedulerOutput | tuple[Tensor, Tensor]:
        """The latents of the next step.

        Args:
            model_output: [B, C, ...] what the model predicted, guidance included; [B, 2 C, ...] with variance_type.
            timestep: where the run begins, if `set_begin_index` did not say; later ones are counted, not looked up.
            sample: [B, C, ...] (or as `layout` says) the latents that the model saw. What a pipeline changed in them since the
                last step, as inpainting does, stays changed.
            generator: ignored: the steps draw no noise.
            return_dict: False for a tuple.

        Returns:
            The latents, in sample's dtype, and the denoised ones.

        Raises:
            ValueError: before `set_timesteps`, or after the last step.
        """
        if self.num_inference_steps is None:
            raise ValueError("set_timesteps has not been called: the scheduler knows no steps yet")
        i = self._index(timestep)
        if i >= self.num_inference_steps:
            raise ValueError(f"all {self.num_inference_steps} steps are done: call set_timesteps before another run")
        if self._stepping is None:
            self._stepping = self._stepping_for(i, sample)
        if self.config.variance_type in ("learned", "learned_range") and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output.chunk(2, dim=1)[0]
        before, denoised = self._stepping.step(model_output, sample)
        self._step_index = i + 1
        return DPMSolverV3SchedulerOutput(before, denoised) if return_dict else (before, denoised)

    def _index(self, timestep: float | Tensor | None) -> int:
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        return self._step_index

    def _stepping_for(self, first: int, sample: Tensor) -> Stepping:
        """The run from step `first` on, for latents like `sample`."""
        config, run = self.config, self._run()
        layout = layout_for(sample.shape, 1 if self._file is None else self._file.channels)
        ems: EMS | None = None
        if self._file is not None:
            found = choose_statistics(self._file, str(config.ems), "given", run, layout.channels_first(sample).shape)
            (logger.warning if found.warn else logger.info)(found.message)
            ems = found.ems
        chosen = cast("SolverOptions", {name: config[ours] for name, ours in _OPTIONS.items()})
        limit = (config.dynamic_thresholding_ratio, config.sample_max_value) if config.thresholding else None
        levels = self._levels[first:]
        plan = plan_for(levels, ems=ems, space=self._noise.space, guidance=run.guidance, **chosen)
        return Stepping(levels, self._noise, config.prediction_type, layout, plan, limit)

    # --- noise for the beginning

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean latents [B, ...] with `noise` at the levels of `timesteps` [B] (or one for all)."""
        levels = self._levels_for(timesteps)
        parts = torch.tensor([self._noise.parts(level) for level in levels])
        parts = parts.to(original_samples).reshape(-1, 2, *(1,) * (original_samples.ndim - 1))
        return parts[:, 0] * original_samples + parts[:, 1] * noise

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """`add_noise` by the name and order that flow-matching pipelines use."""
        return self.add_noise(sample, noise, torch.as_tensor(timestep).reshape(-1))

    def _levels_for(self, timesteps: Tensor) -> list[float]:
        """In a run the level where it stands, which is what pipelines mean before and after a step; else the time's."""
        timesteps = torch.as_tensor(timesteps).reshape(-1)
        at = self._step_index if self._step_index is not None else self._begin_index
        if at is not None:
            return [self._levels[at].item()] * len(timesteps)
        known = dict(zip(self.timesteps.tolist(), self._levels.tolist(), strict=False))
        return [known.get(t, self._noise.level_of(torch.tensor(t)).item()) for t in timesteps.tolist()]

    @property
    def alphas_cumprod(self) -> Tensor:
        """[N] of the trained time steps, for pipelines that compute with it."""
        if not isinstance(self._noise, VPNoise):
            raise AttributeError(f"alphas_cumprod: {type(self._noise).__name__} has no table of betas")
        return self._noise.schedule.alphas_cumprod.float()

    def __len__(self) -> int:
        """Trained time steps."""
        return int(self.config.num_train_timesteps)
