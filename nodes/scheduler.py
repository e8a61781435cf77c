"""Fitted steps, and the paper's step schedules over the model's own noise range, as SIGMAS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..sampler import cosine_time, karras, quadratic_time, uniform_lambda, uniform_time
from ..sampler.schedules import NoiseSchedule
from . import host
from .graph import Asked, Place, agreed, executing, link_of, receivers
from .model import level_table, model_sampling_of
from .protocols import Guider, Patcher
from .sampling import choice, chosen_steps, told

__all__ = ["SCHEDULES", "SchedulerNode", "host_levels"]

FITTED, PASSES = "fitted", "fitted, fewer passes"

SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "uniform lambda": uniform_lambda,
    "uniform time": uniform_time,
    "quadratic time": quadratic_time,
    "cosine time": cosine_time,
    "Karras": karras,
}


class SchedulerNode:
    """The paper's step schedules over the model's own noise range, as SIGMAS."""

    CATEGORY = host.category_of("BasicScheduler", "sampling/custom_sampling/schedulers")
    FUNCTION = "build"
    RETURN_TYPES = ("SIGMAS",)
    DESCRIPTION = "The steps that Compute EMS fitted to this model, and the step schedules of the DPM-Solver-v3 paper."
    SEARCH_ALIASES = ("dpm_solver_v3 scheduler", "dpm", "dpm++", "uniform lambda", "logsnr", "sigmas", "fitted")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, object]:
        return {
            "required": {
                "model": ("MODEL",),
                "schedule": choice(
                    [*SCHEDULES, FITTED, PASSES],
                    "fitted: the steps that Compute EMS fitted to this model, best for dpm_solver_v3 with few steps; "
                    "fitted, fewer passes: more steps in the same time, some without the negative prompt; "
                    "uniform lambda: equal steps in log-SNR, the paper's choice for small images; uniform time: its choice for "
                    "latent models with guidance; cosine time: good for flow models; Karras: good for others.",
                    "uniform time",
                ),
                "steps": ("INT", {"default": 8, "min": 1, "max": 1000, "tooltip": "Model evaluations."}),
                "denoise": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "Below 1: img2img.",
                    },
                ),
                "end": choice(
                    ["zero", "smallest sigma"],
                    "zero: the last step removes all noise, as the host's schedulers do; smallest sigma: as in the paper.",
                    "zero",
                ),
            },
            "optional": {
                "cfg": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.1,
                        "tooltip": "For fitted steps: the CFG scale that you sample with. 0: that of the node that gets these "
                        "steps. Where another node makes that cfg, connect it here too.",
                    },
                ),
                "guider": ("GUIDER", {"tooltip": "For fitted steps: the guider that you sample with, instead of cfg."}),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, schedule: object = None, unique_id: object = None, **inputs: object) -> str:
        """Fitted steps depend on the cfg of the nodes that get them, which is no input of this one."""
        return repr(receivers(executing(str(unique_id)))) if schedule in (FITTED, PASSES) else ""

    def build(
        self,
        model: Patcher,
        schedule: str,
        steps: int,
        denoise: float,
        end: str = "zero",
        cfg: float = 0.0,
        guider: Guider | None = None,
        unique_id: str = "",
    ) -> tuple[Tensor]:
        """SIGMAS [steps + 1], empty for denoise 0."""
        if denoise <= 0:
            return (torch.empty(0),)
        sampling = model_sampling_of(model)
        if schedule in (FITTED, PASSES):
            facts = replace(facts_of(executing(str(unique_id)), cfg), patcher=model)
            return (told(chosen_steps(sampling, steps, denoise, facts, guider, schedule == PASSES)),)
        total = max(round(steps / denoise), steps)
        return (host_levels(level_table(sampling), schedule, total, end == "zero")[-(steps + 1) :],)


def facts_of(place: Place, cfg: float) -> Asked:
    """What is known of the run that gets this node's steps, whose own input says `cfg` (0: nothing).

    The nodes that sample say it. Only where they are unknown packs', or take their cfg from the very node that this one takes
    it from, does the input count.
    """
    found = receivers(place)
    if not found:
        return Asked(scale=cfg, guider="") if cfg > 0 else agreed(found)
    own = link_of(place.inputs(place.node).get("cfg"))
    if own is not None and all(r.link == own for r in found):
        return agreed([replace(r, scale=cfg) for r in found])
    return agreed(found)


def host_levels(table: NoiseSchedule, schedule: str, steps: int, to_zero: bool) -> Tensor:
    """SIGMAS [steps + 1] in float32."""
    return SCHEDULES[schedule](table, steps, to_zero=to_zero).to(torch.float32)
