"""One network of the zoo as a test bench: converged solutions, every rival on every schedule, a fit as a user would make it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import geometric_mean
from entrants import host_schedules
from rivals import RIVALS
from torch import Tensor

from dpm_solver_v3.ems_tools.compute import Effort, evaluations, job_for, plan_for
from dpm_solver_v3.ems_tools.estimate.job import JobState
from dpm_solver_v3.ems_tools.estimate.run import estimate_moments
from dpm_solver_v3.ems_tools.estimate.source import Source
from dpm_solver_v3.ems_tools.file.rows import FittedRow
from dpm_solver_v3.ems_tools.fit import fit_steps
from dpm_solver_v3.sampler import EDM as SigmaTime
from dpm_solver_v3.sampler import (
    EMS,
    FittedSteps,
    Recommendation,
    karras,
    quadratic_time,
    sample_dpm_solver_v3,
    uniform_lambda,
    uniform_time,
)
from dpm_solver_v3.sampler import VPContinuous as VPTime

from . import Loaded

__all__ = ["QUICK", "Bench", "Size", "fit"]

SKIPPED = ("dpmpp_2m_diffusers", "dpmpp_2m_heun_diffusers", "lms")
"""Rivals that another one equals, or that are hopeless at few steps."""
FINE = 160
"""Steps of a converged solution down to sigma_min; from there on 24 more to sigma 0.002."""


@dataclass(frozen=True)
class Size:
    """How much is measured: step counts, noises to judge on, noises to choose the rival on (first on all, then on the best)."""

    steps: tuple[int, ...] = (4, 5, 6, 8, 10)
    noises: int = 24
    first: int = 3
    selection: int = 16
    finalists: int = 20


QUICK = Size((5, 8), 12, 2, 8, 12)


class Bench:
    """One network at one guidance scale: noises, converged solutions, errors of samplers."""

    def __init__(self, network: Loaded, guidance: float, size: Size) -> None:
        self.network, self.guidance, self.size = network, guidance, size
        self.high, self.low = network.ends
        self.judged = list(range(1000, 1000 + size.noises))
        self.chosen_on = list(range(500, 500 + size.selection))
        self.clean = {k: x for ids in (self.judged, self.chosen_on) for k, x in zip(ids, self.solve(ids), strict=True)}

    def denoiser(self, samples: Sequence[int], part: str = "judge") -> torch.nn.Module:
        """D for these samples; sample k has the class k mod n of those that are judged."""
        classes = self.network.entry.classes_of(part)
        return self.network.denoiser(self.guidance, [classes[k % len(classes)] for k in samples])

    def noise(self, samples: Sequence[int]) -> Tensor:
        """Unit start noise."""
        seeds = [70_000_133 + k for k in samples]
        shape = self.network.entry.shape
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def solve(self, samples: list[int]) -> Tensor:
        """Converged solutions [K, C, ...]."""
        lam = torch.linspace(-math.log(self.high), -math.log(self.low), FINE + 1, dtype=torch.float64)
        tail = torch.logspace(math.log10(self.low), math.log10(0.002), 25, dtype=torch.float64)[1:]
        sigmas = torch.cat([(-lam).exp(), tail if self.low > 0.004 else lam[:0], lam.new_zeros(1)])
        options: dict[str, Any] = {"order": 3, "corrector": "none", "lower_order_final": False, "disable": True}
        return sample_dpm_solver_v3(self.denoiser(samples), self.noise(samples) * self.high, sigmas, **options)

    def errors(self, samples: Sequence[int], sampler: Callable[[Any, Tensor, Tensor], Tensor], sigmas: Tensor) -> Tensor:
        """Squared errors [K]; infinite where a sampler cannot follow the schedule."""
        start = self.noise(samples) * sigmas[0].item()
        try:
            x = sampler(self.denoiser(samples), start, sigmas)
        except (ArithmeticError, ValueError, RuntimeError, IndexError):
            x = torch.full_like(start, math.nan)
        clean = torch.stack([self.clean[k] for k in samples])
        return (x.double() - clean.double()).square().flatten(1).mean(1).nan_to_num(nan=1e30).clamp(max=1e30)

    def schedules(self) -> dict[str, Callable[[int], Tensor]]:
        """Those of the model's own time, of VP time, flow time and sigma, to sigma_min and to 0, and the hosts'."""
        own, both = self.network.entry.schedule, SigmaTime(self.low, self.high)
        vp = VPTime.between(self.low, self.high)
        found: dict[str, Callable[[int], Tensor]] = {}
        kinds = (("uniform", uniform_time), ("quadratic", quadratic_time))
        for time_name, schedule in (("own", own), ("vp", vp), ("flow", _Flow(self.low, self.high))):
            for name, kind in kinds:
                for zero in (False, True):
                    found[f"{time_name} {name}{' 0' if zero else ''}"] = _made(kind, schedule, zero)
        for name, kind in (("lambda", uniform_lambda), ("karras", karras)):
            for zero in (False, True):
                found[f"{name}{' 0' if zero else ''}"] = _made(kind, both, zero)
        hosts = host_schedules(own)
        return {**found, **{name: hosts[name] for name in ("sgm_uniform", "beta", "kl_optimal")}}

    def best_rival(self, steps: int) -> tuple[str, Tensor]:
        """Name and errors on the judged noises of the rival that is best on the noises of its choice."""
        name, schedule, sigmas = self.chosen_rival(steps)
        return f"{name} on {schedule}", self.errors(self.judged, RIVALS[name], sigmas)

    def chosen_rival(self, steps: int) -> tuple[str, str, Tensor]:
        """Names of sampler and schedule that are best on the noises of the rival's choice, and the sigmas."""
        scores: dict[tuple[str, str], Tensor] = {}
        made = {name: make(steps) for name, make in self.schedules().items()}
        usable = {name: s for name, s in made.items() if len(s) == steps + 1 and bool((s.diff() < 0).all())}
        size, names = self.size, [name for name in RIVALS if name not in SKIPPED]
        first, rest = self.chosen_on[: size.first], self.chosen_on[size.first :]
        for schedule, sigmas in usable.items():
            for name in names:
                scores[name, schedule] = self.errors(first, RIVALS[name], sigmas)
        ranked = sorted(scores, key=lambda k: geometric_mean(scores[k]).item())[: size.finalists]
        for key in ranked:
            scores[key] = torch.cat([scores[key], self.errors(rest, RIVALS[key[0]], usable[key[1]])])
        name, schedule = min(ranked, key=lambda k: geometric_mean(scores[k]).item())
        return name, schedule, usable[schedule]

    def fitted_errors(self, steps: FittedSteps) -> Tensor:
        """Errors of the sampler with fitted steps."""
        ems = replace(EMS.degenerate(1), recommendation=Recommendation((), (steps,)))
        sigmas = torch.tensor([*(math.exp(-v) for v in steps.lambdas), 0.0], dtype=torch.float64)
        run = lambda model, x, s: sample_dpm_solver_v3(model, x, s, ems=ems, disable=True)  # noqa: E731
        return self.errors(self.judged, run, sigmas)


@dataclass(frozen=True)
class _Flow:
    """Flow time between two sigmas, in sigma space."""

    low: float
    high: float
    space = SigmaTime.space

    @property
    def time_min(self) -> float:
        """Where sigma is lowest."""
        return self.low / (1 + self.low)

    @property
    def time_max(self) -> float:
        """Where sigma is highest."""
        return self.high / (1 + self.high)

    def level_at(self, time: Tensor) -> Tensor:
        """Sigma at `time`."""
        t = time.to(torch.float64)
        return t / (1 - t)


def _made(kind: Callable[..., Tensor], schedule: Any, zero: bool) -> Callable[[int], Tensor]:
    return lambda n: kind(schedule, n, to_zero=zero)


def fit(
    network: Loaded, guidance: float, effort: Effort, steps: tuple[int, ...], classes: int = 0
) -> tuple[list[FittedRow], int, float, float]:
    """Rows, evaluations counted, and seconds in all and in the network; on the first `classes` of those to fit on (0: all)."""
    entry, spent = network.entry, [0.0, 0.0]

    class Counted(torch.nn.Module):
        def __init__(self, denoiser: Any) -> None:
            super().__init__()
            self.denoiser = denoiser

        def for_samples(self, samples: list[int]) -> Counted:
            return Counted(self.denoiser.for_samples(samples))

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            began = time.perf_counter()
            out: Tensor = self.denoiser(x, sigma)
            spent[0], spent[1] = spent[0] + len(x), spent[1] + time.perf_counter() - began
            return out

    model = Counted(network.denoiser(guidance, entry.classes_of("fit")[: classes or None]))
    source = Source({guidance: model}, entry.shape, entry.schedule, {})
    job, plan, state = job_for(source, effort, steps=steps), plan_for(source, effort, steps), JobState()
    assert plan.fit is not None
    began = time.perf_counter()
    estimate_moments(source.models, job, state, batch=32, keep=plan.fit.noises)
    rows = fit_steps(source, job, guidance, plan.fit, state, batch=32)
    planned = evaluations(job, replace(plan, schedules={}))
    if spent[0] > planned:
        raise AssertionError(f"{spent[0]} evaluations, announced were {planned}")
    return rows, int(spent[0]), time.perf_counter() - began, spent[1]
