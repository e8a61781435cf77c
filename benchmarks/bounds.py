"""What fits and statistics of sane models need: the largest numbers found, from which the bounds of the file format follow.

    python benchmarks/bounds.py [--only digits emoji]      # networks that are trained in out/zoo; minutes each

Fits are made at every number of steps from 2 to 20 on several spacings, from few noises (as the cheapest effort does), and the
panel's formulas are taken as they are. Statistics are those of the quickest effort.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
from zoo import NETWORKS, Loaded, load

from dpm_solver_v3.ems_tools.compute import EFFORTS, job_for
from dpm_solver_v3.ems_tools.estimate.job import JobState
from dpm_solver_v3.ems_tools.estimate.run import estimate_moments
from dpm_solver_v3.ems_tools.estimate.source import Source
from dpm_solver_v3.ems_tools.fit.panel import entrants
from dpm_solver_v3.ems_tools.fit.spacing import CANDIDATES, Range
from dpm_solver_v3.ems_tools.fit.steps import closed_loop
from dpm_solver_v3.ems_tools.trajectory import Runner, teach
from dpm_solver_v3.sampler import FittedSteps

STEPS, SPACINGS, NOISES = (2, 3, 4, 5, 6, 8, 10, 14, 20), 3, range(6)
COLUMNS = ("start", "1/start", "decay", "-decay", "weight", "row", "|excess|", "late")


def extremes(steps: FittedSteps, low: float) -> list[float]:
    """In the order of COLUMNS; "row" is the sum of a row's sizes, "late" how far the first lambda lies above `low`."""
    rows = list(zip(steps.decay, steps.weights, strict=True))
    return [
        steps.start,
        1 / steps.start,
        max(steps.decay),
        -min(steps.decay),
        max(abs(w) for _, row in rows for w in row),
        max(sum(map(abs, row)) for _, row in rows),
        max(abs(d + sum(row) - 1) for d, row in rows),
        steps.lambdas[0] - low,
    ]


def show(name: str, found: list[list[float]]) -> None:
    """A line of the table: the largest of each column."""
    print(f"{name:<26} " + " ".join(f"{max(column):8.3g}" for column in zip(*found, strict=True)), flush=True)


def fits(network: Loaded, guidance: float) -> list[list[float]]:
    """Of fits on one network at one scale."""
    model = network.denoiser(guidance, network.entry.classes_of("fit"))
    job = job_for(Source({guidance: model}, network.entry.shape, network.entry.schedule, {}), EFFORTS["quick"])
    runner = Runner(job, model, batch=32)
    teacher, span = teach(runner, NOISES), Range.of(job.lambdas, network.entry.schedule)
    found = []
    for n in STEPS:
        for spacing in CANDIDATES[:SPACINGS]:
            steps, _ = closed_loop(runner, NOISES, teacher, spacing.lambdas(n, span, teacher))
            found.append(extremes(steps, span.low))
    return found


def statistics(network: Loaded, guidance: float) -> str:
    """The ranges of l, s and b."""
    model = network.denoiser(guidance, network.entry.classes_of("fit"))
    source = Source({guidance: model}, network.entry.shape, network.entry.schedule, {})
    job, state = job_for(source, EFFORTS["quick"]), JobState()
    moments = estimate_moments(source.models, job, state, batch=32)[0]
    return ", ".join(f"{n} {v.min():.3g} to {v.max():.3g}" for n, v in zip("lsb", moments.values(), strict=True))


def formulas(low: float, high: float) -> list[list[float]]:
    """Of all formulas on all schedules of the panel over a range of lambda."""
    found = []
    for entrant in entrants(1000, Range(low, high), {}):
        for n in STEPS:
            try:
                found.append(extremes(entrant.steps(n, list), low))
            except ValueError:
                continue
    return found


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(NETWORKS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'fits':<26} " + " ".join(f"{name:>8}" for name in COLUMNS))
    for name in args.only:
        try:
            network = load(name)
        except FileNotFoundError:
            continue
        for guidance in network.entry.guidances:
            show(f"{name}, guidance {guidance:g}", fits(network, guidance))
            print(f"    {statistics(network, guidance)}", flush=True)
    for low, high in ((-2.7, 3.5), (-4.4, 6.2), (-5.0, 5.0), (-6.9, 4.6)):
        show(f"formulas, {low:g} to {high:g}", [row for row in formulas(low, high) if all(map(math.isfinite, row))])
    return 0


if __name__ == "__main__":
    sys.exit(main())
