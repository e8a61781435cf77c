"""Import statistics computed by the authors of DPM-Solver-v3: `l.npz` (key l) and `sb.npz` (keys s, b).

Each array is [N+1, C, H, W], index 0 at the noisy end, on points uniform in lambda; the range is not in the files.

The values carry over unchanged. The authors work in x = alpha y with noise predictions eps and
    f = (sigma eps - l x) / alpha,   lambda = log(alpha / sigma).
With D = (x - sigma eps) / alpha, that is sigma eps / alpha = y - D, this is f = (1 - l) y - D, ours. Their
l = E[diag(sigma d eps/dx)] = E[diag(I - dD/dy)] is ours too, as is lambda = -log(sigma / alpha). f is the same function
along the same solutions, so its regression (s, b) on itself is the same.

Pooling to channels takes the mean over positions of l, s and b. For l this is exact (a mean of means). For s = Cov/Var
it is an approximation: pooled statistics are a ratio of pooled moments, a mean weighted by each position's variance,
and the moments are not in the files. b inherits it.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...sampler import EDM, EMSError, NoiseSchedule, VPContinuous, VPDiscrete
from .contents import EMSFile
from .reader import EMSFileError
from .rows import MAX_LAMBDA, EMSMeta, Fact

Array: TypeAlias = "npt.NDArray[np.floating[Any]]"

__all__ = ["MAX_ARRAY_BYTES", "PRESETS", "convert_npz", "lambda_range"]

MAX_ARRAY_BYTES = 2**30
"""Largest array read; the authors' largest (ImageNet 256, [501, 3, 256, 256] in float32) has 376 MiB."""

PRESETS: Mapping[str, tuple[str, NoiseSchedule]] = {
    "sd-v1": ("Stable Diffusion 1.x, 250_1024 (t = 0.001 to 1)", VPDiscrete.linear(0.00085, 0.012)),
    "lsun-ldm": ("LSUN Bedroom latent, 120_1024 (t = 0.001 to 1)", VPDiscrete.linear(0.0015, 0.0195)),
    "imagenet256": ("ImageNet 256 (ADM), 500_1024 (t = 0.001 to 1)", VPDiscrete.linear(0.0001, 0.02, sqrt=False)),
    "edm": ("EDM CIFAR10, 0.002_80.0_* (sigma = 0.002 to 80)", EDM(0.002, 80.0)),
    "scoresde-1e-3": ("ScoreSDE CIFAR10, 0.001_1200_4096 (t = 0.001 to 1)", VPContinuous(0.1, 20.0, time_min=1e-3)),
    "scoresde-1e-4": ("ScoreSDE CIFAR10, 0.0001_1200_4096 (t = 0.0001 to 1)", VPContinuous(0.1, 20.0, time_min=1e-4)),
}
"""The cases of the paper: which of the authors' folders they are for, and the noise schedule that gives the range."""


def lambda_range(preset: str) -> tuple[float, float]:
    """Lambda at the noisy and at the clean end of a preset. Raises EMSError that lists the presets."""
    if preset not in PRESETS:
        raise EMSError(f"there is no preset {preset!r}: choose one of {', '.join(PRESETS)}, or give the range")
    schedule = PRESETS[preset][1]
    times = torch.tensor([schedule.time_max, schedule.time_min], dtype=torch.float64)
    first, last = schedule.space.lambda_of(schedule.level_at(times)).tolist()
    return first, last


def convert_npz(
    l_path: str | os.PathLike[str],
    sb_path: str | os.PathLike[str],
    lambdas: tuple[float, float],
    *,
    guidance: float = 1.0,
    per_element: bool = False,
    model: Mapping[str, Fact] | None = None,
    date: str = "",
) -> EMSFile:
    """The authors' two files as one statistics file, without evidence.

    Args:
        l_path, sb_path: `l.npz` and `sb.npz`.
        lambdas: at the noisy and at the clean end, increasing.
        guidance: the scale that the statistics were computed for.
        per_element: keep [C, H, W] (one latent size only) instead of pooling to [C].
        model, date: as in `EMSMeta`.

    Raises:
        EMSFileError: a file that is not such a file.
        EMSError: values or a range that no statistics have.
    """
    from ... import __version__

    first, last = lambdas
    if not -MAX_LAMBDA <= first < last <= MAX_LAMBDA:
        limits = f"within [{-MAX_LAMBDA:g}, {MAX_LAMBDA:g}]"
        raise EMSError(f"lambda must increase from the noisy to the clean end {limits}, not go from {first:g} to {last:g}")
    values: dict[str, Tensor] = {}
    shape: tuple[int, ...] = ()
    for path, name in ((l_path, "l"), (sb_path, "s"), (sb_path, "b")):
        array = _read_array(path, name)
        if array.ndim < 3 or array.shape[0] < 2 or 0 in array.shape:
            raise EMSFileError(path, f"array '{name}' has shape {array.shape}, but must have [N+1, C, H, W]")
        if shape and array.shape != shape:
            what = f"'{name}' has shape {array.shape}, 'l' has {shape}"
            raise EMSFileError(path, f"array {what}: they belong to different statistics")
        shape = array.shape
        values[name] = _pooled(array, per_element)[None]
    grid = torch.linspace(first, last, shape[0], dtype=torch.float64)
    meta = EMSMeta(
        space="sigma",
        sigma_min=math.exp(-last),
        sigma_max=math.exp(-first),
        model=model or {},
        grid={"kind": "uniform in lambda", "intervals": shape[0] - 1},
        estimate={
            "source": "converted from the files of the paper's authors",
            "denoiser": "unguided",
            "resolution": shape[2:],
            "pooled": "no" if per_element else "mean over positions of l, s, b; approximate for s and b",
        },
        program=__version__,
        date=date,
    )
    return EMSFile(grid, torch.tensor([guidance], dtype=torch.float64), values["l"], values["s"], values["b"], meta)


def _pooled(array: Array, per_element: bool) -> Tensor:
    if per_element:
        return torch.from_numpy(array.astype(np.float32 if array.dtype.itemsize <= 4 else np.float64))
    mean = array.reshape(*array.shape[:2], -1).mean(-1, dtype=np.float64)
    return torch.from_numpy(mean.astype(np.float32))


def _read_array(path: str | os.PathLike[str], name: str) -> Array:
    """One array of an .npz file. Sizes are checked before anything is unpacked; pickled objects are never read."""
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                found = ", ".join(n.removesuffix(".npy")[:40] for n in archive.namelist()[:5]) or "nothing"
                what = f"has no array '{name}' but {found!r}"
                raise EMSFileError(path, f"{what}: give l.npz, which holds l, and sb.npz, which holds s and b")
            info = archive.getinfo(f"{name}.npy")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise EMSFileError(path, f"array '{name}' is compressed in a way that numpy does not use")
            with archive.open(info) as member:
                return _read_npy(member, path, name, info.file_size)
    except FileNotFoundError:
        raise EMSFileError(path, "there is no such file: check the name and the folder") from None
    except IsADirectoryError:
        raise EMSFileError(path, "is a folder: give the .npz file in it") from None
    except EMSError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        raise EMSFileError(path, f"is not a whole .npz file ({error!s:.120}): get it again") from error


_NPY_HEADER = re.compile(
    rb"\{'descr': '(<f[248])', 'fortran_order': (False|True), 'shape': \((\d{1,9}(?:, ?\d{1,9})*),?\), ?\}\s*"
)
"""What numpy writes for plain little-endian numbers; parsed by hand, because numpy evaluates this text."""


def _read_npy(member: IO[bytes], path: str | os.PathLike[str], name: str, size: int) -> Array:
    if size > MAX_ARRAY_BYTES:
        raise EMSFileError(path, f"array '{name}' has {size >> 20} MiB, more than the {MAX_ARRAY_BYTES >> 20} allowed")
    start = member.read(8)
    if start[:6] != b"\x93NUMPY":
        raise EMSFileError(path, f"array '{name}' is not in numpy's format")
    length = int.from_bytes(member.read(2 if start[6] == 1 else 4), "little")
    text = member.read(min(length, 4096))
    header = _NPY_HEADER.fullmatch(text)
    if header is None or header[2] == b"True":
        what = f"is no plain array of floating-point numbers, but {text[:100]!r}"
        raise EMSFileError(path, f"array '{name}' {what}; objects and other types are not read")
    dtype, shape = np.dtype(header[1].decode()), tuple(int(n) for n in header[3].split(b","))
    wanted = math.prod(shape) * dtype.itemsize
    data = member.read(min(wanted, MAX_ARRAY_BYTES) + 1)
    if len(data) != wanted:
        raise EMSFileError(path, f"array '{name}' of shape {shape} lacks some of its {wanted} bytes: get it again")
    return np.frombuffer(data, dtype).reshape(shape)
