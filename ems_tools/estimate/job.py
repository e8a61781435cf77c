"""What is estimated and how far it is: jobs, their saved state, the noise of every sample, batches that fit into memory.

Sample k is determined by (seed, k) alone: its start noise and probes come from a generator of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypedDict, TypeVar

import torch
from torch import Tensor

from ...sampler import LambdaDenoiser, Space
from ..file.storage import write_atomic
from .moments import Moments

__all__ = [
    "EstimateError",
    "Evaluating",
    "Job",
    "JobState",
    "Meter",
    "Model",
    "Progress",
    "denoiser_for",
    "evaluations_of",
    "in_batches",
    "probed_points",
    "sample_noise",
    "snapped_grid",
    "uniform_grid",
]

T = TypeVar("T")
_ONLY = {"source": "trajectory", "probe_method": "difference"}
"""What could be chosen once; saved states of before name it."""
_STATE_FORMAT = "dpm-solver-v3-ems-job"


class EstimateError(RuntimeError):
    """A job that cannot run or go on; the message says why and what to do."""


class Model(Protocol):
    """A denoiser D(x, level). It may offer `for_samples(indices)`: the same, conditioned for these samples."""

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """D [B, C, ...] of x [B, C, ...] at host levels [B]."""
        ...


class Evaluating(TypedDict, total=False):
    """How a model is evaluated, as the options of functions that run it: what each says, and defaults, see `Runner`."""

    batch: int
    device: torch.device | str
    dtype: torch.dtype


@dataclass(frozen=True)
class Job:
    """What is estimated. Two jobs with equal fields (but `samples`) can be resumed, extended and compared.

    Args:
        shape: latent [C, ...] without the batch.
        lambdas: grid of half log-SNR, increasing.
        space: the host's, see `sampler.Space`.
        samples: trajectories per guidance scale.
        guidance: scales; the model is given for each.
        seed: of start noise and probes.
        probes, probe_every, per_element: see `points.sample_moments`.
        groups: of samples, for standard errors.
        start: the host's noise at the first point of the grid, over the unit noise times sigma; at later points it is that.
    """

    shape: tuple[int, ...]
    lambdas: tuple[float, ...]
    space: Space = Space.SIGMA
    samples: int = 32
    guidance: tuple[float, ...] = (1.0,)
    seed: int = 0
    probes: int = 1
    probe_every: int = 1
    per_element: bool = False
    groups: int = 32
    start: float = 1.0

    def __post_init__(self) -> None:
        if len(self.lambdas) < 5:
            raise EstimateError(f"a grid needs at least 5 points, not {len(self.lambdas)}")
        if any(b <= a for a, b in zip(self.lambdas, self.lambdas[1:], strict=False)):
            raise EstimateError("the grid of lambda must increase strictly")
        if self.samples < 1 or self.probes < 1 or self.probe_every < 1 or self.groups < 2:
            raise EstimateError("samples, probes and probe_every must be at least 1, groups at least 2")
        if not self.guidance or any(b <= a for a, b in zip(self.guidance, self.guidance[1:], strict=False)):
            raise EstimateError("guidance scales must be given in increasing order")

    def identity(self) -> dict[str, object]:
        """Everything that must agree for two runs to be the same job, JSON-serialisable."""
        found = {k: v for k, v in json.loads(json.dumps(asdict(self))).items() if k != "samples"}
        if self.start == 1:  # saved states of before do not name it
            del found["start"]
        return {**found, **_ONLY}


def evaluations_of(job: Job) -> int:
    """Denoiser evaluations of the whole job (a guided one counts once)."""
    points = len(job.lambdas)
    per_sample = points + len(probed_points(points, job.probe_every)) * job.probes
    return len(job.guidance) * job.samples * per_sample


def probed_points(points: int, every: int) -> list[int]:
    """Indices of the grid points at which the Jacobian's diagonal is measured: every so many, and the last."""
    return sorted({*range(0, points, every), points - 1})


def uniform_grid(sigma_min: float, sigma_max: float, intervals: int) -> tuple[float, ...]:
    """`intervals` + 1 points uniform in lambda."""
    return tuple(torch.linspace(-math.log(sigma_max), -math.log(sigma_min), intervals + 1, dtype=torch.float64).tolist())


def snapped_grid(grid: tuple[float, ...], levels: Tensor, space: Space = Space.SIGMA) -> tuple[float, ...]:
    """The grid moved to the nearest of the host's own noise levels, for hosts that round to them (repeats dropped)."""
    own = space.lambda_of(levels.to(torch.float64)).sort().values
    own = own[own.isfinite()]
    index = (torch.tensor(grid, dtype=torch.float64)[:, None] - own).abs().argmin(1).unique()
    return tuple(own[index].tolist())


@dataclass(frozen=True)
class Progress:
    """Where one stage of a job stands, in denoiser evaluations; `earlier` ones were made before this run."""

    stage: str
    done: int
    total: int
    note: str = ""
    earlier: int = 0


class Meter:
    """Counts the denoiser evaluations of one stage and reports them.

    The count stands in the job's state too, so whenever that is saved it says what the saved results have cost: a job that
    goes on counts on from there, and a stage that was finished before is reported as finished.
    """

    def __init__(self, progress: Callable[[Progress], None], stage: str, total: int, note: str, state: JobState) -> None:
        self.progress, self.stage, self.total, self.note = progress, stage, total, note
        self._counts: dict[str, int] = state.facts.setdefault("counts", {})
        self.done = self.before = self._counts.get(note, 0)
        if self.done:
            self.tick(0)

    def tick(self, evaluations: int) -> None:
        """Count these and report."""
        self.done += evaluations
        self._counts[self.note] = self.done
        self.progress(Progress(self.stage, self.done, self.total, self.note, self.before))


@dataclass
class JobState:
    """What a job has so far, kept in one file beside the result while it runs.

    `tensors` and `facts` are free for later stages (calibration); `path` None keeps the state in memory only.
    """

    path: Path | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, job: Job) -> JobState:
        """The state saved for this very job, or an empty one. Raises EstimateError if the file is another job's."""
        if path is None or not path.exists():
            return cls(path, {}, {"job": job.identity()})
        state = cls._read(path)
        if state.facts.get("job") != job.identity():
            theirs, mine = state.facts.get("job") or {}, job.identity()
            names = sorted(k for k in {*theirs, *mine} if theirs.get(k) != mine.get(k))
            raise EstimateError(
                f"{path} holds an unfinished job with other settings ({', '.join(names)} differ): finish it with those, "
                f"give another output name, or delete it"
            )
        return state

    @classmethod
    def _read(cls, path: Path) -> JobState:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt", device="cpu") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _STATE_FORMAT:
                    raise ValueError("not an unfinished job")
                facts = json.loads(metadata["facts"])
                if not isinstance(facts, dict) or not isinstance(facts.get("job", {}), dict):
                    raise ValueError("what it says of the job is no table")
                return cls(path, {k: file.get_tensor(k) for k in file.keys()}, facts)
        except (SafetensorError, ValueError, KeyError, OSError, RecursionError) as error:
            raise EstimateError(f"{path} cannot be resumed ({error}): delete it to start again") from error

    def kept(self, table: str, name: str, key: str, value: Callable[[], T]) -> T:
        """What JSON can hold under `key` in the facts' table of this name, found and saved if it is not there."""
        known: dict[str, T] = self.facts.setdefault(table, {}).setdefault(name, {})
        if key not in known:
            known[key] = value()
            self.save()
        return known[key]

    def save(self) -> None:
        """Write the state, atomically."""
        if self.path is None:
            return
        from safetensors.torch import save

        metadata = {"format": _STATE_FORMAT, "facts": json.dumps(self.facts, sort_keys=True)}
        tensors = {k: v.contiguous() for k, v in self.tensors.items()}
        write_atomic(self.path, save(tensors, metadata))

    def delete(self) -> None:
        """Remove the file, once the result is written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def moments(self, job: Job, g: int) -> Moments:
        """Moments of the g-th guidance scale so far (new and empty at the start)."""
        if f"sums.{g}" not in self.tensors:
            return Moments.empty(torch.tensor(job.lambdas, dtype=torch.float64), job.shape, job.per_element, job.groups)
        lambdas = torch.tensor(job.lambdas, dtype=torch.float64)
        return Moments(lambdas, self.tensors[f"count.{g}"].clone(), self.tensors[f"sums.{g}"].clone())

    def keep(self, g: int, moments: Moments) -> None:
        """Take over moments of the g-th scale; call `save` to write them."""
        self.tensors[f"sums.{g}"], self.tensors[f"count.{g}"] = moments.sums, moments.count


def sample_noise(job: Job, samples: list[int]) -> tuple[Tensor, list[torch.Generator]]:
    """Unit start noise [B, C, ...] on the CPU of these samples, and their generators, ready for the probes."""
    generators = [torch.Generator().manual_seed((job.seed * 1_000_003 + k) % 2**63) for k in samples]
    return torch.stack([torch.randn(job.shape, generator=g) for g in generators]), generators


def denoiser_for(model: Model, samples: list[int], space: Space) -> LambdaDenoiser:
    """D(y, lambda) of the model, conditioned for these samples where it distinguishes them."""
    choose = getattr(model, "for_samples", None)
    return LambdaDenoiser(choose(samples) if callable(choose) else model, space)


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError))):
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()


def in_batches(
    samples: list[int], batch: int, run: Callable[[list[int]], T], retry: Callable[[], None] = lambda: None
) -> Iterator[tuple[list[int], T]]:
    """(part, run(part)) for consecutive parts of at most `batch` samples; when memory runs out, the batch is halved.

    Raises EstimateError when a single sample does not fit.
    """
    start = 0
    while start < len(samples):
        part = samples[start : start + batch]
        try:
            result = run(part)
        except Exception as error:
            if not _out_of_memory(error):
                raise
            batch = _halved(len(part), error)
            retry()
            continue
        yield part, result
        start += len(part)


def _halved(batch: int, error: Exception) -> int:
    if batch == 1:
        raise EstimateError(
            f"out of memory with a single sample: use a smaller latent size, or free memory on the device ({error})"
        ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return batch // 2
