"""What plots show: the file's numbers, and axes that read well."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from dpm_solver_v3.ems_tools.file.reader import load_ems_file
from dpm_solver_v3.ems_tools.file.rows import FittedRow
from dpm_solver_v3.ems_tools.show.describe import facts_of, gain_of, gains_of, lines_of, rival_in_words
from dpm_solver_v3.ems_tools.show.panels import Curve, Panel, limits_of, statistics_of, style_of, summary_of, ticks_between
from dpm_solver_v3.sampler import FittedSteps

SHIPPED = Path(__file__).resolve().parents[3] / "stats" / "embedded-emoji.ems.safetensors"


def test_statistics_hold_the_files_numbers(make_ems_file):
    file = make_ems_file()
    panel = statistics_of(file)[1][2]
    assert panel.title == "b, guidance 7.5"
    assert panel.curves[1].y == pytest.approx(file.b[1, :, 1].tolist())
    assert panel.curves[1].low == pytest.approx((file.b[1, :, 1].double() - 0.2).tolist())
    evidence = statistics_of(file)[0][3].curves[0]
    assert evidence.x == (5, 10) and evidence.y == pytest.approx((0.75, 0.75))


def test_summary_is_the_mean_over_schedules_of_unseen_noise(make_ems_file):
    file = make_ems_file()
    other = [dataclasses.replace(row, schedule="normal", ems=row.ems / 4) for row in file.meta.evidence]
    file = dataclasses.replace(file, meta=dataclasses.replace(file.meta, evidence=(*file.meta.evidence, *other)))
    ((panel,),) = summary_of(file)
    assert [c.name for c in panel.curves] == ["CFG 1, other schedulers", "CFG 7.5, other schedulers"]
    assert panel.curves[0].x == (5, 10) and panel.curves[0].y == pytest.approx([0.75 / 2] * 2)  # not calibration's 0.5 / 2
    assert limits_of(panel)[1][0] == 0


def test_summary_shows_the_fitted_steps_of_the_shipped_file():
    file = load_ems_file(SHIPPED)
    ((panel,),) = summary_of(file)
    fitted = next(c for c in panel.curves if c.name == "CFG 1, fitted steps")
    rows = sorted((r for r in file.meta.fitted if r.guidance == 1), key=lambda r: r.steps)
    assert fitted.x == tuple(r.steps for r in rows) and fitted.y == tuple(r.ratio[0] for r in rows)
    assert all(low <= y <= high for low, y, high in zip(fitted.low, fitted.y, fitted.high, strict=True))
    text = gains_of(file)
    row = rows[0]
    other = rival_in_words(row.fixed_schedule)
    assert f"  cfg 1, {row.steps} steps: {row.ratio[0]:.2f} ({row.ratio[1]:.2f} to {row.ratio[2]:.2f}) of {other}" in text
    assert lines_of(file)[: len(text)] == text  # before everything else
    assert gain_of(file).startswith(f"error {min(r.ratio[0] for r in file.meta.fitted):.2f} to ")
    lost = dataclasses.replace(row, ratio=(1.0, 1.0, 1.0))
    file = dataclasses.replace(file, meta=dataclasses.replace(file.meta, fitted=(lost,)))
    assert f"  cfg 1, {row.steps} steps: no better than {other}, whose steps are used" in gains_of(file)
    assert gain_of(file) == "no fit beat the best other sampler, whose steps are used"


def test_nothing_is_claimed_where_nothing_was_fitted(make_ems_file):
    assert gains_of(make_ems_file()) == [] and gain_of(make_ems_file()) == ""
    assert not any("image to image" in line for line in lines_of(make_ems_file()))


def test_steps_for_image_to_image_have_a_table(make_ems_file):
    def row(first: float, ratio: float) -> FittedRow:
        steps = FittedSteps((first, first + 1.0), (0.4, 0.0), ((0.6,), (0.0, 1.0)))
        errors, name = (0.1, 0.1, 0.1), "this sampler without a file on the model's time"
        return FittedRow(7.5, 2, steps.lambdas, steps, errors, errors, name, (ratio, ratio / 2, 2 * ratio), 5)

    file = make_ems_file()
    file = dataclasses.replace(file, meta=dataclasses.replace(file.meta, partial=(row(1.0, 0.31), row(-2.0, 0.62))))
    text = lines_of(file)
    table = text[next(k for k, line in enumerate(text) if line.startswith("image to image: ")) + 3 :]
    assert [line.split()[:3] for line in table] == [["7.5", "7.39", "2"], ["7.5", "0.368", "2"]]  # the noisiest first
    assert table[1].endswith("this sampler without a file on the model's time  0.310  0.155 to 0.620")
    assert [entry["sigma"] for entry in facts_of(file)["partial"]] == [math.exp(-1.0), math.exp(2.0)]


def test_summary_without_evidence_says_so(make_ems_file):
    ((panel,),) = summary_of(make_ems_file(evidence=False))
    assert not panel.curves and "no evidence" in panel.note


def panel_of(xs, ys, **options):
    return Panel("", "", (Curve("a", tuple(xs), tuple(ys)),), **options)


def test_ticks_stand_at_step_counts_and_at_round_numbers():
    assert panel_of([5, 6, 8, 10], [0, 1, 2, 3]).x_ticks == [5, 6, 8, 10]
    assert panel_of([0.0, 0.25, 1.0], [0, 1, 2]).x_ticks == ticks_between(-0.06, 1.06) == [0, 0.5, 1]
    short = panel_of([1, 2], [math.log10(0.004), math.log10(0.1)], log=True)
    assert [short.y_tick(v) for v in short.y_ticks] == ["0.005", "0.01", "0.02", "0.05", "0.1"]
    long = panel_of([1, 2], [-20, 0], log=True)
    assert 3 <= len(long.y_ticks) <= 8 and all(float(v).is_integer() for v in long.y_ticks)


def test_a_constant_curve_has_axes_with_room():
    (x_low, x_high), (y_low, y_high) = limits_of(panel_of([5], [2]))
    assert x_low < 5 < x_high and y_low < 2 < y_high


def test_sixteen_curves_look_different():
    assert len({style_of(k) for k in range(16)}) == 16


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        ("UniPC 2 on model 1", "UniPC 2 on uniform time"),
        ("DEIS 3 on vp 2 to 0", "DEIS 3 on quadratic VP time to 0"),
        ("iPNDM on lambda to 0", "iPNDM on uniform lambda to 0"),
        ("UniPC 2 on karras to sigma_min", "UniPC 2 on Karras to sigma_min"),
        ("DPM-Solver++ 2M on sgm_uniform", "DPM-Solver++ 2M on sgm_uniform"),
        ("this sampler without a file on the steps that hosts take then", "this sampler without a file"),
        ("anything else",) * 2,
        ("model 7 on vp x",) * 2,
        ("", ""),
    ],
)
def test_schedules_have_the_names_that_nodes_show(stored: str, shown: str) -> None:
    assert rival_in_words(stored) == shown
