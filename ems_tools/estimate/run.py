"""Estimate moments of any denoiser, batch by batch, so that nothing is lost: resumable, cancellable, reproducible.

Sample k is determined by (seed, k) alone: its start noise and probes come from a generator of its own. A job over samples
0 .. n - 1 runs in batches; after each the state is saved (atomically), so a killed job loses at most one batch and
ends with the same file. Extending a job is resuming it with a larger n; merging adds jobs over different samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..trajectory import Path, Runner, elements_of
from .job import Evaluating, Job, JobState, Model, Progress, denoiser_for, evaluations_of, in_batches, sample_noise
from .moments import Moments
from .points import sample_moments

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["estimate_moments"]


def estimate_moments(
    models: Mapping[float, Model],
    job: Job,
    state: JobState,
    *,
    until: float | None = None,
    keep: int = 0,
    progress: Callable[[Progress], None] = lambda p: None,
    **options: Unpack[Evaluating],
) -> list[Moments]:
    """Moments for every guidance scale of the job, resuming from `state`.

    Args:
        models: the denoiser of each scale of `job.guidance`.
        job, state: what to do, and what was done.
        until: stop a scale once the root-mean-square standard errors of l, s and b are all at most this.
        keep: so many samples' trajectories stay in the state, as "fit.<guidance>", for a fit to learn from.
        progress: called after every evaluation; whatever it raises (a host's cancel) leaves the saved state intact.
        options: batch, device and dtype, see `Runner`.

    Raises:
        EstimateError: out of memory with a batch of one; a state that has other settings.
        SamplingError: from the model, naming sigma.
    """
    counter = _Counter(job, progress)
    result = []
    for g, guidance in enumerate(job.guidance):
        moments = state.moments(job, g)
        counter.skip(moments.samples)
        runner = Runner(job, models[guidance], tick=counter.tick, **options)

        def run(samples: list[int], guidance: float = guidance, runner: Runner = runner) -> tuple[Tensor, Path]:
            which = f"samples {samples[0] + 1} to {samples[-1] + 1}" if len(samples) > 1 else f"sample {samples[0] + 1}"
            counter.begin_batch(f"guidance {guidance:g}, {which} of {job.samples}")
            path = Path(elements_of(job))
            return _batch_moments(runner, samples, path), path

        for samples, (values, path) in in_batches(
            list(range(moments.samples, job.samples)), runner.batch, run, counter.cancel_batch
        ):
            moments.add(samples, values)
            state.keep(g, moments)
            path.save(state, f"fit.{guidance:g}", samples[0], keep)
            state.save()
            if until is not None and moments.samples >= job.groups and moments.statistics().worst_error() <= until:
                break
        result.append(moments)
    return result


def _batch_moments(runner: Runner, samples: list[int], path: Path) -> Tensor:
    """Moments [9, B, N+1, C, ...] of these samples, on the CPU; their trajectories go into `path`."""
    job = runner.job
    noise, generators = sample_noise(job, samples)
    denoiser, start = denoiser_for(runner.model, samples, job.space), (noise * job.start).to(runner.device, runner.dtype)
    with torch.no_grad():
        return sample_moments(denoiser, job, start, generators, runner.tick, path.add).cpu()


class _Counter:
    """Counts the evaluations of the estimate and reports them; a batch that runs out of memory does not count."""

    def __init__(self, job: Job, progress: Callable[[Progress], None]) -> None:
        self.progress, self.total = progress, evaluations_of(job)
        self.per_sample = self.total // (job.samples * len(job.guidance))
        self.done = self.skipped = self.before_batch = 0
        self.note = ""

    def skip(self, samples: int) -> None:
        self.done += samples * self.per_sample
        self.skipped += samples * self.per_sample

    def begin_batch(self, note: str) -> None:
        self.note, self.before_batch = note, self.done

    def cancel_batch(self) -> None:
        self.done = self.before_batch

    def tick(self, evaluations: int) -> None:
        self.done += evaluations
        self.progress(Progress("estimate", self.done, self.total, self.note, self.skipped))
