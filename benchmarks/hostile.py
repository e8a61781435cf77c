"""Statistics files that are valid in form and hostile in meaning: none may hang, fill the memory, break a command or a picture.

    python benchmarks/hostile.py                   # 5,000 files, some minutes on one core
    python benchmarks/hostile.py --first 1250 --files 1250    # a part of them, to be run beside others

Statistics, fitted rows, evidence, recommendation and moments are drawn within and at the bounds that the format allows. Each
file goes through encode and load, inspect, index, plot, verify, install and a sampling run of 8 steps on a model in closed
form, as a host samples with somebody else's file. A failure is: more than 2 s of computing, more than 200 MiB, an error that
is not for the user, a result that is not finite, or a squared error above 1.5 times that without the file, unless a message
said so.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpm_solver_v3.ems_tools.file import EMSFile, EMSMeta, EvidenceRow, FittedRow, RecommendedSetting, decode_ems_file
from dpm_solver_v3.ems_tools.file.contents import MAX_POINTS, MAX_VALUES
from dpm_solver_v3.ems_tools.file.rows import MAX_DECAY, MAX_ERROR, MAX_START, MAX_WEIGHT
from dpm_solver_v3.ems_tools.hosting import Origin, TrustBook, sample_on_trial
from dpm_solver_v3.ems_tools.judge import consistency_problems
from dpm_solver_v3.ems_tools.share.index import decode_index, encode_index, entry_of
from dpm_solver_v3.ems_tools.share.pull import install
from dpm_solver_v3.ems_tools.show.describe import facts_of, lines_of
from dpm_solver_v3.ems_tools.show.draw import plot_ems
from dpm_solver_v3.sampler import (
    EDM,
    EMSError,
    FittedSteps,
    SamplingError,
    Settings,
    karras,
    sample_dpm_solver_v3,
    uniform_lambda,
)

__all__ = ["Result", "hostile", "run"]

HIGH, LOW, STEPS, SHAPE = 14.6, 0.03, 8, (2, 8, 8)
SCHEDULE = EDM(LOW, HIGH)
SECONDS, MIB, WORSE = 2.0, 200.0, 1.5


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """D of two Gaussians at +-m for x [B, C, H, W], sigma [B]; in closed form."""
    grid = torch.linspace(-1, 1, x[0].numel(), dtype=torch.float64).reshape(x.shape[1:])
    mean, s = 1.2 * torch.sin(3 * grid + 0.4), sigma.double().reshape(-1, 1, 1, 1)
    total = 0.3**2 + s**2
    y = x.double()
    side = (2 * (y * mean / total).flatten(1).sum(1)).sigmoid().reshape(-1, 1, 1, 1) * 2 - 1
    return (side * mean + 0.3**2 / total * (y - side * mean)).to(x.dtype)


@dataclass(frozen=True)
class Result:
    """What became of one file: "refused", "left out" (with a message) or "used"; what failed; seconds and error ratio."""

    outcome: str
    failure: str
    seconds: float
    ratio: float


def extreme(draw: random.Random, most: float) -> float:
    """A number within +-most: at a bound, 0, ordinary, or of any size."""
    kind = draw.randrange(5)
    if kind == 0:
        return draw.choice((-most, most, 0.0))
    return draw.gauss(0, 1) % most if kind == 1 else draw.choice((-1, 1)) * most * 10 ** draw.uniform(-6, 0)


def hostile(draw: random.Random) -> EMSFile:
    """A file that the format allows. Raises EMSError where it does not."""
    points, channels = draw.choice((2, 5, 30, 61, 61, 400)), SHAPE[0]
    lambdas = torch.linspace(-math.log(HIGH), -math.log(LOW), points, dtype=torch.float64)
    if draw.random() < 0.3:  # dense somewhere
        lambdas = draw.uniform(-2, 3) + torch.cumsum(
            torch.full((points,), 10 ** draw.uniform(-5.9, -2), dtype=torch.float64), 0
        )
    scales = sorted({round(draw.uniform(0.01, 20), 3) for _ in range(draw.choice((1, 1, 2, 5)))} | {2.0})
    tables = {name: _table(draw, name, (len(scales), points, channels)) for name in ("l", "s", "b")}
    rows, advice = _evidence(draw, scales)
    meta = EMSMeta(
        "sigma", LOW, HIGH, "EDM", {"name": "hostile", "sha256": "ab" * 32}, {}, {"samples": (draw.choice((1, 2**60)),)},
        rows, advice, "0", draw.choice(("2026-01-01", "zzzz")), {}, _fits(draw),
    )  # fmt: skip
    moments = {}
    if draw.random() < 0.3:
        groups = draw.choice((1, 2, 3000))
        sums = torch.full((9, groups, min(points, 61), channels), extreme(draw, 1e300), dtype=torch.float64)
        moments = {"sums.0": sums, "count.0": torch.full((groups,), abs(extreme(draw, 1e11)), dtype=torch.float64)}
    l, s, b = (tables[name] for name in "lsb")
    meta = replace(meta, passes=_fewer(draw, meta.fitted), partial=_begun(draw, meta.fitted))
    return EMSFile(lambdas, torch.tensor(scales, dtype=torch.float64), l, s, b, meta, moments=moments)


def _table(draw: random.Random, name: str, shape: tuple[int, ...]) -> Tensor:
    base = {"l": 0.8, "s": 0.0, "b": 0.0}[name]
    kind, most = draw.randrange(4), MAX_VALUES[name]
    if kind == 0:
        return torch.full(shape, extreme(draw, most))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(draw.randrange(2**31)))
    size = 10 ** draw.uniform(-3, math.log10(most) if kind == 1 else 0)
    return (base + size * (noise if kind < 3 else noise[:, :1])).clamp(-most, most).expand(shape).clone()


def _evidence(draw: random.Random, scales: list[float]) -> tuple[tuple[EvidenceRow, ...], tuple[RecommendedSetting, ...]]:
    rows, advice = [], []
    for k in range(draw.choice((0, 1, 5, 300))):
        steps, errors = draw.choice((5, 8, 10_000)), [abs(extreme(draw, MAX_ERROR)) for _ in range(3)]
        rows.append(EvidenceRow(draw.choice(scales), f"s{k}", steps, draw.choice(("report", "calibration")), *errors))
        n = draw.choice((1, 8, 9, 50))
        lambdas = tuple(sorted(extreme(draw, 60.0) for _ in range(n)))
        settings = Settings(
            draw.choice((1, 2, 3)), corrector=draw.choice(("none", "pseudo", "raised")), strength=draw.uniform(0, 2)
        )
        advice.append(RecommendedSetting(draw.choice(scales), f"s{k}", lambdas, settings))
    return tuple(rows), tuple(advice)


def _fits(draw: random.Random) -> tuple[FittedRow, ...]:
    """Rows for 8 steps: data prediction's coefficients, bent, or anything within the bounds."""
    if draw.random() < 0.5:
        return ()
    lambdas = tuple(sorted(draw.uniform(-math.log(HIGH), -math.log(LOW)) for _ in range(STEPS)))
    if draw.random() < 0.7:
        lambdas = tuple((-karras(SCHEDULE, STEPS, to_zero=True)[:-1].log()).tolist())
    wild, bend = draw.random() < 0.4, draw.choice((0.0, 1e-3, 0.05, 0.2))
    decay, weights = [], []
    for i in range(STEPS):
        shrink = math.exp(lambdas[i] - lambdas[i + 1]) if i + 1 < STEPS else 0.0
        decay.append(extreme(draw, MAX_DECAY) if wild else shrink * (1 + draw.gauss(0, bend)))
        row = [0.0] * i + [1 - shrink]
        weights.append(tuple(extreme(draw, MAX_WEIGHT) if wild else w + draw.gauss(0, bend) for w in row))
    start = draw.choice((1 / MAX_START, 1.0, 1.0, MAX_START))
    steps = FittedSteps(lambdas, tuple(decay), tuple(weights), start)
    errors = tuple(abs(extreme(draw, MAX_ERROR)) for _ in range(3))
    return (FittedRow(2.0, STEPS, lambdas, steps, errors, errors, "karras", errors, 4),)


def _fewer(draw: random.Random, fitted: tuple[FittedRow, ...]) -> tuple[FittedRow, ...]:
    """The same steps in fewer passes, or as many: guided anywhere, weights of c 0 or anything within the bounds."""
    found = []
    for row in fitted:
        c = row.coefficients
        if c is None or draw.random() < 0.5:
            continue
        guided, wild = tuple(draw.random() < 0.6 for _ in c.lambdas), draw.random() < 0.4
        weights = tuple(
            tuple(
                v for w, both in zip(known, guided) for v in ((extreme(draw, MAX_WEIGHT) if wild else 0.0, w) if both else (w,))
            )
            for known in c.weights
        )
        found.append(replace(row, coefficients=replace(c, weights=weights, guided=guided)))
    return tuple(found)


def _begun(draw: random.Random, fitted: tuple[FittedRow, ...]) -> tuple[FittedRow, ...]:
    """The last of these steps, as if they were for image to image; sometimes for two beginnings as near as can be."""
    found = []
    for row in fitted:
        c, first = row.coefficients, draw.randrange(1, STEPS - 1)
        if c is None or draw.random() < 0.5:
            continue
        weights = tuple(known[first:] for known in c.weights[first:])
        for by in draw.choice(((0.0,), (0.0, 0.006))):
            lambdas = (c.lambdas[first] - by, *c.lambdas[first + 1 :])
            steps = FittedSteps(lambdas, c.decay[first:], weights)
            found.append(replace(row, steps=len(lambdas), lambdas=lambdas, coefficients=steps))
    return tuple(found)


def _commands(file: EMSFile, folder: Path) -> EMSFile:
    """What the command line and the tabs do with a file."""
    data = file.encode()
    file = decode_ems_file(data)
    json.dumps([facts_of(file), lines_of(file)], allow_nan=False)
    decode_index(encode_index([entry_of(data, "a.ems.safetensors")]))
    plot_ems(file, folder / "a.svg")
    consistency_problems(file)
    path, _ = install(data, "a", folder)
    path.unlink()
    return file


def _sampled(file: EMSFile, draw: random.Random) -> tuple[bool, float]:
    """Whether a message said that the file is left out, and the squared error over that without it."""
    kind = draw.randrange(3)
    fitted, inside = bool(file.meta.fitted) and kind == 0, bool(file.meta.partial) and kind == 1
    levels, seed = file.fitted_sigmas(STEPS, 2.0) if fitted else _usual(kind < 2), draw.randrange(20)
    x = _noise(seed) * levels[0].float()
    if inside:
        x, levels = _begin(seed, draw.choice(file.meta.partial))
    told: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        ems, origin, given = file.at(2.0), Origin(file, "theirs"), (denoiser, x, levels)
        options: dict[str, Any] = {"disable": True, "guidance": 2.0, "image_to_image": inside}
        out = sample_on_trial(TrustBook(None), origin, told.append, *given, ems=ems, **options)
    if not torch.isfinite(out).all():
        raise ArithmeticError("the picture is not finite")
    exact, without = _right_from(x, levels) if inside else _right(seed, kind < 2 or fitted)
    ratio = float((out - exact).square().mean()) / max(float((without - exact).square().mean()), 1e-7)
    return bool(told or warned), ratio


def _noise(seed: int) -> Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed))


def _begin(seed: int, row: FittedRow) -> tuple[Tensor, Tensor]:
    """What a run of image to image of so many steps begins with, another picture with noise on it, and its usual levels."""
    levels = karras(EDM(LOW, math.exp(-row.lambdas[0])), row.steps, to_zero=True)
    return _right(seed + 20, True)[0] + _noise(seed) * levels[0].float(), levels


def _right_from(x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The converged picture of a run from there, and what a user without the file gets."""
    fine = uniform_lambda(EDM(LOW, float(levels[0])), 150, to_zero=True)
    exact = sample_dpm_solver_v3(denoiser, x, fine, disable=True)
    return exact, sample_dpm_solver_v3(denoiser, x, levels, disable=True, guidance=2.0)


def _usual(by_karras: bool) -> Tensor:
    return (karras if by_karras else uniform_lambda)(SCHEDULE, STEPS, to_zero=True)


@cache
def _right(seed: int, by_karras: bool) -> tuple[Tensor, Tensor]:
    """The converged picture of a noise, and what a user without the file gets."""
    fine, usual, noise = uniform_lambda(SCHEDULE, 150, to_zero=True), _usual(by_karras), _noise(seed)
    exact = sample_dpm_solver_v3(denoiser, noise * fine[0].float(), fine, disable=True)
    return exact, sample_dpm_solver_v3(denoiser, noise * usual[0].float(), usual, disable=True, guidance=2.0)


def heaviest() -> dict[str, EMSFile]:
    """Files that fill what the format allows: no check has a deadline of its own, so these tell how long one can take."""
    place = EMSMeta("sigma", LOW, HIGH, "EDM", {"name": "heavy"})
    shape, rows = (64, MAX_POINTS, 85), tuple(EvidenceRow(1.0, f"s{k}", 8, "report", 0.1, 0.2, 0.3) for k in range(8192))
    advice = tuple(RecommendedSetting(1.0, f"s{k}", tuple(0.01 * i for i in range(-20, 30)), Settings()) for k in range(1600))
    found = {}
    for name, scales, meta in (("values", 64, place), ("rows", 1, replace(place, evidence=rows, recommendation=advice))):
        size = shape if scales > 1 else (1, 61, 2)
        lambdas = torch.linspace(-math.log(HIGH), -math.log(LOW), size[1], dtype=torch.float64)
        guidance = torch.linspace(1, 20, scales, dtype=torch.float64)
        found[name] = EMSFile(lambdas, guidance, torch.full(size, 0.8), torch.zeros(size), torch.zeros(size), meta)
    return found


def outcome_of(draw: random.Random, folder: Path) -> Result:
    """One file's way."""
    began, ratio = time.process_time(), 0.0
    try:
        file = _commands(hostile(draw), folder)
        took = time.process_time() - began
        said, ratio = _sampled(file, draw)
    except (EMSError, SamplingError) as error:
        seconds, text = time.process_time() - began, str(error)
        return Result(
            "refused", "" if "\n" not in text and text.isprintable() else f"unclear message {text!r:.200}", seconds, 0.0
        )
    except Exception as error:
        return Result("failed", f"{type(error).__name__}: {error!s:.200}", time.process_time() - began, ratio)
    failure = f"took {took:.1f} s" if took > SECONDS else ""
    if ratio > WORSE and not said:
        failure = f"the picture is {ratio:.3g} times as far off, and no message says so"
    return Result("left out" if said else "used", failure, took, ratio)


def run(numbers: range, seed: int) -> tuple[Counter[str], list[str], list[Result]]:
    """Outcomes, failures with what draws them again, and all results."""
    counts: Counter[str] = Counter()
    failures, results = [], []
    with tempfile.TemporaryDirectory() as name:
        for k in numbers:
            result = outcome_of(random.Random(f"{seed} {k}"), Path(name))
            counts[result.outcome] += 1
            results.append(result)
            if result.failure:
                failures.append(f"seed {seed}, number {k}: {result.failure}")
    return counts, failures, results


def main() -> int:
    """Print counts and extremes; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heaviest", action="store_true", help="time the largest files that the format allows instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.heaviest:
        for name, file in heaviest().items():
            data, began = file.encode(), time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                _commands(file, Path(folder))
            print(f"{name}: {len(data) / 2**20:.1f} MiB, all commands {time.process_time() - began:.1f} s of computing")
        return 0
    run(range(20), args.seed + 1)  # what is loaded once does not count
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts, failures, results = run(range(args.first, args.first + args.files), args.seed)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    used = [r.ratio for r in results if r.outcome == "used"]
    print(
        f"longest {max(r.seconds for r in results):.2f} s, memory grown by {grown:.0f} MiB, "
        f"largest error ratio of those used {max(used, default=0):.3g}, failures {len(failures)}"
    )
    for failure in failures[:20]:
        print(f"FAILED: {failure}")
    return 1 if failures or grown > MIB else 0


if __name__ == "__main__":
    sys.exit(main())
