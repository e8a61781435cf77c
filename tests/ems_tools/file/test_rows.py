"""Records of a statistics file that are valid in form and hostile in meaning: refused, or harmless."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import pytest

from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.reader import load_ems_file
from dpm_solver_v3.ems_tools.file.rows import EMSMeta, EvidenceRow, FittedRow, RecommendedSetting, advice_by_case, clean_text
from dpm_solver_v3.sampler import EMSError, FittedSteps, Settings

SHIPPED = load_ems_file(Path(__file__).resolve().parents[3] / "stats" / "embedded-emoji.ems.safetensors")


def test_lambdas_of_a_fit_lie_within_the_noise_range() -> None:
    lambdas = (-60.0, 0.0)
    steps, errors = FittedSteps(lambdas, (0.1, 0.0), ((0.9,), (0.0, 1.0))), (0.1, 0.1, 0.1)
    row = FittedRow(1.0, 2, lambdas, steps, errors, errors, "k", (1.0,) * 3, 4)
    with pytest.raises(EMSError, match="outside the file's noise range"):
        EMSMeta("sigma", 0.03, 14.6, fitted=(row,))


def test_a_fit_begins_before_most_of_the_noise_range_is_over() -> None:
    lambdas = (3.0, 3.3)
    steps, errors = FittedSteps(lambdas, (0.1, 0.0), ((0.9,), (0.0, 1.0))), (0.1, 0.1, 0.1)
    row = FittedRow(1.0, 2, lambdas, steps, errors, errors, "k", (1.0,) * 3, 4)
    with pytest.raises(EMSError, match="most of the noise range is over"):
        EMSMeta("sigma", 0.03, 14.6, fitted=(row,))


def begun(first: float = 0.0, steps: int = 2, **changed: Any) -> FittedRow:
    """A row for image to image from lambda `first`."""
    lambdas = tuple(first + 0.8 * k for k in range(steps))
    c = FittedSteps(lambdas, (0.4,) * (steps - 1) + (0.0,), tuple((0.0,) * k + (0.6,) for k in range(steps)))
    c, errors = dataclasses.replace(c, **changed), (0.1, 0.1, 0.1)
    return FittedRow(1.0, steps, lambdas, c, errors, errors, "k", (1.0,) * 3, 4)


def test_rows_for_image_to_image_begin_anywhere_in_the_noise_range() -> None:
    rows = (begun(0.0), begun(2.9), begun(2.9, 3), begun(2.91, 2))  # later than a row from noise to a picture may
    assert EMSMeta("sigma", 0.01, 14.6, partial=rows).partial == rows
    with pytest.raises(EMSError, match="outside the file's noise range"):
        EMSMeta("sigma", 0.01, 14.6, partial=(begun(-4.0),))
    with pytest.raises(EMSError, match="outside the file's noise range"):
        EMSMeta("sigma", 0.01, 14.6, partial=(begun(4.9),))


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ((dataclasses.replace(begun(), coefficients=None),), "must hold coefficients of at least 2 steps"),
        ((begun(steps=1),), "must hold coefficients of at least 2 steps"),
        ((begun(guided=(True, False), weights=((0.1, 0.5), (0.0, 0.1, 0.5))),), "leave out no passes"),
        ((begun(start=1.1),), "its start factor is 1"),
        ((begun(0.0), begun(0.004)), "each for another scale, number or beginning"),
        (tuple(begun(0.01 * k, steps) for k in range(220) for steps in range(2, 7)), "must be at most 1024"),
    ],
)
def test_what_is_no_row_for_image_to_image_is_refused(rows: tuple[FittedRow, ...], why: str) -> None:
    with pytest.raises(EMSError, match=why):
        EMSMeta("sigma", 0.001, 14.6, partial=rows)


@pytest.mark.parametrize("change", ["start", "decay", "weights", "row"])
def test_coefficients_that_no_step_can_need_are_refused(change: str) -> None:
    row = SHIPPED.meta.fitted[3]
    c = row.coefficients
    assert c is not None
    wrong = {
        "start": dataclasses.replace(c, start=1.6),
        "decay": dataclasses.replace(c, decay=(6.0, *c.decay[1:])),
        "weights": dataclasses.replace(c, weights=((13.0,), *c.weights[1:])),
        "row": dataclasses.replace(c, weights=(*c.weights[:-1], (11.0, -11.0) * 4)),
    }[change]
    with pytest.raises(EMSError, match="none that a step can need"):
        dataclasses.replace(row, coefficients=wrong)


@pytest.mark.parametrize("error", [1e300, 1e32, math.inf])
def test_errors_are_bounded(error: float) -> None:
    with pytest.raises(EMSError, match="must be finite and lie in"):
        EvidenceRow(1.0, "karras", 5, "report", error, 1e-30, 0.1)


@pytest.mark.parametrize(("name", "value"), [("l", -300.0), ("l", 8.0), ("s", 25.0), ("guidance", 1e-9)])
def test_statistics_are_bounded(name: str, value: float) -> None:
    with pytest.raises(EMSError, match="outside"):
        dataclasses.replace(SHIPPED, **{name: getattr(SHIPPED, name) * 0 + value}, meta=EMSMeta("sigma", 0.03, 14.6))


def test_advice_is_joined_in_linear_time() -> None:
    """8,000 schedules of one row each; the product of the two numbers of rows takes half a minute."""
    rows = tuple(EvidenceRow(1.0, f"s{k}", 5, "calibration", 0.2, 0.1, 0.3) for k in range(8000))
    advice = tuple(RecommendedSetting(1.0, f"s{k}", (-1.0, 0.0, 1.0, 2.0, 3.0), Settings()) for k in range(4000))
    began = time.monotonic()
    assert len(advice_by_case(EMSMeta("sigma", 0.03, 14.6, evidence=rows, recommendation=advice))) == 4000
    assert time.monotonic() - began < 5  # far from both: 0.1 s and 30 s


def test_rows_are_bounded() -> None:
    with pytest.raises(EMSError, match="rows of evidence"):
        EMSMeta("sigma", 0.03, 14.6, evidence=(EvidenceRow(1.0, "k", 5, "report", 0.2, 0.1, 0.3),) * 9000)


@pytest.mark.parametrize(
    "text", ["two\nlines", "e\u200dmoji", "full\u3000width", "no\u00a0break", "bell\a", "x\ud800", "x" * 9000]
)
def test_any_text_becomes_one_that_a_file_can_hold(text: str) -> None:
    clean = clean_text(text)
    assert clean and EMSMeta("sigma", 0.03, 14.6, model={"name": clean}).model["name"] == clean


def test_at_gives_the_same_object_for_the_same_scale() -> None:
    file: EMSFile = dataclasses.replace(SHIPPED)
    assert file.at(2.5) is file.at(2.5)
    assert file.at(2.5) is not file.at(2.6)
