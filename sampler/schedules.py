"""Noise schedules of the model families, and the paper's step schedules on them as plain lists of host levels.

A noise schedule maps time to the host's noise level (see `space`). A step schedule of n steps is a float64 tensor
[n + 1] of levels. It ends at the schedule's smallest level, as in the paper, or with `to_zero=True` at 0: then the
first n levels reach the smallest one and the last step goes to 0, as k-diffusion and the hosts do. Both cost n calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .space import Space

__all__ = [
    "EDM",
    "Flow",
    "LevelTable",
    "NoiseSchedule",
    "VPContinuous",
    "VPDiscrete",
    "cosine_time",
    "half_corrector_sigma",
    "karras",
    "quadratic_time",
    "unfitted_from",
    "unfitted_steps",
    "uniform_lambda",
    "uniform_time",
]


class NoiseSchedule(Protocol):
    """Time in [time_min, time_max], larger is noisier, and the host's level there."""

    @property
    def space(self) -> Space:
        """What the host's levels are."""
        ...

    @property
    def time_min(self) -> float:
        """Time of the least noise."""
        ...

    @property
    def time_max(self) -> float:
        """Time of the most noise."""
        ...

    def level_at(self, time: Tensor) -> Tensor:
        """Host level in float64 at `time`, any shape."""
        ...


@dataclass(frozen=True, eq=False)
class VPDiscrete:
    """N trained time steps with cumulative alpha-bar [N] (Stable Diffusion, DDPM); time (k + 1) / N is step k.

    Between the trained steps log sigma is linear in time, as in k-diffusion's DiscreteSchedule.
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        a = self.alphas_cumprod
        if a.ndim != 1 or len(a) < 2 or not ((a > 0) & (a < 1)).all() or not (a.diff() < 0).all():
            raise ValueError("alphas_cumprod must be a decreasing tensor [N] of values in (0, 1)")

    space = Space.SIGMA
    time_max = 1.0

    @property
    def time_min(self) -> float:
        """Time of the first trained step."""
        return 1 / len(self.alphas_cumprod)

    @classmethod
    def linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000, sqrt: bool = True) -> VPDiscrete:
        """Linear betas; `sqrt` for "scaled linear", i.e. linear in sqrt(beta). The defaults are Stable Diffusion's."""
        power = 0.5 if sqrt else 1.0
        betas = torch.linspace(beta_start**power, beta_end**power, steps, dtype=torch.float64) ** (1 / power)
        return cls((1 - betas).cumprod(0))

    def level_at(self, time: Tensor) -> Tensor:
        """Sigma at `time` in [1 / N, 1]."""
        a = self.alphas_cumprod.to(torch.float64)
        log_sigma = ((1 - a) / a).log() / 2
        position = (time.to(torch.float64) * len(a) - 1).clamp(0, len(a) - 1)
        low = position.floor().long().clamp(max=len(a) - 2)
        return torch.lerp(log_sigma[low], log_sigma[low + 1], position - low).exp()


@dataclass(frozen=True)
class VPContinuous:
    """The VP SDE with linear beta(t) (ScoreSDE): log alpha = -(beta_1 - beta_0) t^2 / 4 - beta_0 t / 2."""

    beta_0: float = 0.1
    beta_1: float = 20.0
    time_min: float = 1e-3
    time_max: float = 1.0
    space = Space.SIGMA

    @classmethod
    def between(cls, low: float, high: float) -> VPContinuous:
        """This process from sigma `low` to sigma `high`."""
        first, last = cls().time_at(torch.tensor([low, high], dtype=torch.float64)).tolist()
        return cls(time_min=first, time_max=last)

    def time_at(self, sigma: Tensor) -> Tensor:
        """The time of `sigma`, the inverse of `level_at`, in sigma's dtype."""
        slope = self.beta_1 - self.beta_0
        return ((self.beta_0**2 + 2 * slope * torch.log1p(sigma**2)).sqrt() - self.beta_0) / slope

    def level_at(self, time: Tensor) -> Tensor:
        """Sigma at `time`."""
        t = time.to(torch.float64)
        return torch.expm1((self.beta_1 - self.beta_0) * t**2 / 2 + self.beta_0 * t).sqrt()


@dataclass(frozen=True)
class EDM:
    """Karras et al. 2022: time is sigma itself."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    space = Space.SIGMA

    @property
    def time_min(self) -> float:
        """sigma_min."""
        return self.sigma_min

    @property
    def time_max(self) -> float:
        """sigma_max."""
        return self.sigma_max

    def level_at(self, time: Tensor) -> Tensor:
        """Sigma at `time`, the same number."""
        return time.to(torch.float64)


@dataclass(frozen=True)
class Flow:
    """Rectified flow x = (1 - t) x0 + t n; `shift` moves the steps towards noise as in SD3: s u / (1 + (s - 1) u)."""

    shift: float = 1.0
    time_min: float = 1e-3
    time_max: float = 1.0
    space = Space.FLOW

    def level_at(self, time: Tensor) -> Tensor:
        """The level t at unshifted `time`."""
        u = time.to(torch.float64)
        return self.shift * u / (1 + (self.shift - 1) * u)


@dataclass(frozen=True, eq=False)
class LevelTable:
    """A host's own table of levels [N], increasing, for models that only the host knows (shifted, rescaled, ...).

    Entry k is the level at time (k + 1) / N. Between entries log sigma (in sigma space) or t (flow) is linear in time.
    """

    levels: Tensor
    space: Space = Space.SIGMA
    time_max = 1.0

    def __post_init__(self) -> None:
        v = self.levels
        if v.ndim != 1 or len(v) < 2 or not (v > 0).all() or not v.isfinite().all() or not (v.diff() > 0).all():
            raise ValueError("levels must be an increasing tensor [N] of finite values above 0")
        if self.space is Space.FLOW and v[-1] > 1:
            raise ValueError("a flow's levels are times t, at most 1")

    @property
    def time_min(self) -> float:
        """Time of the first entry."""
        return 1 / len(self.levels)

    def level_at(self, time: Tensor) -> Tensor:
        """Level at `time` in [1 / N, 1]."""
        table = self.levels.to("cpu", torch.float64)
        table = table if self.space is Space.FLOW else table.log()
        position = (time.to(torch.float64) * len(table) - 1).clamp(0, len(table) - 1)
        low = position.floor().long().clamp(max=len(table) - 2)
        value = torch.lerp(table[low], table[low + 1], position - low)
        return value if self.space is Space.FLOW else value.exp()


def half_corrector_sigma(schedule: NoiseSchedule) -> float:
    """Sigma at time 0.5: `corrector_below` for the paper's half corrector ("t <= 0.5")."""
    level = schedule.level_at(torch.tensor(0.5, dtype=torch.float64))
    return math.exp(-schedule.space.lambda_of(level).item())


def uniform_time(schedule: NoiseSchedule, n: int, *, to_zero: bool = False) -> Tensor:
    """Steps uniform in time: the paper's choice for latents and large images [time_uniform]."""
    return _assemble(lambda u: schedule.level_at(_line(schedule.time_max, schedule.time_min, u)), n, to_zero)


def quadratic_time(schedule: NoiseSchedule, n: int, *, to_zero: bool = False) -> Tensor:
    """Steps uniform in the square root of time (DDIM's quadratic spacing) [time_quadratic]."""
    ends = schedule.time_max**0.5, schedule.time_min**0.5
    return _assemble(lambda u: schedule.level_at(_line(*ends, u) ** 2), n, to_zero)


def cosine_time(schedule: NoiseSchedule, n: int, *, share: float = 1.0, to_zero: bool = False) -> Tensor:
    """Steps that are short at both ends of time: time falls as (1 + cos(pi u)) / 2, as Chebyshev's nodes do.

    With `to_zero` node k of n stands at u = k / n, so the steps shorten towards 0 and no step is lost at the end. `share` below
    1 mixes with equal steps: 0 is uniform time.
    """

    def levels(u: Tensor) -> Tensor:
        passed = (1 - share) * u + share * (1 - torch.cos(math.pi * u)) / 2
        return schedule.level_at(_line(schedule.time_max, schedule.time_min, passed))

    if n > 0 and to_zero:
        values = levels(torch.arange(n, dtype=torch.float64) / n)
        return torch.cat([values, values.new_zeros(1)])
    return _assemble(levels, n, to_zero)


def uniform_lambda(schedule: NoiseSchedule, n: int, *, to_zero: bool = False) -> Tensor:
    """Steps uniform in lambda, the half log-SNR: the paper's choice for small images [logSNR].

    A flow schedule that starts at t = 1, where lambda is -inf, gets its first node there and the others uniform
    from t = 0.999 on.
    """
    high, low = _ends(schedule)
    start = min(high, 0.999) if schedule.space is Space.FLOW else high
    lam = schedule.space.lambda_of(torch.tensor([start, low], dtype=torch.float64)).tolist()
    levels = _assemble(lambda u: schedule.space.level_of(_line(lam[0], lam[1], u)), n, to_zero)
    if n > 0:
        levels[0] = high
    return levels


def karras(schedule: NoiseSchedule, n: int, *, rho: float = 7.0, to_zero: bool = False) -> Tensor:
    """Karras et al. 2022, eq. 5, between the schedule's ends, in the host's level [edm]."""
    high, low = _ends(schedule)
    return _assemble(lambda u: _line(high ** (1 / rho), low ** (1 / rho), u) ** rho, n, to_zero)


KARRAS_FROM, TIMELESS_KARRAS_FROM = 8, 13
"""Steps from which Karras steps are the better ones in sigma space, on Stable Diffusion's range; and on a wide one, where time
is but another name for sigma. See `unfitted_steps`."""
WIDE = 2000.0
"""Largest sigma over the smallest beyond which Karras steps spend too much at the noisy end; Stable Diffusion's is 501."""


def unfitted_steps(schedule: NoiseSchedule, steps: int) -> tuple[str, Tensor]:
    """The schedule for a model without fitted steps: its title, and host levels [steps + 1] that end at 0.

    Chosen by `benchmarks/unfitted_steps.py`, with this sampler and no statistics, for each family of models: a flow; a model of
    Stable Diffusion's range; one that begins with far more noise, or ends with far less; and one whose time is sigma.
    """
    if schedule.space is Space.FLOW:
        return "cosine", cosine_time(schedule, steps, to_zero=True)
    high, low = _ends(schedule)
    wide = high > WIDE * low
    if _is_timeless(schedule):
        if steps < (TIMELESS_KARRAS_FROM if wide else KARRAS_FROM):
            return "cosine", cosine_time(VPContinuous.between(low, high), steps, to_zero=True)
    elif steps < KARRAS_FROM:
        return "half-cosine", cosine_time(schedule, steps, share=0.5, to_zero=True)
    elif wide:
        return "cosine", cosine_time(schedule, steps, to_zero=True)
    return "Karras", karras(schedule, steps, to_zero=True)


def unfitted_from(schedule: NoiseSchedule, first: float, steps: int) -> Tensor:
    """Levels [steps + 1] from level `first` to 0 as image to image takes them: the last part of many `unfitted_steps`."""
    title, levels = unfitted_steps(schedule, 1000)
    logs, karras_ends = levels[:-1].log(), title == "Karras"
    above = int((logs > math.log(first)).sum().clamp(1, len(logs) - 1))
    place = above - 1 + ((logs[above - 1] - math.log(first)) / (logs[above - 1] - logs[above])).clamp(0, 1)
    u = torch.arange(steps, dtype=torch.float64) / max(steps - karras_ends, 1)  # Karras steps evaluate at sigma_min too
    at = place + (len(logs) - karras_ends - place) * u
    low = at.floor().long().clamp(max=len(logs) - 2)
    found = torch.lerp(logs[low], logs[low + 1], at - low).exp()
    return torch.cat([found.new_tensor([first]), found[1:], found.new_zeros(1)])


def _is_timeless(schedule: NoiseSchedule) -> bool:
    """Whether time is but another name for sigma, or for its logarithm, as EDM's is: it tells nothing of where steps matter."""
    times = torch.linspace(schedule.time_min, schedule.time_max, 9, dtype=torch.float64)
    levels = schedule.level_at(times)
    return any(bool(((v.diff() / v.diff().mean() - 1).abs() < 0.05).all()) for v in (levels, levels.log()))


def _ends(schedule: NoiseSchedule) -> tuple[float, float]:
    times = torch.tensor([schedule.time_max, schedule.time_min], dtype=torch.float64)
    high, low = schedule.level_at(times).tolist()
    return high, low


def _line(start: float, end: float, u: Tensor) -> Tensor:
    return start + (end - start) * u


def _assemble(levels: Callable[[Tensor], Tensor], n: int, to_zero: bool) -> Tensor:
    """Evaluate `levels` on [0, 1] at n + 1 points, or at n points followed by 0."""
    if n < 0:
        raise ValueError(f"the number of steps must be at least 0, not {n}")
    if n == 0:
        return torch.empty(0, dtype=torch.float64)
    points = n if to_zero else n + 1
    u = torch.linspace(0, 1, points, dtype=torch.float64) if points > 1 else torch.zeros(1, dtype=torch.float64)
    values = levels(u)
    return torch.cat([values, values.new_zeros(1)]) if to_zero else values
