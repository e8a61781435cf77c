"""The node "Compute EMS"."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from . import host
from .graph import Place, Prompt
from .model import latent_of, words_of_guider
from .protocols import Clip, Conditioning, Guider, Latent, Patcher

if TYPE_CHECKING:
    from ..ems_tools.file.contents import EMSFile

__all__ = ["ComputeNode"]

_SKIPPED = ("pooled_output", "area", "mask", "strength", "start_percent", "end_percent", "hooks", "attention_mask")


class ComputeNode:
    """Measure a model's statistics."""

    CATEGORY = "DPM-Solver-v3"
    FUNCTION = "compute"
    RETURN_TYPES = ("EMS", "STRING", "IMAGE", "STRING")
    RETURN_NAMES = ("ems", "path", "plot", "report")
    OUTPUT_NODE = True
    DESCRIPTION = (
        "Compute the empirical model statistics (EMS) of this model once, and steps fitted to it; dpm_solver_v3 then finds "
        "them by the checkpoint. Cancel at any time: queueing the same again goes on where it stopped."
    )
    SEARCH_ALIASES = ("compute ems", "empirical model statistics", "fit steps", "calibrate")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, object]:
        return {"required": _required(), "optional": _optional(), "hidden": {"unique_id": "UNIQUE_ID", "prompt": "PROMPT"}}

    def compute(
        self,
        model: Patcher,
        positive: Conditioning,
        negative: Conditioning,
        latent_size: Latent,
        guidance_scales: str,
        effort: str,
        name: str,
        batch_size: int,
        start_seed: int,
        keep_moments: bool,
        clip: Clip | None = None,
        schedulers: str = "auto",
        steps: str = "auto",
        guider: Guider | None = None,
        fewer_passes: bool = False,
        image_to_image: bool = False,
        unique_id: str = "",
        prompt: Prompt | None = None,
    ) -> dict[str, object]:
        """EMS, path, plot IMAGE and report. Raises HostError or EstimateError with what to do."""
        from ..ems_tools.hosting.jobs import scales_of
        from .find import identity_of, trust
        from .session import Request, measure

        run = plain_guider(model, positive, negative) if guider is None else guider
        latent = _single(latent_of(run.model_patcher, latent_size))
        identity = identity_of(run.model_patcher, Place(prompt or {}, str(unique_id)))
        prompts = [positive, *_built_in(clip, positive)]
        request = Request(
            guider=run,
            prompts=prompts,
            shape=tuple(latent.shape[1:]),
            identity={**identity.facts(), **_facts(run, len(prompts))},
            scales=scales_of(guidance_scales),
            effort=effort,
            name=name or identity.name or "model",
            batch=batch_size,
            seed=start_seed,
            keep_moments=keep_moments,
            schedulers=_listed(schedulers),
            steps=_step_counts(steps),
            node=str(unique_id),
            passes=fewer_passes,
            image_to_image=image_to_image,
        )
        file, path = measure(request)
        trust().computed(file)
        host.say(_done(file, path), str(unique_id))
        return _outputs(file, path)


def _done(file: EMSFile, path: Path) -> str:
    """For two lines on the node: what to do next, and what it gains."""
    from ..ems_tools.show.describe import gain_of
    from .sampling import FITTED_NAME

    gain = gain_of(file)
    return f"use scheduler {FITTED_NAME}: {gain}" if gain else f"done: {path.stem.removesuffix('.ems')}"


def _single(latent: Tensor) -> Tensor:
    """The latent, unless it is several in one. Raises HostError."""
    if getattr(latent, "is_nested", False):
        raise host.HostError("several latents in one (video with sound, say) cannot be measured: no EMS for this model")
    return latent


def _required() -> dict[str, tuple[object, ...]]:
    """What every graph with this node gives, in the order of the node's face."""
    from ..ems_tools.compute import EFFORTS
    from ..ems_tools.hosting.jobs import effort_in_words

    return {
        "model": ("MODEL",),
        "positive": ("CONDITIONING", {"tooltip": "Your prompt, with ControlNet and the like if you always use it."}),
        "negative": ("CONDITIONING",),
        "latent_size": (
            "LATENT",
            {"tooltip": "An empty latent of the usual size; smaller is faster; the EMS fit every size."},
        ),
        "guidance_scales": ("STRING", {"default": "1, 4, 7.5", "tooltip": "CFG scales, in between is interpolated."}),
        "effort": (list(EFFORTS), {"default": "quick", "tooltip": effort_in_words()}),
        "name": ("STRING", {"default": "", "tooltip": "File name in output/ems. Empty: the checkpoint's name."}),
        "batch_size": (
            "INT",
            {"default": 4, "min": 1, "max": 64, "tooltip": "Samples at once. Halved when memory runs out."},
        ),
        # Not called "seed": the front end would change that after every run, and the same job goes on by its seed.
        "start_seed": (
            "INT",
            {"default": 0, "min": 0, "max": 2**31 - 1, "tooltip": "Another seed to merge with Merge EMS."},
        ),
        "keep_moments": (
            "BOOLEAN",
            {"default": False, "tooltip": "Keep what Merge EMS needs. Makes the file much larger."},
        ),
    }


def _optional() -> dict[str, tuple[object, ...]]:
    """What was added since, or is for some models only."""
    from ..ems_tools.hosting.jobs import PROMPTS

    return {
        "clip": (
            "CLIP",
            {"tooltip": f"Adds {len(PROMPTS)} built-in prompts: the EMS are not your prompt's alone."},
        ),
        "schedulers": (
            "STRING",
            {
                "default": "auto",
                "tooltip": "Schedulers on which settings are chosen and judged, comma-separated. auto: normal and "
                "karras, or simple and beta for flow models.",
            },
        ),
        "steps": (
            "STRING",
            {"default": "auto", "tooltip": "Step counts to fit, such as 5, 8, 20. auto: those of the effort."},
        ),
        "guider": (
            "GUIDER",
            {
                "tooltip": "If you sample with a guider other than plain CFG: compute under it. Its model, negative "
                "prompt and its own settings are used, with the guidance scales given here."
            },
        ),
        "fewer_passes": (
            "BOOLEAN",
            {
                "default": False,
                "tooltip": "Also fit steps that leave out the negative prompt's pass here and there, for the scheduler "
                "dpm_solver_v3_fewer_passes. Takes up to four times as long.",
            },
        ),
        "image_to_image": (
            "BOOLEAN",
            {
                "default": False,
                "tooltip": "Also fit steps for image to image (denoise below 1, hires fix), which dpm_solver_v3 takes with the "
                "scheduler dpm_solver_v3_fitted. Several times as long: name the step counts you use.",
            },
        ),
    }


def plain_guider(model: Patcher, positive: Conditioning, negative: Conditioning) -> Guider:
    """The host's classifier-free guidance."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    return guider


def _outputs(file: EMSFile, path: Path) -> dict[str, object]:
    """What the node gives and shows of the finished file."""
    from ..ems_tools.show.describe import lines_of
    from .find import Handle
    from .pictures import ems_picture

    text = "\n".join([str(path), *lines_of(file)])
    result = (Handle(file, path.name, path), str(path), ems_picture(file, path.name), text)
    return {"ui": {"text": [text]}, "result": result}


def _facts(run: Guider, prompts: int) -> dict[str, str]:
    """What the file says of the run that it was measured in, beside its model."""
    from ..ems_tools.hosting.runs import GUIDER

    facts = {"prompts": f"{prompts}: the user's and {prompts - 1} built in"}
    words = words_of_guider(run, run.model_patcher)
    return facts | ({GUIDER: words} if words else {})


def _listed(text: str) -> tuple[str, ...]:
    """Names of a line, () for "auto"."""
    given = tuple(part.strip() for part in text.split(",") if part.strip())
    return () if given == ("auto",) else given


def _step_counts(text: str) -> tuple[int, ...]:
    """Step counts of a line, () for "auto"."""
    try:
        counts = tuple(sorted({int(part) for part in _listed(text)}))
    except ValueError:
        counts = (0,)
    if counts and not 2 <= counts[0] <= counts[-1] <= 64:
        raise host.HostError(f"steps must be whole numbers from 2 to 64, such as '5, 8, 20', or auto, not {text!r}")
    return counts


def _built_in(clip: Clip | None, positive: Conditioning) -> list[Conditioning]:
    """Conditionings of the built-in prompts, with whatever else (ControlNet, sizes, ...) the user's has."""
    if clip is None:
        return []
    from ..ems_tools.hosting.jobs import PROMPTS

    extra = {k: v for k, v in (positive[0][1] if positive else {}).items() if not k.startswith(_SKIPPED)}
    found = []
    for text in PROMPTS:
        tokens = clip.tokenize(text)
        encode = getattr(clip, "encode_from_tokens_scheduled", None)
        if callable(encode):
            conds = encode(tokens)
        else:
            cond, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
            conds = [[cond, {"pooled_output": pooled}]]
        found.append([[cond, {**extra, **facts}] for cond, facts in conds])
    return found
