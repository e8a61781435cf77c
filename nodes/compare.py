"""The node "Compare samplers": samplers and step counts on the user's own model, against the converged solution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import host
from .find import Attached, attach
from .graph import Asked
from .model import latent_of, level_table, model_sampling_of
from .pictures import labelled_grid, panels_picture
from .protocols import VAE, Conditioning, Latent, ModelSampling, Patcher
from .sampling import FITTED_NAME, PASSES_NAME, chosen_steps, sample_host
from .scheduler import host_levels

if TYPE_CHECKING:
    from ..ems_tools.show.panels import Panel

__all__ = ["CompareNode"]


@dataclass(frozen=True)
class _Run:
    """One line of the comparison; `schedule` is what its scheduler really gave, where that can differ from its name."""

    sampler: str
    scheduler: str
    schedule: str = ""

    def __str__(self) -> str:
        return f"{self.sampler}, {self.schedule or self.scheduler}"


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
    SEARCH_ALIASES = ("compare samplers", "benchmark")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, object]:
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
        model: Patcher,
        positive: Conditioning,
        negative: Conditioning,
        latent_image: Latent,
        seed: int,
        cfg: float,
        samplers: str,
        scheduler: str,
        steps: str,
        reference_steps: int,
        vae: VAE | None = None,
        unique_id: str = "",
    ) -> dict[str, object]:
        """Plot, grid (one grey pixel without a VAE) and table."""
        import comfy.sample

        sampling = model_sampling_of(model)
        runs, counts = _runs(samplers, scheduler), _counts(steps)
        runs = [_named(run, model, sampling, cfg, counts) for run in runs]
        latent = latent_of(model, latent_image)
        noise = comfy.sample.prepare_noise(latent, seed)
        total = reference_steps + len(runs) * sum(counts)
        update, done = host.progress_bar(total, str(unique_id)), [0]

        def tick(*_: object) -> None:
            done[0] += 1
            update(min(done[0], total), None)

        shared = {"callback": tick, "disable_pbar": True, "seed": seed}
        host.say(f"Reference: {reference_steps} steps", str(unique_id))
        levels = host_levels(level_table(sampling), "uniform lambda", reference_steps, True)
        bare = (attach(model, Attached(None)), noise, cfg, _reference_sampler(), levels, positive, negative, latent)
        reference = _streams(comfy.sample.sample_custom(*bare, noise_mask=None, **shared))
        found: dict[tuple[_Run, int], list[Tensor]] = {}
        for run in runs:
            for n in counts:
                host.say_first(f"{run}, {n} steps", "", str(unique_id))
                # What the KSampler node calls, so that every sampler gets the very steps that it gets there.
                given = (model, noise, n, cfg, run.sampler, run.scheduler, positive, negative, latent)
                found[run, n] = _streams(comfy.sample.sample(*given, **shared))
        errors = {key: _error(x, reference) for key, x in found.items()}
        table = _table(runs, counts, errors)
        host.say_first("done", "", str(unique_id))
        plot = panels_picture([[_panel(runs, counts, errors)]], f"error over steps, cfg {cfg:g}", zoom=1.6)
        pictures = {key: x[0] for key, x in found.items()}
        grid = _grid(vae, runs, counts, pictures, reference[0])
        return {"ui": {"text": [table]}, "result": (plot, grid, table)}


def _named(run: _Run, model: Patcher, sampling: ModelSampling | None, cfg: float, counts: list[int]) -> _Run:
    """The run with what the fitted scheduler really gives: fitted steps, others, or some of both."""
    if run.scheduler not in (FITTED_NAME, PASSES_NAME):
        return run
    facts = Asked(model, cfg, "", run.sampler)
    fewer = run.scheduler == PASSES_NAME
    fitted = [n for n in counts if chosen_steps(sampling, n, 1.0, facts, passes=fewer).fitted]
    some = f"fitted at {', '.join(map(str, fitted))} steps only"
    return _Run(run.sampler, run.scheduler, "fitted" if fitted == counts else some if fitted else "not fitted")


def _streams(samples: Tensor) -> list[Tensor]:
    """The latents of a result on the CPU: one, or those of a nested one (video with sound)."""
    parts = samples.unbind() if getattr(samples, "is_nested", False) else [samples]
    return [part.cpu() for part in parts]


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


def _reference_sampler() -> object:
    import comfy.samplers

    options = {"order": 3, "corrector": "none", "lower_order_final": False, "strength": 0.0}
    return comfy.samplers.KSAMPLER(sample_host, extra_options={"dpm_solver_v3_options": options})


def _error(x: list[Tensor], reference: list[Tensor]) -> float:
    """Geometric mean over the batch of the mean squared difference over all streams."""
    differences = [(a.double() - b.double()).square().flatten(1) for a, b in zip(x, reference, strict=True)]
    return torch.cat(differences, 1).mean(1).clamp(min=1e-30).log().mean().exp().item()


def _table(runs: list[_Run], counts: list[int], errors: dict[tuple[_Run, int], float]) -> str:
    """For each number of steps the runs from best to worst, readable in any font: the host's text node has one of its own."""
    blocks = []
    for n in counts:
        found = {run: errors[run, n] for run in runs}
        ranked = sorted(runs, key=found.__getitem__)
        best = errors[ranked[0], n]
        lines = [f"{run}: {errors[run, n]:.3g} ({errors[run, n] / max(best, 1e-30):.3g} times)" for run in ranked[1:]]
        blocks.append("\n".join([f"{n} steps", f"\u2605 {ranked[0]}: {best:.3g}", *lines]))
    return "\n\n".join(blocks)


def _panel(runs: list[_Run], counts: list[int], errors: dict[tuple[_Run, int], float]) -> Panel:
    from ..ems_tools.show.panels import Curve, Panel, style_of

    xs = tuple(float(n) for n in counts)
    curves = tuple(
        Curve(str(run), xs, tuple(math.log10(max(errors[run, n], 1e-30)) for n in counts), (), (), *style_of(k))
        for k, run in enumerate(runs)
    )
    return Panel("mean squared difference to the converged latent", "steps", curves, log=True)


def _grid(
    vae: VAE | None, runs: list[_Run], counts: list[int], found: dict[tuple[_Run, int], Tensor], reference: Tensor
) -> Tensor:
    if vae is None:
        return torch.full((1, 1, 1, 3), 0.5)

    def image(x: Tensor) -> Tensor:
        pixels = vae.decode(x[:1])
        return pixels.reshape(-1, *pixels.shape[-3:])[0]

    rows = [[image(found[run, n]) for n in counts] + [image(reference)] for run in runs]
    return labelled_grid(
        rows, [str(run).replace(", ", "\n", 1) for run in runs], [f"{n} steps" for n in counts] + ["converged"]
    )
