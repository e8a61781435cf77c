"""Whether a statistics file is what it says: by its own content, and by trying it on the model.

Without the model (`consistency_problems`): what the reader checks (format, checksum, shapes, ranges, an increasing grid), then
whether the moments, where there are any, give these l, s, b, and whether evidence, recommendation and fit agree.

With the model (`spot_check`): K fresh trajectories, on a few triples of neighbouring points of the file's own grid, give per
sample and channel, with f = (1 - l) y - D and its derivative f' for the file's l,

    u_l = v (I - J) v - l,      u_b = f' - s f - b,      u_s = u_b (f - E f) / Var f

For the right statistics all three have mean zero at every lambda; a wrong l, s or b shifts them by its error. Each is
projected, per channel and per difference of neighbouring channels, on three smooth functions of lambda and tested by Student's
t. The evidence is tested alike, by the logarithm of the error that the file's settings really reach from the same noises. The
level of all tests together is `alpha` (Bonferroni), and what fails must fail again on other noise. Means over 16 samples are
not quite normal (a model with few modes has few kinds of trajectories), so t is judged with half the degrees of freedom.
benchmarks/forged.py measures how often right files fail and wrong ones pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...sampler import EMSError, SamplingError, Settings, sample_dpm_solver_v3
from ..estimate.moments import MOMENTS, Moments, smoothed_slope
from ..estimate.points import PROBE_STEP, difference_weights
from ..estimate.run import Job, Model, denoiser_for, in_batches, sample_noise
from ..estimate.source import Source
from ..file.contents import EMSFile, EvidenceRow, RecommendedSetting, advice_by_case, evidence_problems

__all__ = [
    "ALPHA",
    "Check",
    "Measured",
    "SpotCheck",
    "confirmed",
    "consistency_problems",
    "judge",
    "measure",
    "spot_check",
    "statistics_checks",
]

ALPHA = 0.01
"""How often a right file may fail the spot check."""
SAMPLES, PLACES, FUNCTIONS = 16, 6, 3
_FEWEST_SAMPLES, _FEWEST_NOISES = 12, 4
"""What a file is at least taken to rest on: one that claims less would ask to be believed whatever it holds."""


# --- Without the model


def consistency_problems(file: EMSFile) -> list[str]:
    """What in a file contradicts itself; empty if nothing does."""
    return [*evidence_problems(file), *_selection_problems(file), *_moment_problems(file), *_fit_problems(file)]


def _selection_problems(file: EMSFile) -> list[str]:
    """Settings were chosen as the best of several on calibration noise: what was among them cannot be better."""
    advice = advice_by_case(file.meta)
    problems = []
    for row in file.meta.evidence:
        entry = advice.get((row.guidance, row.schedule, row.steps))
        if row.split != "calibration" or entry is None:
            continue
        if row.ems > row.full_strength:
            numbers = f"{row.full_strength:g} against {row.ems:g}"
            problems.append(f"{_case(row)}: full strength, which was tried too, is better than the recommendation ({numbers})")
        if entry.settings.strength == 0 and row.ems != row.data_prediction:
            problems.append(f"{_case(row)}: strength 0 is data prediction, and yet the two errors differ")
    return problems


def _case(row: EvidenceRow) -> str:
    return f"guidance {row.guidance:g}, {row.schedule}, {row.steps} steps"


def _moment_problems(file: EMSFile) -> list[str]:
    """l, s, b again from the moments, to the precision in which they are kept."""
    problems = []
    claimed = _numbers(file.meta.estimate.get("samples"))
    for g, guidance in enumerate(file.guidance.tolist()):
        sums, count = file.moments.get(f"sums.{g}"), file.moments.get(f"count.{g}")
        if sums is None or count is None:
            continue
        place = f"guidance {guidance:g}"
        fits = count.ndim == 1 and tuple(sums.shape) == (len(MOMENTS), len(count), *file.l.shape[1:])
        if not fits or not (count >= 0).all() or count.sum() < 1:
            problems.append(f"{place}: the moments have not the shape of these statistics")
            continue
        moments = Moments(file.lambdas, count, sums)
        found = moments.statistics()
        for name in "lsb":
            mine, theirs = getattr(file, name)[g].double(), getattr(found, name)
            off = (mine - theirs).abs() - 1e-5 * (1 + theirs.abs())
            if not bool((off <= 0).all()):
                worst = (mine - theirs).abs().max().item()
                problems.append(f"{place}: {name} is not what the moments give (it differs by up to {worst:.3g})")
        if g < len(claimed) and claimed[g] != moments.samples:
            problems.append(f"{place}: says {claimed[g]:g} samples, the moments hold {moments.samples}")
    return problems


def _fit_problems(file: EMSFile) -> list[str]:
    """Coefficients are kept where they won; the ratio is that of the errors."""
    problems = []
    for row in file.meta.fitted:
        place = f"guidance {row.guidance:g}, fitted, {row.steps} steps"
        if (row.coefficients is not None) != (row.ratio[0] < 1):
            problems.append(f"{place}: coefficients are kept where they win, and the ratio is {row.ratio[0]:g}")
        if min(row.fixed[0], row.fitted[0]) > 1e-25 and max(row.fixed[0], row.fitted[0]) < 1e25:
            expected = row.fitted[0] / row.fixed[0]
            if abs(math.log(max(row.ratio[0], 1e-30) / expected)) > 2e-3:
                problems.append(f"{place}: the ratio is {row.ratio[0]:g}, but the errors give {expected:.4g}")
    return problems


def _numbers(value: object) -> list[float]:
    values = value if isinstance(value, tuple) else (value,)
    return [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]


# --- With the model: measuring


@dataclass(frozen=True)
class Measured:
    """K fresh trajectories of one guidance scale.

    Args:
        guidance: the scale.
        samples: their indices; `job` says what noise they begin with.
        places: indices of the file's grid where moments were taken.
        moments: [9, K, places, C, ...], as `points.sample_moments` gives them.
        ends: (x at the clean end of the grid, D there), [K, C, ...] each.
        evaluations: of the denoiser.
    """

    guidance: float
    job: Job
    samples: tuple[int, ...]
    places: tuple[int, ...]
    moments: Tensor
    ends: tuple[Tensor, Tensor]
    evaluations: int


def measure(
    model: Model,
    job: Job,
    guidance: float,
    *,
    samples: int = SAMPLES,
    batch: int = 16,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tick: Callable[[int], None] = lambda evaluations: None,
) -> Measured:
    """Trajectories on part of `job.lambdas`, with what `judge` needs of them. Raises SamplingError, EstimateError."""
    nodes, places = _nodes(len(job.lambdas))
    kept: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []

    def run(part: list[int]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return _trajectories(model, job, part, nodes, places, device, dtype, tick)

    indices = list(range(samples))
    for _, found in in_batches(indices, batch, run):
        kept.append(found)
    moments = torch.cat([m for m, _ in kept], 1)
    ends = torch.cat([e[0] for _, e in kept]), torch.cat([e[1] for _, e in kept])
    return Measured(guidance, job, tuple(indices), places, moments, ends, samples * (len(nodes) + len(places)))


def _nodes(points: int) -> tuple[list[int], tuple[int, ...]]:
    """Grid indices to solve on, and those among them (with both neighbours) to measure at; all of a small grid."""
    last = points - 1
    count = min(PLACES, max((points - 2) // 3, 1))
    places = [round(1 + (last - 2) * (2 * k + 1) / (2 * count)) for k in range(count)]
    nodes = {0, last, *(i + d for i in places for d in (-1, 0, 1))}
    ordered = sorted(nodes)
    nodes |= {(a + b) // 2 for a, b in itertools.pairwise(ordered) if b - a > 3}
    return sorted(nodes), tuple(places)


def _trajectories(
    model: Model,
    job: Job,
    samples: list[int],
    nodes: list[int],
    places: tuple[int, ...],
    device: torch.device | str,
    dtype: torch.dtype,
    tick: Callable[[int], None],
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    noise, generators = sample_noise(job, samples)
    denoiser = denoiser_for(model, samples, job.space)
    lambdas = torch.tensor(job.lambdas, dtype=torch.float64)[nodes]
    levels = job.space.level_of(lambdas)
    start = noise.to(device, dtype) * (job.space.alpha_of(levels[0]) * (-lambdas[0]).exp()).item()
    points: list[tuple[Tensor, Tensor, Tensor]] = []  # x, y, D

    def on_step(info: dict[str, object]) -> None:
        x, D = info["x"], info["denoised"]
        assert isinstance(x, Tensor) and isinstance(D, Tensor)
        alpha = job.space.alpha_of(levels[len(points)]).item()
        points.append((x, x / alpha, D))
        tick(len(x))

    with torch.no_grad():
        end = torch.cat([levels, levels.new_zeros(1)]).to(device)
        options = {"order": 3, "predictor": "true", "corrector": "none", "lower_order_final": False}
        sample_dpm_solver_v3(
            denoiser.model,
            start,
            end,
            denoiser.extra_args,
            on_step,
            True,
            space=denoiser.space,
            **options,  # type: ignore[arg-type]
        )
        rows = []
        for place in places:
            at = nodes.index(place)
            y, D = (v.to(torch.float64) for v in points[at][1:])
            weights = difference_weights(lambdas[at - 1 : at + 2])[1][1].tolist()
            slope = sum((w * points[at + k - 1][2].to(torch.float64) for k, w in enumerate(weights)), torch.zeros_like(D))
            v = torch.stack([torch.randint(0, 2, job.shape, generator=g, dtype=torch.int8) for g in generators])
            v = v.to(device, dtype) * 2 - 1
            step = PROBE_STEP * math.exp(-lambdas[at].item())
            jv = (denoiser(points[at][1] + step * v, lambdas[at].item()) - points[at][2]) / step
            tick(len(v))
            products = (y, D, slope, y * y, y * D, D * D, y * slope, D * slope, v.double() * jv.double())
            rows.append(torch.stack([_pooled(p, job.per_element) for p in products]))
    return torch.stack(rows, 2).cpu(), (points[-1][0].cpu(), points[-1][2].cpu())


def _pooled(v: Tensor, per_element: bool) -> Tensor:
    return v if per_element or v.ndim == 2 else v.flatten(2).mean(2)


# --- With the model: judging


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
    batch: int = 16,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tick: Callable[[int], None] = lambda evaluations: None,
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
    options: dict[str, Any] = {"batch": batch, "device": device, "dtype": dtype, "tick": tick}
    first = _one_check(file, source, seed, seed, samples, alpha, options)
    if not first.problems:
        return first
    return confirmed(first, _one_check(file, source, seed + 500_009, seed, samples, alpha, options))


def confirmed(first: SpotCheck, second: SpotCheck) -> SpotCheck:
    """Two checks of one file on different noise: of each test the larger p counts."""
    pairs = zip(first.checks, second.checks, strict=True)
    return SpotCheck(tuple(max(pair, key=lambda c: c.p) for pair in pairs), first.evaluations + second.evaluations, first.alpha)


def _one_check(
    file: EMSFile, source: Source, seed: int, case: int, samples: int, alpha: float, options: dict[str, Any]
) -> SpotCheck:
    checks: list[Check] = []
    evaluations = 0
    for guidance in file.guidance.tolist():
        job = Job(
            source.shape,
            tuple(file.lambdas.tolist()),
            source.schedule.space,
            samples,
            (guidance,),
            seed,
            per_element=file.per_element,
        )
        model = source.models[guidance]
        measured = measure(model, job, guidance, samples=samples, **options)
        found, used = judge(file, model, measured, case, **options)
        checks += found
        evaluations += measured.evaluations + used
    return SpotCheck(tuple(checks), evaluations, alpha)


def judge(
    file: EMSFile,
    model: Model,
    measured: Measured,
    case: int = 0,
    *,
    batch: int = 16,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tick: Callable[[int], None] = lambda evaluations: None,
) -> tuple[list[Check], int]:
    """Tests of one guidance scale, and the evaluations that the evidence took; `case` picks the one of it that is tried."""
    checks = statistics_checks(file, measured)
    found = _evidence_case(file, measured.guidance, case)
    if found is None:
        return checks, 0
    row, entry = found
    errors = []
    for settings in (entry.settings, Settings(order=2, corrector="none", strength=0.0)):
        errors.append(_errors(file, model, measured, entry, row.steps, settings, batch, device, dtype, tick))
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
    claimed = _numbers(file.meta.estimate.get("samples"))
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
    return [_p_value(scaled @ function, own) for function in functions]


def _p_value(values: Tensor, own: float, one_sided: bool = False) -> float:
    """Of the mean of `values` [K] being 0 (or not above it), known to within the spread of `own` more of them."""
    n = len(values)
    spread = values.std(correction=1).item() * math.sqrt(1 / n + 1 / own)
    mean = values.mean().item()
    if spread < 1e-12 * (1 + abs(mean)):
        return 1.0 if abs(mean) < 1e-9 else 0.0
    t, freedom = mean / spread, max((n - 1) // 2, 1)
    if one_sided:
        return _student_tail(t, freedom) if t > 0 else 1.0
    return min(2 * _student_tail(abs(t), freedom), 1.0)


def _student_tail(t: float, freedom: int) -> float:
    """P(T > t), t >= 0, of Student's t: the integral of cos^(nu - 1) from atan(t / sqrt(nu)) to pi / 2."""
    angles = torch.linspace(math.atan(t / math.sqrt(freedom)), math.pi / 2, 4001, dtype=torch.float64)
    area = torch.trapezoid(angles.cos().clamp(min=0) ** (freedom - 1), angles).item()
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return area * scale


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


def _errors(
    file: EMSFile,
    model: Model,
    measured: Measured,
    entry: RecommendedSetting,
    steps: int,
    settings: Settings,
    batch: int,
    device: torch.device | str,
    dtype: torch.dtype,
    tick: Callable[[int], None],
) -> Tensor:
    """Mean squared errors [K] against the measured trajectories' ends, as `calibrate` takes them; infinite if it overflows."""
    job, ems = measured.job, file.at(measured.guidance)
    to_zero = len(entry.lambdas) == steps
    levels = job.space.level_of(torch.tensor(entry.lambdas, dtype=torch.float64))
    scale = (job.space.alpha_of(levels[0]) * math.exp(-entry.lambdas[0])).item()
    levels = torch.cat([levels, levels.new_zeros(1)]) if to_zero else levels
    ends = measured.ends[1 if to_zero else 0]

    def run(part: list[int]) -> Tensor:
        start = sample_noise(job, part)[0].to(device, dtype) * scale
        denoiser = denoiser_for(model, part, job.space)
        x = sample_dpm_solver_v3(
            denoiser.model,
            start,
            levels.to(device),
            None,
            lambda info: tick(len(part)),
            True,
            ems=ems if settings.strength else None,
            space=job.space,
            **settings.__dict__,
        )
        return (x.cpu() - ends[part]).double().square().flatten(1).mean(1)

    try:
        with torch.no_grad():
            return torch.cat([e for _, e in in_batches(list(measured.samples), batch, run)]).clamp(1e-30, 1e30)
    except SamplingError:
        return torch.full((len(measured.samples),), 1e30, dtype=torch.float64)


def _evidence_checks(file: EMSFile, report: EvidenceRow, ems: Tensor, data: Tensor) -> list[Check]:
    """The error that the settings reach, and how much better than data prediction of order 2 they are.

    The file compares with the best of several settings without EMS, so against order 2 the gain cannot be smaller.
    """
    noises = _numbers(file.meta.estimate.get(f"{report.split}_noises"))
    own = max(noises[0] if noises else 0, _FEWEST_NOISES)
    geometric = ems.log().mean().exp().item()
    gain = (ems / data).log().mean().exp().item()
    claimed = max(report.ems, 1e-30) / max(report.data_prediction, 1e-30)
    case = _case(report)
    return [
        Check(
            f"{case}, error with EMS",
            _p_value(ems.log() - math.log(max(report.ems, 1e-30)), own),
            f"{geometric:.3g} here, {report.ems:.3g} in the file",
        ),
        Check(
            f"{case}, error with EMS over that without",
            _p_value((ems / data).log() - math.log(claimed), own, one_sided=True),
            f"{gain:.3g} here, {claimed:.3g} in the file",
        ),
    ]
