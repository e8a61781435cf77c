"""Steps for image to image: fitted for a few beginnings, made for any between, taken where a run asks for them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpm_solver_v3.ems_tools.compute import EFFORTS, compute_ems, evaluations, is_result_of, job_for, plan_for
from dpm_solver_v3.ems_tools.estimate.job import uniform_grid
from dpm_solver_v3.ems_tools.estimate.source import Source
from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.reader import load_ems_file
from dpm_solver_v3.ems_tools.fit.partial import beginnings, fine_grid
from dpm_solver_v3.ems_tools.hosting import Handed, Origin, Run, TrustBook, choose_steps, sample_on_trial, told_of_image
from dpm_solver_v3.ems_tools.trajectory import Runner, few_steps, pictures_of, teach
from dpm_solver_v3.sampler import EDM, EMS, FittedSteps, Recommendation, Space, karras, sample_dpm_solver_v3
from dpm_solver_v3.sampler.fitted import APART, REACH, between, formula_step

SHAPE, LOW, HIGH = (2, 4, 4), 0.02, 20.0
CENTRES = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
STEPS = 5


class Points:
    """The exact denoiser of four points with a spread of 0.3; counts its evaluations."""

    def __init__(self) -> None:
        self.calls = 0
        self.levels: list[float] = []

    def __call__(self, y: Tensor, sigma: Tensor) -> Tensor:
        self.calls += len(y)
        self.levels.append(float(sigma.reshape(-1)[0]))
        s2 = sigma.double().reshape(-1, 1) ** 2
        rows, points = y.double().flatten(1), CENTRES.double().flatten(1)
        near = torch.softmax(-torch.cdist(rows, points).square() / (2 * (s2 + 0.09)), 1)
        mean = near @ points
        return (mean + 0.09 / (0.09 + s2) * (rows - mean)).reshape(y.shape).to(y.dtype)


def source() -> Source:
    return Source({1.0: Points()}, SHAPE, EDM(LOW, HIGH), {"name": "four points"})


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> tuple[EMSFile, int, Path]:
    """A file of quick effort with steps for image to image, and its evaluations."""
    made, path = source(), tmp_path_factory.mktemp("image") / "points.ems.safetensors"
    effort = EFFORTS["quick"]
    plan = plan_for(made, effort, (STEPS, 8), image_to_image=True)
    compute_ems(made, job_for(made, effort, steps=(STEPS, 8)), plan, path)
    return load_ems_file(path), made.models[1.0].calls, path  # type: ignore[attr-defined]


def error_from(ems: EMS | None, top: float, steps: int, seed: int = 5, **options: Any) -> float:
    """Mean log error of runs from pictures with noise of sigma `top` on them, on Karras steps."""
    model, draw = Points(), torch.Generator().manual_seed(seed)
    pictures = CENTRES.repeat(8, 1, 1, 1) + 0.3 * torch.randn(32, *SHAPE, generator=draw)
    x = pictures + top * torch.randn(pictures.shape, generator=draw)
    fine = torch.tensor([math.exp(-v) for v in fine_grid(-math.log(top), -math.log(0.002), 300)] + [0.0], dtype=torch.float64)
    exact = sample_dpm_solver_v3(model, x.double(), fine, disable=True, order=3, corrector="none")
    levels = karras(EDM(LOW, top), steps, to_zero=True)
    end = sample_dpm_solver_v3(model, x, levels, disable=True, ems=ems, **options)
    return float((end - exact).square().flatten(1).mean(1).log().mean())


def test_a_file_has_rows_for_every_beginning_that_wins(computed: tuple[EMSFile, int, Path]) -> None:
    file, _, _ = computed
    job = job_for(source(), EFFORTS["quick"])
    found = {(row.steps, round(row.lambdas[0], 3)) for row in file.meta.partial}
    assert found <= {(n, v) for n in (STEPS, 8) for v in beginnings(job)} and len(found) >= 4
    assert all(row.coefficients is not None and row.coefficients.start == 1 for row in file.meta.partial)
    assert sum(row.ratio[0] < 0.9 for row in file.meta.partial) > len(file.meta.partial) / 2
    assert -math.log(HIGH) + 0.4 <= min(beginnings(job)) and max(beginnings(job)) <= -math.log(LOW) - 1.8


def test_runs_between_two_beginnings_gain_too(computed: tuple[EMSFile, int, Path]) -> None:
    """On other noise and pictures; without being asked, the sampler follows the schedule as it is."""
    file, _, _ = computed
    ems = file.at(1.0)
    gains = []
    for top in (0.45, 0.75, 1.3, 2.0):
        plain, asked = (error_from(ems, top, STEPS, image_to_image=v) for v in (False, True))
        assert plain == pytest.approx(error_from(None, top, STEPS), abs=1e-9)
        gains.append(asked - plain)
    assert sum(gains) / len(gains) < math.log(0.7), gains
    assert max(gains) < math.log(1.1), gains


def test_the_announced_evaluations_are_those_at_most(computed: tuple[EMSFile, int, Path]) -> None:
    file, calls, _ = computed
    made, effort = source(), EFFORTS["quick"]
    plan, job = plan_for(made, effort, (STEPS, 8), image_to_image=True), job_for(made, effort, steps=(STEPS, 8))
    assert calls <= evaluations(job, plan)
    without = plan_for(made, effort, (STEPS, 8))
    assert evaluations(job, plan) > evaluations(job, without)
    assert is_result_of(file, made, job, plan) and not is_result_of(file, made, job, without)


def test_a_cancelled_fit_goes_on_where_it_was(tmp_path: Path, computed: tuple[EMSFile, int, Path]) -> None:
    file, calls, _ = computed

    class StopError(Exception):
        pass

    made, effort, path = source(), EFFORTS["quick"], tmp_path / "points.ems.safetensors"
    plan, job = plan_for(made, effort, (STEPS, 8), image_to_image=True), job_for(made, effort, steps=(STEPS, 8))

    def stop(p: object) -> None:
        if getattr(p, "stage", "") == "partial" and getattr(p, "done", 0) > 600:
            raise StopError

    with pytest.raises(StopError):
        compute_ems(made, job, plan, path, progress=stop)
    first = made.models[1.0].calls  # type: ignore[attr-defined]
    again = compute_ems(made, job, plan, path)
    assert again.meta.partial == file.meta.partial
    spent = made.models[1.0].calls - first  # type: ignore[attr-defined]
    assert spent < calls - first + 600  # only what was under way is made again


def test_the_picture_of_a_sample_is_where_its_trajectory_ends() -> None:
    job = dataclasses.replace(job_for(source(), EFFORTS["quick"]), lambdas=uniform_grid(LOW, HIGH, 40))
    runner = Runner(job, Points())
    pictures = pictures_of(runner, range(3))
    torch.testing.assert_close(pictures.flatten(1).double(), teach(runner, range(3)).clean, atol=1e-6, rtol=0)
    begun = dataclasses.replace(runner, pictures=dict(enumerate(pictures)))
    noise = begun.start(range(3), 0.0) - pictures
    torch.testing.assert_close(noise, runner.start(range(3), 0.0))


def formula_on(lambdas: tuple[float, ...], bent: float = 0.0) -> FittedSteps:
    """DPM-Solver++ 2M on these lambdas, each decay bent by the same amount."""
    steps = [formula_step(lambdas, i, then) for i, then in enumerate([*lambdas[1:], math.inf])]
    return FittedSteps(lambdas, tuple(d + bent for d, _ in steps), tuple(tuple(w) for _, w in steps))


def test_between_two_beginnings_the_corrections_are_mixed_and_the_formula_is_that_of_the_steps_at_hand() -> None:
    low, high = formula_on((-1.0, 0.0, 1.0, 2.5), 0.2), formula_on((0.0, 0.5, 1.5, 3.0), 0.4)
    found = between([high, low], -0.75, 4)
    assert found is not None
    assert found.lambdas[0] == -0.75 and found.lambdas[-1] == pytest.approx(2.625)
    expected = formula_on(found.lambdas, 0.25)
    assert found.decay == pytest.approx(expected.decay)
    assert [v for row in found.weights for v in row] == pytest.approx([v for row in expected.weights for v in row])
    for row in (low, high):
        same = between([low, high], row.lambdas[0], 4)
        assert same is not None and same.lambdas == pytest.approx(row.lambdas) and same.decay == pytest.approx(row.decay)


def test_nothing_is_made_up_far_from_what_was_fitted() -> None:
    low, far = formula_on((-1.0, 0.0, 1.0)), formula_on((-1.0 + APART + 0.2, 1.0, 2.0))
    assert between([low], -1.0 + REACH + 0.01, 3) is None and between([low], -1.0 + REACH - 0.01, 3) is not None
    assert between([low], -1.0 - REACH - 0.01, 3) is None
    assert between([low, far], -1.0 + (APART + 0.2) / 2, 3) is None  # too far apart to lie between
    assert between([low], -1.0, 4) is None and between([], 0.0, 3) is None


def test_evaluations_lie_where_the_steps_say_in_every_space() -> None:
    rows = (formula_on((-1.0, 0.0, 1.0, 2.5), 0.01), formula_on((0.0, 0.5, 1.5, 3.0), 0.01))
    ems = dataclasses.replace(EMS.degenerate(1), recommendation=Recommendation(partial=rows))
    wanted = between(rows, -0.5, 4)
    assert wanted is not None
    for space in Space:
        levels = space.level_of(torch.tensor([-0.5, -0.1, 0.8, 1.4, math.inf], dtype=torch.float64))
        seen: list[float] = []

        def model(x: Tensor, level: Tensor, seen: list[float] = seen) -> Tensor:
            seen.append(float(level[0]))
            return 0.5 * x

        sample_dpm_solver_v3(model, torch.ones(1, 1, 2, 2), levels, disable=True, ems=ems, space=space, image_to_image=True)
        found = space.lambda_of(torch.tensor(seen, dtype=torch.float64))
        assert found.tolist() == pytest.approx(wanted.lambdas, abs=1e-5)
        for options in ({"order": 2}, {"image_to_image": False}):  # the schedule is followed where an option is set
            del seen[:]
            asked: dict[str, Any] = {"image_to_image": True, **options}
            sample_dpm_solver_v3(model, torch.ones(1, 1, 2, 2), levels, disable=True, ems=ems, space=space, **asked)
            assert seen == pytest.approx(levels[:-1].tolist(), rel=1e-6)


def test_our_own_schedule_is_known_again_by_its_last_part(computed: tuple[EMSFile, int, Path]) -> None:
    """A host's own of the same kind is another one, whatever was asked for before."""
    file, _, _ = computed
    handed, run = Handed(), Run(EDM(LOW, HIGH), 1.0)
    whole = handed.give(choose_steps(file, "points", run, 16))
    plain = karras(EDM(LOW, HIGH), 16, to_zero=True).to(torch.float32)
    torch.testing.assert_close(whole, plain, rtol=3e-5, atol=0)
    assert handed.is_part(whole[-9:]) and not handed.is_part(plain[-9:])
    assert not handed.is_part(whole)  # a run from noise
    assert not handed.is_part(torch.cat([whole[-9:-1], whole[-2:-1] / 2]))
    fitted = handed.give(choose_steps(file, "points", run, 8))
    assert handed.is_part(fitted[-6:])
    part = handed.give(choose_steps(file, "points", run, 5, denoise=0.5))
    assert len(part) == 6 and handed.is_part(part) and not handed.is_part(part[:0])
    other = Handed()
    assert len(other.give(choose_steps(None, "no file", run, 16))) == 17
    assert not other.is_part(plain[-9:])  # nothing was fitted: there is nothing to know again


def test_of_a_strangers_file_they_are_tried_once_and_wrong_ones_are_not_taken(
    tmp_path: Path, computed: tuple[EMSFile, int, Path]
) -> None:
    file, _, _ = computed
    draw = torch.Generator().manual_seed(3)
    levels = karras(EDM(LOW, 1.1), STEPS, to_zero=True)
    x = CENTRES + 0.3 * torch.randn(CENTRES.shape, generator=draw) + 1.1 * torch.randn(CENTRES.shape, generator=draw)

    def run(book: TrustBook, some: EMSFile) -> tuple[Tensor, int, list[str]]:
        model, said = Points(), list[str]()
        options: dict[str, Any] = {"disable": True, "ems": some.at(1.0), "guidance": 1.0, "image_to_image": True}
        end = sample_on_trial(book, Origin(some, "theirs"), said.append, model, x, levels, **options)
        return end, model.calls // len(x), said

    book = TrustBook(tmp_path / "book.json")
    right, calls, said = run(book, file)
    assert calls > STEPS and not said
    known, calls, said = run(book, file)
    assert calls == STEPS and not said and torch.equal(known, right)

    def bent(row: object) -> object:
        c = row.coefficients  # type: ignore[attr-defined]
        steps = dataclasses.replace(c, decay=tuple(1.3 * v for v in c.decay))
        return dataclasses.replace(row, coefficients=steps)  # type: ignore[type-var]

    wrong = dataclasses.replace(
        file,
        meta=dataclasses.replace(file.meta, partial=tuple(map(bent, file.meta.partial))),  # type: ignore[arg-type]
    )
    end, _, said = run(book, wrong)
    assert len(said) == 1 and "image to image of theirs are not taken" in said[0]
    torch.testing.assert_close(end, sample_dpm_solver_v3(Points(), x, levels, disable=True, guidance=1.0))
    assert book.no_images(Origin(wrong, "theirs")) and not book.refusal(Origin(wrong, "theirs"))
    again, calls, said = run(book, wrong)
    assert calls == STEPS and not said and torch.equal(again, end)


def test_the_log_says_what_was_taken(computed: tuple[EMSFile, int, Path]) -> None:
    file, _, _ = computed
    levels = karras(EDM(LOW, 1.1), STEPS, to_zero=True)
    assert told_of_image(file.at(1.0), levels, Space.SIGMA) == f"image to image: {STEPS} steps fitted for it, from sigma 1.1 on"
    assert told_of_image(file.at(1.0), karras(EDM(LOW, 1.1), 6, to_zero=True), Space.SIGMA) == ""
    assert told_of_image(None, levels, Space.SIGMA) == ""


def test_runs_of_few_steps_begin_with_the_picture(computed: tuple[EMSFile, int, Path]) -> None:
    """`few_steps`, which fits are judged by, is what the sampler does."""
    file, _, _ = computed
    row = file.meta.partial[0]
    assert row.coefficients is not None
    job = dataclasses.replace(job_for(source(), EFFORTS["quick"]), lambdas=tuple(fine_grid(row.lambdas[0], -math.log(LOW))))
    runner = Runner(job, Points(), pictures=dict(enumerate(CENTRES)))
    end = few_steps(runner, range(4), row.coefficients)
    levels = torch.tensor([*(math.exp(-v) for v in row.lambdas), 0.0], dtype=torch.float64)
    start = runner.start(range(4), row.lambdas[0])
    same = sample_dpm_solver_v3(Points(), start, levels, disable=True, ems=file.at(1.0), image_to_image=True)
    torch.testing.assert_close(end, same, atol=2e-5, rtol=1e-4)
