"""Does the first run with steps in fewer passes of somebody else tell right ones from wrong ones? Counts, on the zoo.

    python benchmarks/first_passes.py [--only waves digits] [--runs 60] [--effort quick]

Each trial is the first run of a user with a file of somebody else's that holds steps in fewer passes: a row, a class and a
noise drawn at random. Right files are fitted as `benchmarks/passes.py` does it; wrong ones have a row's decay or weights times
1.15, every weight times a factor drawn from 0.5 to 1.5, or the row of another guidance scale. "harm" is the squared error of
the picture in fewer passes over that of guided Karras steps without a file in as many passes, on that one noise; the reference
is a run of 80 steps. "extra" are the passes beyond those of the row.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from common import OUT
from passes import source_of
from torch import Tensor
from zoo import Loaded, load

from dpm_solver_v3.ems_tools.compute import EFFORTS, compute_ems, job_for, plan_for
from dpm_solver_v3.ems_tools.file import EMSFile, load_ems_file
from dpm_solver_v3.ems_tools.file.rows import FittedRow, insane
from dpm_solver_v3.ems_tools.hosting import Origin, TrustBook, sample_on_trial
from dpm_solver_v3.sampler import EDM, FittedSteps, karras, sample_dpm_solver_v3

KINDS = ("right", "decay x 1.15", "weights x 1.15", "random weights", "another scale")
STEPS = (4, 5, 6, 8)
"""Guided steps whose passes are spent."""
COLUMNS = ("refused", "harm <= 1.5", "passed", "harm > 1.5", "worst", "most extra")


@dataclass(frozen=True)
class Outcome:
    """What one first run showed."""

    refused: bool
    extra: int
    harm: float


def computed(network: Loaded, guidance: float, effort: str) -> EMSFile:
    """The network's file at one scale, computed if it is not there yet."""
    path = OUT / f"first-passes-{network.name}-{guidance:g}-{effort}.ems.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        source = source_of(network, guidance, "fit")
        job, plan = job_for(source, EFFORTS[effort], steps=STEPS), plan_for(source, EFFORTS[effort], STEPS, passes=True)
        compute_ems(source, job, plan, path, batch=32)
    return load_ems_file(path)


def changed(row: FittedRow, kind: str, others: list[FittedRow], draw: random.Random) -> FittedRow | None:
    """The row as a stranger would have it; None where no file can hold that."""
    steps = row.coefficients
    assert steps is not None
    if kind == "another scale":
        found = [r for r in others if r.passes == row.passes]
        return replace(draw.choice(found), guidance=row.guidance) if found else None
    factor: Callable[[], float] = lambda: 1.0  # noqa: E731
    if kind == "weights x 1.15":
        factor = lambda: 1.15  # noqa: E731
    if kind == "random weights":
        factor = lambda: draw.uniform(0.5, 1.5)  # noqa: E731
    weights = tuple(tuple(w * factor() for w in row) for row in steps.weights)
    decay = tuple(1.15 * v for v in steps.decay) if kind == "decay x 1.15" else steps.decay
    steps = replace(steps, decay=decay, weights=weights)
    return None if insane(steps) else replace(row, coefficients=steps)


class Answers:
    """Both answers of a network for one class; counts its passes."""

    def __init__(self, network: Loaded, guidance: float, label: int) -> None:
        self.conditional, self.guided = (network.denoiser(g, [label]) for g in (1.0, guidance))
        self.passes = 0

    def model(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D of x [B, C, H, W] at sigma [B]."""
        self.passes += 2
        denoised: Tensor = self.guided(x, sigma)
        return denoised

    def answers(self, x: Tensor, sigma: Tensor, both: bool) -> tuple[Tensor, ...]:
        """(c,) or (c, D)."""
        self.passes += 1 + both
        c: Tensor = self.conditional(x, sigma)
        return (c, self.guided(x, sigma)) if both else (c,)


def trial(file: EMSFile, steps: FittedSteps, guidance: float, network: Loaded, draw: random.Random) -> Outcome:
    """The first run with these steps of `file`."""
    model = Answers(network, guidance, draw.randrange(network.entry.classes))
    noise = torch.randn(1, *network.entry.shape, generator=torch.Generator().manual_seed(draw.randrange(2**31)))
    levels = torch.tensor([-lam for lam in steps.lambdas], dtype=torch.float64).exp()
    levels = torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
    x, told = (noise * levels[0]).float(), list[str]()
    ems = file.at(guidance)
    sample_on_trial(
        TrustBook(None),
        Origin(file, "theirs"),
        told.append,
        model.model,
        x,
        levels,
        disable=True,
        ems=ems,
        guidance=guidance,
        passes=model.answers,
    )
    extra = model.passes - steps.passes
    blind = sample_dpm_solver_v3(model.model, x, levels, disable=True, ems=ems, guidance=guidance, passes=model.answers)
    high, low = network.ends
    plain = karras(EDM(low, high), steps.passes // 2, to_zero=True)
    without = sample_dpm_solver_v3(model.model, (noise * high).float(), plain, disable=True, guidance=guidance)
    fine = karras(EDM(low, high), 80, to_zero=True)
    exact = sample_dpm_solver_v3(model.model, (noise * high).float(), fine, disable=True, guidance=guidance)
    harm = float((blind - exact).square().mean()) / float((without - exact).square().mean())
    return Outcome(bool(told), extra, harm)


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["waves", "digits"], help="networks of the zoo")
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0, 4.0])
    parser.add_argument("--runs", type=int, default=60, help="of each kind and network")
    parser.add_argument("--effort", choices=sorted(EFFORTS), default="quick", help="of the fit")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'network':<10} {'row':<15} {'runs':>5} " + " ".join(f"{name:>11}" for name in COLUMNS))
    for name in args.only:
        network = load(name)
        files = {g: computed(network, g, args.effort) for g in args.guidance}
        for kind in KINDS:
            print(f"{name:<10} {kind:<15} " + _counts(network, files, kind, args.runs, args.seed), flush=True)


def _counts(network: Loaded, files: dict[float, EMSFile], kind: str, runs: int, seed: int) -> str:
    draw, found = random.Random(f"{seed} {network.name} {kind}"), list[Outcome]()
    scales = [g for g, file in files.items() if file.meta.passes]
    for _ in range(20 * runs):
        if len(found) == runs or not scales:
            break
        guidance = draw.choice(scales)
        file = files[guidance]
        others = [r for g, other in files.items() if g != guidance for r in other.meta.passes]
        row = changed(draw.choice(file.meta.passes), kind, others, draw)
        if row is None or row.coefficients is None:
            continue
        theirs = replace(file, meta=replace(file.meta, passes=(row,)))
        found.append(trial(theirs, row.coefficients, guidance, network, draw))
    return counted(found)


def counted(found: list[Outcome]) -> str:
    """How many runs, and COLUMNS of them."""
    refused, passed = [o for o in found if o.refused], [o for o in found if not o.refused]
    needless, harmful = sum(o.harm <= 1.5 for o in refused), [o.harm for o in passed if o.harm > 1.5]
    most = max((o.extra for o in passed), default=0)
    counts = (len(refused), needless, len(passed), len(harmful), f"{max(harmful, default=0.0):.3g}", most)
    return f"{len(found):5} " + " ".join(f"{value:>11}" for value in counts)


if __name__ == "__main__":
    main()
