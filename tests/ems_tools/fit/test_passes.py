"""Steps in fewer passes: patterns keep their budget, runs make the passes that they say, files keep what won."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dpm_solver_v3.ems_tools.cli.main import main
from dpm_solver_v3.ems_tools.compute import EFFORTS, PASSES, compute_ems, evaluations, is_result_of, job_for, plan_for
from dpm_solver_v3.ems_tools.estimate.job import Job, uniform_grid
from dpm_solver_v3.ems_tools.estimate.source import Source
from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.layout import fitted_row, fitted_values
from dpm_solver_v3.ems_tools.file.reader import EMSFileError, decode_ems_file, load_ems_file
from dpm_solver_v3.ems_tools.file.rows import FittedRow
from dpm_solver_v3.ems_tools.fit.passes import best_passes, fit_pattern, passes_row, patterns
from dpm_solver_v3.ems_tools.fit.refine import refine, with_last_step
from dpm_solver_v3.ems_tools.fit.spacing import CANDIDATES, Range
from dpm_solver_v3.ems_tools.fit.steps import closed_loop, objective
from dpm_solver_v3.ems_tools.hosting import Origin, Run, TrustBook, choose_steps, sample_on_trial
from dpm_solver_v3.ems_tools.judge.trial import EXTRA
from dpm_solver_v3.ems_tools.show.describe import lines_of
from dpm_solver_v3.ems_tools.trajectory import Pair, Runner, few_steps, teach
from dpm_solver_v3.sampler import EDM, EMS, EMSError, FittedSteps, Recommendation, SamplingError, sample_dpm_solver_v3

GUIDANCE, SHAPE = 3.0, (2, 4, 4)
JOB = Job(shape=SHAPE, lambdas=uniform_grid(0.03, 10.0, 60), samples=8, guidance=(GUIDANCE,))
CENTRES = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))


class Counted:
    """Guidance over two answers; counts the passes, one for each answer and sample."""

    def __init__(self, conditional, unconditional) -> None:
        self.conditional, self.unconditional, self.passes = conditional, unconditional, 0

    def only(self, y: Tensor, sigma: Tensor) -> Tensor:
        self.passes += len(y)
        out: Tensor = self.conditional(y, sigma)
        return out

    def guided(self, y: Tensor, sigma: Tensor) -> Tensor:
        return self.answers(y, sigma, True)[-1]

    def answers(self, y: Tensor, sigma: Tensor, both: bool) -> tuple[Tensor, ...]:
        """As the sampler asks for them."""
        c = self.only(y, sigma)
        if not both:
            return (c,)
        self.passes += len(y)
        return c, c + (GUIDANCE - 1) * (c - self.unconditional(y, sigma))

    def pair(self) -> Pair:
        return Pair(Runner(JOB, self.only), Runner(JOB, self.guided))

    def source(self) -> Source:
        return Source({GUIDANCE: self.guided}, SHAPE, EDM(0.03, 10.0), {"name": "two centres"}, conditional=self.only)


def mixture(centres: Tensor):
    """The exact denoiser of points at `centres` [n, ...], each with a spread of 0.3."""

    def denoise(y: Tensor, sigma: Tensor) -> Tensor:
        s2 = sigma.double().reshape(-1, 1) ** 2
        rows, points = y.double().flatten(1), centres.double().flatten(1)
        near = torch.softmax(-torch.cdist(rows, points).square() / (2 * (s2 + 0.09)), 1)
        mean = near @ points
        return (mean + 0.09 / (0.09 + s2) * (rows - mean)).reshape(y.shape).to(y.dtype)

    return denoise


def one_class() -> Counted:
    """Two centres against all four."""
    return Counted(mixture(CENTRES[:2]), mixture(CENTRES))


@pytest.fixture
def network() -> Counted:
    """The same."""
    return one_class()


def proportional() -> Counted:
    """U = c / 2, so that c alone tells everything."""
    wanted = mixture(CENTRES[:2])
    return Counted(wanted, lambda y, sigma: wanted(y, sigma) / 2)


def found_by(network: Counted, steps: int = 4) -> FittedSteps:
    samples = range(6)
    teacher = teach(network.pair().guided, samples)
    span = Range.of(JOB.lambdas, None)
    at = lambda spacing, n: [round(v, 6) for v in spacing.lambdas(n, span, teacher)]  # noqa: E731
    found = best_passes(network.pair(), samples, teacher, at, steps, CANDIDATES[:2])
    assert found is not None
    return found


@pytest.mark.parametrize("steps", [3, 4, 5, 6, 8, 12])
def test_every_pattern_costs_what_so_many_guided_steps_cost(steps: int) -> None:
    found = patterns(steps)
    assert found and len(set(found)) == len(found)
    for guided in found:
        assert len(guided) + sum(guided) == 2 * steps and any(guided) and len(guided) > steps
    assert not patterns(2)


def test_the_sampler_makes_the_passes_of_the_pattern_and_follows_the_fit(network: Counted) -> None:
    steps = found_by(network)
    assert steps.passes == 8
    ems = dataclasses.replace(EMS.degenerate(2), recommendation=Recommendation((), (steps,)))
    sigmas = torch.tensor([*(math.exp(-lam) for lam in steps.lambdas), 0.0], dtype=torch.float64)
    noise = network.pair().start(range(3), steps.lambdas[0]).double()
    seen: list[int] = []
    network.passes = 0
    out = sample_dpm_solver_v3(
        network.guided, noise, sigmas, None, lambda s: seen.append(s["i"]), ems=ems, passes=network.answers
    )
    assert network.passes == 3 * 8 and seen == list(range(len(steps.lambdas)))
    expected = few_steps(network.pair(), range(3), steps)
    assert (out - expected).abs().max() < 1e-4
    # Whoever offers no passes gets the schedule with guided steps, whatever coefficients there are for it.
    network.passes = 0
    other = sample_dpm_solver_v3(network.guided, noise, sigmas, ems=ems)
    plain = sample_dpm_solver_v3(network.guided, noise, sigmas, ems=dataclasses.replace(ems, recommendation=None), strength=0)
    assert network.passes == 2 * 3 * 2 * len(steps.lambdas) and torch.isfinite(other).all() and torch.isfinite(plain).all()
    with pytest.raises(SamplingError, match="1 answers came at step"):
        sample_dpm_solver_v3(network.guided, noise, sigmas, ems=ems, passes=lambda x, s, both: network.answers(x, s, False))


def test_an_unconditional_answer_that_follows_from_the_conditional_one_is_not_missed() -> None:
    """Where u = c / 2 steps without any unconditional pass do as well as guided ones, at half the passes."""
    network, samples = proportional(), range(6)
    teacher = teach(network.pair().guided, samples)
    lambdas = uniform_grid(0.1, 10.0, 5)
    guided, _ = closed_loop(network.pair().guided, samples, teacher, lambdas)
    steps, _ = fit_pattern(network.pair(), samples, teacher, lambdas, (False,) * 6) or (None, 0.0)
    assert steps is not None and steps.passes == 6
    mine = objective(teacher.errors(few_steps(network.pair(), samples, steps)))
    assert mine < objective(teacher.errors(few_steps(network.pair().guided, samples, guided))) + 0.1


def test_refining_lowers_the_final_error(network: Counted) -> None:
    pair, samples = network.pair(), range(6)
    teacher, steps = teach(pair.guided, samples), found_by(network)
    before = objective(with_last_step(pair, samples, teacher, steps)[1])
    refined = refine(pair, samples, teacher, steps, 2)
    assert refined.guided == steps.guided
    assert objective(teacher.errors(few_steps(pair, samples, refined))) < before + 1e-6


def rival(steps: int, coefficients: FittedSteps) -> FittedRow:
    one = (1.0, 1.0, 1.0)
    return FittedRow(GUIDANCE, steps, coefficients.lambdas, coefficients, one, one, "", one, 4)


@pytest.mark.parametrize("wins", [True, False])
def test_a_row_is_kept_where_it_beats_the_guided_steps(wins: bool, network: Counted) -> None:
    samples = range(20, 26)
    truth = teach(network.pair().guided, samples)
    mine, lambdas = found_by(network), uniform_grid(0.1, 10.0, 3)
    theirs, _ = closed_loop(network.pair().guided, range(6), teach(network.pair().guided, range(6)), lambdas)
    if not wins:
        mine = dataclasses.replace(mine, decay=(1.2 * mine.decay[0], *mine.decay[1:]))
    row = passes_row(network.pair(), samples, truth, rival(4, theirs), mine)
    assert (row is not None) == wins
    if row is not None:
        assert row.passes == 8 and row.ratio[0] < 1 and row.fixed_schedule == "4 guided steps"


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> EMSFile:
    """A whole quick computation with steps in fewer passes; it counts its evaluations."""
    network = one_class()
    source = network.source()
    job = job_for(source, EFFORTS["quick"], steps=(4, 5))
    plan = plan_for(source, EFFORTS["quick"], (4, 5), passes=True)
    path = tmp_path_factory.mktemp("passes") / "two.ems.safetensors"
    seen: list[int] = []
    compute_ems(source, job, plan, path, batch=8, progress=lambda p: seen.append(p.done) if p.stage == "passes" else None)
    assert seen and plan.fit is not None and plan.fit.passes == PASSES
    file = load_ems_file(path)
    assert is_result_of(file, source, job, plan)
    assert not is_result_of(file, source, job, plan_for(source, EFFORTS["quick"], (4, 5)))
    assert network.passes <= 2 * evaluations(job, plan)
    return file


def test_a_file_keeps_what_won_and_says_so(computed: EMSFile, tmp_path: Path) -> None:
    assert 8 in {row.passes for row in computed.meta.passes} <= {8, 10}
    data = computed.encode()
    assert b'"format_version":"2"' in data and decode_ems_file(data).meta.passes == computed.meta.passes
    for row in computed.meta.passes:
        assert fitted_row(list(fitted_values(row))) == row
    text = "\n".join(lines_of(computed))
    assert "in fewer passes" in text and "version" not in text
    without = dataclasses.replace(computed, meta=dataclasses.replace(computed.meta, passes=()))
    assert b'"format_version":"1"' in without.encode()
    computed.save(tmp_path / "kept.ems.safetensors")
    assert main(["inspect", str(tmp_path / "kept.ems.safetensors")]) == 0


def test_a_runs_levels_tell_which_row_is_meant(computed: EMSFile) -> None:
    """Guided steps on the same spacing lay at the very same levels, and were taken in place of those in fewer passes."""
    meta = computed.meta
    for row in (*meta.fitted, *meta.passes):
        others = [other for other in (*meta.fitted, *meta.passes) if other is not row]
        assert not any(o.coefficients is None or o.coefficients.matches([*row.lambdas, math.inf]) for o in others)


def test_rows_in_the_wrong_table_are_refused(computed: EMSFile) -> None:
    meta = computed.meta
    with pytest.raises(EMSError, match="a table of their own"):
        dataclasses.replace(meta, fitted=meta.passes)
    with pytest.raises(EMSError, match="must say which of its evaluations are guided"):
        dataclasses.replace(meta, passes=meta.fitted)
    with pytest.raises(EMSError, match="each for another scale or number of passes"):
        dataclasses.replace(meta, passes=(meta.passes[0], meta.passes[0]))
    data = computed.encode()
    with pytest.raises(EMSFileError):
        decode_ems_file(data.replace(b'"format_version":"2"', b'"format_version":"1"'))
    row = list(fitted_values(meta.passes[0]))
    with pytest.raises(EMSError, match="true or false"):
        fitted_row([*row[:-1], [1, 0, 1, 1, 0]])
    with pytest.raises(EMSError, match="all answers so far"):
        fitted_row([*row[:-1], [not both for both in row[-1]]])  # type: ignore[attr-defined]


def test_steps_of_another_scale_do_not_stand_in_for_those_that_lost(computed: EMSFile) -> None:
    """Fitted at guidance 3 and 5, fewer passes that won at 3 only: at 4.5 every step is guided."""
    scales = torch.tensor([3.0, 5.0], dtype=torch.float64)
    l, s, b = (torch.cat([v, v]) for v in (computed.l, computed.s, computed.b))
    errors = None if computed.errors is None else {name: torch.cat([v] * 2) for name, v in computed.errors.items()}
    more = tuple(dataclasses.replace(row, guidance=5.0) for row in computed.meta.fitted)
    meta = dataclasses.replace(computed.meta, fitted=(*computed.meta.fitted, *more))
    file = dataclasses.replace(computed, guidance=scales, meta=meta, errors=errors, l=l, s=s, b=b)
    assert file.passes_sigmas(8, 3.2) is not None and file.passes_sigmas(8, 4.5) is None
    advice = file.at(4.5).recommendation
    assert advice is not None and not any(steps.guided for steps in advice.fitted)


def test_hosts_take_more_steps_in_the_same_passes_where_they_are_asked_to(computed: EMSFile) -> None:
    run = Run(EDM(0.03, 10.0), GUIDANCE, sampler="dpm_solver_v3")
    plain, fewer = (choose_steps(computed, "two", run, 4, passes=passes) for passes in (False, True))
    assert len(plain.levels) == 5 and len(fewer.levels) == 6 and fewer.fitted
    assert "5 steps in the passes of 4, 3 of them guided, fitted at cfg 3, from two" in fewer.message
    assert len(choose_steps(computed, "two", run, 6, passes=True).levels) == 7  # none for so many
    partial = choose_steps(computed, "two", run, 4, 0.5, passes=True)
    assert len(partial.levels) == 5
    one = choose_steps(computed, "two", Run(EDM(0.03, 10.0), 1.0, sampler="dpm_solver_v3"), 4, passes=True)
    assert len(one.levels) == 5


def first_run(book: TrustBook, file: EMSFile, network: Counted) -> tuple[Tensor, list[str]]:
    """A run in the passes of four guided steps; what it told."""
    found = file.passes_sigmas(8, GUIDANCE)
    assert found is not None
    told: list[str] = []
    x = network.pair().start(range(2), found[1].lambdas[0])
    out = sample_on_trial(
        book,
        Origin(file, "two"),
        told.append,
        network.guided,
        x,
        found[0],
        ems=file.at(GUIDANCE),
        guidance=GUIDANCE,
        passes=network.answers,
    )
    assert torch.isfinite(out).all()
    return out, told


def test_files_computed_here_leave_out_passes_at_once(computed: EMSFile) -> None:
    network, book = one_class(), TrustBook(None)
    book.computed(computed)
    first_run(book, computed, network)
    assert network.passes == 2 * 8


def test_passes_of_somebody_else_are_tried_once(computed: EMSFile) -> None:
    """The first run makes both passes at each of five steps, and at most EXTRA evaluations more; the picture is the same."""
    network, book = one_class(), TrustBook(None)
    found = computed.passes_sigmas(8, GUIDANCE)
    assert found is not None and len(found[1].lambdas) == 5
    out, told = first_run(book, computed, network)
    assert not told and 2 * 2 * 5 < network.passes <= 2 * 2 * (5 + EXTRA)
    network.passes = 0
    again, told = first_run(book, computed, network)
    assert not told and network.passes == 2 * 8 and torch.allclose(again, out)


def test_wrong_passes_of_somebody_else_are_not_taken(computed: EMSFile, tmp_path: Path) -> None:
    """The picture is made anew, and guided steps are taken from then on, with the reason; the file itself is not refused."""
    row = next(row for row in computed.meta.passes if row.passes == 8)
    assert row.coefficients is not None
    wrong = dataclasses.replace(row.coefficients, decay=tuple(1.15 * v for v in row.coefficients.decay))
    rows = (dataclasses.replace(row, coefficients=wrong),)
    file = dataclasses.replace(computed, meta=dataclasses.replace(computed.meta, passes=rows))
    network, path = one_class(), tmp_path / "trust.json"
    out, told = first_run(TrustBook(path), file, network)
    assert len(told) == 1 and "are not taken" in told[0] and "Every step is guided" in told[0]
    book, origin = TrustBook(path), Origin(file, "two")
    assert not book.refusal(origin) and book.guided_only(origin) == told[0]
    run = Run(EDM(0.03, 10.0), GUIDANCE, sampler="dpm_solver_v3")
    steps = choose_steps(file, "two", run, 4, passes=True, guided_only=book.guided_only(origin))
    assert len(steps.levels) == 5 and "are not taken" in steps.message
    network.passes = 0
    again, told = first_run(book, file, network)  # on levels from before
    assert not told and network.passes == 2 * 2 * 5 and torch.allclose(again, out)
