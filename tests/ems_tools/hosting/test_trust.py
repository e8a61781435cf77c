"""Files that others made: tried on the first run, remembered, and dropped if they are wrong. On the embedded model."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dpm_solver_v3.ems_tools.embedded import load_denoiser
from dpm_solver_v3.ems_tools.file import EMSFile, EMSMeta, FittedRow, load_ems_file
from dpm_solver_v3.ems_tools.hosting import Origin, TrustBook, sample_on_trial
from dpm_solver_v3.sampler import FittedSteps, SamplingError, VPDiscrete, karras, sample_dpm_solver_v3, uniform_lambda
from loading import benchmark

SHIPPED = load_ems_file(Path(__file__).resolve().parents[3] / "stats" / "embedded-emoji.ems.safetensors")
GUIDANCE, STEPS = 2.0, 10
FIXED = uniform_lambda(VPDiscrete.linear(), STEPS)  # where the file uses its statistics


def forged(kind: str) -> EMSFile:
    """As a stranger would: valid in form, wrong in content."""
    file = SHIPPED
    if kind == "s x 3":
        return dataclasses.replace(file, s=3 * file.s)
    if kind == "l = -2":
        return dataclasses.replace(file, l=torch.full_like(file.l, -2.0))
    if kind == "b + 0.05":
        return dataclasses.replace(file, b=file.b + 0.05)
    rows = []
    for row in file.meta.fitted:
        assert row.coefficients is not None
        decay, weights = tuple(1.15 * v for v in row.coefficients.decay), row.coefficients.weights
        if kind == "first order":  # a formula that suits every model, and is far worse than the steps without a file
            decay = (*(math.exp(a - b) for a, b in pairwise(row.lambdas)), 0.0)
            weights = tuple((*(0.0,) * i, 1 - d) for i, d in enumerate(decay))
        steps = dataclasses.replace(row.coefficients, decay=decay, weights=weights)
        rows.append(dataclasses.replace(row, coefficients=steps))
    return dataclasses.replace(file, meta=dataclasses.replace(file.meta, fitted=tuple(rows)))


class Counted:
    """The embedded model, counting its evaluations."""

    def __init__(self) -> None:
        self.model, self.calls = load_denoiser(torch.tensor([1, 4]), GUIDANCE), 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        return self.model(x, sigma)


def sample(
    book: TrustBook, file: EMSFile, levels: Tensor, told: list[str], model: Callable[..., Tensor] | None = None
) -> Tensor:
    x = levels[0] * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    origin, model = Origin(file, "theirs"), model or Counted()
    return sample_on_trial(book, origin, told.append, model, x.float(), levels, disable=True, ems=file.at(2.0), guidance=2.0)


@pytest.mark.parametrize(
    ("kind", "levels"),
    [
        ("s x 3", FIXED),
        ("l = -2", FIXED),
        ("b + 0.05", FIXED),
        ("decay x 1.15", None),
        ("first order", None),
    ],
)
def test_a_forged_file_is_found_out_by_its_first_run(tmp_path: Path, kind: str, levels: Tensor | None) -> None:
    levels = SHIPPED.fitted_sigmas(8, GUIDANCE) if levels is None else levels
    book, file = TrustBook(tmp_path / "trust.json"), forged(kind)
    told: list[str] = []
    with warnings.catch_warnings(record=True) as warned:  # what no step can need, the solver itself refuses
        warnings.simplefilter("always")
        got = sample(book, file, levels, told)
    told += [str(w.message) for w in warned]
    assert len(told) == 1 and ("data prediction" in told[0] or "sampling without them" in told[0])
    x = (levels[0] * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))).float()
    without = sample_dpm_solver_v3(Counted(), x, levels, disable=True, guidance=GUIDANCE)
    if kind == "l = -2":  # the solver has left the statistics out, and the settings beside them stay
        assert (got - without).square().mean() < 1e-3
        return
    assert torch.equal(got, without)
    again, told = TrustBook(tmp_path / "trust.json"), []  # another session
    counted = Counted()
    assert torch.equal(sample(again, file, levels, told, counted), got)
    assert told and counted.calls == len(levels) - 1


@pytest.mark.parametrize("fitted", [True, False])
def test_a_right_file_passes_once_and_is_believed_then(tmp_path: Path, fitted: bool) -> None:
    levels = SHIPPED.fitted_sigmas(8, GUIDANCE) if fitted else FIXED
    book = TrustBook(tmp_path / "trust.json")
    told: list[str] = []
    first, second = Counted(), Counted()
    got = sample(book, SHIPPED, levels, told, first)
    assert not told and first.calls <= len(levels) - 1 + 8
    assert torch.equal(got, sample(TrustBook(tmp_path / "trust.json"), SHIPPED, levels, told, second))
    assert second.calls == len(levels) - 1
    x = (levels[0] * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))).float()
    assert torch.equal(got, sample_dpm_solver_v3(Counted(), x, levels, disable=True, ems=SHIPPED.at(2.0), guidance=2.0))


def on_two_gaussians(lambdas: tuple[float, ...], bend: float, draw: random.Random, start: float = 1.0) -> EMSFile:
    """A file for them of data prediction's steps on these lambdas, every coefficient off by about `bend`."""
    gauss = benchmark("hostile")
    shrink = (*(math.exp(a - b) for a, b in pairwise(lambdas)), 0.0)
    decay = tuple(d * (1 + draw.gauss(0, bend)) for d in shrink)
    weights = tuple(tuple(w + draw.gauss(0, bend) for w in (*(0.0,) * i, 1 - d)) for i, d in enumerate(shrink))
    errors = (0.1, 0.1, 0.1)
    row = FittedRow(2.0, 8, lambdas, FittedSteps(lambdas, decay, weights, start), errors, errors, "karras", errors, 4)
    meta = EMSMeta("sigma", gauss.LOW, gauss.HIGH, fitted=(row,))
    grid = torch.linspace(-2.6, 3.4, 5, dtype=torch.float64)
    l = torch.full((1, 5, 2), 0.8)
    return EMSFile(grid, torch.tensor([2.0], dtype=torch.float64), l, l * 0, l * 0, meta)


def first_run(file: EMSFile, seed: int) -> tuple[bool, float]:
    """Whether it said that the file is not used, and the squared error over that of a user without it."""
    gauss, told = benchmark("hostile"), list[str]()
    levels, usual = file.fitted_sigmas(8, 2.0), karras(gauss.SCHEDULE, 8, to_zero=True)
    noise = torch.randn(2, *gauss.SHAPE, generator=torch.Generator().manual_seed(seed))
    origin, x, ems = Origin(file, "theirs"), (noise * levels[0]).float(), file.at(2.0)
    got = sample_on_trial(TrustBook(None), origin, told.append, gauss.denoiser, x, levels, disable=True, ems=ems, guidance=2.0)
    fine, x = uniform_lambda(gauss.SCHEDULE, 150, to_zero=True), (noise * usual[0]).float()
    without = sample_dpm_solver_v3(gauss.denoiser, x, usual, disable=True, guidance=2.0)
    exact = sample_dpm_solver_v3(gauss.denoiser, x, fine, disable=True)
    return bool(told), float((got - exact).square().mean() / (without - exact).square().mean())


@pytest.mark.parametrize("seed", [39, 57, 61, 71, 143, 191])
def test_steps_bent_everywhere_are_noticed_or_do_no_harm(seed: int) -> None:
    """Data prediction with every coefficient off by a few hundredths, on two Gaussians of which both solutions are known."""
    lambdas = tuple((-karras(benchmark("hostile").SCHEDULE, 8, to_zero=True)[:-1].log()).tolist())
    told, ratio = first_run(on_two_gaussians(lambdas, 0.05, random.Random(seed)), seed)
    assert told or ratio < 1.5


@pytest.mark.parametrize("seed", [0, 5])
def test_steps_that_begin_late_are_judged_from_where_the_noise_begins(seed: int) -> None:
    """Data prediction, but from the middle of the noise range on: what the picture holds by then is missing.

    Judged from where it begins, it was as good as any, and with seed 5 a picture 306 times as far off was not noticed.
    """
    lambdas = (-1.03, -0.79, 0.13, 0.69, 0.91, 1.41, 2.65, 3.39)
    told, ratio = first_run(on_two_gaussians(lambdas, 0.0, random.Random(seed)), seed)
    assert told and ratio > 100


def test_four_steps_of_the_shipped_file_pass() -> None:
    """Of so few D a polynomial tells little: the residual alone refused these."""
    levels, told = SHIPPED.fitted_sigmas(4, 1.0), list[str]()
    x = (levels[0] * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1004))).float()
    origin, model, ems = Origin(SHIPPED, "theirs"), load_denoiser(torch.tensor([7]), 1.0), SHIPPED.at(1.0)
    sample_on_trial(TrustBook(None), origin, told.append, model, x, levels, disable=True, ems=ems, guidance=1.0)
    assert not told


def test_what_was_computed_here_needs_no_trial() -> None:
    book, counted = TrustBook(None), Counted()
    told: list[str] = []
    book.computed(SHIPPED)
    levels = SHIPPED.fitted_sigmas(8, GUIDANCE)
    sample(book, SHIPPED, levels, told, counted)
    assert counted.calls == len(levels) - 1 and not told


def test_a_model_that_fails_is_not_held_against_the_file(tmp_path: Path) -> None:
    book = TrustBook(tmp_path / "trust.json")
    told: list[str] = []
    with pytest.raises(SamplingError, match="the model returned"):
        sample(book, SHIPPED, FIXED, told, lambda x, sigma: x * torch.nan)
    assert not book.refusal(Origin(SHIPPED, "theirs"))


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 5000, b'{"format": "dpm-solver-v3-trust-1", "files": [1]}', b"\xff"])
def test_a_damaged_book_is_an_empty_one(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trust.json"
    path.write_bytes(content)
    book = TrustBook(path)
    assert not book.refusal(Origin(SHIPPED, "x"))
    book.computed(SHIPPED)
    assert json.loads(path.read_text())["files"]
