"""Few-step settings fitted to a model: where to evaluate it, and how to combine what it returns.

For one guidance scale, with reference trajectories at hand (the teacher; those that the statistics were measured on):

1. `candidates`: spacings of many kinds are compared by fitting on them, on few noises, at some step counts; and formulas of
   known samplers on schedules of many kinds, the panel, by their error.
2. `turn`: the evaluations of the best spacing are moved so that the final error falls, at a few step counts.
   `steps`: there, coefficients are fitted in closed loop on all noises; `refine` turns them together with the lambdas, where
   the plan says so.
3. `judge`: on noise of no other use, against the panel's best. Where the fit is not better, the panel's best is stored.

Every run's result is kept in the job's state, so a cancelled fit goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from ...sampler import FittedSteps, NoiseSchedule, unfitted_steps
from ...sampler.fitted import MATCH
from ..estimate.job import Evaluating, Job, JobState, Meter, Progress, snapped_grid
from ..estimate.source import Source
from ..file.layout import fitted_row, fitted_values
from ..file.rows import FittedRow, insane
from ..trajectory import Pair, Runner, kept_trajectories
from .candidates import Bench, best_spacing, fit_on, follows, likely_entrants
from .formulas import OWN
from .judge import Rivals, judged_row
from .panel import Entrant, entrants
from .passes import best_passes, passes_row
from .plan import FitPlan, evaluations_of_fit, evaluations_of_passes, searched_steps, turned_steps
from .refine import refine, with_last_step
from .spacing import CANDIDATES, Range, Spacing
from .steps import objective, rounded
from .turn import Turned, best_turned, moved

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "JUDGE_NOISE",
    "FitPlan",
    "evaluations_of_fit",
    "evaluations_of_passes",
    "fit_passes",
    "fit_steps",
    "forget",
    "snapping",
]

_T = TypeVar("_T")
JUDGE_NOISE = 2_000_000_000
"""Index of the first sample that a fit is judged on. A fit uses the statistics' samples, from 0; calibration counts from
1,000,000,000."""


def fit_steps(
    source: Source,
    job: Job,
    guidance: float,
    plan: FitPlan,
    state: JobState,
    *,
    progress: Callable[[Progress], None] = lambda p: None,
    **options: Unpack[Evaluating],
) -> list[FittedRow]:
    """Fitted rows for one guidance scale; trajectories, runs and rows already in `state` are not computed again.

    Spacings in the model's own time are those of the source's schedule; where the host rounds to levels of its own,
    evaluations are placed on these. `options`: batch, device and dtype, see `Runner`.

    Raises whatever the model and `progress` raise; finished runs are in the saved state by then.
    """
    rows = {r.steps: r for r in rows_of_fit(state) if r.guidance == guidance}
    wanted = sorted(set(plan.steps))
    name = f"{guidance:g}"
    known = state.facts.setdefault("fit_known", {}).setdefault(name, _known(state, f"fit.{name}"))
    total = evaluations_of_fit(plan, len(job.lambdas), 1, min(known, plan.noises))
    meter = Meter(progress, "fit", total, f"fit at guidance {name}", state)
    if all(n in rows for n in wanted):
        return [rows[n] for n in wanted]
    runner = Runner(job, source.models[guidance], tick=meter.tick, **options)
    judge_on = range(JUDGE_NOISE, JUDGE_NOISE + plan.held_out)
    bench = _bench(runner, source, plan, state, name)
    judge = kept_trajectories(runner, state, f"judge.{name}", judge_on)
    own = _without_file(source.schedule, guidance, job)
    choices = _choices(bench)
    turned = _turned(bench, choices)
    for n in wanted:
        if n in rows:
            continue
        spacing, likely = _nearest(choices, n)
        rivals = {e.name: rounded(e.steps(n, bench.snap)) for e in [*likely, own] if follows(bench, e, n)}
        if not rivals:  # the host has too few levels for so many steps
            continue
        fitted = _fitted(bench, spacing, n, turned)
        if fitted is not None and insane(fitted):  # a file could not hold it, and the whole computation would be lost
            fitted = None
        rows[n] = judged_row(runner, judge_on, judge, guidance, fitted, Rivals(rivals, plan.panel_noises, own.name))
        state.facts.setdefault("fit", []).append(fitted_values(rows[n]))
        state.save()
    return [rows[n] for n in wanted if n in rows]


def fit_passes(
    source: Source,
    job: Job,
    guidance: float,
    plan: FitPlan,
    state: JobState,
    rivals: Sequence[FittedRow],
    *,
    progress: Callable[[Progress], None] = lambda p: None,
    **options: Unpack[Evaluating],
) -> list[FittedRow]:
    """Rows of fewer passes for one guidance scale, of those numbers of passes at which they win; see `passes`.

    `rivals` are the scale's guided steps. Without `plan.passes`, without guidance and without the source's conditional answer
    there are none. Everything else as in `fit_steps`, which comes before.
    """
    if not plan.passes or guidance == 1 or source.conditional is None:
        return []
    name = f"{guidance:g}"
    known: dict[str, list[Any]] = state.facts.setdefault("passes", {}).setdefault(name, {})
    meter = Meter(progress, "passes", evaluations_of_passes(plan, [guidance]), f"fewer passes at guidance {name}", state)
    runners = (Runner(job, model, tick=meter.tick, **options) for model in (source.conditional, source.models[guidance]))
    pair, held_out = Pair(*runners), range(JUDGE_NOISE, JUDGE_NOISE + plan.held_out)
    bench = _bench(pair.guided, source, plan, state, name)
    truth = kept_trajectories(pair.guided, state, f"judge.{name}", held_out)
    choices = _choices(bench)  # known from the guided fit, as what was turned there
    turned = _turned(bench, choices)
    for rival in rivals:
        if str(rival.steps) in known:
            continue
        near, _ = _nearest(choices, rival.steps)
        others = [*rivals, *(fitted_row(values) for values in known.values() if values)]
        lambdas_of = partial(_lambdas_of, bench, turned, others, near)
        spacings = list(dict.fromkeys([near, *CANDIDATES[: plan.passes]]))
        found = best_passes(pair, bench.samples, bench.teacher, lambdas_of, rival.steps, spacings)
        if found is not None and rival.steps <= plan.passes_refined:
            found = _refined(bench, pair, found)
        row = passes_row(pair, held_out, truth, rival, found)
        known[str(rival.steps)] = [] if row is None else fitted_values(row)
        state.save()
    return [fitted_row(values) for values in known.values() if values]


def forget(state: JobState, guidance: float) -> None:
    """Drop from the state what was needed to fit at this scale, once its rows are there."""
    name = f"{guidance:g}"
    for key in [key for key in state.tensors if key.startswith((f"fit.{name}.", f"judge.{name}.", f"partial.{name}."))]:
        del state.tensors[key]
    for table in ("fit_runs", "partial_runs"):
        state.facts.get(table, {}).pop(name, None)
    state.save()


def _known(state: JobState, name: str) -> int:
    """Samples whose trajectories the estimate has left behind."""
    return state.tensors[f"{name}.y"].shape[1] if f"{name}.y" in state.tensors else 0


def _bench(runner: Runner, source: Source, plan: FitPlan, state: JobState, name: str) -> Bench:
    samples, job = range(plan.noises), runner.job
    teacher = kept_trajectories(runner, state, f"fit.{name}", samples)
    span, snap = Range.of(job.lambdas, source.schedule), snapping(source.levels, job)
    return Bench(runner, plan, samples, teacher, span, snap, state, name)


def _choices(bench: Bench) -> dict[int, tuple[Spacing, list[Entrant]]]:
    """The best spacing and the likely entrants, at the step counts at which they are compared."""
    panel = entrants(bench.plan.panel, bench.span, _host_lambdas(bench.plan.fixed, bench.runner.job))
    found = {}
    for n in searched_steps(bench.plan):
        likely = likely_entrants(bench, panel, n)
        found[n] = best_spacing(bench, n, likely), likely
    return found


def _nearest(choices: Mapping[int, _T], steps: int) -> _T:
    """What was found at the nearest step count."""
    return choices[min(choices, key=lambda n: (max(n, steps) / min(n, steps), n))]


def snapping(levels: Tensor | None, job: Job) -> Callable[[Sequence[float]], list[float]]:
    """Moves lambdas to the host's own levels, if it has some."""
    return lambda lambdas: list(lambdas if levels is None else snapped_grid(tuple(lambdas), levels, job.space))


def _host_lambdas(
    fixed: Mapping[str, Callable[[int], Tensor]], job: Job
) -> dict[str, Callable[[int], tuple[list[float], float]]]:
    """The host's schedules as the panel knows them: lambdas of n evaluations, and where the last step ends."""

    def lambdas_of(make: Callable[[int], Tensor], n: int) -> tuple[list[float], float]:
        own = job.space.lambda_of(make(n)).clamp(min=job.lambdas[0]).tolist()
        return own[:-1], own[-1]

    return {name: lambda n, make=make: lambdas_of(make, n) for name, make in fixed.items()}  # type: ignore[misc]


def _without_file(schedule: NoiseSchedule, guidance: float, job: Job) -> Entrant:
    """What the same run would be without a file: with one it must never be worse."""
    make = lambda n: unfitted_steps(schedule, n)[1]  # noqa: E731
    (levels_at,) = _host_lambdas({OWN: make}, job).values()
    return Entrant("the steps that hosts take then", OWN, levels_at, guidance)


def _turned(bench: Bench, choices: Mapping[int, tuple[Spacing, list[Entrant]]]) -> dict[int, Turned]:
    """The fits of those step counts at which lambdas are turned."""
    found = {n: best_turned(bench, _nearest(choices, n)[0], n) for n in turned_steps(bench.plan)}
    return {n: turned for n, turned in found.items() if turned is not None}


def _lambdas_of(
    bench: Bench, turned: Mapping[int, Turned], others: Sequence[FittedRow], near: Spacing, spacing: Spacing, steps: int
) -> list[float]:
    """Of a spacing; of that of the guided steps, turned as they were. Never those of `others`: a run is known by its levels."""
    lambdas = _turned_lambdas(bench, spacing, steps, turned if spacing == near else {})
    while any(row.coefficients is not None and row.coefficients.matches([*lambdas, math.inf]) for row in others):
        lambdas[-1] = round(lambdas[-1] - 3 * MATCH, 6)
    return lambdas


def _turned_lambdas(bench: Bench, spacing: Spacing, steps: int, turned: Mapping[int, Turned]) -> list[float]:
    """The spacing's lambdas, moved as at the nearest step count at which they were turned; fewer without room."""
    lambdas = bench.lambdas(spacing, steps)
    if not turned or len(lambdas) < steps:
        return lambdas
    as_there = moved(bench, lambdas, _nearest(turned, steps).moves(steps))
    return as_there if len(as_there) == steps else lambdas


def _fitted(bench: Bench, spacing: Spacing, steps: int, turned: Mapping[int, Turned]) -> FittedSteps | None:
    """Coefficients on this spacing, turned as at the nearest step count and refined if the plan says so; None without room."""
    if steps in turned:
        found = turned[steps].steps
    else:
        lambdas = _turned_lambdas(bench, spacing, steps, turned)
        if len(lambdas) < steps:
            lambdas = next((v for v in (bench.lambdas(s, steps) for s in CANDIDATES) if len(v) == steps), [])
        if not lambdas:
            return None
        found, _ = fit_on(bench, lambdas)
    return _refined(bench, bench.runner, found) if steps <= bench.plan.refined else found


def _refined(bench: Bench, runner: Runner | Pair, found: FittedSteps) -> FittedSteps:
    """Steps refined for the final error, if the plan says so and noise that took no part in it agrees."""
    plan, samples, teacher = bench.plan, bench.samples, bench.teacher
    few = min(plan.refine_noises, len(samples) // 2)
    if not plan.rounds or few < 2:
        return found
    before = with_last_step(runner, samples, teacher, found)[1]
    refined = refine(runner, samples[:few], teacher.part(few), found, plan.rounds)
    moved = bench.snap(refined.lambdas)
    if len(moved) < len(found.lambdas):
        return found
    refined = replace(refined, lambdas=tuple(moved))
    refined, after = with_last_step(runner, samples, teacher, refined)
    return rounded(refined) if objective(after[few:]) < objective(before[few:]) else found


def rows_of_fit(state: JobState) -> list[FittedRow]:
    """Fitted rows that a job has so far."""
    return [fitted_row(plain) for plain in state.facts.get("fit", [])]
