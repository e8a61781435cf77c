"""From a denoiser to a finished statistics file: estimate, judge, recommend, write. What `ems compute` and the hosts call."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..sampler import (
    EMS,
    EMSError,
    Settings,
    half_corrector_sigma,
    uniform_lambda,
    uniform_time,
)
from .estimate.job import EstimateError, Evaluating, Job, JobState, Progress, evaluations_of, snapped_grid, uniform_grid
from .estimate.moments import Moments
from .estimate.run import estimate_moments
from .estimate.source import Source
from .file.contents import EMSFile
from .file.rows import MAX_FITTED_STEPS, EMSMeta, FittedRow
from .fit.partial import evaluations_of_partial, fit_partial
from .fit.run import FitPlan, evaluations_of_fit, evaluations_of_passes, fit_passes, fit_steps, forget
from .judge.calibrate import CalibrationPlan, Row, calibrate, evaluations_of_calibration

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "EFFORTS",
    "FINER",
    "Effort",
    "compute_ems",
    "evaluations",
    "evaluations_of_fits",
    "is_result_of",
    "job_for",
    "plan_for",
    "statistics_file",
    "with_fit",
]

_FEW = (Settings(order=2, corrector="none"), Settings(order=2, corrector="pseudo"), Settings(order=3, corrector="pseudo"))


@dataclass(frozen=True)
class Effort:
    """How much a computation costs: sizes of the estimate and of its calibration, per guidance scale.

    `probes` at every `probe_every`-th point; `intervals` of the grid; `noises` in each of the calibration and the report set.
    `schedules` 0 leaves the calibration out: the statistics then steer no schedule but the fitted ones.
    """

    samples: int
    intervals: int
    probes: int
    noises: int
    steps: tuple[int, ...]
    schedules: int
    combinations: tuple[Settings, ...] | None
    strengths: tuple[float, ...]
    reference_steps: int
    fit: FitPlan
    probe_every: int = 1


_QUICK_FIT = FitPlan(
    steps=(4, 5, 6, 8, 10),
    noises=8,
    held_out=5,
    search=2,
    spacings=5,
    searched=1,
    moves=1,
    finalists=3,
    panel=10,
    panel_noises=2,
    turns=1,
    turned=1,
    turn_noises=2,
)
_FIT = FitPlan(
    held_out=12,
    searched=3,
    moves=3,
    panel=17,
    panel_noises=4,
    turns=1,
    turned=3,
    turn_noises=7,
    rounds=1,
    refine_noises=8,
    refined=0,
    passes_refined=5,
)
_THOROUGH_FIT = FitPlan(
    noises=48,
    held_out=24,
    search=6,
    spacings=12,
    searched=5,
    panel=40,
    turns=3,
    turned=5,
    rounds=1,
    refined=7,
    passes_refined=7,
)
EFFORTS = {
    "quick": Effort(8, 24, 1, 4, (5, 8), 0, _FEW, (0.5,), 40, _QUICK_FIT, 6),
    "standard": Effort(24, 40, 1, 4, (6, 10), 1, _FEW[:2], (0.5,), 40, _FIT, 2),
    "thorough": Effort(64, 60, 1, 8, (5, 6, 8, 10, 15, 20), 2, None, (0.5, 0.75), 120, _THOROUGH_FIT, 2),
}


FINER = 2
"""Grid intervals a step, at least: the fine solution that a fit is judged by has to be much nearer the truth than the fit."""


def job_for(subject: Source, effort: Effort, seed: int = 0, steps: tuple[int, ...] = (), **changes: Any) -> Job:
    """The estimate's job, on a grid fine enough for a fit of so many `steps`; `changes` are fields of `Job`."""
    effort = _for_steps(effort, steps)
    grid = uniform_grid(*subject.noise_range(), max(effort.intervals, FINER * max(steps, default=0)))
    if subject.levels is not None:
        grid = snapped_grid(grid, subject.levels, subject.schedule.space)
    job = Job(
        shape=tuple(subject.shape),
        lambdas=grid,
        space=subject.schedule.space,
        samples=effort.samples,
        guidance=tuple(sorted(subject.models)),
        seed=seed,
        probes=effort.probes,
        probe_every=effort.probe_every,
        start=subject.start,
    )
    return replace(job, **changes)


def _for_steps(effort: Effort, steps: tuple[int, ...]) -> Effort:
    """The effort with these step counts alone; quick for one of them, to 10 steps, costs at most 700 evaluations in all."""
    if not steps:
        return effort
    chosen = tuple(sorted(set(steps)))
    fit = replace(effort.fit, steps=chosen)
    if len(chosen) == 1 and fit.noises <= _QUICK_FIT.noises:
        n = chosen[0]
        fit = replace(fit, noises=6, held_out=4, spacings=4 if n <= 6 else 2 if n <= 8 else 1, panel=4, heat=1 + (n <= 8))
        fit = replace(fit, moves=int(n <= 6), turns=int(n <= 12), turn_noises=2 + (n <= 6))
        if n > 6:  # three runs more on all noises would cost too much: one noise more ranks the few spacings
            fit = replace(fit, search=3, finalists=1)
        effort = replace(effort, samples=6)
    return replace(effort, steps=chosen, fit=fit)


PASSES = 4
"""Spacings on which steps in fewer passes are tried."""


def plan_for(
    source: Source, effort: Effort, steps: tuple[int, ...] = (), passes: bool = False, image_to_image: bool = False
) -> CalibrationPlan:
    """The calibration, on the host's own schedules, then on two of the paper's: as many as the effort says.

    `steps`, where given, are the only step counts that are fitted and judged: who uses one or two pays for no others.
    `passes`: whether steps in fewer passes of the network are fitted as well, `image_to_image`: whether steps for that are.
    Raises EstimateError unless each lies between 2 and 64.
    """
    if any(not 2 <= n <= MAX_FITTED_STEPS for n in steps):
        raise EstimateError(f"step counts to fit must lie between 2 and {MAX_FITTED_STEPS}, not {', '.join(map(str, steps))}")
    effort = _for_steps(effort, steps)
    s = source.schedule
    own: dict[str, Callable[[int], Tensor]] = {
        "uniform_lambda": lambda n: uniform_lambda(s, n),
        "uniform_time_zero": lambda n: uniform_time(s, n, to_zero=True),
    }
    hosts = dict(source.host_schedules or {})
    schedules = {**hosts, **{name: make for name, make in own.items() if name not in hosts}}
    kept = dict(list(schedules.items())[: effort.schedules])
    plan = CalibrationPlan(
        kept,
        effort.steps,
        effort.noises,
        effort.noises,
        strengths=effort.strengths,
        reference_steps=effort.reference_steps,
        fit=replace(effort.fit, fixed=hosts, passes=PASSES if passes else 0, partial=image_to_image),
    )
    if effort.combinations is not None:
        return replace(plan, combinations=effort.combinations)
    half = Settings(order=2, corrector="pseudo", corrector_below=half_corrector_sigma(s))
    return replace(plan, combinations=(*plan.combinations, half))


def evaluations(job: Job, plan: CalibrationPlan | None) -> int:
    """Denoiser evaluations of everything."""
    if plan is None:
        return evaluations_of(job)
    fit = evaluations_of_fits(job, plan.fit, min(job.samples, plan.fit.noises)) if plan.fit else 0
    return evaluations_of(job) + evaluations_of_calibration(plan, len(job.guidance)) + fit


def evaluations_of_fits(job: Job, fit: FitPlan, known: int = 0) -> int:
    """Those of all kinds of fitted steps, where the estimate has made `known` of the trajectories."""
    guided = evaluations_of_fit(fit, len(job.lambdas), len(job.guidance), known)
    return guided + evaluations_of_passes(fit, job.guidance) + evaluations_of_partial(fit, job, len(job.guidance))


def compute_ems(  # noqa: PLR0913 - what to compute, and options by name
    source: Source,
    job: Job,
    plan: CalibrationPlan | None,
    path: Path,
    *,
    until: float | None = None,
    keep_moments: bool = False,
    extend: EMSFile | None = None,
    progress: Callable[[Progress], None] = lambda p: None,
    **options: Unpack[Evaluating],
) -> EMSFile:
    """Compute, judge and write a statistics file; continue the job if it was begun.

    The state lies in `path` + ".partial" until the file is written. Arguments as in `estimate_moments`;
    `plan` None leaves evidence, recommendation and fit out; `extend` begins with the moments of a finished file.

    Raises:
        EstimateError, SamplingError, OSError: the state so far is saved; call again to resume.
    """
    _check_before(source, job, plan, path)
    state = JobState.open(path.with_name(path.name + ".partial"), job)
    if extend is not None and not state.tensors:
        state.tensors.update({name: v.clone() for name, v in extend.moments.items()})
    _check_same(state, source, plan)
    state.facts.setdefault("date", datetime.date.today().isoformat())
    if state.path is not None and not state.path.exists():
        state.save()  # claims the name: another job of this name is refused from now on
    keep = plan.fit.noises if plan is not None and plan.fit is not None else 0
    moments = estimate_moments(source.models, job, state, until=until, keep=keep, progress=progress, **options)
    rows: list[Row] = []
    if plan is not None:
        for guidance, ems in zip(job.guidance, map(_ems, moments), strict=True):
            rows += calibrate(source.models[guidance], ems, job, guidance, plan, state, progress=progress, **options)
    file = statistics_file(source, job, moments, rows, str(state.facts["date"]), plan, keep_moments)
    if plan is not None and plan.fit is not None:
        file = with_fit(file, source, job, plan.fit, state, progress=progress, **options)
    file.save(path)
    state.delete()
    return file


def with_fit(
    file: EMSFile,
    source: Source,
    job: Job,
    fit: FitPlan,
    state: JobState,
    *,
    progress: Callable[[Progress], None] = lambda p: None,
    **options: Unpack[Evaluating],
) -> EMSFile:
    """The file with schedules and coefficients fitted at each of its guidance scales; `options` are those of `fit_steps`."""
    rows, passes, partial = (list[FittedRow]() for _ in range(3))
    for guidance in job.guidance:
        found = fit_steps(source, job, guidance, fit, state, progress=progress, **options)
        passes += fit_passes(source, job, guidance, fit, state, found, progress=progress, **options)
        partial += fit_partial(source, job, guidance, fit, state, progress=progress, **options)
        forget(state, guidance)
        rows += found
    used = evaluations_of_fits(job, fit, min(job.samples, fit.noises))
    facts = {"fit_noises": fit.noises, "fit_held_out": fit.held_out, "fit_evaluations": used, "fit_passes": fit.passes}
    facts |= {"fit_partial": True} if fit.partial else {}
    known = {**{k: v for k, v in file.meta.estimate.items() if k != "fit_partial"}, **facts}
    meta = replace(file.meta, fitted=tuple(rows), passes=tuple(passes), partial=tuple(partial), estimate=known)
    file = replace(file, meta=meta)
    # Standard errors give way if the rows make the file too large to share.
    return file if file.errors is None or file.per_element else replace(file.compacted(), moments=file.moments)


def is_result_of(file: EMSFile, source: Source, job: Job, plan: CalibrationPlan | None) -> bool:
    """Whether the file is what this request makes, kept moments and the number of samples (see `until`) aside."""
    mine = _empty_file(source, job, plan)
    fit = plan.fit if plan is not None else None
    facts = {k: v for k, v in mine.meta.estimate.items() if k != "samples"}
    same = all(file.meta.estimate.get(k) == v for k, v in facts.items()) and dict(file.meta.model) == dict(mine.meta.model)
    same = same and file.guidance.tolist() == mine.guidance.tolist() and file.lambdas.tolist() == mine.lambdas.tolist()
    known = file.meta.estimate
    theirs = (known.get("fit_noises"), known.get("fit_held_out"), known.get("fit_passes", 0), known.get("fit_partial", False))
    same = same and theirs == ((fit.noises, fit.held_out, fit.passes, fit.partial) if fit else (None, None, 0, False))
    return same and {row.steps for row in file.meta.fitted} == (set(fit.steps) if fit else set())


def _empty_file(source: Source, job: Job, plan: CalibrationPlan | None) -> EMSFile:
    """What the request makes, with statistics of nothing. Raises EstimateError if no file can hold it."""
    empty = Moments.empty(torch.tensor(job.lambdas, dtype=torch.float64), job.shape, job.per_element, job.groups)
    moments = [replace(empty, count=empty.count + 1) for _ in job.guidance]
    try:
        file = statistics_file(source, job, moments, [], datetime.date.today().isoformat(), plan, False)
        file.encode()
    except EMSError as error:
        raise EstimateError(f"this computation could not be kept in a file, so it was not begun: {error}") from error
    return file


def _check_before(source: Source, job: Job, plan: CalibrationPlan | None, path: Path) -> None:
    """What the file cannot hold, and where it cannot be written, shows before evaluation 1. Raises EstimateError."""
    _empty_file(source, job, plan)
    if path.exists() and not path.is_file():
        raise EstimateError(f"{path} is no file that could be written, so the computation was not begun: give another name")


def _check_same(state: JobState, source: Source, plan: CalibrationPlan | None) -> None:
    """Raise EstimateError if the state was begun with another model or another calibration."""
    sizes = [plan.calibration, plan.report, plan.reference_steps] if plan else None
    fit = plan.fit if plan else None
    named = [(k, v) for k, v in vars(fit).items() if k != "fixed" and (k, v) != ("partial", False)] if fit else []  # as before
    fitted = [[k, list(v) if isinstance(v, tuple) else v] for k, v in named] or None
    facts = (("another model", dict(source.identity)), ("another effort or evidence", sizes), ("another fit", fitted))
    for what, mine in facts:
        if state.facts.setdefault(what, mine) != mine:
            raise EstimateError(
                f"{state.path} holds an unfinished job begun with {what} ({state.facts[what]}): finish it so, "
                f"give another output name, or delete it"
            )


def _ems(moments: Moments) -> EMS:
    st = moments.statistics()
    return EMS(moments.lambdas, st.l, st.s, st.b)


def statistics_file(
    source: Source,
    job: Job,
    moments: list[Moments],
    rows: list[Row],
    date: str,
    plan: CalibrationPlan | None,
    keep_moments: bool,
) -> EMSFile:
    """Assemble the file from finished parts."""
    statistics = [m.statistics() for m in moments]
    l, s, b = (torch.stack([getattr(st, name) for st in statistics]) for name in "lsb")
    errors = {name: torch.stack([getattr(st, f"{name}_se") for st in statistics]) for name in "lsb"}
    meta = replace(
        _meta(source, job, plan, tuple(m.samples for m in moments)),
        evidence=tuple(row for r in rows for row in r.evidence),
        recommendation=tuple(r.advice for r in rows),
        date=date,
    )
    kept = {f"{name}.{g}": value for g, m in enumerate(moments) for name, value in (("sums", m.sums), ("count", m.count))}
    file = EMSFile(
        lambdas=torch.tensor(job.lambdas, dtype=torch.float64),
        guidance=torch.tensor(job.guidance, dtype=torch.float64),
        l=l,
        s=s,
        b=b,
        meta=meta,
        errors=errors if all(torch.isfinite(e).all() for e in errors.values()) else None,
        moments=kept,
    )
    return replace(file.compacted(), moments=kept if keep_moments else {})


def _meta(source: Source, job: Job, plan: CalibrationPlan | None, samples: tuple[int, ...]) -> EMSMeta:
    """What the file says of its model and of how it was estimated; `samples` for each guidance scale."""
    from .. import __version__

    sigma_min, sigma_max = source.noise_range()
    return EMSMeta(
        space=job.space.value,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        schedule=type(source.schedule).__name__,
        model=dict(source.identity),
        grid={"points": len(job.lambdas), "kind": "uniform in lambda" if source.levels is None else "the host's own levels"},
        estimate={
            "samples": samples,
            "probes": job.probes,
            "probe_method": "difference",
            "points": "trajectory",
            "denoiser": "guided",
            "resolution": job.shape,
            "per_element": job.per_element,
            "groups": job.groups,
            "seed": job.seed,
            "seeds": (job.seed,),
            "evaluations": evaluations(job, plan),
            "calibration_noises": plan.calibration if plan else 0,
            "report_noises": plan.report if plan else 0,
            "reference_steps": plan.reference_steps if plan else 0,
        },
        program=__version__,
    )
