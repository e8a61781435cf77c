"""One run of a scheduler: the sampler's steps on the latents that a pipeline holds.

The pipeline owns the latents between two steps, rounds them to its dtype and may change them (inpainting writes the known
region back). The run keeps its own latents in float32, and takes over what changed against the ones that it gave away:
nothing if the pipeline gives them back as they were.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..sampler import Plan, Run
from .layout import Layout
from .noise import Noise

__all__ = ["Stepping"]


class Stepping:
    """The steps of one run. Called once a step, in order.

    Args:
        levels: [n + 1] host levels in float64, from the run's first step to its end; equal neighbours are one node.
        noise: of the model.
        prediction: what the model's output is.
        layout: of the pipeline's latents.
        plan: what the sampler does at these levels.
        threshold: (ratio, maximum) of dynamic thresholding, or None.
    """

    def __init__(
        self,
        levels: Tensor,
        noise: Noise,
        prediction: str,
        layout: Layout,
        plan: Plan,
        threshold: tuple[float, float] | None,
    ) -> None:
        self._levels = levels.tolist()
        self._noise, self._prediction, self._layout, self._threshold = noise, prediction, layout, threshold
        self._done = 0
        self._plan = plan
        self._run: Run | None = None
        self._given: Tensor | None = None  # what the pipeline got from the last step

    def step(self, output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """(latents of the next step, denoised) from the model's output at `sample`; all as the pipeline holds them."""
        level, following = self._levels[self._done : self._done + 2]
        run = self._run = self._taken_over(sample, self._noise.scale(level))
        denoised = self._denoised(self._layout.channels_first(output).to(run.x.dtype), run.x, level)
        self._done += 1
        if following != level:
            run.observe(denoised)
            run.advance()
        given = self._layout.as_given(run.x * self._noise.scale(following)).to(sample.dtype)
        self._given = given.clone()  # the pipeline may write into what it gets
        return given, self._layout.as_given(denoised).to(sample.dtype)

    def _taken_over(self, sample: Tensor, scale: float) -> Run:
        """The sampler's run, at the x [B, C, ...] at which the model was called."""
        dtype = sample.dtype if sample.dtype == torch.float64 else torch.float32
        if self._run is None or self._given is None:
            first = self._layout.channels_first(sample).to(dtype) / (scale * self._plan.start)  # `Run` puts the start in again
            return Run(self._plan, first)
        changed = sample.to(dtype) - self._given.to(dtype)
        self._run.move(self._layout.channels_first(changed) / scale)
        return self._run

    def _denoised(self, output: Tensor, x: Tensor, level: float) -> Tensor:
        p, q = self._noise.factors(level, self._prediction)
        denoised = output if (p, q) == (0, 1) else torch.add(x if p == 1 else p * x, output, alpha=q)
        return denoised if self._threshold is None else _thresholded(denoised, *self._threshold)


def _thresholded(denoised: Tensor, ratio: float, most: float) -> Tensor:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3), for models of pixels."""
    size = denoised.abs().flatten(1).quantile(ratio, dim=1).clamp(1, most).reshape(-1, *(1,) * (denoised.ndim - 1))
    return denoised.clamp(-size, size) / size
