"""Does the first sampling run with a statistics file tell right files from forged ones? Counts, on the embedded model.

    python benchmarks/first_run.py                 # 100 right and 100 forged files, some minutes on one core
    python benchmarks/first_run.py --network waves --file waves.ems.safetensors    # another one; computes its file first

Each trial is the first run of a user with a file of somebody else's: a scale, a number of steps, a schedule, a class and a
noise drawn at random. Right files are the shipped one (of other networks one of effort "standard" with two schedules and the
fit of "quick"), its l, s and b drawn anew within their standard errors, as other seeds would give them. Forgeries: s x 3, b +
0.05, l = -2, fitted decay x 1.15. "harm" is the squared error of the picture that the file gives, over that without it, on
that one noise; the reference is a run of 80 steps. A false alarm is a right file that is refused though its picture is at
most 1.5 times as far off ("harm <= 1.5"): some right ones are further off on single noises.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from zoo import Loaded, load

from dpm_solver_v3.ems_tools.compute import EFFORTS, compute_ems, job_for, plan_for
from dpm_solver_v3.ems_tools.estimate.source import Source
from dpm_solver_v3.ems_tools.file import EMSFile, load_ems_file
from dpm_solver_v3.ems_tools.hosting import Origin, TrustBook, sample_on_trial
from dpm_solver_v3.sampler import (
    EDM,
    NoiseSchedule,
    SamplingError,
    cosine_time,
    karras,
    sample_dpm_solver_v3,
    uniform_lambda,
    uniform_time,
)

__all__ = ["KINDS", "Outcome", "forged", "trial"]

SHIPPED = Path(__file__).resolve().parents[1] / "stats" / "embedded-emoji.ems.safetensors"
KINDS = ("s x 3", "b + 0.05", "l = -2", "decay x 1.15")
KNOTS = 8


@dataclass(frozen=True)
class Outcome:
    """What one first run showed; `harm` of the picture that the file alone would have given."""

    refused: bool
    extra: int
    harm: float
    delivered: float


def right(file: EMSFile, seed: int) -> EMSFile:
    """The file as another seed would have given it: errors of the size stated, which change sign a few times over lambda."""
    draw = torch.Generator().manual_seed(seed)
    assert file.errors is not None
    changed = {}
    for name in ("l", "s", "b"):
        value, error = getattr(file, name), file.errors[name].float()
        scales, points, channels = value.shape
        knots = torch.randn(scales, channels, KNOTS, generator=draw)
        wave = torch.nn.functional.interpolate(knots, points, mode="linear", align_corners=True)
        changed[name] = value + error * wave.transpose(1, 2)
    return replace(file, l=changed["l"], s=changed["s"], b=changed["b"])


def forged(file: EMSFile, kind: str) -> EMSFile:
    """The file as a stranger would change it: valid in form."""
    if kind == "s x 3":
        return replace(file, s=3 * file.s)
    if kind == "b + 0.05":
        return replace(file, b=file.b + 0.05)
    if kind == "l = -2":
        return replace(file, l=torch.full_like(file.l, -2.0))
    rows = []
    for row in file.meta.fitted:
        c = row.coefficients
        rows.append(row if c is None else replace(row, coefficients=replace(c, decay=tuple(1.15 * v for v in c.decay))))
    return replace(file, meta=replace(file.meta, fitted=tuple(rows)))


class Counted:
    """A denoiser that counts its evaluations."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.calls = model, 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D of x [B, C, H, W] at sigma [B]."""
        self.calls += 1
        denoised: Tensor = self.model(x, sigma)
        return denoised


def computed(network: Loaded, path: Path) -> EMSFile:
    """The network's file at guidance 1 and 4, computed if it is not there yet."""
    if not path.exists():
        entry = network.entry
        models = {g: network.denoiser(g, entry.classes_of("fit")) for g in entry.guidances if g in (1.0, 4.0)}
        source = Source(models, entry.shape, entry.schedule, {})
        effort = replace(EFFORTS["standard"], schedules=2, fit=EFFORTS["quick"].fit)
        compute_ems(source, job_for(source, effort), plan_for(source, effort), path, batch=32)
    return load_ems_file(path)


def levels_of(schedule: NoiseSchedule, draw: random.Random) -> Tensor:
    """Of one of four schedules at one of seven numbers of steps."""
    make = draw.choice((karras, uniform_time, cosine_time, uniform_lambda))
    return make(schedule, draw.choice((5, 6, 8, 10, 12, 15, 20)), to_zero=make is not uniform_lambda)


def trial(file: EMSFile, network: Loaded, draw: random.Random, fitted: bool) -> Outcome:
    """The first run with `file`, on steps fitted in it or on a schedule drawn."""
    entry, guidance = network.entry, draw.choice(file.guidance.tolist())
    counts = sorted(r.steps for r in file.meta.fitted if r.guidance == guidance and r.coefficients is not None)
    fitted = fitted and bool(counts)
    levels = file.fitted_sigmas(draw.choice(counts), guidance) if fitted else levels_of(entry.schedule, draw)
    model = Counted(network.denoiser(guidance, [draw.randrange(max(entry.classes, 1))]))
    noise = torch.randn(1, *entry.shape, generator=torch.Generator().manual_seed(draw.randrange(2**31)))
    told: list[str] = []
    x, book = (noise * levels[0]).float(), TrustBook(None)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        got = sample_on_trial(
            book, Origin(file, "theirs"), told.append, model, x, levels, disable=True, ems=file.at(guidance), guidance=guidance
        )
        said = told + [str(w.message) for w in warned]
        extra = model.calls - (len(levels) - 1) * (2 if told else 1)
        without = sample_dpm_solver_v3(model, x, levels, disable=True, guidance=guidance)
        try:
            blind = sample_dpm_solver_v3(model, x, levels, disable=True, ems=file.at(guidance), guidance=guidance)
        except SamplingError:
            blind = x
    fine = karras(EDM(network.ends[1], network.ends[0]), 80, to_zero=bool(levels[-1] == 0))
    if levels[-1] > 0:
        fine = torch.cat([fine[fine > levels[-1]], levels[-1:]])
    exact = sample_dpm_solver_v3(model, (noise * fine[0]).float(), fine, disable=True, guidance=guidance)
    error = float((without - exact).square().mean())
    harm, delivered = (float((v - exact).square().mean()) / error for v in (blind, got))
    return Outcome(bool(said), extra, harm, delivered)


def main() -> int:
    """Print the counts; 1 if a harmful picture was delivered without a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100, help="right ones, and as many forged ones (100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--network", default="emoji", help="of the zoo; emoji is the embedded model")
    parser.add_argument("--file", type=Path, default=SHIPPED, help="of the network; is computed where it does not exist")
    args = parser.parse_args()
    torch.set_num_threads(1)
    network = load(args.network)
    shipped = computed(network, args.file)
    columns = ("refused", "harm <= 1.5", "passed", "harm > 1.5", "worst", "most extra")
    print(f"{'file':<14} {'runs':>5} " + " ".join(f"{name:>11}" for name in columns))
    bad = 0
    for kind in ("right", *KINDS):
        draw, tally, worst, most = random.Random(f"{args.seed} {kind}"), Counter[str](), 0.0, 0
        for k in range(args.files if kind == "right" else args.files // len(KINDS)):
            file = right(shipped, draw.randrange(2**31))
            file = file if kind == "right" else forged(file, kind)
            found = trial(file, network, draw, kind == "decay x 1.15" or (kind == "right" and k % 2 == 0))
            harmful = not found.refused and found.delivered > 1.5
            needless = found.refused and found.harm <= 1.5
            tally.update(["refused" if found.refused else "passed", *(["harmful"] * harmful), *(["needless"] * needless)])
            worst, most = max(worst, found.delivered if harmful else 0.0), max(most, found.extra)
        bad += tally["harmful"] if kind != "right" else 0
        counts = (tally["refused"], tally["needless"], tally["passed"], tally["harmful"], f"{worst:.3g}", most)
        runs = tally["refused"] + tally["passed"]
        print(f"{kind:<14} {runs:5} " + " ".join(f"{value:>11}" for value in counts), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
