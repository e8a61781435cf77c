"""The paper's table for one pipeline: how far each scheduler's latents are from the converged ones, by number of steps.

Every scheduler begins with the same noise and solves the same ODE; its error is the root-mean-square distance of where it ends,
over all elements and relative to the converged latents' own size. The converged latents are those of this project's solver, of
order 3 and without statistics, on very many steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..ems_tools.estimate.job import EstimateError
from ..ems_tools.file.storage import write_atomic
from ..ems_tools.show.draw import png_of, svg_of
from ..ems_tools.show.panels import Curve, Panel, style_of
from ..sampler import SolverOptions, Space, sample_dpm_solver_v3, uniform_lambda, uniform_time
from .noise import EDMNoise
from .protocols import Scheduler
from .replay import PipelineDenoiser, Replay
from .scheduler import DPMSolverV3Scheduler

__all__ = ["STEPS", "Comparison", "compare", "drawn", "entrants", "table_of"]

STEPS = (5, 6, 8, 10, 12, 15, 20)
REFERENCE_STEPS = 200
_RIVALS = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler")
_FLOW_RIVALS = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler")
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """Errors [steps] of every scheduler by name, at one guidance scale."""

    model: str
    guidance: float
    samples: int
    steps: tuple[int, ...]
    errors: dict[str, tuple[float, ...]]


def entrants(replay: Replay, file: Path | None, guidance: float) -> dict[str, Scheduler]:
    """Schedulers by name: the pipeline's own first, then diffusers' common ones, then ours without and with statistics."""
    import diffusers

    pipe = replay.pipe
    config = dict(pipe.scheduler.config)
    flow = replay.noise.space is Space.FLOW
    own = type(pipe.scheduler).__name__
    found: dict[str, Scheduler] = {f"{own} (the pipeline's)": pipe.scheduler}
    extra: dict[str, object] = {}
    if flow:
        extra = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": replay.config["flow_shift"]}
    for name in _FLOW_RIVALS if flow else _RIVALS:
        if name != own and not isinstance(replay.noise, EDMNoise):
            found[name] = getattr(diffusers, name).from_config(config, **(extra if "Flow" not in name else {}))
    found["DPMSolverV3Scheduler"] = DPMSolverV3Scheduler.from_config(config, guidance_scale=guidance, ems=None)
    if file is not None:
        found["DPMSolverV3Scheduler + EMS"] = DPMSolverV3Scheduler.from_config(config, guidance_scale=guidance, ems=str(file))
    return found


def compare(  # noqa: PLR0913 - what to compare, and options by name
    replay: Replay,
    schedulers: dict[str, Scheduler],
    guidance: float,
    *,
    model: str,
    samples: int = 4,
    batch: int = 4,
    steps: Sequence[int] = STEPS,
    reference_steps: int = REFERENCE_STEPS,
    seed: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Run the pipeline with every scheduler. A scheduler that cannot do it is left out, with a warning.

    Args:
        replay: of the pipeline, whose scheduler stays what it is.
        schedulers: see `entrants`.
        guidance: the scale that the pipeline is called with.
        model: its name, for the table.
        samples: noises; `batch` of them run at once.
        batch: see there.
        steps: counts of model calls.
        reference_steps: of the converged latents.
        seed: of the noises.
        progress: told what is being run.
    """
    draw, device = torch.Generator().manual_seed(seed), replay.pipe._execution_device
    noise = torch.randn(samples, *replay.native, generator=draw)
    parts = [list(range(k, min(k + batch, samples))) for k in range(0, samples, batch)]
    progress(f"converged latents: {reference_steps} steps")
    truth = torch.cat([_converged(replay, noise[part], part, guidance, reference_steps) for part in parts])

    def run(scheduler: Scheduler, n: int) -> Tensor:
        start = noise * _start_factor(scheduler, n, replay)
        ends = [replay.run(scheduler, start[part].to(device, replay.dtype), guidance, n, part) for part in parts]
        return torch.cat(ends).float().cpu()

    size = truth.square().mean().sqrt().item()
    errors: dict[str, tuple[float, ...]] = {}
    for name, scheduler in schedulers.items():
        try:
            found = []
            for n in steps:
                progress(f"{name}: {n} steps")
                found.append((run(scheduler, n) - truth).square().mean().sqrt().item() / size)
            errors[name] = tuple(found)
        except (ValueError, TypeError, IndexError, NotImplementedError, RuntimeError) as error:
            LOG.warning("%s is left out: %s", name, error)
    if not errors:
        raise EstimateError("no scheduler could run this pipeline")
    return Comparison(model, guidance, samples, tuple(steps), errors)


def _converged(replay: Replay, noise: Tensor, part: list[int], guidance: float, steps: int) -> Tensor:
    """Native latents [B, ...] at sigma = 0, on the CPU."""
    noise_model, device = replay.noise, replay.pipe._execution_device
    schedule = noise_model.schedule
    spaced = uniform_time if noise_model.space is Space.FLOW else uniform_lambda
    levels = spaced(schedule, steps, to_zero=True)
    start = replay.layout.channels_first(noise).to(device) * levels[0].item()  # x of a flow at t = 1 is the noise
    denoiser = PipelineDenoiser(replay, guidance, tuple(part))
    options: SolverOptions = {"order": 3, "predictor": "true", "corrector": "none", "lower_order_final": False}
    final = sample_dpm_solver_v3(denoiser, start, levels, disable=True, space=noise_model.space, **options)
    return replay.layout.as_given(final).float().cpu()


def _start_factor(scheduler: Scheduler, n: int, replay: Replay) -> float:
    """What unit noise is multiplied with, so that y = sigma n at the scheduler's first level.

    Some begin at y = sqrt(1 + sigma^2) n, which is the data's own variance added: a little more noise than in y = sigma n.
    Fitted steps bring their own start.
    """
    if replay.noise.space is Space.FLOW or getattr(scheduler, "_start", None) is not None:
        return 1.0
    scheduler.set_timesteps(n)
    if getattr(scheduler, "_start", None) is not None:
        return 1.0
    first, given = float(replay.noise.level_of(scheduler.timesteps[:1].cpu())[0]), float(scheduler.init_noise_sigma)
    own_scale = 1.0 if given > 1.5 else replay.noise.scale(first)  # the Euler family holds y itself
    return first * own_scale / given


def table_of(result: Comparison) -> list[str]:
    """Lines of a Markdown table for a model card."""
    case = f"{result.model}, guidance {result.guidance:g}, {result.samples} noises"
    head = f"{case}: distance to the converged latents, relative to their size."
    lines = [head, "", "| scheduler | " + " | ".join(f"{n} steps" for n in result.steps) + " |"]
    lines.append("| --- |" + " --- |" * len(result.steps))
    best = [min(errors[k] for errors in result.errors.values()) for k in range(len(result.steps))]
    for name, errors in result.errors.items():
        cells = (f"**{e:.4f}**" if e == least else f"{e:.4f}" for e, least in zip(errors, best, strict=True))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def drawn(result: Comparison, path: Path) -> None:
    """The table as a picture, .svg or .png. Raises EMSError, OSError."""
    curves = []
    for k, (name, errors) in enumerate(result.errors.items()):
        colour, dash = style_of(k)
        y = tuple(math.log10(max(e, 1e-12)) for e in errors)
        curves.append(Curve(name, tuple(map(float, result.steps)), y, colour=colour, dash=dash))
    title = f"{result.model}, guidance {result.guidance:g}: distance to the converged latents"
    rows = [[Panel("relative error", "steps", tuple(curves), log=True)]]
    write_atomic(path, png_of(rows, title, 2.0) if path.suffix == ".png" else svg_of(rows, title))
