"""What is measured: a model at its guidance scales, the shape of its latents and its noise schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...sampler import NoiseSchedule, Space
from ..file.rows import clean_text
from .job import Model

__all__ = ["Source"]


@dataclass(frozen=True)
class Source:
    """A model to measure.

    Args:
        models: the denoiser D(x, level) of each guidance scale.
        shape: latent [C, ...].
        schedule: its noise schedule; gives space and noise range.
        identity: what is known of the model: name, hashes, prediction; strings.
        levels: the host's own noise levels, if it rounds to them.
        host_schedules: the host's step schedules to judge on, before the paper's, by name.
        conditional: the conditional answer alone, from one pass of the network; None if the model has no such answer.
        start: see `Job`.
    """

    models: Mapping[float, Model]
    shape: tuple[int, ...]
    schedule: NoiseSchedule
    identity: Mapping[str, str]
    levels: Tensor | None = None
    host_schedules: Mapping[str, Callable[[int], Tensor]] | None = None
    conditional: Model | None = None
    start: float = 1.0

    def __post_init__(self) -> None:
        """A host's text can be anything; here it becomes what a file can hold."""
        object.__setattr__(self, "identity", {clean_text(k): clean_text(v) for k, v in self.identity.items()})

    def noise_range(self) -> tuple[float, float]:
        """sigma_min and sigma_max; a flow that begins at t = 1 is measured from t = 0.999 on."""
        space = self.schedule.space
        times = torch.tensor([self.schedule.time_min, self.schedule.time_max], dtype=torch.float64)
        low, high = self.schedule.level_at(times).tolist()
        high = min(high, 0.999) if space is Space.FLOW else high
        lam = space.lambda_of(torch.tensor([low, high], dtype=torch.float64))
        sigma_min, sigma_max = (-lam).exp().tolist()
        return sigma_min, sigma_max
