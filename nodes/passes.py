"""Steps in fewer passes of the network through the host's own guidance: which runs allow them, and how their passes are made.

The host looks up `sampler_calc_cond_batch_function` in the `model_options` of every call and lets it evaluate the network for
the positive and the negative conditioning. A copy of these options with a function of ours asks for the positive one alone, or
keeps its answer beside the guided one. Masks, areas, ControlNet, hooks and several conditionings stay the host's affair, and
nothing of the host is replaced. A run in which anything else stands between the network and the guided answer is not touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .host import loaded
from .model import Running, is_plain
from .protocols import Options

__all__ = ["HostPasses", "NotOfferedError", "why_not"]

_KEY = "sampler_calc_cond_batch_function"
_BETWEEN = (_KEY, "sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function")
"""Keys of `model_options` whose functions see or change the answers."""


class NotOfferedError(RuntimeError):
    """The host did not ask for the passes in the way that is known."""


def why_not(run: Running, extra_args: Options) -> str:
    """Why this run cannot leave out passes, "" if it can. Whatever is not known for sure counts as a reason."""
    options = extra_args.get("model_options") or {}
    found = [key for key in _BETWEEN if options.get(key)]
    if not callable(getattr(loaded("comfy.samplers"), "calc_cond_batch", None)):
        return "this ComfyUI evaluates its conditionings in another way"
    if run.guider is None or not is_plain(run.guider) or "predict_noise" in vars(run.guider):
        return "another guider than plain CFG"
    if found:
        return f"a node changes the guidance ({found[0]})"
    if any((getattr(run.patcher, "wrappers", None) or {}).get("predict_noise", {}).values()):
        return "a node wraps the guided prediction"
    if extra_args.get("denoise_mask") is not None:
        return "inpainting"
    return "cfg 1, which makes one pass anyway" if math.isclose(run.guidance, 1.0) else ""


class HostPasses:
    """The passes of one run, for `passes` of the sampler.

    Args:
        model: what the host gave the sampler function.

    `count` tells how many passes were made for every picture.
    """

    def __init__(self, model: Callable[..., Tensor]) -> None:
        self.model, self.count = model, 0

    def __call__(self, x: Tensor, sigma: Tensor, guided: bool, **extra_args: Any) -> tuple[Tensor, ...]:
        """(c,) or, where `guided`, (c, D), each like x [B, C, ...]. Raises NotOfferedError."""
        import comfy.samplers

        kept: list[Tensor] = []

        def evaluate(asked: Mapping[str, Any]) -> list[Tensor]:
            positive, negative = asked["conds"]
            conds = [positive, negative if guided else None]
            out = comfy.samplers.calc_cond_batch(asked["model"], conds, asked["input"], asked["sigma"], asked["model_options"])
            kept.append(out[0])
            self.count += 2 if guided else 1
            return list(out) if guided else [out[0], out[0]]  # then c + (scale - 1)(c - c) = c

        options = {**(extra_args.get("model_options") or {}), _KEY: evaluate}
        denoised = self.model(x, sigma, **{**extra_args, "model_options": options})
        if len(kept) != 1 or kept[0].shape != x.shape:
            raise NotOfferedError
        return (kept[0], denoised) if guided else (denoised,)
