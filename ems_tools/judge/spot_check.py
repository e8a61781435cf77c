"""Whether a statistics file is its model's, by trying it on the model.

K fresh trajectories (`measure`) give per sample and channel, with f = (1 - l) y - D and its derivative f' for the file's l,

    u_l = v (I - J) v - l,      u_b = f' - s f - b,      u_s = u_b (f - E f) / Var f

For the right statistics all three have mean zero at every lambda; a wrong l, s or b shifts them by its error. Each is
projected, per channel and per difference of neighbouring channels, on three smooth functions of lambda and tested by Student's
t. The evidence is tested alike, by the logarithm of the error that the file's settings really reach from the same noises. The
level of all tests together is `alpha` (Bonferroni), and what fails must fail again on other noise. Means over 16 samples are
not quite normal (a model with few modes has few kinds of trajectories), so t is judged with half the degrees of freedom.
benchmarks/forged.py measures how often right files fail and wrong ones pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...sampler import EMSError, SamplingError, Settings, sample_dpm_solver_v3
from ..estimate.job import Evaluating, Job, Model, denoiser_for, in_batches, sample_noise
from ..estimate.moments import smoothed_slope
from ..estimate.source import Source
from ..file.contents import EMSFile
from ..file.rows import EvidenceRow, RecommendedSetting, advice_by_case
from ..trajectory import Runner
from .consistency import case_of, numbers_in
from .measure import SAMPLES, Measured, measure
from .student import p_value

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "ALPHA",
    "Check",
    "Measured",
    "SpotCheck",
    "confirmed",
    "judge",
    "measure",
    "spot_check",
    "statistics_checks",
]

ALPHA = 0.01
"""How often a right file may fail the spot check."""
FUNCTIONS = 3
_FEWEST_SAMPLES, _FEWEST_NOISES = 12, 4
"""A floor for the number of samples that a file says it rests on, so that claiming few samples cannot loosen the test."""


@dataclass(frozen=True)
class Check:
    """One test: what was compared, its p-value, and in words what it found."""

    what: str
    p: float
    found: str


@dataclass(frozen=True)
class SpotCheck:
    """All tests of a file. `problems` are those below the level alpha / number of tests."""

    checks: tuple[Check, ...]
    evaluations: int
    alpha: float = ALPHA

    @property
    def level(self) -> float:
        """Of a single test."""
        return self.alpha / max(len(self.checks), 1)

    @property
    def problems(self) -> list[str]:
        """What the model contradicts, the clearest first."""
        failed = sorted((c for c in self.checks if c.p < self.level), key=lambda c: c.p)
        return [f"{c.what}: {c.found} (p = {c.p:.1g})" for c in failed]

    def in_words(self) -> str:
        """One line."""
        smallest = min((c.p for c in self.checks), default=1.0)
        return (
            f"tried on the model with {self.evaluations} evaluations: {len(self.checks)} tests, smallest p = {smallest:.2g}, "
            f"level of each {self.level:.2g} (a right file fails in {100 * self.alpha:g} % of such checks)"
        )


def spot_check(
    file: EMSFile,
    source: Source,
    *,
    seed: int,
    samples: int = SAMPLES,
    alpha: float = ALPHA,
    tick: Callable[[int], None] = lambda evaluations: None,
    **options: Unpack[Evaluating],
) -> SpotCheck:
    """Try the file on the model, at every guidance scale that it covers; see the module.

    Args:
        source: the model, at these scales.
        seed: of the fresh noise. Choose it at random: a forger who knows it could aim at it.

    Raises:
        EMSError: the file is for latents of another kind than the model's.
        SamplingError, EstimateError: from the model.
    """
    if source.schedule.space.value != file.meta.space:
        raise EMSError(f"the file is in {file.meta.space} space, the model in {source.schedule.space.value} space")
    file.at(file.guidance[0].item()).check_fits((1, *source.shape))
    if len(file.lambdas) < 5:
        raise EMSError(f"a spot check needs at least 5 points of lambda, the file has {len(file.lambdas)}")

    def check(noise: int) -> SpotCheck:
        checks: list[Check] = []
        evaluations = 0
        for guidance in file.guidance.tolist():
            grid, space = tuple(file.lambdas.tolist()), source.schedule.space
            job = Job(source.shape, grid, space, samples, (guidance,), noise, per_element=file.per_element)
            model = source.models[guidance]
            measured = measure(model, job, guidance, samples=samples, tick=tick, **options)
            found, used = judge(file, model, measured, seed, tick=tick, **options)
            checks += found
            evaluations += measured.evaluations + used
        return SpotCheck(tuple(checks), evaluations, alpha)

    first = check(seed)
    return confirmed(first, check(seed + 500_009)) if first.problems else first


def confirmed(first: SpotCheck, second: SpotCheck) -> SpotCheck:
    """Two checks of one file on different noise: of each test the larger p counts."""
    pairs = zip(first.checks, second.checks, strict=True)
    return SpotCheck(tuple(max(pair, key=lambda c: c.p) for pair in pairs), first.evaluations + second.evaluations, first.alpha)


def judge(
    file: EMSFile,
    model: Model,
    measured: Measured,
    case: int = 0,
    *,
    tick: Callable[[int], None] = lambda evaluations: None,
    **options: Unpack[Evaluating],
) -> tuple[list[Check], int]:
    """Tests of one guidance scale, and the evaluations that the evidence took; `case` picks the one of it that is tried."""
    checks = statistics_checks(file, measured)
    found = _evidence_case(file, measured.guidance, case)
    if found is None:
        return checks, 0
    row, entry = found
    runner = Runner(measured.job, model, tick=tick, **options)
    both = (entry.settings, Settings(order=2, corrector="none", strength=0.0))
    errors = [_errors(runner, file, measured, replace(entry, settings=settings), row.steps) for settings in both]
    return [*checks, *_evidence_checks(file, row, *errors)], 2 * len(measured.samples) * row.steps


def statistics_checks(file: EMSFile, measured: Measured) -> list[Check]:
    """Tests of l, s and b at one guidance scale; no evaluations."""
    g = file.guidance.tolist().index(measured.guidance)
    places = list(measured.places)
    l, s, b = (getattr(file, name)[g].double()[places] for name in "lsb")
    slope = smoothed_slope(file.lambdas, file.l[g].double())[places]
    y, D, Dp, yy, yD, DD, yDp, DDp, vJv = measured.moments
    q = 1 - l
    p = -slope - q
    f, df = q * y - D, p * y + q * D - Dp
    ff, fdf = q * q * yy - 2 * q * yD + DD, q * (p * yy + q * yD - yDp) - (p * yD + q * DD - DDp)
    mean = f.mean(0)
    variance = (ff.mean(0) - mean**2).clamp(min=1e-12)
    rest = df - s * f - b
    shifts = {"l": 1 - vJv - l, "s": (fdf - s * ff - b * f - mean * rest) / variance, "b": rest}
    claimed = numbers_in(file.meta.estimate.get("samples"))
    own = max(claimed[g] if g < len(claimed) else 0, _FEWEST_SAMPLES)
    checks = []
    for name, values in shifts.items():
        pooled = values.flatten(3).mean(3) if values.ndim > 3 else values  # [K, places, C]
        for c in range(pooled.shape[2]):
            what = f"guidance {measured.guidance:g}, {name} of channel {c}"
            off = f"off by {pooled[:, :, c].mean():+.3g} on average over lambda"
            checks += [Check(what, p, off) for p in _projected(pooled[:, :, c], own)]
        for c in range(pooled.shape[2] - 1):  # what channels share cancels: exchanged ones show
            apart = pooled[:, :, c] - pooled[:, :, c + 1]
            what = f"guidance {measured.guidance:g}, {name} of channel {c} less that of {c + 1}"
            off = f"off by {apart.mean():+.3g} on average over lambda"
            checks += [Check(what, p, off) for p in _projected(apart, own)]
    return checks


def _projected(values: Tensor, own: float) -> list[float]:
    """p-values of the mean of values [K, places] along a constant, a line and a parabola over the places.

    The file's own estimate rests on `own` samples of the same spread, which adds to the variance.
    """
    scaled = values / values.std(0, correction=1).clamp(min=1e-12)
    u = torch.linspace(-1, 1, scaled.shape[1], dtype=torch.float64) if scaled.shape[1] > 1 else torch.zeros(1).double()
    functions = (torch.ones_like(u), u, 1.5 * u**2 - 0.5)[: min(FUNCTIONS, len(u))]
    return [p_value(scaled @ function, own) for function in functions]


_Case = tuple[EvidenceRow, RecommendedSetting]


def _evidence_case(file: EMSFile, guidance: float, pick: int) -> _Case | None:
    """A case of few steps: the report row (or else the calibration row) and the advice."""
    rows = {(r.schedule, r.steps, r.split): r for r in file.meta.evidence if r.guidance == guidance}
    cases: list[_Case] = []
    for (scale, schedule, steps), entry in sorted(advice_by_case(file.meta).items(), key=lambda item: item[0]):
        row = rows.get((schedule, steps, "calibration"))
        if scale == guidance and row is not None and steps <= 8:
            cases.append((rows.get((schedule, steps, "report"), row), entry))
    return cases[pick % len(cases)] if cases else None


def _errors(runner: Runner, file: EMSFile, measured: Measured, entry: RecommendedSetting, steps: int) -> Tensor:
    """Mean squared errors [K] against the measured trajectories' ends, as `calibrate` takes them; infinite if it overflows."""
    job, ems = measured.job, file.at(measured.guidance)
    to_zero = len(entry.lambdas) == steps
    levels = job.space.level_of(torch.tensor(entry.lambdas, dtype=torch.float64))
    scale = (job.space.alpha_of(levels[0]) * math.exp(-entry.lambdas[0])).item()
    levels = torch.cat([levels, levels.new_zeros(1)]) if to_zero else levels
    ends = measured.ends[1 if to_zero else 0]

    def run(part: list[int]) -> Tensor:
        x = sample_dpm_solver_v3(
            denoiser_for(runner.model, part, job.space).model,
            sample_noise(job, part)[0].to(runner.device, runner.dtype) * scale,
            levels.to(runner.device),
            None,
            lambda info: runner.tick(len(part)),
            True,
            ems=ems if entry.settings.strength else None,
            space=job.space,
            **entry.settings.__dict__,
        )
        return (x.cpu() - ends[part]).double().square().flatten(1).mean(1)

    try:
        with torch.no_grad():
            return torch.cat([e for _, e in in_batches(list(measured.samples), runner.batch, run)]).clamp(1e-30, 1e30)
    except SamplingError:
        return torch.full((len(measured.samples),), 1e30, dtype=torch.float64)


def _evidence_checks(file: EMSFile, report: EvidenceRow, ems: Tensor, data: Tensor) -> list[Check]:
    """The error that the settings reach, and how much better than data prediction of order 2 they are.

    The file compares with the best of several settings without EMS, so against order 2 the gain cannot be smaller.
    """
    noises = numbers_in(file.meta.estimate.get(f"{report.split}_noises"))
    own = max(noises[0] if noises else 0, _FEWEST_NOISES)
    geometric = ems.log().mean().exp().item()
    gain = (ems / data).log().mean().exp().item()
    claimed = max(report.ems, 1e-30) / max(report.data_prediction, 1e-30)
    case = case_of(report)
    return [
        Check(
            f"{case}, error with EMS",
            p_value(ems.log() - math.log(max(report.ems, 1e-30)), own),
            f"{geometric:.3g} here, {report.ems:.3g} in the file",
        ),
        Check(
            f"{case}, error with EMS over that without",
            p_value((ems / data).log() - math.log(claimed), own, one_sided=True),
            f"{gain:.3g} here, {claimed:.3g} in the file",
        ),
    ]
