"""The statistics file: exact round trips, interpolation in guidance, and refusal of everything that is not one."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpm_solver_v3.ems_tools.file import layout as format_
from dpm_solver_v3.ems_tools.file import storage as atomic
from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.reader import EMSFileError, decode_ems_file, load_ems_file
from dpm_solver_v3.ems_tools.file.rows import EMSMeta, EvidenceRow, FittedRow, RecommendedSetting
from dpm_solver_v3.ems_tools.judge.consistency import consistency_problems, evidence_problems
from dpm_solver_v3.sampler import (
    EMSError,
    FittedSteps,
    Settings,
    VPDiscrete,
    karras,
    quadratic_time,
    uniform_lambda,
    uniform_time,
)
from loading import benchmark

corrupt = benchmark("corrupt")
example = corrupt.example
META = EMSMeta("sigma", 0.03, 14.6)


def changed(**fields):
    return dataclasses.replace(example(), **fields)


def with_meta(**fields):
    return changed(meta=dataclasses.replace(example().meta, **fields))


def tensors_of(file):
    named = {n: getattr(file, n) for n in ("lambdas", "guidance", "l", "s", "b")}
    return {**named, **{f"{n}_se": v for n, v in (file.errors or {}).items()}, **file.moments}


# --- Round trip


@pytest.mark.parametrize("file", [example(), example(4, (5, 6)), example(1, (7,), moments=False), example(n=1)])
def test_round_trip_is_exact(file, tmp_path):
    path = tmp_path / "a.ems.safetensors"
    file.save(path)
    back = load_ems_file(path)
    assert back.meta == file.meta
    mine, theirs = tensors_of(file), tensors_of(back)
    assert mine.keys() == theirs.keys()
    assert all(theirs[n].dtype == v.dtype and torch.equal(theirs[n], v) for n, v in mine.items())
    assert path.read_bytes() == back.encode()


def test_other_programs_can_read_the_tensors(tmp_path):
    from safetensors import safe_open

    example().save(tmp_path / "a.ems.safetensors")
    with safe_open(tmp_path / "a.ems.safetensors", "pt") as opened:
        assert torch.equal(opened.get_tensor("l"), example().l)
        assert opened.metadata()["format"] == "dpm-solver-v3-ems"


TEXT = st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=20)
SCALARS = TEXT | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none()
FACTS = st.dictionaries(TEXT, SCALARS | st.lists(SCALARS, max_size=3).map(tuple), max_size=4)
NUMBERS = st.floats(0, 1e6)


def several(numbers, n):
    return st.lists(numbers, min_size=n, max_size=n).map(tuple)


@st.composite
def fitted_rows(draw, table, guidance, first, last):
    """A row of this table, with evaluations from lambda `first` at the earliest to `last` at most."""
    n = draw(st.integers(2, 4))
    begin = first if table != "partial" else draw(st.floats(first, first + 0.9 * (last - first)))
    lambdas = tuple(begin + (last - begin) * k / n for k in range(n))
    guided = draw(several(st.booleans(), n)) if table == "passes" else ()
    counts = accumulate(1 + both for both in guided) if guided else range(1, n + 1)
    weights = tuple(draw(several(st.floats(-0.3, 0.3), k)) for k in counts)
    start = 1.0 if table == "partial" else draw(st.floats(0.8, 1.2))
    steps = FittedSteps(lambdas, draw(several(st.floats(0, 1), n)), weights, start, guided)
    mine, theirs, ratio = (draw(several(NUMBERS, 3)) for _ in range(3))
    return FittedRow(guidance, n, lambdas, steps, mine, theirs, draw(TEXT), ratio, draw(st.integers(1, 99)))


CASES = {"fitted": lambda r: r.steps, "passes": lambda r: r.passes, "partial": lambda r: (r.steps, round(r.lambdas[0], 2))}


@st.composite
def files(draw):
    seed, g, n, c = (draw(st.integers(low, 4)) for low in (0, 1, 1, 1))
    spatial = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    noise = torch.Generator().manual_seed(seed)
    tables = torch.randn(3, g, n + 1, c, *spatial, generator=noise, dtype=torch.float64).to(dtype)
    axes = [torch.rand(k, generator=noise, dtype=torch.float64).add(0.1).cumsum(0) for k in (n + 1, g)]
    row = st.builds(
        EvidenceRow,
        st.just(axes[1][0].item()),
        TEXT,
        st.integers(1, 100),
        st.sampled_from(["calibration", "report"]),
        NUMBERS,
        NUMBERS,
        NUMBERS,
    )
    chosen = st.builds(
        Settings,
        order=st.integers(1, 3),
        corrector=st.sampled_from(["none", "pseudo", "raised"]),
        corrector_below=NUMBERS | st.just(math.inf),
        strength=st.floats(0, 2),
    )
    lambdas = st.lists(st.floats(-20, 20), min_size=1, max_size=4).map(tuple)
    advice = st.builds(RecommendedSetting, st.just(axes[1][0].item()), TEXT, lambdas, chosen)
    low, high = draw(st.floats(1e-3, 1)), draw(st.floats(2, 1e3))
    place = (axes[1][0].item(), -math.log(high), -math.log(low))
    tables_of_rows = {
        name: tuple(draw(st.lists(fitted_rows(name, *place), max_size=2, unique_by=case))) for name, case in CASES.items()
    }
    meta = EMSMeta(
        draw(st.sampled_from(["sigma", "flow"])),
        low,
        high,
        draw(TEXT),
        draw(FACTS),
        draw(FACTS),
        draw(FACTS),
        tuple(draw(st.lists(row, max_size=2))),
        tuple(draw(st.lists(advice, max_size=2))),
        draw(TEXT),
        draw(TEXT),
        draw(st.dictionaries(st.from_regex(r"\A(modelspec\.|ss_)[a-z]{1,5}\Z"), TEXT, max_size=2)),
        **tables_of_rows,
    )
    errors = {k: v.abs().half() for k, v in zip("lsb", tables, strict=True)} if draw(st.booleans()) else None
    grid, guidance = axes
    l, s, b = tables
    return EMSFile(grid, guidance, l, s, b, meta, errors, {"a.0": axes[0][0]} if draw(st.booleans()) else {})


@settings(max_examples=30, deadline=None)
@given(files())
def test_any_file_comes_back_as_it_was(file):
    data = file.encode()
    back = decode_ems_file(data)
    assert back.meta == file.meta and back.encode() == data
    version = 3 if file.meta.partial else 2 if file.meta.passes else 1
    assert corrupt._parts(data)[0]["format_version"] == str(version)
    assert all(torch.equal(tensors_of(back)[n], v) for n, v in tensors_of(file).items())


# --- Guidance


def test_covered_scales_come_back_unchanged():
    file = example(scales=4)
    for g, scale in enumerate(file.guidance.tolist()):
        ems = file.at(scale)
        assert all(torch.equal(getattr(ems, n), getattr(file, n)[g]) for n in "lsb")
        assert {e.schedule for e in ems.recommendation.entries} == {"uniform_lambda"}


def test_between_scales_statistics_are_linear_and_the_nearer_recommendation_is_taken():
    file = example(scales=4)  # 1, 2, 4, 7.5
    entries = tuple(
        dataclasses.replace(r, settings=Settings(order=2 if r.guidance == 2 else 3)) for r in file.meta.recommendation
    )
    file = dataclasses.replace(file, meta=dataclasses.replace(file.meta, recommendation=entries))
    expected = 0.25 * file.b[1].double() + 0.75 * file.b[2].double()
    assert torch.allclose(file.at(3.5).b.double(), expected, atol=1e-6)
    assert file.at(2.8).recommendation.best_for([0.0] * 6).order == 2  # log(2.8) lies nearer to log 2, 2.9 nearer to log 4
    assert file.at(2.9).recommendation.best_for([0.0] * 6).order == 3


@pytest.mark.parametrize(("scale", "used"), [(0.0, 0), (-1.0, 0), (30.0, 1), (math.inf, 1)])
def test_outside_the_covered_scales_the_nearest_is_used_with_a_warning(scale, used):
    file = example()
    with pytest.warns(UserWarning, match=f"cover guidance 1 to 2; using those of {used + 1}"):
        assert torch.equal(file.at(scale).s, file.s[used])


def test_inside_there_is_no_warning_and_nan_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        example().at(1.5)
    with pytest.raises(EMSError, match="not a number"):
        example().at(math.nan)


# --- What is written


@pytest.mark.parametrize("channels", [3, 4, 8, 16])
def test_a_shared_file_stays_below_64_kib(channels):
    """4 scales, 61 points, evidence on 2 schedules and 6 step counts."""
    file = example(channels, scales=4, n=60)
    rows, advice = [], []
    for g in file.guidance.tolist():
        for schedule in ("uniform_lambda", "karras_zero"):
            for steps in (5, 6, 8, 10, 15, 20):
                for split in ("calibration", "report"):
                    rows.append(EvidenceRow(g, schedule, steps, split, 0.0123456, 0.0112345, 0.0345678))
                lambdas = tuple(torch.linspace(-2.68211, 3.53111, steps + 1).tolist())
                advice.append(RecommendedSetting(g, schedule, lambdas, Settings(order=3, strength=0.75)))
    meta = dataclasses.replace(file.meta, evidence=tuple(rows), recommendation=tuple(advice))
    shared = dataclasses.replace(file, meta=meta).compacted()
    assert len(shared.encode()) <= 64 * 1024
    assert not shared.moments and torch.equal(shared.l, file.l)
    rms = file.errors["s"].double().square().mean(1, keepdim=True).sqrt().float()
    full = shared.errors["s"].shape == file.s.shape
    assert full == (channels <= 8)
    assert torch.equal(shared.errors["s"], file.errors["s"] if full else rms)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: changed(l=example().l.half()), "l, s, b must share"),
        (lambda: changed(s=example().s[:, :-1]), "'s' has shape"),
        (lambda: changed(b=example().b * math.nan), r"'b' holds values that are not finite, the first at \[0, 0, 0\]"),
        (lambda: changed(l=example().l + 2e4), "'l' holds values from"),
        (lambda: changed(lambdas=example().lambdas.flip(0)), "'lambdas' must increase strictly, and does not at 1"),
        (lambda: changed(lambdas=example().lambdas.float()), "'lambdas' is torch.float32"),
        (lambda: changed(lambdas=example().lambdas * 20), r"'lambdas' holds values from .* outside \[-30, 30\]"),
        (lambda: changed(guidance=torch.tensor([0.0, 1.0], dtype=torch.float64)), "outside \\[0.001, 1000\\]"),
        (
            lambda: changed(guidance=torch.tensor([3.0, 4.0], dtype=torch.float64)),
            "for guidance 1; the file covers 3, 4",
        ),
        (lambda: changed(errors={"l": example().l.abs()}), "those of l, s and b, not of l"),
        (lambda: changed(errors={n: -example().l.abs() for n in "lsb"}), "'l_se' holds values from"),
        (lambda: changed(moments={"a/b": torch.zeros(2, dtype=torch.float64)}), "short name of letters"),
        (lambda: with_meta(space="pixels"), "noise.space must be one of sigma, flow"),
        (lambda: with_meta(sigma_min=20.0), "must be below"),
        (lambda: with_meta(model={"name": "a\x1b[31m"}), "one line of plain text"),
        (lambda: with_meta(estimate={"a": math.nan}), "'estimate.a' is not finite"),
        (lambda: with_meta(estimate={"a": {"b": 1}}), "'estimate.a' must be text"),
        (lambda: with_meta(foreign={"format": "x"}), "'modelspec.' or 'ss_'"),
        (lambda: EvidenceRow(1.0, "karras", 5, cast("Any", "test"), 0.1, 0.1, 0.1), "'calibration' or 'report'"),
        (lambda: EvidenceRow(1.0, "karras", 5, "report", math.nan, 0.1, 0.1), "data_prediction is nan"),
        (lambda: RecommendedSetting(1.0, "karras", (), Settings()), "tuple of 1 to"),
    ],
)
def test_what_the_format_does_not_allow_cannot_be_made(make, message):
    with pytest.raises(EMSError, match=message):
        make()


def test_later_changes_of_the_source_do_not_reach_it():
    table = example().l.clone()
    file = changed(l=table)
    table.zero_()
    assert torch.equal(file.l, example().l)


# --- What is read


@pytest.mark.parametrize("kind", corrupt.KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_corrupted_files_are_refused_with_a_message(kind, seed):
    bad = corrupt.corrupted(example().encode(), kind, seed)
    with pytest.raises(EMSFileError) as caught:
        decode_ems_file(bad, "bad.ems.safetensors")
    assert str(caught.value).startswith("bad.ems.safetensors: ")
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 600


GOOD = example(2, moments=False, scales=1, n=4).encode()


def test_every_single_bit_counts():
    for at in range(0, len(GOOD), 13):
        flipped = GOOD[:at] + bytes([GOOD[at] ^ 1 << at % 8]) + GOOD[at + 1 :]
        with pytest.raises(EMSFileError):
            decode_ems_file(flipped)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(GOOD)), st.integers(0, 64), st.binary(max_size=64))
def test_bytes_replaced_by_any_others_are_refused(at, length, other):
    data = GOOD[:at] + other + GOOD[at + length :]
    if data != GOOD:
        with pytest.raises(EMSFileError):
            decode_ems_file(data)


@settings(max_examples=100, deadline=None)
@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=10), st.data())
def test_any_json_in_the_metadata_is_accepted_as_it_is_or_refused(value, data):
    metadata, tensors = corrupt._parts(GOOD)
    key = data.draw(st.sampled_from(["model", "noise", "grid", "estimate", "evidence", "recommendation"]))
    metadata[key] = format_._json(value)
    try:
        back = decode_ems_file(corrupt._signed((metadata, tensors)))
    except EMSFileError:
        return
    assert format_.metadata_of(back.meta)[key] == metadata[key]


def test_what_is_read_lies_in_memory_once() -> None:
    """The bytes of a 250 MiB file, what safetensors made of them and the file's own copy together took 844 MiB."""
    data = bytearray(example().encode())
    begin = torch.frombuffer(data, dtype=torch.uint8).data_ptr()
    for value in tensors_of(decode_ems_file(data)).values():
        assert begin <= value.data_ptr() < begin + len(data)
    given = bytes(data)
    assert torch.equal(decode_ems_file(given).l, example().l) and given == data


def test_a_newer_version_says_to_update():
    metadata, tensors = corrupt._parts(GOOD)
    metadata["format_version"] = "4"
    with pytest.raises(EMSFileError, match="format version 4, this program reads up to 3: update"):
        decode_ems_file(corrupt._signed((metadata, tensors)))


def test_a_file_for_image_to_image_is_of_version_3():
    metadata, tensors = corrupt._parts(GOOD)
    assert metadata["format_version"] == "3"  # the example has such rows
    del metadata["partial"]
    with pytest.raises(EMSFileError, match="is of version 3"):
        decode_ems_file(corrupt._signed((metadata, tensors)))
    metadata["format_version"] = "1"
    assert decode_ems_file(corrupt._signed((metadata, tensors))).meta.partial == ()
    older = dict(corrupt._parts(GOOD)[0], format_version="2")
    with pytest.raises(EMSFileError, match="is of version 3"):
        decode_ems_file(corrupt._signed((older, tensors)))


def test_a_pickle_and_another_safetensors_file_are_named(tmp_path):
    from safetensors.torch import save_file

    torch.save({"l": torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(EMSFileError, match="zip, pickle or numpy file"):
        load_ems_file(tmp_path / "a.pt")
    save_file({"weight": torch.zeros(3)}, tmp_path / "b.safetensors")
    with pytest.raises(EMSFileError, match=r"holds no EMS \(it names no format"):
        load_ems_file(tmp_path / "b.safetensors")


def test_missing_too_large_and_folder(tmp_path):
    with pytest.raises(EMSFileError, match="no such file"):
        load_ems_file(tmp_path / "none")
    with pytest.raises(EMSFileError, match="is not a file"):
        load_ems_file(tmp_path)
    with pytest.raises(EMSFileError, match="cannot be read"):
        load_ems_file("a\0b")
    big = tmp_path / "big"
    with open(big, "wb") as file:
        file.truncate(2**34)  # sparse
    with pytest.raises(EMSFileError, match="16384 MiB, more than the 256"):
        load_ems_file(big)


def test_content_that_fits_no_header_is_not_written():
    long = {f"k{i}": "x" * 4000 for i in range(300)}
    with pytest.raises(EMSError, match="metadata are too long"):
        with_meta(model=long).encode()


# --- Evidence


def test_evidence_that_supports_the_recommendation_has_no_problem():
    assert evidence_problems(example()) == []


def test_evidence_against_the_recommendation_is_named():
    meta = example().meta
    worse = dataclasses.replace(meta.evidence[0], ems=0.03)
    found = evidence_problems(with_meta(evidence=(worse, *meta.evidence[1:])))
    assert len(found) == 1 and "loses to data prediction" in found[0]
    found = evidence_problems(with_meta(recommendation=meta.recommendation[1:]))
    assert len(found) == 1 and "not for the same steps" in found[0]
    found = evidence_problems(with_meta(evidence=()))
    assert len(found) == 2
    found = evidence_problems(with_meta(evidence=meta.evidence[1:]))
    assert len(found) == 1 and "not for the same steps" in found[0]


def test_rows_for_image_to_image_are_checked_against_themselves():
    file = example()
    assert consistency_problems(dataclasses.replace(file, moments={})) == []
    first, *others = file.meta.partial
    wrong = dataclasses.replace(first, ratio=(0.1, 0.1, 0.1))
    (found,) = consistency_problems(dataclasses.replace(with_meta(partial=(wrong, *others)), moments={}))
    assert "guidance 1, fitted, 3 steps in 6 passes, from lambda -2: the ratio is 0.1, but the errors give 0.5" in found
    lost = dataclasses.replace(first, fitted=first.fixed, fixed=first.fitted, ratio=(2.0, 1.5, 2.5))
    worse = dataclasses.replace(with_meta(partial=(lost, *others)), moments={})
    assert consistency_problems(worse) == []  # better than the run without them, if not than the best other way
    with pytest.raises(EMSError, match="for guidance 9; the file covers 1, 2"):
        with_meta(partial=(dataclasses.replace(first, guidance=9.0), *others))


# --- Atomic writing


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.ems.safetensors"
    example().save(path)
    old = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_atomic(path, b"new")
    assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]


def test_a_write_replaces_the_file(tmp_path):
    path = tmp_path / "a"
    atomic.write_atomic(path, b"old")
    atomic.write_atomic(str(path), b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_the_path_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example().save("a b.ems.safetensors")
    assert load_ems_file("a b.ems.safetensors").meta == example().meta


SHIPPED = Path(__file__).parents[3] / "stats" / "embedded-emoji.ems.safetensors"


@pytest.mark.parametrize("guidance", [1.0, 2.0, 4.0, 7.5])
def test_the_shipped_statistics_grow_slowly(guidance: float) -> None:
    """What sampler.choice.GROWTH_LIMIT is set by: below 1 on every schedule of the paper from 4 steps on."""
    ems = load_ems_file(SHIPPED).at(guidance)
    for make in (uniform_lambda, uniform_time, quadratic_time, karras):
        for steps in (4, 5, 6, 8):
            assert ems.growth(-make(VPDiscrete.linear(), steps).log()) < 1


def test_statistics_for_latents_come_with_what_was_warned_of() -> None:
    file = load_ems_file(SHIPPED)
    ems, warned = file.for_latents(4.0, (2, 3, 64, 64))
    assert torch.equal(ems.l, file.at(4.0).l) and warned == []
    assert "guidance 30" in file.for_latents(30.0, (2, 3, 64, 64))[1][0]
    with pytest.raises(EMSError, match="3 channels and the latent has 4"):
        file.for_latents(4.0, (2, 4, 64, 64))


def test_the_filters_of_warnings_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that both change and restore these filters, which are the process's, can leave them changed for good."""

    def forbidden(*args: object, **options: object) -> None:
        raise AssertionError("warnings.filters were touched")

    monkeypatch.setattr(warnings, "catch_warnings", forbidden)
    monkeypatch.setattr(warnings, "simplefilter", forbidden)
    assert load_ems_file(SHIPPED).for_latents(30.0, (2, 3, 64, 64))[1]


def test_a_latent_larger_than_any_is_refused() -> None:
    """Coefficients per element of 5.9 million elements took 6.9 GB in eight steps; the file had 180 MiB and two points."""
    l = torch.zeros(1, 2, 4, 512, 513)
    lambdas = torch.tensor([-2.0, 2.0], dtype=torch.float64)
    with pytest.raises(EMSError, match="latents of 1050624 elements; at most 1048576"):
        EMSFile(lambdas, torch.ones(1, dtype=torch.float64), l, l, l, META)
