"""What the benchmarks share: start noise, converged solutions, schedules and error measures on the embedded model.

Sample k of a seed is a start noise and the class k mod 9; both depend on (seed, k) alone, whatever the batch. A run's
error is the mean squared difference to the converged solution of the ODE from the same noise, one number per sample.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpm_solver_v3.ems_tools.embedded import CLASSES, SHAPE, GuidedDenoiser, load_network
from dpm_solver_v3.ems_tools.embedded.denoiser import WEIGHTS
from dpm_solver_v3.sampler import (
    NoiseSchedule,
    VPDiscrete,
    karras,
    quadratic_time,
    sample_dpm_solver_v3,
    uniform_lambda,
    uniform_time,
)

__all__ = [
    "NOISE",
    "OUT",
    "SCHEDULES",
    "SIGMA_MAX",
    "SIGMA_MIN",
    "Problem",
    "Reference",
    "bootstrap_ratio",
    "geometric_mean",
    "per_sample_error",
    "schedules_on",
    "solve",
    "summary",
]

OUT = Path(__file__).resolve().parents[1] / "out"
NOISE = VPDiscrete.linear()
SIGMA_MAX, SIGMA_MIN = NOISE.level_at(torch.tensor([1.0, NOISE.time_min], dtype=torch.float64)).tolist()
"""Stable Diffusion's range, on which the embedded model is used."""

_KINDS = {
    "uniform_lambda": uniform_lambda,
    "uniform_time": uniform_time,
    "quadratic_time": quadratic_time,
    "karras": karras,
}


def schedules_on(noise: NoiseSchedule) -> dict[str, Callable[[int], Tensor]]:
    """The step schedules on a noise range, by name."""
    return {
        name + ending: partial(kind, noise, to_zero=bool(ending))
        for name, kind in _KINDS.items()
        for ending in ("", "_to_zero")
    }


SCHEDULES = schedules_on(NOISE)
"""Name to function of the number of steps: sigmas that end at SIGMA_MIN, or at 0 after SIGMA_MIN."""

_CLEAN_SIGMA = 0.002
_CHUNK = 9


@dataclass(frozen=True)
class Reference:
    """The converged solution [n, 3, 32, 32] at sigma = 0 (`clean`) and on its way at SIGMA_MIN (`at_min`)."""

    clean: Tensor
    at_min: Tensor

    def end_of(self, sigmas: Tensor, target: str) -> Tensor:
        """What a run on `sigmas` is compared with: the picture, or with target "end" the solution at its last level."""
        return self.at_min if target == "end" and sigmas[-1] > 0 else self.clean


class Problem:
    """The embedded model's ODE for samples of one seed.

    Args:
        seed: of the start noise.
        reference_steps: steps of the converged solution.
        wrap: applied to every denoiser, e.g. to count calls.
        weights: of the network, where they are not the embedded ones.
        shape: of a sample, where it is not the one that the network was trained on.
    """

    noise: NoiseSchedule = NOISE
    shape: tuple[int, ...] = SHAPE
    classes = len(CLASSES)

    def __init__(
        self,
        seed: int,
        reference_steps: int,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        weights: Path = WEIGHTS,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self.shape = shape or self.shape
        self.seed, self.reference_steps = seed, reference_steps
        self.network = load_network(weights)
        self.weights_hash = hashlib.sha256(weights.read_bytes()).hexdigest()
        self.wrap = wrap or (lambda denoiser: denoiser)

    @property
    def ends(self) -> tuple[float, float]:
        """sigma_max and sigma_min."""
        high, low = self.noise.level_at(torch.tensor([self.noise.time_max, self.noise.time_min], dtype=torch.float64)).tolist()
        return high, low

    def denoiser(self, samples: Sequence[int], guidance: float) -> nn.Module:
        """D(x, sigma) for a batch of these samples."""
        labels = torch.tensor(samples) % self.classes
        return self.wrap(GuidedDenoiser(self.network, labels, guidance))

    def start(self, samples: Sequence[int], sigma: float | None = None) -> Tensor:
        """Noise [n, C, H, W] times sigma, as hosts begin on a schedule that begins there; sigma_max if not given."""
        seeds = [int.from_bytes(hashlib.sha256(f"{self.seed} {k}".encode()).digest()[:7], "big") for k in samples]
        return torch.stack([torch.randn(self.shape, generator=torch.Generator().manual_seed(s)) for s in seeds]) * (
            sigma or self.ends[0]
        )

    def reference(self, samples: Sequence[int], guidance: float, steps: int | None = None) -> Reference:
        """The converged solution, from out/cache where it is known."""
        steps = steps or self.reference_steps
        chunks = {k // _CHUNK: None for k in samples}
        parts = {c: self._chunk(c, guidance, steps) for c in chunks}
        pick = [(k // _CHUNK, k % _CHUNK) for k in samples]
        stacked = (torch.stack([parts[c][name][i] for c, i in pick]) for name in ("clean", "at_min"))
        return Reference(*stacked)

    def is_cached(self, samples: Sequence[int], guidance: float, steps: int | None = None) -> bool:
        """Whether `reference` costs nothing."""
        steps = steps or self.reference_steps
        return all(self._path(c, guidance, steps).exists() for c in {k // _CHUNK for k in samples})

    def _path(self, chunk: int, guidance: float, steps: int) -> Path:
        key = {
            "weights": self.weights_hash,
            "seed": self.seed,
            "labels": "sample mod 9",
            "samples": [chunk * _CHUNK, (chunk + 1) * _CHUNK],
            "guidance": guidance,
            "steps": steps,
            "sigmas": [*self.ends, _CLEAN_SIGMA, 0],
            "sampler": "order 3, uniform lambda, no corrector",
            **({} if self.shape == type(self).shape else {"shape": list(self.shape)}),
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return OUT / "cache" / f"reference-{digest[:20]}.safetensors"

    def _chunk(self, chunk: int, guidance: float, steps: int) -> dict[str, Tensor]:
        path = self._path(chunk, guidance, steps)
        if not path.exists():
            samples = range(chunk * _CHUNK, (chunk + 1) * _CHUNK)
            solved = solve(self.denoiser(samples, guidance), self.start(samples), steps, *self.ends)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            save_file(solved, temporary)
            temporary.replace(path)
        return load_file(path)


def solve(denoiser: nn.Module, x: Tensor, steps: int, sigma_max: float, sigma_min: float) -> dict[str, Tensor]:
    """Order 3 on steps uniform in lambda: to sigma_min, on to 0.002, and the denoised picture there."""
    share = math.log(sigma_max / sigma_min) / math.log(sigma_max / _CLEAN_SIGMA)
    first = round(steps * share)
    down = torch.linspace(math.log(sigma_max), math.log(sigma_min), first + 1, dtype=torch.float64).exp()
    rest = torch.linspace(math.log(sigma_min), math.log(_CLEAN_SIGMA), steps - first, dtype=torch.float64).exp()
    options: dict[str, Any] = {"order": 3, "corrector": "none", "disable": True}
    at_min = sample_dpm_solver_v3(denoiser, x, down, **options)
    clean = sample_dpm_solver_v3(denoiser, at_min, torch.cat([rest, rest.new_zeros(1)]), **options)
    return {"clean": clean.contiguous(), "at_min": at_min.contiguous()}


def per_sample_error(x: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference per sample [n], float64; infinite where x is not finite."""
    error = (x.double() - target.double()).pow(2).flatten(1).mean(1)
    return error.nan_to_num(nan=math.inf)


def geometric_mean(errors: Tensor, dim: int = -1) -> Tensor:
    """exp(mean(log errors))."""
    return errors.log().mean(dim).exp()


_MEASURES: dict[str, Callable[..., Tensor]] = {"geometric_mean": geometric_mean, "mean": torch.mean}


def _resamples(n: int, seed: int, draws: int) -> Tensor:
    return torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))


def _interval(values: Tensor) -> list[float]:
    return torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def summary(errors: Tensor, seed: int = 0, draws: int = 2000) -> dict[str, object]:
    """Mean, median and geometric mean over samples [n], with bootstrap 95% intervals."""
    picks = errors[_resamples(len(errors), seed, draws)]
    out: dict[str, object] = {}
    for name, measure in (*_MEASURES.items(), ("median", _median)):
        out[name] = measure(errors, dim=-1).item()
        out[f"{name}_95"] = _interval(measure(picks, dim=-1))
    return out


def _median(errors: Tensor, dim: int) -> Tensor:
    return errors.quantile(0.5, dim=dim)


def bootstrap_ratio(ours: Tensor, theirs: Tensor, seed: int = 0, draws: int = 2000) -> dict[str, list[float]]:
    """Per measure, the ratio ours / theirs over the same samples [n]: [value, low, high] of the 95% interval."""
    index = _resamples(len(ours), seed, draws)
    out = {}
    for name, measure in _MEASURES.items():
        value = (measure(ours, dim=-1) / measure(theirs, dim=-1)).item()
        out[name] = [value, *_interval(measure(ours[index], dim=-1) / measure(theirs[index], dim=-1))]
    return out
