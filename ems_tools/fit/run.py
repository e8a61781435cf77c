"""Few-step settings fitted to a model: where to evaluate it, and how to combine what it returns.

For one guidance scale and n evaluations, with reference trajectories y(lambda) at hand (the teacher), a candidate schedule is
solved on calibration noise step by step. Step i is

    y_{i+1} = decay_i y_i + sum_{j <= i} weights_{i,j} D_j

and its few numbers, the same for all pixels and noises, are those that bring the y_{i+1} of *this* run nearest to the
teacher's (the last step: to x0), so each step knows the errors that the ones before it made. One run fits all steps.
The objective is the mean over noises of the log of the squared error: a few start noises carry most of a mean square, and
would be all that is fitted. Iteratively reweighted least squares minimises it exactly.

The lambdas are Karras steps in three parameters, the exponent and the places of the first and the last evaluation, found by
pattern search on the final error (`_search`); the step from there to sigma = 0 is fitted as the others are. The first one need
not be the noisy end: there the model sees noise only and answers with its mean, which a run of few steps can do without. Noise
scaled to the first sigma lacks a little of what the trajectory holds there; the factor `start` makes up for it.
Then all lambdas and coefficients are turned together so that the final error falls (`_refine`), which is what wins at strong
guidance. `benchmarks/fit_ablation.py` takes every ingredient away in turn. Dynamic programming on local errors (GITS) and Align
Your Steps' bound cost no evaluations and were several times worse: neither is the error of this solver.

What is fitted is then judged on noise that took no part, against the best that a fixed schedule gives with the same
statistics; where it does not win, that schedule is kept instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...sampler import EMS, FittedSteps, SamplingError, StepInfo, sample_dpm_solver_v3
from ..estimate.run import Job, JobState, Meter, Model, Progress, denoiser_for, in_batches, sample_noise, snapped_grid
from ..file.layout import fitted_row, fitted_values
from ..file.rows import FittedRow, insane

__all__ = ["FIT_NOISE", "FitPlan", "evaluations_of_fit", "fit_steps"]

FIT_NOISE = 2_000_000_000
"""Index of the first sample of a fit; statistics count from 0, their calibration from 1,000,000,000."""
_ELEMENTS = 4096
"""Latent elements of each sample that the fit looks at; chosen at random where a latent has more."""
_RIDGE = 1e-6
_REWEIGHTINGS = 4
_DAMPING = 1e-3
_MOVES = ((0.0, 0.0, 0.35), (0.0, 0.0, -0.35), (0.0, 0.2, 0.0), (0.0, -0.2, 0.0), (0.1, 0.0, 0.0), (-0.1, 0.0, 0.0))
"""Of the pattern search: changes of a `_Spacing`'s bend, first and last."""
_BENDS = (0.2, 0.05, 0.4)
_FIRSTS = (1.0, 0.0, 2.5)
"""Where the search begins: 1 / rho, and the share of the picture that is known at the first evaluation, over `_first`'s."""


@dataclass(frozen=True)
class FitPlan:
    """How much to fit.

    Args:
        steps: step counts fitted.
        noises: to fit coefficients on, `search` of them to search lambdas on (0: no search).
        held_out: to judge on, those of no other set.
        fixed: schedules to beat, host levels as a function of the number of steps, by name.
        moves: candidate schedules at most in a search.
        rounds: of refinement (`_refine`), on the noises of the search and for at most `refined` steps.
    """

    steps: tuple[int, ...] = (4, 5, 6, 7, 8, 9, 10, 11, 12)
    noises: int = 32
    held_out: int = 16
    fixed: Mapping[str, Callable[[int], Tensor]] = field(default_factory=dict)
    search: int = 12
    moves: int = 10
    rounds: int = 0
    refined: int = 7

    @property
    def few(self) -> int:
        """Noises of a refinement; the others that coefficients are fitted on then tell whether it helped."""
        return min(self.search or self.noises, self.noises // 2)


def evaluations_of_fit(plan: FitPlan, grid: int, scales: int) -> int:
    """Denoiser evaluations of `fit_steps` at most, for this many guidance scales; `grid` points of the teacher."""
    teacher = (plan.noises + plan.held_out) * grid
    runs = plan.noises + plan.held_out * (1 + len(plan.fixed)) + plan.search * plan.moves
    return scales * (teacher + sum(plan.steps) * runs + sum(_cost_of_refinement(plan, n) for n in plan.steps))


def _cost_of_refinement(plan: FitPlan, steps: int) -> int:
    """A knob costs the evaluations after it; a round also one run before and at most three after it."""
    if not plan.rounds or steps > plan.refined:
        return 0
    runs = sum(steps - i - (what in ("y", "D")) for what, i, _ in _knobs(steps)) + 4 * steps
    return plan.rounds * plan.few * runs + plan.noises * steps


@dataclass
class _Bench:
    """The denoiser of one guidance scale, in y and lambda, and a count of evaluations."""

    job: Job
    model: Model
    device: torch.device | str
    dtype: torch.dtype
    batch: int
    tick: Callable[[int], None]

    def denoise(self, samples: Sequence[int], y: Tensor, lam: float) -> Tensor:
        """D [K, C, ...] of y [K, C, ...], float32."""
        at = {k: i for i, k in enumerate(samples)}

        def run(part: list[int]) -> Tensor:
            rows = y[[at[k] for k in part]].to(self.device, self.dtype)
            with torch.no_grad():
                D = denoiser_for(self.model, part, self.job.space)(rows, lam)
            self.tick(len(part))
            return D.to("cpu", torch.float32)

        return torch.cat([D for _, D in in_batches(list(samples), self.batch, run)])

    def start(self, samples: Sequence[int], lam: float, factor: float = 1.0) -> Tensor:
        """Y [K, C, ...] as a host begins at `lam`: noise times sigma; and times a fit's factor."""
        return sample_noise(self.job, list(samples))[0] * (factor * math.exp(-lam))


@dataclass
class _Teacher:
    """Reference trajectories: y and D [M, K, P] at the grid's lambdas, on P elements of every sample."""

    lambdas: tuple[float, ...]
    elements: Tensor
    y: Tensor
    D: Tensor

    @property
    def clean(self) -> Tensor:
        """x0 [K, P]: the denoised at the clean end."""
        return self.D[-1].double()

    def at(self, lam: float) -> Tensor:
        """Y [K, P] at `lam`, by the cubic through two grid points with their exact slopes D - y."""
        grid = self.lambdas
        i = min(max(sum(v <= lam for v in grid), 1), len(grid) - 1)
        h = grid[i] - grid[i - 1]
        u = (lam - grid[i - 1]) / h
        a, b = self.y[i - 1].double(), self.y[i].double()
        da, db = (self.D[i - 1].double() - a) * h, (self.D[i].double() - b) * h
        return (1 + 2 * u) * (1 - u) ** 2 * a + u * (1 - u) ** 2 * da + u**2 * (3 - 2 * u) * b - u**2 * (1 - u) * db

    def lambda_where_left(self, share: float) -> float:
        """Lambda from which D is nearer to the picture than `share` of the squared distance at the noisy end."""
        gap = torch.stack([(D.double() - self.clean).square().mean(1).clamp(min=1e-30).log().mean() for D in self.D[:-1]])
        left = (gap - gap[0]).cummin(0).values.tolist()
        goal = math.log(share)
        i = next((i for i, v in enumerate(left) if v < goal), None)
        if not i:
            return self.lambdas[0 if i == 0 else len(left) - 1]
        u = (left[i - 1] - goal) / (left[i - 1] - left[i])
        return self.lambdas[i - 1] + u * (self.lambdas[i] - self.lambdas[i - 1])

    def part(self, samples: int) -> _Teacher:
        """The first samples only."""
        return _Teacher(self.lambdas, self.elements, self.y[:, :samples], self.D[:, :samples])


def _teach(bench: _Bench, samples: Sequence[int]) -> _Teacher:
    """Solve on the job's grid at order 3, one evaluation a grid point."""
    job = bench.job
    size = math.prod(job.shape)
    draw = torch.Generator().manual_seed(job.seed)
    elements = torch.randperm(size, generator=draw)[:_ELEMENTS].sort().values
    levels = job.space.level_of(torch.tensor(job.lambdas, dtype=torch.float64))
    alphas = job.space.alpha_of(levels)

    def run(part: list[int]) -> tuple[Tensor, Tensor]:
        ys: list[Tensor] = []
        Ds: list[Tensor] = []

        def keep(info: StepInfo) -> None:
            x, D, i = info["x"], info["denoised"], info["i"]
            assert isinstance(x, Tensor) and isinstance(D, Tensor)
            ys.append((x.flatten(1)[:, elements.to(x.device)].double() / alphas[i].item()).to("cpu", torch.float32))
            Ds.append(D.flatten(1)[:, elements.to(D.device)].to("cpu", torch.float32))
            bench.tick(len(part))

        start = bench.start(part, job.lambdas[0]).to(bench.device, bench.dtype) * alphas[0].item()
        denoiser = denoiser_for(bench.model, part, job.space)
        end = torch.cat([levels, levels.new_zeros(1)])  # so that D is evaluated at the last grid point too
        fine = {"order": 3, "predictor": "true", "corrector": "none", "lower_order_final": False, "space": job.space}
        sample_dpm_solver_v3(denoiser.model, start, end.to(bench.device), None, keep, True, **fine)  # type: ignore[arg-type]
        return torch.stack(ys), torch.stack(Ds)

    parts = [values for _, values in in_batches(list(samples), bench.batch, run)]
    y, D = (torch.cat([p[k] for p in parts], 1) for k in (0, 1))
    return _Teacher(job.lambdas, elements, y, D)


def _least_squares(features: Tensor, target: Tensor) -> Tensor:
    """C [F] that minimises the mean over k of log |target_k - sum_f c_f features_kf|^2; [K, F, P] and [K, P], float64."""
    gram = torch.einsum("kfp,kgp->kfg", features, features)
    side = torch.einsum("kfp,kp->kf", features, target)
    size = target.square().sum(1)
    errors = size
    c = torch.zeros(features.shape[1], dtype=torch.float64)
    for _ in range(_REWEIGHTINGS):
        weight = 1 / errors.clamp(min=max(errors.median().item() * 1e-2, 1e-20))
        A, b = torch.einsum("k,kfg->fg", weight, gram), weight @ side
        scale = A.diagonal().clamp(min=1e-30).sqrt()
        A = A / scale[:, None] / scale + _RIDGE * torch.eye(len(scale), dtype=torch.float64)
        c = torch.linalg.solve(A, b / scale) / scale
        errors = size - 2 * side @ c + torch.einsum("kfg,f,g->k", gram, c, c)
    return c


def _solve(
    bench: _Bench,
    samples: Sequence[int],
    teacher: _Teacher,
    lambdas: Sequence[float],
    given: FittedSteps | None = None,
    fitted_from: int | None = None,
) -> tuple[FittedSteps, Tensor]:
    """Run a schedule on these samples: its coefficients, and errors [K].

    Steps before `fitted_from` (default: none without `given`, all with it) take the coefficients of `given`; the others
    are fitted on the way.
    """
    factor = 1.0 if given is None else given.start
    y, history = bench.start(samples, lambdas[0], factor), []
    decays, rows = [], []
    first = fitted_from if fitted_from is not None else 0 if given is None else len(lambdas)
    ends = [*lambdas[1:], math.inf]
    for i, (lam, then) in enumerate(zip(lambdas, ends, strict=True)):
        history.append(bench.denoise(samples, y, lam))
        if given is not None and i < first:
            decay, weights = given.decay[i], list(given.weights[i])
        else:
            decay, weights = _fit_step(teacher, y, history, lam, then)
        decays.append(decay)
        rows.append(tuple(weights))
        y = _step(y, history, decay, weights)
    errors = (y.flatten(1)[:, teacher.elements].double() - teacher.clean).square().mean(1)
    return FittedSteps(tuple(lambdas), tuple(decays), tuple(rows), factor), errors


def _step(y: Tensor, history: list[Tensor], decay: float, weights: Sequence[float]) -> Tensor:
    y = y * decay
    for w, past in zip(weights, history, strict=True):
        y.add_(past, alpha=w)
    return y


def _fit_step(teacher: _Teacher, y: Tensor, history: list[Tensor], lam: float, then: float) -> tuple[float, list[float]]:
    """Decay and weights of one step, as corrections of the exact first-order one (DDIM), which the ridge holds on to."""
    pick = teacher.elements
    state, past = y.flatten(1)[:, pick].double(), [D.flatten(1)[:, pick].double() for D in history]
    decay = math.exp(lam - then)
    target = teacher.clean if then == math.inf else teacher.at(then)
    now = past[-1]
    features = torch.stack([state - now, now, *(now - D for D in past[:-1])], 1)
    c = _least_squares(features, target - decay * state - (1 - decay) * now).tolist()
    weights = [-v for v in c[2:]]
    return decay + c[0], [*weights, 1 - decay - c[0] + c[1] + sum(c[2:])]


@dataclass
class _Point:
    """A schedule and its coefficients as corrections of first-order steps (DDIM), so that the lambdas can move under them."""

    lambdas: list[float]
    decay: list[float]
    weights: list[list[float]]
    start: float

    @classmethod
    def of(cls, steps: FittedSteps) -> _Point:
        point = cls(list(steps.lambdas), list(steps.decay), [list(row) for row in steps.weights], steps.start)
        point._add(-1)
        return point

    def steps(self) -> FittedSteps:
        """The coefficients themselves."""
        other = self.copy()
        other._add(1)
        return FittedSteps(tuple(other.lambdas), tuple(other.decay), tuple(map(tuple, other.weights)), other.start)

    def copy(self) -> _Point:
        return _Point(list(self.lambdas), list(self.decay), [list(row) for row in self.weights], self.start)

    def _add(self, sign: int) -> None:
        for i, (lam, then) in enumerate(zip(self.lambdas, [*self.lambdas[1:], math.inf])):
            first = math.exp(lam - then)
            self.decay[i] += sign * first
            self.weights[i][i] += sign * (1 - first)

    def move(self, knob: tuple[str, int, int], by: float) -> None:
        """Turn one knob: a lambda, the start, or in step i the share of y against D_i, or of D_i against an older D."""
        what, i, j = knob
        if what == "lambda":
            self.lambdas[i] += by
        elif what == "start":
            self.start += by
        elif what == "y":
            self.decay[i] += by
            self.weights[i][i] -= by
        else:
            self.weights[i][i] += by
            self.weights[i][j] -= by


_TURN = {"lambda": 0.04, "start": 0.01, "y": 0.02, "D": 0.04}
"""How far a knob is turned to see what it does."""


def _knobs(steps: int) -> list[tuple[str, int, int]]:
    """Of all steps but the last, whose coefficients are fitted whatever the others are."""
    knobs = [("lambda", i, 0) for i in range(steps)] + [("y", i, 0) for i in range(steps - 1)]
    return [("start", 0, 0), *knobs] + [("D", i, j) for i in range(1, steps - 1) for j in range(max(i - 2, 0), i)]


def _refine(bench: _Bench, samples: Sequence[int], teacher: _Teacher, steps: FittedSteps, rounds: int) -> FittedSteps:
    """Turn all knobs together so that the *final* error falls: Gauss-Newton rounds on the mean log error.

    Fitting each step to the teacher for its own sake ignores what an error there does to the steps after it. Derivatives
    are differences between runs that begin where a knob first acts.
    """
    for _ in range(rounds):
        point = _Point.of(steps)
        ys, history, residual = _trace(bench, samples, teacher, steps)
        errors = residual.square().mean(1)
        knobs = _knobs(len(steps.lambdas))
        columns = []
        for knob in knobs:
            moved = point.copy()
            moved.move(knob, _TURN[knob[0]])
            begin = knob[1] - (knob[0] in ("lambda", "start"))
            end = _trace(bench, samples, teacher, moved.steps(), begin, ys, history)[2]
            columns.append((end - residual) / _TURN[knob[0]])
        last = [D.flatten(1)[:, teacher.elements].double() for D in history]
        columns += [ys[-1].flatten(1)[:, teacher.elements].double() - last[-1], *last]
        turn = _turns(torch.stack(columns, 1), residual, errors)[: len(knobs)]
        for share in (1.0, 0.5, 0.25):
            trial = point.copy()
            for knob, by in zip(knobs, turn.tolist()):
                trial.move(knob, share * by)
            trial.lambdas[0] = max(trial.lambdas[0], bench.job.lambdas[0])
            if any(b - a < 0.02 for a, b in zip(trial.lambdas, trial.lambdas[1:])) or trial.lambdas[-1] > bench.job.lambdas[-1]:
                continue
            n = len(trial.lambdas)
            found, now = _solve(bench, samples, teacher, trial.lambdas, trial.steps(), n - 1)
            if _objective(now) < _objective(errors):
                steps = found
                break
        else:
            break
    return steps


def _turns(columns: Tensor, residual: Tensor, errors: Tensor) -> Tensor:
    """The damped, weighted least-squares turn of every knob; columns [K, F, P]."""
    weight = 1 / errors.clamp(min=max(errors.median().item() * 1e-2, 1e-20))
    A = torch.einsum("k,kfp,kgp->fg", weight, columns, columns)
    b = -torch.einsum("k,kfp,kp->f", weight, columns, residual)
    scale = A.diagonal().clamp(min=1e-30).sqrt()
    A = A / scale[:, None] / scale + _DAMPING * torch.eye(len(scale), dtype=torch.float64)
    return torch.linalg.solve(A, b / scale) / scale


def _trace(
    bench: _Bench,
    samples: Sequence[int],
    teacher: _Teacher,
    steps: FittedSteps,
    begin: int = -1,
    ys: Sequence[Tensor] = (),
    past: Sequence[Tensor] = (),
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Y and D at every evaluation, and the final residual [K, P]; of a run that differs from (ys, past) from `begin` on."""
    states, history = list(ys[: begin + 1]), list(past[: begin + 1])
    if not states:
        states = [bench.start(samples, steps.lambdas[0], steps.start)]
    for i in range(max(begin, 0), len(steps.lambdas)):
        if i >= len(history):
            history.append(bench.denoise(samples, states[-1], steps.lambdas[i]))
        states.append(_step(states[-1], history, steps.decay[i], steps.weights[i]))
    return states[:-1], history, states[-1].flatten(1)[:, teacher.elements].double() - teacher.clean


def _objective(errors: Tensor) -> float:
    """Mean log error; infinite for a run that overflowed."""
    value = errors.clamp(min=1e-30).log().mean().item()
    return value if math.isfinite(value) else math.inf


@dataclass(frozen=True)
class _Spacing:
    """Karras steps from lambda `first` to `last` with rho = 1 / bend (0: uniform in lambda)."""

    bend: float
    first: float
    last: float

    def lambdas(self, steps: int) -> list[float]:
        """Of `steps` evaluations."""
        u = [i / max(steps - 1, 1) for i in range(steps)]
        if self.bend < 1e-3:
            return [self.first + v * (self.last - self.first) for v in u]
        a, b = math.exp(-self.first * self.bend), math.exp(-self.last * self.bend)
        return [-math.log(a + v * (b - a)) / self.bend for v in u]

    def within(self, job: Job) -> _Spacing:
        """The same, held to what can be used."""
        low, high = job.lambdas[0], job.lambdas[-1]
        first = min(max(self.first, low), low + 0.5 * (high - low))
        last = min(max(self.last, low + 0.3 * (high - low), first + 0.2 * (high - low)), high)
        return _Spacing(round(min(max(self.bend, 0.0), 1.0), 4), round(first, 4) if first > low else low, round(last, 4))


def _last(teacher: _Teacher, steps: int) -> float:
    """The search's first guess of the last lambda: the more steps, the less may be left. Measured on the embedded model."""
    return teacher.lambda_where_left(math.exp(-0.9 - 0.85 * steps))


def _first(teacher: _Teacher, steps: int, times: float = 1.0) -> float:
    """The search's first guess of the first lambda. What the trajectory knows there, noise does not: an error that stays."""
    return teacher.lambda_where_left(1 - times * math.exp(-0.8 - 0.4 * steps))


def _search(
    bench: _Bench, plan: FitPlan, samples: Sequence[int], teacher: _Teacher, steps: int, before: _Spacing | None
) -> _Spacing:
    """The spacing with the lowest final error found; starts from that of fewer steps, `before`, or tries several."""
    tried: dict[_Spacing, float] = {}

    def value(spacing: _Spacing) -> float:
        spacing = spacing.within(bench.job)
        if spacing not in tried:
            if len(tried) >= plan.moves:
                return math.inf
            tried[spacing] = _objective(_solve(bench, samples, teacher, spacing.lambdas(steps))[1])
        return tried[spacing]

    for start in _starts(teacher, steps, before):
        value(start)
    size = 1.0
    while len(tried) < plan.moves and size > 0.2:
        best = min(tried, key=tried.__getitem__)
        lowest = tried[best]
        for bend, first, last in _MOVES:
            if value(_Spacing(best.bend + size * bend, best.first + size * first, best.last + size * last)) < lowest:
                break
        if min(tried.values()) >= lowest:
            size /= 2
    return min(tried, key=tried.__getitem__)


def _starts(teacher: _Teacher, steps: int, before: _Spacing | None = None) -> list[_Spacing]:
    """Where a search begins that knows nothing, or the spacing for fewer steps; the best guess first."""
    firsts, last = [_first(teacher, steps, times) for times in _FIRSTS], _last(teacher, steps)
    if before is not None:
        return [_Spacing(before.bend, first, last) for first in (firsts[0], before.first)]
    return [_Spacing(bend, firsts[0], last) for bend in _BENDS] + [_Spacing(_BENDS[0], first, last) for first in firsts[1:]]


def fit_steps(
    model: Model,
    ems: EMS,
    job: Job,
    guidance: float,
    plan: FitPlan,
    state: JobState,
    *,
    levels: Tensor | None = None,
    batch: int = 16,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[Progress], None] = lambda p: None,
) -> list[FittedRow]:
    """Fitted rows for one guidance scale; trajectories and rows already in `state` are not computed again.

    Args:
        ems: finished statistics, with their recommendation: what the fixed schedules are solved with.
        levels: the host's own noise levels, if it rounds to them; evaluations are then placed on these.

    Raises whatever the model and `progress` raise; finished rows are in the saved state by then.
    """
    rows = {r.steps: r for r in rows_of_fit(state) if r.guidance == guidance}
    wanted = sorted(set(plan.steps))
    if all(n in rows for n in wanted):
        return [rows[n] for n in wanted]
    meter = Meter(progress, "fit", evaluations_of_fit(plan, len(job.lambdas), 1), f"fit at guidance {guidance:g}")
    bench = _Bench(job, model, device, dtype, batch, meter.tick)
    fit_on = range(FIT_NOISE, FIT_NOISE + plan.noises)
    judge_on = range(FIT_NOISE + plan.noises, FIT_NOISE + plan.noises + plan.held_out)
    teacher = _kept_teacher(bench, state, f"fit.{guidance:g}", fit_on)
    judge = _kept_teacher(bench, state, f"judge.{guidance:g}", judge_on)
    spacings = state.facts.setdefault("fit_spacings", {})  # where the search for the next number of steps begins
    for n in wanted:
        if n in rows:
            continue
        spacing = _starts(teacher, n)[0].within(job)
        if plan.search:
            few = min(plan.search, plan.noises)
            known = spacings.get(f"{guidance:g}")
            spacing = _search(bench, plan, fit_on[:few], teacher.part(few), n, None if known is None else _Spacing(*known))
            spacings[f"{guidance:g}"] = [spacing.bend, spacing.first, spacing.last]
        snap = _snapping(levels, job)
        coefficients = _fitted(bench, plan, n, snap(spacing.lambdas(n)), snap, fit_on, teacher)
        rows[n] = _judged(bench, ems, guidance, plan, coefficients, (judge_on, judge))
        state.facts.setdefault("fit", []).append(fitted_values(rows[n]))
        state.save()
    for name in [name for name in state.tensors if name.startswith((f"fit.{guidance:g}.", f"judge.{guidance:g}."))]:
        del state.tensors[name]
    state.save()
    return [rows[n] for n in wanted]


def _kept_teacher(bench: _Bench, state: JobState, name: str, samples: Sequence[int]) -> _Teacher:
    """Reference trajectories of these samples, from the state if it has them."""
    if f"{name}.y" not in state.tensors:
        made = _teach(bench, samples)
        state.tensors.update({f"{name}.y": made.y, f"{name}.D": made.D, f"{name}.elements": made.elements})
        state.save()
    y, D, elements = (state.tensors[f"{name}.{what}"] for what in ("y", "D", "elements"))
    return _Teacher(bench.job.lambdas, elements, y, D)


def _snapping(levels: Tensor | None, job: Job) -> Callable[[Sequence[float]], list[float]]:
    """Moves lambdas to the host's own levels, if it has some."""
    return lambda lambdas: list(lambdas if levels is None else snapped_grid(tuple(lambdas), levels, job.space))


def _fitted(
    bench: _Bench,
    plan: FitPlan,
    steps: int,
    lambdas: Sequence[float],
    snap: Callable[[Sequence[float]], list[float]],
    samples: Sequence[int],
    teacher: _Teacher,
) -> FittedSteps:
    """Coefficients for these lambdas, refined if the plan says so and noise that took no part in it agrees."""
    coefficients, errors = _solve(bench, samples, teacher, lambdas)
    if plan.rounds and steps <= plan.refined:
        few = plan.few
        point = _Point.of(_refine(bench, samples[:few], teacher.part(few), coefficients, plan.rounds))
        point.lambdas = snap(point.lambdas)
        if len(point.lambdas) == steps:
            refined, now = _solve(bench, samples, teacher, point.lambdas, point.steps(), steps - 1)
            if _objective(now[few:]) < _objective(errors[few:]):
                coefficients = refined
    return _rounded(coefficients)


def _judged(
    bench: _Bench,
    ems: EMS,
    guidance: float,
    plan: FitPlan,
    coefficients: FittedSteps,
    judge: tuple[Sequence[int], _Teacher],
) -> FittedRow:
    """The row: errors on held-out noise of these coefficients and of the best fixed schedule, which is kept if it wins."""
    steps = len(coefficients.lambdas)
    mine = _solve(bench, *judge, coefficients.lambdas, coefficients)[1]
    fixed = {name: _fixed_errors(bench, ems, *judge, make(steps)) for name, make in plan.fixed.items()}
    best = min(fixed, key=lambda name: _objective(fixed[name])) if fixed else ""
    theirs = fixed[best] if fixed else mine
    found: Sequence[float] = coefficients.lambdas
    kept: FittedSteps | None = coefficients
    if fixed and (insane(coefficients) or not _objective(mine) < _objective(theirs)):
        kept = None
        own = bench.job.space.lambda_of(plan.fixed[best](steps))
        own[own == -math.inf] = bench.job.lambdas[0]  # t = 1 of a flow
        found = [round(v, 6) for v in own[own.isfinite()].tolist()]
    ratio = _ratio(mine, theirs)
    return FittedRow(guidance, steps, tuple(found), kept, _averages(mine), _averages(theirs), best, ratio, len(judge[0]))


def _fixed_errors(bench: _Bench, ems: EMS, samples: Sequence[int], teacher: _Teacher, levels: Tensor) -> Tensor:
    """Errors [K] of the solver with these statistics on a fixed schedule, options at "auto"."""
    space = bench.job.space
    lam = space.lambda_of(levels[:1])
    alpha = space.alpha_of(levels[:1]).item()
    scale = math.exp(-lam.item()) * alpha if lam.isfinite() else 1.0  # at t = 1 of a flow x is the noise itself

    def run(part: list[int]) -> Tensor:
        x = sample_noise(bench.job, part)[0].to(bench.device, bench.dtype) * scale
        model = denoiser_for(bench.model, part, space).model
        end = sample_dpm_solver_v3(
            model, x, levels.to(bench.device), None, lambda info: bench.tick(len(part)), True, ems=ems, space=space
        )
        at = torch.tensor([samples.index(k) for k in part])
        end = end / space.alpha_of(levels[-1:]).item()
        return (end.flatten(1).cpu()[:, teacher.elements].double() - teacher.clean[at]).square().mean(1)

    try:
        return torch.cat([e for _, e in in_batches(list(samples), bench.batch, run)])
    except SamplingError:
        return torch.full((len(samples),), math.inf, dtype=torch.float64)


def _rounded(steps: FittedSteps) -> FittedSteps:
    """As the file stores them: 6 decimals of lambda, 8 significant digits of the coefficients."""
    short = lambda v: float(f"{v:.8g}")  # noqa: E731
    return FittedSteps(
        tuple(round(v, 6) for v in steps.lambdas),
        tuple(map(short, steps.decay)),
        tuple(tuple(map(short, row)) for row in steps.weights),
        short(steps.start),
    )


def _averages(errors: Tensor) -> tuple[float, float, float]:
    """Geometric mean, median and mean, to 5 digits."""
    values = (math.exp(_objective(errors)), errors.median().item(), errors.mean().item())
    a, b, c = (float(f"{min(v, 1e30):.4e}") for v in values)
    return a, b, c


def _ratio(mine: Tensor, theirs: Tensor) -> tuple[float, float, float]:
    """Geometric mean of mine / theirs, and its bootstrap 95 % interval."""
    logs = (mine.clamp(min=1e-30).log() - theirs.clamp(1e-30, 1e30).log()).clamp(-60, 60)
    picks = torch.randint(len(logs), (2000, len(logs)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(logs[picks].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    a, b, c = (float(f"{math.exp(v):.4g}") for v in (logs.mean().item(), low, high))
    return a, b, c


def rows_of_fit(state: JobState) -> list[FittedRow]:
    """Fitted rows that a job has so far."""
    return [fitted_row(plain) for plain in state.facts.get("fit", [])]
