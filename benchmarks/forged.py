"""Does `ems verify --model` tell right statistics of the embedded model from wrong ones? Error rates, with 95 % intervals.

    python benchmarks/forged.py                   # about ten minutes on one core
    python benchmarks/forged.py --checks 40       # more checks: narrower intervals

Right files: the shipped one, and files computed here with other seeds and efforts. Every check uses fresh noise. Wrong files
are right ones, changed and signed anew (format and checksum are right), so that only the model can tell.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpm_solver_v3.ems_tools import embedded
from dpm_solver_v3.ems_tools.compute import EFFORTS, compute_ems, job_for, plan_for
from dpm_solver_v3.ems_tools.estimate.job import Job
from dpm_solver_v3.ems_tools.estimate.source import Source
from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.reader import decode_ems_file, load_ems_file
from dpm_solver_v3.ems_tools.file.rows import EvidenceRow
from dpm_solver_v3.ems_tools.judge.consistency import consistency_problems
from dpm_solver_v3.ems_tools.judge.measure import SAMPLES, Measured, measure
from dpm_solver_v3.ems_tools.judge.spot_check import ALPHA, SpotCheck, confirmed, judge, statistics_checks
from dpm_solver_v3.sampler import VPDiscrete

__all__ = ["FORGERIES", "forged", "right_files", "verdict"]

SHIPPED = Path(__file__).resolve().parents[1] / "stats" / "embedded-emoji.ems.safetensors"

Forgery = Callable[[EMSFile], EMSFile]
Cache = dict[tuple[object, ...], Measured]
SIZE = {"samples": SAMPLES}
"""Trajectories of a check, as `ems verify --samples`."""


def _scaled(name: str, factor: float) -> Forgery:
    return lambda file: _with(file, name, getattr(file, name) * factor)


def _with(file: EMSFile, name: str, value: Tensor) -> EMSFile:
    """The file with another l, s or b."""
    changed: dict[str, Any] = {name: value}
    return replace(file, **changed)


def _bumped(name: str, height: float) -> Forgery:
    """A smooth bump in the middle of the range."""

    def change(file: EMSFile) -> EMSFile:
        u = torch.linspace(-1, 1, len(file.lambdas), dtype=torch.float64)
        bump = (height * torch.exp(-8 * u**2)).to(file.l.dtype)
        value: Tensor = getattr(file, name)
        return _with(file, name, value + bump.reshape(1, -1, *(1,) * (value.ndim - 2)))

    return change


def _shifted_in_lambda(by: float) -> Forgery:
    """The values of lambda + `by`; the grid stays."""

    def change(file: EMSFile) -> EMSFile:
        tables = []
        for g in range(len(file.guidance)):
            ems = replace(file.at(file.guidance[g].item()), recommendation=None)
            lam = (file.lambdas + by).clamp(file.lambdas[0], file.lambdas[-1])
            tables.append(ems.at(lam))
        l, s, b = (torch.stack(v).to(file.l.dtype) for v in zip(*tables, strict=True))
        return replace(file, l=l, s=s, b=b)

    return change


def _rolled_channels(file: EMSFile) -> EMSFile:
    return replace(file, **{name: getattr(file, name).roll(1, 2) for name in "lsb"})


def _other_scale(g: int) -> Forgery:
    """The statistics of the shipped file's g-th scale, under this file's own scales."""

    def change(file: EMSFile) -> EMSFile:
        other = load_ems_file(SHIPPED).at(load_ems_file(SHIPPED).guidance[g].item())
        tables = other.at(file.lambdas)
        scales = len(file.guidance)
        for name, table in zip("lsb", tables, strict=True):
            file = _with(file, name, table.to(file.l.dtype).expand(scales, *table.shape))
        return file

    return change


def _degenerate(file: EMSFile) -> EMSFile:
    return replace(file, l=torch.ones_like(file.l), s=torch.zeros_like(file.s), b=torch.zeros_like(file.b))


def _better_evidence(factor: float) -> Forgery:
    """Errors with EMS that are `factor` times the measured ones, and a recommendation to match."""

    def better(row: EvidenceRow) -> EvidenceRow:
        return replace(row, ems=row.ems * factor, full_strength=row.full_strength * factor)

    return lambda file: replace(file, meta=replace(file.meta, evidence=tuple(map(better, file.meta.evidence))))


def _worse_rival(factor: float) -> Forgery:
    """Errors without EMS that are `factor` times the measured ones."""

    def change(file: EMSFile) -> EMSFile:
        rows = tuple(replace(row, data_prediction=row.data_prediction * factor) for row in file.meta.evidence)
        return replace(file, meta=replace(file.meta, evidence=rows))

    return change


FORGERIES: dict[str, Forgery] = {
    **{f"{name} x {factor:g}": _scaled(name, factor) for name in "lsb" for factor in (0.5, 0.8, 0.9, 1.1, 1.25)},
    **{f"bump of {h:g} on {name}": _bumped(name, h) for name in "lsb" for h in (0.05, 0.1, 0.2)},
    **{f"shifted by {by:+g} in lambda": _shifted_in_lambda(by) for by in (-0.5, 0.25, 0.5, 1.0)},
    "channels in another order": _rolled_channels,
    "statistics of guidance 2": _other_scale(1),
    "statistics of guidance 4": _other_scale(2),
    "statistics of guidance 7.5": _other_scale(3),
    "l = 1, s = b = 0": _degenerate,
    **{f"error with EMS x {factor:g}": _better_evidence(factor) for factor in (0.1, 0.3, 0.5, 0.7)},
    **{f"error without EMS x {factor:g}": _worse_rival(factor) for factor in (2, 4, 10)},
}
"""What is forged: the name says which numbers are changed and by how much."""


def forged(file: EMSFile, name: str) -> EMSFile:
    """A forgery as a reader gets it: written and read again, so that its format and checksum are right."""
    return decode_ems_file(FORGERIES[name](file).encode(), name)


def source(guidance: float) -> Source:
    """The embedded model at one scale."""
    network = embedded.load_network()
    models = {guidance: embedded.GuidedDenoiser(network, torch.arange(embedded.NULL_CLASS), guidance)}
    return Source(models, embedded.SHAPE, VPDiscrete.linear(), {"name": "embedded-emoji"})


def right_files(subject: Source, seeds: int, folder: Path) -> dict[str, EMSFile]:
    """The shipped file's part for this scale, and `seeds` files computed with "quick" and with half of "standard"."""
    guidance = next(iter(subject.models))
    files = {"shipped (thorough)": _one_scale(load_ems_file(SHIPPED), guidance)}
    half = replace(EFFORTS["standard"], samples=24, steps=(5, 8), schedules=1)
    for seed in range(1, seeds + 1):
        for name, effort in (("quick", EFFORTS["quick"]), ("half of standard", half)):
            job = job_for(subject, effort, seed)
            plan = replace(plan_for(subject, effort), fit=None)
            files[f"{name}, seed {seed}"] = compute_ems(subject, job, plan, folder / f"{name} {seed}.ems.safetensors")
    return files


def _one_scale(file: EMSFile, guidance: float) -> EMSFile:
    at = file.guidance.tolist().index(guidance)
    meta = replace(
        file.meta,
        evidence=tuple(r for r in file.meta.evidence if r.guidance == guidance),
        recommendation=tuple(r for r in file.meta.recommendation if r.guidance == guidance),
        fitted=tuple(r for r in file.meta.fitted if r.guidance == guidance),
    )
    tables = {name: getattr(file, name)[at : at + 1] for name in "lsb"}
    errors = {name: e[at : at + 1] for name, e in file.errors.items()} if file.errors else None
    return replace(file, guidance=file.guidance[at : at + 1], meta=meta, errors=errors, **tables)


def verdict(file: EMSFile, subject: Source, seed: int, cache: Cache, evidence: bool = True) -> SpotCheck:
    """What `ems verify --model` finds with this seed: what fails must fail on other noise too."""

    def check(measured: Measured) -> SpotCheck:
        if not evidence:
            return SpotCheck(tuple(statistics_checks(file, measured)), measured.evaluations)
        checks, used = judge(file, subject.models[measured.guidance], measured, seed)
        return SpotCheck(tuple(checks), measured.evaluations + used)

    first = check(_measured(subject, file, seed, cache))
    return confirmed(first, check(_measured(subject, file, seed + 500_009, cache))) if first.problems else first


def _refused(file: EMSFile, subject: Source, seed: int, cache: Cache, evidence: bool) -> bool:
    """Whether the file fails; the evidence, which costs time, is tried only where it is what was forged."""
    return bool(consistency_problems(file)) or bool(verdict(file, subject, seed, cache, evidence).problems)


def _measured(subject: Source, file: EMSFile, seed: int, cache: Cache) -> Measured:
    guidance = next(iter(subject.models))
    samples = SIZE["samples"]
    lambdas = tuple(file.lambdas.tolist())
    key = (lambdas, seed)
    if key not in cache:
        job = Job(subject.shape, lambdas, subject.schedule.space, samples, (guidance,), seed)
        cache[key] = measure(subject.models[guidance], job, guidance, samples=samples)
    return cache[key]


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a rate."""
    z = 1.96
    centre, half = (hits + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def main() -> int:
    """Print the rates; 1 if right files fail more often than stated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", type=int, default=12, help="fresh noises per right file (12)")
    parser.add_argument("--forged-checks", type=int, default=6, help="fresh noises per forgery and right file (6)")
    parser.add_argument("--seeds", type=int, default=2, help="right files of each effort (2)")
    parser.add_argument("--guidance", type=float, default=1.0, help="scale (1); the shipped file has 1, 2, 4, 7.5")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"trajectories of a check ({SAMPLES})")
    args = parser.parse_args()
    SIZE["samples"] = args.samples
    torch.set_num_threads(1)
    began = time.monotonic()
    subject = source(args.guidance)
    cache: Cache = {}
    with tempfile.TemporaryDirectory() as folder:
        right = right_files(subject, args.seeds, Path(folder))
    print(f"guidance {args.guidance:g}; {len(right)} right files made in {time.monotonic() - began:.0f} s", flush=True)
    accepted, total, evaluations = 0, 0, 0
    print(f"\n{'right files':<28} {'accepted':>9}   smallest p of each check's tests")
    for name, file in right.items():
        if consistency_problems(file):
            print(f"FAILED: {name}: {consistency_problems(file)[0]}")
            return 1
        results = [verdict(file, subject, 7000 + k, cache) for k in range(args.checks)]
        good = sum(not r.problems for r in results)
        smallest = " ".join(f"{min(c.p for c in r.checks):.0e}" for r in results)
        print(f"{name:<28} {good:4} / {len(results):<3}  {smallest}", flush=True)
        accepted, total, evaluations = accepted + good, total + len(results), results[0].evaluations
    low, high = wilson(total - accepted, total)
    rate = f"{total - accepted} of {total} refused, {100 * low:.1f} to {100 * high:.1f} %"
    print(f"false alarms: {rate}; stated: at most {100 * ALPHA:g} %. One check takes {evaluations} evaluations.")
    print(f"\n{'wrong files':<30} {'refused':>9}   95 % interval")
    for name in FORGERIES:
        if name == f"statistics of guidance {args.guidance:g}":
            continue
        refused = n = 0
        for file in right.values():
            try:
                fake = forged(file, name)
            except ValueError as error:  # the format itself refuses it
                print(f"{name}: {error}")
                continue
            for k in range(args.forged_checks):
                refused += _refused(fake, subject, 7000 + k, cache, "error" in name)
                n += 1
        low, high = wilson(refused, n)
        print(f"{name:<30} {refused:4} / {n:<3}  {100 * low:3.0f} to {100 * high:3.0f} %", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s")
    return 1 if wilson(total - accepted, total)[0] > ALPHA else 0


if __name__ == "__main__":
    sys.exit(main())
