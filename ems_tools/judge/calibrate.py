"""Judge finished statistics on noise held out of their estimate, and choose the settings that go with them.

Per guidance scale, schedule and step count, on calibration noise: the best settings without EMS (strength 0 is data
prediction, i.e. multistep DPM-Solver++ with a corrector), the best with EMS, and the factor of `EMS.scaled` that wins.
What wins is recommended: since strength 0 is among the candidates, a recommendation never loses to the best setting without
EMS on the noise it was chosen on. Where the steps that the sampler takes without a file win over all, strength 0 is recommended
too, which at "auto" means these steps. What it is worth is then reported on other noise, which played no part.

Errors are mean squared differences, per noise, to the converged solution from the same noise; candidates are
compared by their geometric mean, because a few start noises carry most of the arithmetic one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...sampler import EMS, SamplingError, Settings, sample_dpm_solver_v3
from ...sampler.plan import make_plan
from ..estimate.job import Evaluating, Job, JobState, Meter, Model, Progress, denoiser_for, in_batches, sample_noise
from ..file.layout import advice_row, advice_values, evidence_values
from ..file.rows import EvidenceRow, RecommendedSetting
from ..fit.run import FitPlan
from ..trajectory import Runner

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["HELD_OUT", "CalibrationPlan", "Row", "calibrate", "endpoint_errors", "evaluations_of_calibration", "reference"]

HELD_OUT = 1_000_000_000
"""Index of the first calibration sample; the samples of an estimate count from 0 and never get there."""

_COMBINATIONS = (
    Settings(order=2, corrector="none"),
    Settings(order=2, corrector="pseudo"),
    Settings(order=2, corrector="raised"),
    Settings(order=3, corrector="none"),
    Settings(order=3, corrector="pseudo"),
)

UNUSABLE = 1e30
"""The error of statistics with which the latent overflows: worse than anything, and a number that the file can hold."""


@dataclass(frozen=True)
class CalibrationPlan:
    """How much to try.

    Args:
        schedules: host levels (decreasing, n + 1 of them) as a function of the number of steps, by name.
        steps: step counts.
        calibration, report: noises of the two disjoint sets.
        combinations: orders and correctors to try, with and without EMS.
        strengths: factors tried on the best combination with EMS, beside 1.
        reference_steps: of the converged solution.
        fit: of schedules and coefficients, after it; None leaves it out.
    """

    schedules: Mapping[str, Callable[[int], Tensor]]
    steps: tuple[int, ...] = (5, 6, 8, 10, 15, 20)
    calibration: int = 16
    report: int = 16
    combinations: tuple[Settings, ...] = _COMBINATIONS
    strengths: tuple[float, ...] = (0.5, 0.75)
    reference_steps: int = 120
    fit: FitPlan | None = None


@dataclass(frozen=True)
class Row:
    """What was found for one schedule and step count: the settings that won, and their errors.

    Errors are geometric means over noises: on those that chose the settings, and on those that chose nothing. Without
    statistics they are those of the best settings without; at full strength, those of the same order and corrector.
    """

    advice: RecommendedSetting
    evidence: tuple[EvidenceRow, EvidenceRow]


@dataclass
class _Bench:
    """One guidance scale's denoiser with reference end points, and what of it the job's state keeps under `name`."""

    runner: Runner
    state: JobState
    name: str
    ends: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def kept(self, key: str, error: Callable[[], float]) -> float:
        """The error under `key` in the job's state, found and saved if it is not there."""
        return self.state.kept("evidence_runs", self.name, key, error)

    def forget(self, *, ends: bool = True) -> None:
        """Take what helps only to go on out of the state: errors of a finished row, and end points if no row is left."""
        self.state.facts.get("evidence_runs", {}).pop(self.name, None)
        for key in [key for key in self.state.tensors if ends and key.startswith(f"{self.name}.")]:
            del self.state.tensors[key]

    def solve(self, samples: list[int], levels: Tensor, ems: EMS | None, settings: Settings | float) -> Tensor:
        """X [B, C, ...] at the end of `levels`; a guidance scale in place of settings leaves all of them at "auto"."""
        runner, space = self.runner, self.runner.job.space
        noise = sample_noise(runner.job, samples)[0].to(runner.device, runner.dtype)
        top = levels[:1].to(torch.float64)
        start = noise * (space.alpha_of(top) * (-space.lambda_of(top)).exp()).nan_to_num(1.0).item()
        if ems is not None and isinstance(settings, Settings):
            host = tuple(levels.to(torch.float64).unique_consecutive().tolist())
            if not make_plan(host, space, ems, settings).is_sane(space):
                ems = None  # as sampling would, with a warning that is not for who computes: other settings are tried too
        return sample_dpm_solver_v3(
            denoiser_for(runner.model, samples, space).model,
            start,
            levels.to(runner.device),
            None,
            lambda info: runner.tick(len(samples)),
            True,
            ems=ems,
            space=space,
            **(settings.__dict__ if isinstance(settings, Settings) else {"guidance": settings}),
        )


def reference(bench: _Bench, samples: list[int], steps: int) -> None:
    """Converged solutions from these noises over the job's range: x at its clean end, and D there (the end at sigma 0).

    They stand in the job's state while it needs them: those that it has are not solved again.
    """
    runner, job = bench.runner, bench.runner.job
    lam = torch.linspace(job.lambdas[0], job.lambdas[-1], steps + 1, dtype=torch.float64)
    levels = job.space.level_of(lam)
    settings = Settings(order=3, corrector="none", lower_order_final=False)

    def run(part: list[int]) -> tuple[Tensor, Tensor]:
        x = bench.solve(part, levels, None, settings)
        y = x / job.space.alpha_of(levels[-1:]).item()
        with torch.no_grad():
            D = denoiser_for(runner.model, part, job.space)(y, lam[-1].item())
        runner.tick(len(part))
        return x, D

    kept, names = bench.state.tensors, (f"{bench.name}.x", f"{bench.name}.D")
    known = len(kept[names[0]]) if names[0] in kept else 0
    for _, ends in in_batches(samples[known:], runner.batch, run):
        for name, values in zip(names, ends, strict=True):
            values = values.cpu()
            kept[name] = torch.cat([kept[name], values]) if name in kept else values
        bench.state.save()
    for sample, x, D in zip(samples, kept[names[0]], kept[names[1]], strict=True):
        bench.ends[sample] = (x, D)


def endpoint_errors(bench: _Bench, samples: list[int], levels: Tensor, ems: EMS | None, settings: Settings | float) -> Tensor:
    """Mean squared error [K] of the end point against the reference from the same noise; `settings` as in `_Bench.solve`."""

    def run(part: list[int]) -> Tensor:
        x = bench.solve(part, levels, ems, settings)
        ends = torch.stack([bench.ends[k][1 if levels[-1] == 0 else 0] for k in part])
        return (x.cpu() - ends).double().square().flatten(1).mean(1)

    return torch.cat([errors for _, errors in in_batches(samples, bench.runner.batch, run)])


def evaluations_of_calibration(plan: CalibrationPlan, scales: int) -> int:
    """Denoiser evaluations of `calibrate` for this many guidance scales."""
    if not plan.schedules:
        return 0
    noises = plan.calibration + plan.report
    tried = 2 * len(plan.combinations) + len(plan.strengths) + 1
    runs = len(plan.schedules) * sum(plan.steps) * (plan.calibration * tried + plan.report * 3)
    return scales * (noises * (plan.reference_steps + 1) + runs)


def calibrate(
    model: Model,
    ems: EMS,
    job: Job,
    guidance: float,
    plan: CalibrationPlan,
    state: JobState,
    *,
    progress: Callable[[Progress], None] = lambda p: None,
    **options: Unpack[Evaluating],
) -> list[Row]:
    """Evidence rows for one guidance scale; rows already in `state` are not computed again.

    Raises whatever the model and `progress` raise; finished rows are in the saved state by then.
    """
    rows = rows_of(state)
    wanted = [(guidance, name, n) for name in plan.schedules for n in plan.steps]
    if not wanted:
        return []
    meter = Meter(progress, "evidence", evaluations_of_calibration(plan, 1), f"evidence at guidance {guidance:g}", state)
    if all(key in rows for key in wanted):
        return [rows[key] for key in wanted]
    bench = _Bench(Runner(job, model, tick=meter.tick, **options), state, f"evidence.{guidance:g}")
    reference(bench, [k for part in _noises(plan) for k in part], plan.reference_steps)
    for key in wanted:
        if key in rows:
            continue
        row = rows[key] = _row(bench, ems, *key, plan)
        plain = [advice_values(row.advice), *map(evidence_values, row.evidence)]
        state.facts.setdefault("calibrated", []).append(plain)
        bench.forget(ends=False)
        state.save()
    bench.forget()
    state.save()
    return [rows[key] for key in wanted]


def _noises(plan: CalibrationPlan) -> tuple[list[int], list[int]]:
    """The samples on which settings are chosen, and those on which they are reported."""
    middle = HELD_OUT + plan.calibration
    return list(range(HELD_OUT, middle)), list(range(middle, middle + plan.report))


def _row(
    bench: _Bench,
    ems: EMS,
    guidance: float,
    name: str,
    steps: int,
    plan: CalibrationPlan,
) -> Row:
    """The row of one schedule and step count: every candidate on the calibration noises, the chosen ones on the report's."""
    levels, chosen_on, reported_on = plan.schedules[name](steps), *_noises(plan)

    def error(samples: list[int], settings: Settings, of: str = "choice") -> float:
        def run() -> float:
            try:
                return _geometric(endpoint_errors(bench, samples, levels, ems if settings.strength else None, settings))
            except SamplingError:
                if not settings.strength:
                    raise
                return UNUSABLE

        return bench.kept(f"{name} {steps} {of} {settings}", run)

    data = {replace(c, strength=0.0): 0.0 for c in plan.combinations}
    full = {replace(c, strength=1.0): 0.0 for c in plan.combinations}
    for table in (data, full):
        for settings in table:
            table[settings] = error(chosen_on, settings)
    best_data, best_full = min(data, key=data.__getitem__), min(full, key=full.__getitem__)
    shrunk = {replace(best_full, strength=s): 0.0 for s in plan.strengths}
    for settings in shrunk:
        shrunk[settings] = error(chosen_on, settings)
    everything = {**data, **full, **shrunk}
    winner = min(everything, key=everything.__getitem__)
    if _without_file(bench, chosen_on, levels, guidance, f"{name} {steps}") <= everything[winner]:
        winner = best_data
    lambdas = bench.runner.job.space.lambda_of(levels)
    at_full = replace(best_data, strength=1.0)
    chosen = EvidenceRow(guidance, name, steps, "calibration", data[best_data], everything[winner], full[at_full])
    report = [error(reported_on, s, of) for s, of in ((best_data, "without"), (winner, "recommended"), (at_full, "full"))]
    advice = RecommendedSetting(guidance, name, tuple(lambdas[lambdas.isfinite()].tolist()), winner)
    return Row(advice, (chosen, EvidenceRow(guidance, name, steps, "report", *report)))


def _without_file(bench: _Bench, samples: list[int], levels: Tensor, guidance: float, key: str) -> float:
    """The error of the same run without a file, with all options at "auto"."""
    return bench.kept(f"{key} without a file", lambda: _geometric(endpoint_errors(bench, samples, levels, None, guidance)))


def _geometric(errors: Tensor) -> float:
    return errors.clamp(min=1e-30).log().mean().exp().item()


def rows_of(state: JobState) -> dict[tuple[float, str, int], Row]:
    """Rows that a job has so far, by guidance scale, schedule and step count."""
    rows = (Row(advice_row(a), (EvidenceRow(*c), EvidenceRow(*r))) for a, c, r in state.facts.get("calibrated", []))
    return {(row.advice.guidance, row.advice.schedule, row.evidence[0].steps): row for row in rows}
