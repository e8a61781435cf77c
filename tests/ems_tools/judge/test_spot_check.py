"""Verification: what a file says against itself, and against the model."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from dpm_solver_v3.ems_tools import cli
from dpm_solver_v3.ems_tools.estimate.job import Job, JobState
from dpm_solver_v3.ems_tools.estimate.run import estimate_moments
from dpm_solver_v3.ems_tools.estimate.source import Source
from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.reader import load_ems_file
from dpm_solver_v3.ems_tools.file.rows import EMSMeta
from dpm_solver_v3.ems_tools.judge.consistency import consistency_problems
from dpm_solver_v3.ems_tools.judge.measure import measure, nodes_of
from dpm_solver_v3.ems_tools.judge.spot_check import Check, SpotCheck, spot_check, statistics_checks
from dpm_solver_v3.ems_tools.judge.student import p_value, student_tail
from dpm_solver_v3.sampler import EDM, EMSError
from loading import benchmark

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ROOT / "stats" / "embedded-emoji.ems.safetensors"


def changed(file: EMSFile, **fields: Any) -> EMSFile:
    return dataclasses.replace(file, meta=dataclasses.replace(file.meta, **fields))


@pytest.fixture(scope="module")
def subject(make_mixture: type) -> Source:
    """A mixture of Gaussians: its statistics cost nothing."""
    return Source({1.0: make_mixture((2, 4, 4))}, (2, 4, 4), EDM(0.15, 6.0), {"name": "mixture"})


@pytest.fixture(scope="module")
def file(subject: Source) -> EMSFile:
    """Estimated from 48 samples, with moments."""
    lambdas = tuple(torch.linspace(-math.log(6.0), -math.log(0.15), 31, dtype=torch.float64).tolist())
    job = Job(subject.shape, lambdas, samples=48, seed=3)
    (moments,) = estimate_moments(subject.models, job, JobState())
    found = moments.statistics()
    tables = {name: getattr(found, name)[None].float() for name in "lsb"}
    meta = EMSMeta("sigma", 0.15, 6.0, model={"name": "mixture"}, estimate={"samples": (48,)})
    kept = {"sums.0": moments.sums, "count.0": moments.count}
    return EMSFile(moments.lambdas, torch.ones(1).double(), **tables, meta=meta, moments=kept)


# --- The file alone


def test_moments_that_fit_and_do_not(file: EMSFile) -> None:
    assert consistency_problems(file) == []
    for name in "lsb":
        wrong = getattr(file, name).clone()
        wrong[0, 5, 1] += 1e-3
        (problem,) = consistency_problems(dataclasses.replace(file, **{name: wrong}))
        assert f"{name} is not what the moments give" in problem
    (problem,) = consistency_problems(changed(file, estimate={"samples": (480,)}))
    assert "says 480 samples, the moments hold 48" in problem
    (problem,) = consistency_problems(dataclasses.replace(file, moments={**file.moments, "count.0": torch.zeros(3).double()}))
    assert "not the shape" in problem


def test_evidence_that_contradicts_how_settings_are_chosen() -> None:
    file = load_ems_file(SHIPPED)
    assert consistency_problems(file) == []
    rows = tuple(dataclasses.replace(r, full_strength=r.ems / 2) for r in file.meta.evidence)
    found = consistency_problems(changed(file, evidence=rows))
    assert found and all("full strength, which was tried too" in p for p in found)
    advice = tuple(
        dataclasses.replace(r, settings=dataclasses.replace(r.settings, strength=0.0)) for r in file.meta.recommendation
    )
    assert any("strength 0 is data prediction" in p for p in consistency_problems(changed(file, recommendation=advice)))


# --- The test itself


@pytest.mark.parametrize("freedom", [1, 3, 15, 63])
@pytest.mark.parametrize("t", [0.0, 0.5, 2.0, 6.0, 20.0])
def test_student(t: float, freedom: int) -> None:
    assert student_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), rel=1e-4, abs=1e-15)


def test_p_values_of_right_files_are_no_smaller_than_uniform() -> None:
    """Two independent means of normal values, one of which (the file's) is not seen by the test but through its size."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(800):
        mine, own = (torch.randn(n, generator=draw, dtype=torch.float64) for n in (16, 24))
        found.append(p_value(mine - own.mean(), 24))
    assert stats.kstest(found, "uniform", alternative="greater").pvalue > 1e-3
    assert min(found) < 0.05  # it can fail


@pytest.mark.parametrize("points", [5, 6, 11, 41, 61, 500])
def test_places_have_both_neighbours(points: int) -> None:
    nodes, places = nodes_of(points)
    assert nodes == sorted(set(nodes)) and nodes[0] == 0 and nodes[-1] == points - 1 and places
    assert all({i - 1, i, i + 1} <= set(nodes) for i in places)
    assert len(nodes) + len(places) <= 40


def test_a_right_file_passes_and_wrong_ones_fail_on_the_mixture(file: EMSFile, subject: Source) -> None:
    bare = dataclasses.replace(file, moments={})
    for seed in (100, 101, 102):
        assert spot_check(bare, subject, seed=seed).problems == []
    job = Job(subject.shape, tuple(file.lambdas.tolist()), seed=200)
    measured = measure(subject.models[1.0], job, 1.0)

    def fails(other: EMSFile) -> bool:
        return bool(SpotCheck(tuple(statistics_checks(other, measured)), 0).problems)

    assert not fails(bare)
    for name in "lsb":
        assert fails(dataclasses.replace(bare, **{name: getattr(bare, name) + 0.2}))
    assert fails(dataclasses.replace(bare, l=bare.l.flip(1)))


def test_claiming_few_samples_does_not_help(file: EMSFile, subject: Source) -> None:
    bare = dataclasses.replace(file, moments={}, l=file.l + 0.2)
    assert spot_check(changed(bare, estimate={"samples": (1,)}), subject, seed=5).problems


def test_the_level_is_shared_among_the_tests() -> None:
    checks = tuple(Check(f"{k}", p, "") for k, p in enumerate((0.0009, 0.0011, *[0.5] * 8)))
    assert len(SpotCheck(checks, 1).problems) == 1


def test_a_model_of_another_kind_is_refused(file: EMSFile, make_mixture: type) -> None:
    other = Source({1.0: make_mixture((3, 2, 2))}, (3, 2, 2), EDM(0.15, 6.0), {})
    with pytest.raises(EMSError, match="2 channels and the latent has 3"):
        spot_check(file, other, seed=0)


# --- The embedded model


def test_forgeries_of_the_shipped_file_are_told_from_it() -> None:
    """One check; the rates are benchmarks/forged.py's."""
    forged = benchmark("forged")
    subject = forged.source(1.0)
    right = forged._one_scale(load_ems_file(SHIPPED), 1.0)
    cache: dict[object, object] = {}
    assert forged.verdict(right, subject, 31, cache).problems == []
    for name in ("l x 0.8", "s x 0.5", "statistics of guidance 7.5", "shifted by +1 in lambda"):
        assert forged._refused(forged.forged(right, name), subject, 31, cache, False), name
    found = forged.verdict(forged.forged(right, "error with EMS x 0.1"), subject, 31, cache).problems
    assert found and all("error with EMS" in p for p in found)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = benchmark("forged")._one_scale(load_ems_file(SHIPPED), 1.0)
    wrong = dataclasses.replace(file, l=file.l * 0.7)
    wrong.save(tmp_path / "wrong.ems.safetensors")
    given = ("--model", "embedded", "--samples", "8", "--seed", "1", "--device", "cpu")
    assert cli.main(["verify", str(tmp_path / "wrong.ems.safetensors")]) == 0  # it does not contradict itself
    assert "checksum right; no moments" in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path / "wrong.ems.safetensors"), *given]) == 1
    assert "l of channel 0: off by" in capsys.readouterr().err
