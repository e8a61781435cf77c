"""Import of the authors' files, written here in their layout: values, ranges, refusals."""

from __future__ import annotations

import contextlib
import io
import zipfile

import numpy as np
import pytest
import torch

from dpm_solver_v3.ems_tools.file import convert
from dpm_solver_v3.ems_tools.file.convert import PRESETS, convert_npz, lambda_range
from dpm_solver_v3.ems_tools.file.reader import EMSFileError, decode_ems_file
from dpm_solver_v3.sampler import EMSError, VPDiscrete

RANGE = (-2.682, 3.535)


@pytest.fixture
def arrays():
    draw = np.random.default_rng(0)
    return {name: draw.normal(size=(7, 4, 5, 6)).astype(np.float32) for name in "lsb"}


@pytest.fixture
def paths(tmp_path, arrays):
    np.savez(tmp_path / "l.npz", l=arrays["l"])
    np.savez_compressed(tmp_path / "sb.npz", s=arrays["s"], b=arrays["b"])
    return tmp_path / "l.npz", tmp_path / "sb.npz"


def test_pooled_statistics_are_means_over_positions(paths, arrays):
    file = convert_npz(paths[0], paths[1], RANGE, guidance=7.5)
    assert file.guidance.tolist() == [7.5] and not file.per_element
    assert torch.allclose(file.lambdas, torch.linspace(*RANGE, 7, dtype=torch.float64))
    for name in "lsb":
        expected = arrays[name].astype(np.float64).mean((2, 3)).astype(np.float32)
        assert np.array_equal(getattr(file, name)[0].numpy(), expected)
    assert decode_ems_file(file.encode()).encode() == file.encode()


def test_per_element_statistics_are_kept_bit_for_bit(paths, arrays):
    file = convert_npz(paths[0], paths[1], RANGE, per_element=True)
    assert all(np.array_equal(getattr(file, name)[0].numpy(), arrays[name]) for name in "lsb")
    assert file.at(1.0).l.shape == (7, 4, 5, 6)


def test_f_of_the_authors_is_ours():
    """(sigma eps - l x) / alpha = (1 - l) y - D, with eps and D of one Gaussian model."""
    alpha, l = 0.6, 0.3
    sigma = (1 - alpha**2) ** 0.5
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    y, noise_level = x / alpha, sigma / alpha
    denoised = y * 0.5**2 / (0.5**2 + noise_level**2)  # data of standard deviation 0.5
    eps = (x - alpha * denoised) / sigma
    assert torch.allclose((sigma * eps - l * x) / alpha, (1 - l) * y - denoised)


def test_presets_are_the_ends_of_the_papers_schedules():
    assert lambda_range("sd-v1") == pytest.approx((-2.682, 3.535), abs=1e-3)
    assert lambda_range("edm") == pytest.approx((-np.log(80), -np.log(0.002)))
    sigma = VPDiscrete.linear(0.0001, 0.02, sqrt=False).alphas_cumprod[[-1, 0]]
    assert lambda_range("imagenet256") == pytest.approx((0.5 * (sigma / (1 - sigma)).log()).tolist(), abs=1e-4)
    exponent = 19.9 / 4 * 1e-6 + 0.1 / 2 * 1e-3  # -log alpha at t = 0.001 of the VP SDE with beta 0.1 to 20
    assert lambda_range("scoresde-1e-3")[1] == pytest.approx(-0.5 * np.log(np.expm1(2 * exponent)))
    assert all(first < -2 and last > 3 for first, last in map(lambda_range, PRESETS))
    with pytest.raises(EMSError, match="no preset 'sdxl': choose one of sd-v1"):
        lambda_range("sdxl")


@pytest.mark.parametrize("span", [(3.5, -2.7), (1.0, 1.0), (float("nan"), 1.0), (-50.0, 3.0)])
def test_ranges_that_no_statistics_have_are_refused(paths, span):
    with pytest.raises(EMSError, match="lambda"):
        convert_npz(paths[0], paths[1], span)


def npz(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


GOOD = np.zeros((7, 4, 5, 6), np.float32)
CLAIM = npy(GOOD).replace(b"(7, 4, 5, 6)", b"(7, 4, 5, 9)")
HUGE = npy(GOOD).replace(b"(7, 4, 5, 6), ", b"(7, 4, 5, 999999999), ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a whole .npz"),
        (b"\x80\x04N.", "not a whole .npz"),
        (npz(l=npy(GOOD))[:-200], "not a whole .npz"),
        (npz(x=npy(GOOD)), "has no array 'l' but 'x'"),
        (npz(l=b"junk"), "not in numpy's format"),
        (npz(l=npy(np.array([{"a": 1}], dtype=object))), "no plain array of floating-point numbers"),
        (npz(l=npy(GOOD.astype(int))), "no plain array of floating-point numbers"),
        (npz(l=npy(np.asfortranarray(GOOD))), "no plain array of floating-point numbers"),
        (npz(l=b"\x93NUMPY\x01\x00\x40\x00" + b"__import__('os').system('touch pwned')".ljust(64)), "no plain array"),
        (npz(l=CLAIM), "lacks some of its"),
        (npz(l=HUGE), "lacks some of its|in numpy's format"),
        (npz(l=npy(GOOD[0, 0])), r"has shape \(5, 6\)"),
        (npz(l=npy(GOOD[:1])), r"has shape \(1, 4, 5, 6\)"),
        (npz(l=npy(np.full_like(GOOD, np.nan))), "not finite"),
        (npz(l=npy(GOOD[:, :3])), "'s' has shape .* belong to different statistics"),
    ],
)
def test_bad_files_are_refused(tmp_path, paths, data, message):
    bad = tmp_path / "bad.npz"
    bad.write_bytes(data)
    with pytest.raises(EMSError, match=message):
        convert_npz(bad, paths[1], RANGE)


def test_missing_file_and_folder_are_named(tmp_path, paths):
    with pytest.raises(EMSFileError, match="no such file"):
        convert_npz(tmp_path / "none.npz", paths[1], RANGE)
    with pytest.raises(EMSFileError, match=r"is a folder|cannot|not a whole"):
        convert_npz(tmp_path, paths[1], RANGE)


def test_sizes_are_limited_before_unpacking(paths, monkeypatch):
    monkeypatch.setattr(convert, "MAX_ARRAY_BYTES", 1000)
    with pytest.raises(EMSFileError, match="more than the"):
        convert_npz(paths[0], paths[1], RANGE)


def test_any_damage_is_refused_or_leaves_the_numbers(paths):
    """zip's own checksum guards the members; damage elsewhere may not matter."""
    good = paths[0].read_bytes()
    reference = convert_npz(paths[0], paths[1], RANGE).l
    draw = np.random.default_rng(1)
    for _ in range(200):
        at = int(draw.integers(len(good)))
        paths[0].write_bytes(good[:at] + bytes([good[at] ^ 1 << int(draw.integers(8))]) + good[at + 1 :])
        with contextlib.suppress(EMSError):
            assert torch.equal(convert_npz(paths[0], paths[1], RANGE).l, reference)
