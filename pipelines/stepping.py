"""One run of a scheduler: the sampler's steps on the latents that a pipeline holds.

The pipeline owns the latents between two steps, rounds them to its dtype and may change them (inpainting writes the known region
back). The run keeps its own latents in float32, and takes over what changed against the ones that it gave away: nothing if the
pipeline gives them back as they were.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sampler import EMS
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
        ems: the model's statistics, or None.
        chosen: the sampler's options, see `sampler.settings_for`.
        guidance: the guidance scale, if known.
        threshold: (ratio, maximum) of dynamic thresholding, or None.
    """

    def __init__(
        self,
        levels: Tensor,
        noise: Noise,
        prediction: str,
        layout: Layout,
        ems: EMS | None,
        chosen: dict[str, Any],
        guidance: float | None,
        threshold: tuple[float, float] | None,
    ) -> None:
        self._levels = levels.tolist()
        self._noise, self._prediction, self._layout, self._threshold = noise, prediction, layout, threshold
        self._done = 0
        self._solver = SamplerRun(levels, noise.space, ems, chosen, guidance)
        self._given: Tensor | None = None

    def step(self, output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """(latents of the next step, denoised) from the model's output at `sample`; all as the pipeline holds them."""
        i, scale = self._done, self._noise.scale(self._levels[self._done])
        dtype = sample.dtype if sample.dtype == torch.float64 else torch.float32
        x = self._taken_over(sample, dtype, scale)
        denoised = self._denoised(self._layout.channels_first(output).to(dtype), x, self._levels[i])
        self._done += 1
        if self._levels[i + 1] != self._levels[i]:
            x = self._solver.step(x, denoised)
        self._x = x
        out = x * self._noise.scale(self._levels[i + 1])
        given = self._layout.as_given(out).to(sample.dtype)
        self._given = given.clone()  # the pipeline may write into what it gets
        return given, self._layout.as_given(denoised).to(sample.dtype)

    def _taken_over(self, sample: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
        """The solver's x [B, C, ...] at which the model was called."""
        if self._given is None:
            return self._layout.channels_first(sample).to(dtype) / scale
        changed = sample.to(dtype) - self._given.to(dtype)
        self._given = None
        return torch.add(self._x, self._layout.channels_first(changed), alpha=1 / scale)

    def _denoised(self, output: Tensor, x: Tensor, level: float) -> Tensor:
        p, q = self._noise.factors(level, self._prediction)
        denoised = output if (p, q) == (0, 1) else torch.add(x if p == 1 else p * x, output, alpha=q)
        return denoised if self._threshold is None else _thresholded(denoised, *self._threshold)


def _thresholded(denoised: Tensor, ratio: float, most: float) -> Tensor:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3), for models of pixels."""
    size = denoised.abs().flatten(1).quantile(ratio, dim=1).clamp(1, most).reshape(-1, *(1,) * (denoised.ndim - 1))
    return denoised.clamp(-size, size) / size


# --- to be replaced by the sampler's own
from ..sampler.plan import DataStep, check_levels, fitted_plan, make_plan
from ..sampler import solver as _s


class SamplerRun:
    def __init__(self, levels, space, ems, chosen, guidance):
        nodes = torch.unique_consecutive(levels)
        check_levels(nodes, space)
        settings = _s.settings_for(nodes, space, ems, chosen, guidance)
        fitted = _s._fitted_for(nodes, space, ems, chosen)
        host = tuple(nodes.tolist())
        self.plan = fitted_plan(host, space, fitted) if fitted else make_plan(host, space, _s._NO_EMS if ems is None else ems, settings)
        self.i, self.history = 0, {}

    def step(self, x, denoised):
        if self.i == 0:
            self.steps = _s._ready_steps(self.plan, x.device, x.dtype, x.ndim)
            self.before = x
        i, step = self.i, self.steps[self.i]
        self.i += 1
        if isinstance(step.predictor, DataStep):
            self.before = x
            self.history.clear()
            return _s._data_step(step.predictor, x, denoised)
        self.history[i] = _s._minus_nonlinear_term(step.x_slope, x, denoised)
        if step.corrector is not None:
            x = _s._combine(step.corrector, self.before, self.history)
        self.before = x
        out = _s._combine(step.predictor, x, self.history)
        for j in [j for j in self.history if j <= i - self.plan.keep]:
            del self.history[j]
        return out
