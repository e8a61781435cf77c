"""The node "Compare samplers": samplers and step counts on the user's own model, against the converged solution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import host
from .find import Attached, attach
from .pictures import labelled_grid, panels_picture
from .sampling import host_levels, sample_host

__all__ = ["CompareNode"]


@dataclass(frozen=True)
class _Run:
    """One line of the comparison."""

    sampler: str
    scheduler: str

    def __str__(self) -> str:
        return f"{self.sampler}, {self.scheduler}"


class CompareNode:
    """Errors and pictures of samplers at few steps."""

    CATEGORY = "DPM-Solver-v3"
    FUNCTION = "compare"
    RETURN_TYPES = ("IMAGE", "IMAGE", "STRING")
    RETURN_NAMES = ("plot", "grid", "table")
    OUTPUT_NODE = True
    DESCRIPTION = (
        "Run samplers at several step counts from the same noise on your model and prompt, and measure how far each is from "
        "the converged solution. Error: mean squared difference of latents. Random samplers (ancestral, sde) aim elsewhere."
    )
    SEARCH_ALIASES = ("compare samplers", "dpm_solver_v3", "benchmark")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        import comfy.samplers

        names = list(comfy.samplers.SCHEDULER_NAMES)
        return {
            "required": {
                "model": ("MODEL",),
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "latent_image": ("LATENT", {"tooltip": "Errors are averaged over its batch; the first image is shown."}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}),
                "cfg": ("FLOAT", {"default": 5.0, "min": 0.0, "max": 100.0, "step": 0.1}),
                "samplers": (
                    "STRING",
                    {
                        "default": "dpm_solver_v3/dpm_solver_v3_fitted, dpm_solver_v3, dpmpp_2m, deis, uni_pc_bh2",
                        "tooltip": "Comma-separated. name/scheduler for a scheduler of its own: dpmpp_2m/karras.",
                    },
                ),
                "scheduler": (names, {"default": "karras" if "karras" in names else names[0]}),
                "steps": ("STRING", {"default": "5, 6, 8, 10"}),
                "reference_steps": (
                    "INT",
                    {"default": 60, "min": 20, "max": 1000, "tooltip": "Steps of the converged solution; 60 is often enough."},
                ),
            },
            "optional": {"vae": ("VAE", {"tooltip": "For the grid of images."})},
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def compare(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        seed: int,
        cfg: float,
        samplers: str,
        scheduler: str,
        steps: str,
        reference_steps: int,
        vae: Any = None,
        unique_id: str = "",
    ) -> dict[str, Any]:
        """Plot, grid (one grey pixel without a VAE) and table."""
        import comfy.sample
        import comfy.samplers

        runs, counts = _runs(samplers, scheduler), _counts(steps)
        latent = host.latent_of(model, latent_image)
        noise = comfy.sample.prepare_noise(latent, seed)
        total = reference_steps + len(runs) * sum(counts)
        update, done = host.progress_bar(total, str(unique_id)), [0]

        def tick(*_: Any) -> None:
            done[0] += 1
            update(min(done[0], total), None)

        def sample(patcher: Any, sampler: Any, sigmas: Tensor) -> Tensor:
            arguments = (cfg, sampler, sigmas, positive, negative, latent)
            return comfy.sample.sample_custom(
                patcher, noise, *arguments, noise_mask=None, callback=tick, disable_pbar=True, seed=seed
            ).cpu()

        host.say(f"Reference: {reference_steps} steps", str(unique_id))
        sampling = host.model_sampling_of(model)
        reference = sample(attach(model, Attached(None)), _reference_sampler(), _reference_levels(sampling, reference_steps))
        found: dict[tuple[_Run, int], Tensor] = {}
        for run in runs:
            for n in counts:
                host.say(f"{run}, {n} steps", str(unique_id))
                sigmas = comfy.samplers.calculate_sigmas(sampling, run.scheduler, n)
                found[run, n] = sample(model, comfy.samplers.sampler_object(run.sampler), sigmas)
        errors = {key: _error(x, reference) for key, x in found.items()}
        table = _table(runs, counts, errors)
        host.say("Compare samplers: done", str(unique_id))
        plot = panels_picture([[_panel(runs, counts, errors)]], f"error over steps, cfg {cfg:g}", zoom=1.6)
        grid = _grid(vae, runs, counts, found, reference)
        return {"ui": {"text": [table]}, "result": (plot, grid, table)}


def _runs(text: str, scheduler: str) -> list[_Run]:
    import comfy.samplers

    runs = []
    for part in text.replace("\n", ",").split(","):
        name, _, own = (piece.strip() for piece in part.partition("/"))
        if not name:
            continue
        if name not in comfy.samplers.KSampler.SAMPLERS:
            raise host.HostError(f"unknown sampler {name!r}. Known: {', '.join(comfy.samplers.KSampler.SAMPLERS)}")
        if own and own not in comfy.samplers.SCHEDULER_NAMES:
            raise host.HostError(f"unknown scheduler {own!r}. Known: {', '.join(comfy.samplers.SCHEDULER_NAMES)}")
        runs.append(_Run(name, own or scheduler))
    if not runs:
        raise host.HostError("name at least one sampler, for example: dpm_solver_v3, dpmpp_2m/karras")
    return list(dict.fromkeys(runs))


def _counts(text: str) -> list[int]:
    try:
        counts = sorted({int(part) for part in text.replace(";", ",").split(",") if part.strip()})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1 or counts[-1] > 1000:
        raise host.HostError(f"steps must be whole numbers from 1 to 1000, such as '5, 6, 8, 10', not {text!r}")
    return counts


def _reference_sampler() -> Any:
    import comfy.samplers

    options = {"order": 3, "corrector": "none", "lower_order_final": False, "strength": 0.0}
    return comfy.samplers.KSAMPLER(sample_host, extra_options={"dpm_solver_v3_options": options})


def _reference_levels(sampling: Any, steps: int) -> Tensor:
    return host_levels(host.level_table(sampling), "uniform lambda", steps, True)


def _error(x: Tensor, reference: Tensor) -> float:
    """Geometric mean over the batch of the mean squared difference."""
    squares = (x.double() - reference.double()).square().flatten(1).mean(1)
    return squares.clamp(min=1e-30).log().mean().exp().item()


def _table(runs: list[_Run], counts: list[int], errors: dict[tuple[_Run, int], float]) -> str:
    width = max(len(str(run)) for run in runs)
    lines = [f"{'':{width}}" + "".join(f"{n:>8} steps" for n in counts)]
    lines += [f"{run!s:{width}}" + "".join(f"{errors[run, n]:14.3e}" for n in counts) for run in runs]
    best = [min(runs, key=lambda run: errors[run, n]) for n in counts]
    lines.append(f"{'best':{width}}" + "".join(f"{run.sampler[:13]:>14}" for run in best))
    return "\n".join(lines)


def _panel(runs: list[_Run], counts: list[int], errors: dict[tuple[_Run, int], float]) -> Any:
    from ..ems_tools.show.panels import Curve, Panel, style_of

    xs = tuple(float(n) for n in counts)
    curves = tuple(
        Curve(str(run), xs, tuple(math.log10(max(errors[run, n], 1e-30)) for n in counts), (), (), *style_of(k))
        for k, run in enumerate(runs)
    )
    return Panel("mean squared difference to the converged latent", "steps", curves, log=True)


def _grid(vae: Any, runs: list[_Run], counts: list[int], found: dict[tuple[_Run, int], Tensor], reference: Tensor) -> Tensor:
    if vae is None:
        return torch.full((1, 1, 1, 3), 0.5)

    def image(x: Tensor) -> Tensor:
        pixels = vae.decode(x[:1])
        return pixels.reshape(-1, *pixels.shape[-3:])[0]

    rows = [[image(found[run, n]) for n in counts] + [image(reference)] for run in runs]
    return labelled_grid(rows, [run.sampler for run in runs], [f"{n} steps" for n in counts] + ["converged"])
