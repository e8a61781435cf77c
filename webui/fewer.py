"""Steps in fewer passes of the network in Forge: which runs allow them, and how their passes are made.

At a CFG scale of 1 Forge makes the conditional pass alone, and the scale is an argument of every call. At a guided evaluation
it keeps the unconditional answer where a sampler asks for that (`need_last_noise_uncond`, which its CFG++ samplers use), from
which the conditional one follows. Nothing of the host is replaced. AUTOMATIC1111 makes both passes at every scale, but for a
setting of the whole program; so there, and wherever anything else decides about passes, every step is guided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from . import host
from .model import Running, guider_of
from .objects import Denoiser

__all__ = ["HostPasses", "is_offered", "why_not"]


def is_offered() -> bool:
    """Whether this host can make one pass alone: Forge."""
    return host.module("backend.sampling.sampling_function") is not None


def why_not(denoiser: Denoiser, run: Running, extra_args: Mapping[str, object]) -> str:
    """Why this run cannot leave out passes, "" if it can. Whatever is not known for sure counts as a reason."""
    unet = getattr(getattr(run.model, "forge_objects", None), "unet", None)
    options = getattr(unet, "model_options", None)
    if not is_offered() or not isinstance(options, dict):
        return "only Forge can leave out a single pass"
    if not hasattr(denoiser, "need_last_noise_uncond") or options.get("disable_cfg1_optimization"):
        return "this host makes both passes always"
    if guider_of(run) or options.get("conditioning_modifiers"):
        return "an extension changes the guidance"
    if getattr(denoiser, "mask", None) is not None:
        return "inpainting"
    if getattr(run.p, "is_hr_pass", False):
        return "the hires pass"
    if getattr(run.p, "refiner_checkpoint_info", None) is not None:
        return "the refiner"
    if _positive(extra_args.get("s_min_uncond")) or _positive(getattr(host.shared("opts"), "skip_early_cond", 0)):
        return "the host leaves out passes itself"
    if not _is_single(extra_args.get("cond")):
        return "several prompts joined by AND"
    scale = extra_args.get("cond_scale")
    guided = isinstance(scale, (int, float)) and not math.isclose(scale, 1.0)
    return "" if guided else "CFG scale 1, which makes one pass anyway"


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _is_single(cond: object) -> bool:
    """Whether every picture has one prompt of weight 1, as far as the host's conditions say."""
    batch = getattr(cond, "batch", None)
    return isinstance(batch, (list, tuple)) and all(len(parts) == 1 and getattr(parts[0], "weight", 0) == 1 for parts in batch)


class HostPasses:
    """The passes of one run, for `passes` of the sampler.

    Args:
        denoiser: what the host gave the sampler function.
        call: evaluates it, as `model(x, sigma, **extra_args)`.

    `count` tells how many passes were made for every picture.
    """

    def __init__(self, denoiser: Denoiser, call: Callable[..., Tensor]) -> None:
        self.denoiser, self.call, self.count = denoiser, call, 0

    def __call__(self, x: Tensor, sigma: Tensor, guided: bool, **extra_args: object) -> tuple[Tensor, ...]:
        """(c,) or, where `guided`, (c, D), each like x [B, C, h, w]."""
        self.count += 2 if guided else 1
        if not guided:
            return (self.call(x, sigma, **{**extra_args, "cond_scale": 1.0}),)
        scale, state = extra_args["cond_scale"], vars(self.denoiser)
        assert isinstance(scale, (int, float))
        before = state.get("need_last_noise_uncond", False)
        state["need_last_noise_uncond"] = True
        try:
            denoised = self.call(x, sigma, **extra_args)
        finally:
            state["need_last_noise_uncond"] = before
        noise: Tensor = state["last_noise_uncond"]
        u = x - noise.to(x) * sigma.reshape(-1, *(1,) * (x.ndim - 1)).to(x)
        return u + (denoised - u) / scale, denoised
