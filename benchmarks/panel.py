"""Which formulas on which schedules the fit has to beat: the order of `panel.LIKELIEST`, chosen over the zoo.

    python benchmarks/panel.py [--only NAME ...] [--guidance 1 4] [--steps 5 8] [--json out/panel.json] [--count 14]

Every formula of the panel runs on every schedule, on every network of development, guidance scale and step count. Entrants are
then taken one by one, each the one that lowers most what the best entrant so far loses to the best of k-diffusion's and
diffusers' samplers on some twenty schedules (mean log of the ratio over cells, no better than equal counted, every network of
the same weight). What the first 2, 8, 14 lose is printed for a network that took no part in the choice. Cells that the file
names are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from common import geometric_mean
from entrants import host_schedules
from torch import Tensor
from zoo import NETWORKS, load
from zoo.bench import Bench, Size

from dpm_solver_v3.ems_tools.fit import panel
from dpm_solver_v3.ems_tools.fit.spacing import Range

Cells = dict[str, dict[str, float]]
"""By "network guidance steps": log error of every entrant over the best rival's."""
DEVELOPMENT = tuple(n for n, e in NETWORKS.items() if e.split == "development" and n != "photographs")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=DEVELOPMENT, choices=sorted(NETWORKS))
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8])
    parser.add_argument("--noises", type=int, default=8)
    parser.add_argument("--count", type=int, default=14, help="entrants to choose")
    parser.add_argument("--json", type=Path, default=Path(__file__).resolve().parents[1] / "out" / "panel.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    cells: Cells = json.loads(args.json.read_text()) if args.json.exists() else {}
    size = Size(tuple(args.steps), args.noises, 2, 6, 12)
    for name in args.only:
        for guidance in [g for g in load(name).entry.guidances if g in args.guidance]:
            if missing := [n for n in args.steps if f"{name} {guidance:g} {n}" not in cells]:
                measure(name, guidance, missing, size, cells)
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(cells))
    report({k: v for k, v in cells.items() if k.split()[0] in args.only and int(k.split()[2]) in args.steps}, args.count)


def measure(name: str, guidance: float, steps: Iterable[int], size: Size, cells: Cells) -> None:
    """Run all entrants and rivals on one network."""
    network = load(name)
    bench = Bench(network, guidance, size)
    span = Range.of((-math.log(bench.high), -math.log(bench.low)), network.entry.schedule)
    hosts = {k: _lambdas(v) for k, v in host_schedules(network.entry.schedule).items() if k in ("sgm_uniform", "kl_optimal")}
    for n in steps:
        rival, theirs = bench.best_rival(n)
        found = cells[f"{name} {guidance:g} {n}"] = {}
        for entrant in panel.entrants(10_000, span, hosts):
            try:
                mine = bench.fitted_errors(entrant.steps(n, list))
            except ValueError:
                continue
            found[f"{entrant.schedule} / {entrant.formula}"] = math.log(geometric_mean(mine) / geometric_mean(theirs))
        best = min(found, key=lambda e: found[e])
        print(f"{name}, {guidance:g}, {n} steps: {best} {math.exp(found[best]):.2f} of {rival}", flush=True)


def _lambdas(make: Callable[[int], Tensor]) -> Callable[[int], tuple[list[float], float]]:
    def of(n: int) -> tuple[list[float], float]:
        own: list[float] = (-make(n).log()).tolist()
        return own[:-1], own[-1]

    return of


def report(cells: Cells, count: int) -> None:
    """The order chosen on all networks, and what it loses on each when that one took no part."""
    networks = sorted({k.split()[0] for k in cells})
    print("entrants, in the order of their choice:")
    for name in cover(cells, count):
        print(f"    {name}")
    now = [f"{s} / {f}" for s, f in panel.LIKELIEST]
    for left_out in networks if len(networks) > 1 else []:
        theirs = {k: v for k, v in cells.items() if k.split()[0] == left_out}
        order = cover({k: v for k, v in cells.items() if k not in theirs}, count)
        words = []
        for many in (2, 8, 14, 1000):
            losses = [best_of(v, order[:many] if many < 1000 else list(v)) for v in theirs.values()]
            old = [best_of(v, now[:many] if many < 1000 else list(v)) for v in theirs.values()]
            words.append(f"{many}: {math.exp(sum(losses) / len(losses)):.2f} ({math.exp(sum(old) / len(old)):.2f})")
        print(f"{left_out} left out, best of the first entrants over the best rival (the present order): " + ", ".join(words))


def cover(cells: Cells, count: int) -> list[str]:
    """Entrants taken one by one, each the one that lowers the mean over networks most."""
    names = set.intersection(*(set(v) for v in cells.values()))
    chosen: list[str] = []
    while len(chosen) < min(count, len(names)):
        chosen.append(min(sorted(names - set(chosen)), key=lambda e: _mean(cells, [*chosen, e])))
    return chosen


def _mean(cells: Cells, chosen: list[str]) -> float:
    """Mean over networks of the mean over cells of the best chosen entrant's log ratio, no better than equal counted."""
    by_network: dict[str, list[float]] = {}
    for key, scores in cells.items():
        by_network.setdefault(key.split()[0], []).append(max(best_of(scores, chosen), 0.0))
    means = [sum(v) / len(v) for v in by_network.values()]
    return sum(means) / len(means)


def best_of(scores: Mapping[str, float], chosen: Iterable[str]) -> float:
    """Lowest log ratio of the chosen entrants."""
    return min(scores.get(name, math.inf) for name in chosen)


if __name__ == "__main__":
    main()
