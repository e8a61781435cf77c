"""Few-step error of DPM-Solver-v3 against the samplers of published libraries, on the embedded model.

    python benchmarks/quality.py [--noises 64] [--quick] [--json out/quality.json]
    python benchmarks/quality.py --contest --ems out/fitted.ems.safetensors --classes 1,3,5,7 --steps 4 5 6 8 10

--contest adds every schedule of the hosts, GITS and Align Your Steps on the model's own trajectories, samplers with two calls a
step, ComfyUI's samplers where COMFYUI_PATH names a checkout, and v3 on the schedule fitted to the model with its ablations.
--classes judges on these only: those that the fit has not seen. Other networks than the embedded one: `zoo.py`.

Every run starts from the same noise and makes the same number of denoiser evaluations. Each method's schedule, the
best rival and our best setting are chosen on selection noise; the errors are measured on evaluation noise that took no
part in the choice. Choices go by the geometric mean of the per-sample mean squared error.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    OUT,
    SCHEDULES,
    Problem,
    bootstrap_ratio,
    geometric_mean,
    per_sample_error,
    schedules_on,
    summary,
)
from entrants import align_your_steps, comfyui_rivals, gits, host_schedules, two_calls
from rivals import RIVALS, Rival
from torch import Tensor, nn
from tqdm import tqdm

from dpm_solver_v3.sampler import EMS, SamplingError, StepInfo, sample_dpm_solver_v3

OURS: dict[str, dict[str, Any]] = {
    "auto": {},
    "order 2": {"order": 2, "corrector": "none", "strength": 1.0},
    "order 2, pseudo corrector": {"order": 2, "corrector": "pseudo", "strength": 1.0},
}
"""Our settings; "auto" follows the file's recommendation, or the defaults without a file."""
WITH, WITHOUT = "v3 + EMS: ", "v3 without EMS: "
FITTED = "v3 fitted: "
SCREEN = ("karras", "karras_to_zero", "uniform_lambda", "uniform_time")
"""Schedules of a contest's first heat; a rival that is hopeless on all of them runs on no other."""
SELECTION_SEED, EVALUATION_SEED = 1, 2
HOPELESS, HOPELESS_IN_CONTEST = 4.0, 2.0
"""A rival this many times worse than the best one on the first selection noise goes no further."""
FINALISTS = 3
"""Schedules of a method that stay for the rest of the selection noise."""


@dataclass(frozen=True)
class Plan:
    """The size of a run."""

    guidances: tuple[float, ...] = (1.0, 2.0, 4.0, 7.5)
    steps: tuple[int, ...] = (5, 6, 8, 10)
    schedules: tuple[str, ...] = tuple(SCHEDULES)
    rivals: tuple[str, ...] = tuple(name for name in RIVALS if name != "dpmpp_2m_diffusers")  # dpmpp_2m again
    ours: tuple[str, ...] = tuple(OURS)
    first: int = 5
    selection: int = 18
    noises: int = 64
    batch: int = 32
    reference_steps: int = 200
    target: str = "clean"
    classes: tuple[int, ...] = ()
    contest: bool = False

    def samples(self, count: int, start: int = 0) -> list[int]:
        """The first samples of a seed whose class is judged, from the `start`-th on."""
        fits = [k for k in range(100 * count) if not self.classes or k % Problem.classes in self.classes]
        return fits[start:count]


QUICK = Plan(
    guidances=(1.0, 4.0),
    steps=(5, 10),
    schedules=("uniform_lambda", "uniform_lambda_to_zero", "uniform_time", "karras_to_zero"),
    rivals=("dpmpp_2m", "unipc_bh1_2", "unipc_bh2_3", "deis_3", "ipndm"),
    ours=("auto",),
    first=2,
    selection=3,
    noises=6,
    reference_steps=60,
)


class Counted(nn.Module):
    """A denoiser that moves the progress bar by the images that pass through the network."""

    def __init__(self, denoiser: nn.Module, bar: tqdm) -> None:
        super().__init__()
        self.denoiser, self.bar = denoiser, bar

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.bar.update(len(x) * (1 if self.denoiser.guidance == 1 else 2))
        return self.denoiser(x, sigma)


@dataclass
class Cell:
    """One guidance scale and number of steps: what was measured and chosen there."""

    guidance: float
    steps: int
    methods: dict[str, Rival]
    selection: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # (method, schedule) -> errors
    evaluation: dict[str, Tensor] = field(default_factory=dict)  # method -> errors, at its chosen schedule
    chosen: dict[str, str] = field(default_factory=dict)  # method -> schedule
    schedules: dict[str, Callable[[int], Tensor]] = field(default_factory=lambda: dict(SCHEDULES))
    own: dict[str, Callable[[int], Tensor]] = field(default_factory=dict)  # method -> its only schedule

    @property
    def cost(self) -> int:
        """Network evaluations per sample and run."""
        return self.steps * (1 if self.guidance == 1 else 2)

    def ranked(self, method: str) -> list[str]:
        """The schedules of a method, those seen on most selection noise first, then by error."""
        mine = [(s, e) for (m, s), e in self.selection.items() if m == method]
        return [s for s, _ in sorted(mine, key=lambda p: (-len(p[1]), geometric_mean(p[1]).item()))]

    def best(self, names: list[str]) -> str:
        """The method with the lowest error on selection noise, at its chosen schedule."""
        return min(names, key=lambda m: geometric_mean(self.selection[m, self.chosen[m]]).item())

    def surviving(self, prefix: str) -> list[str]:
        """Evaluated methods whose name starts so; with "" the rivals."""
        return [m for m in self.evaluation if (m.startswith(prefix) if prefix else not m.startswith("v3"))]


def load_ems(path: Path | None) -> Callable[[float], EMS | None]:
    """guidance -> statistics, of the file given or shipped; None everywhere without a file."""
    found = [path] if path else sorted((Path(__file__).resolve().parents[1] / "stats").glob("*.ems.safetensors"))
    if not found:
        return lambda guidance: None
    from dpm_solver_v3.ems_tools.file.reader import load_ems_file

    return load_ems_file(found[0]).at


def methods_at(plan: Plan, ems: EMS | None) -> dict[str, Rival]:
    """Every method of the run for one guidance scale."""
    methods: dict[str, Rival] = {name: RIVALS[name] for name in plan.rivals}
    for name in plan.ours:
        methods[WITHOUT + name] = partial(_ours, None, OURS[name])
        if ems is not None:
            methods[WITH + name] = partial(_ours, ems, OURS[name])
    return methods


def add_contest(plan: Plan, cell: Cell, problem: Problem, file: Any) -> None:
    """More rivals, more schedules, and v3 on its fitted schedule with its ablations."""
    cell.methods.update({name: two_calls(name) for name in ("heun", "dpm_2")} if cell.steps % 2 == 0 else {})
    cell.methods.update(comfyui_rivals())
    cell.schedules = {
        **schedules_on(problem.noise),
        **host_schedules(problem.noise),
        **_from_trajectories(plan, problem, cell.guidance),
    }
    if file is None or not file.meta.fitted:
        return
    ems = file.at(cell.guidance)
    fitted = lambda n: file.fitted_sigmas(n, cell.guidance)  # noqa: E731
    cell.methods[FITTED + "auto"] = partial(_ours, ems, {})
    cell.methods[FITTED + "its lambdas, EMS"] = partial(_ours, ems, {"corrector": "pseudo", "order": 2})
    cell.methods[FITTED + "its lambdas, no EMS"] = partial(_ours, None, {})
    cell.own = {name: fitted for name in cell.methods if name.startswith(FITTED)}


_TRAJECTORIES: dict[float, dict[str, Callable[[int], Tensor]]] = {}


def _from_trajectories(plan: Plan, problem: Problem, guidance: float) -> dict[str, Callable[[int], Tensor]]:
    """GITS and Align Your Steps on 9 trajectories of selection noise, 61 points uniform in lambda."""
    if guidance not in _TRAJECTORIES:
        samples = plan.samples(9)
        high, low = problem.ends
        grid = torch.linspace(math.log(high), math.log(low), 61, dtype=torch.float64)
        ys: list[Tensor] = []
        Ds: list[Tensor] = []

        def keep(info: StepInfo) -> None:
            ys.append(info["x"].flatten(1))
            Ds.append(info["denoised"].flatten(1))

        sigmas = torch.cat([grid.exp(), grid.new_zeros(1)])
        denoiser, start = problem.denoiser(samples, guidance), problem.start(samples)
        sample_dpm_solver_v3(denoiser, start, sigmas, callback=keep, disable=True, order=3, corrector="none")
        lambdas, D = tuple((-grid).tolist()), torch.stack(Ds)
        _TRAJECTORIES[guidance] = {
            "gits": partial(gits, lambdas, torch.stack(ys), D),
            "ays_own": partial(align_your_steps, lambdas, D),
        }
    return _TRAJECTORIES[guidance]


def _ours(ems: EMS | None, options: dict[str, Any], denoiser: nn.Module, x: Tensor, sigmas: Tensor) -> Tensor:
    return sample_dpm_solver_v3(denoiser, x, sigmas, disable=True, ems=ems, **options)


def errors_of(plan: Plan, problem: Problem, cell: Cell, method: str, schedule: str, samples: list[int]) -> Tensor:
    """Per-sample errors [n] of one method on one schedule; infinite where the method cannot follow it."""
    sigmas = (cell.own[method] if method in cell.own else cell.schedules[schedule])(cell.steps)
    if len(sigmas) != cell.steps + 1 or not (sigmas.diff() < 0).all():
        return torch.full((len(samples),), math.inf, dtype=torch.float64)
    parts = []
    for chunk in _chunks(samples, plan.batch):
        try:
            start = problem.start(chunk, sigmas[0].item())
            x = cell.methods[method](problem.denoiser(chunk, cell.guidance), start, sigmas)
        except (SamplingError, ArithmeticError, ValueError, RuntimeError, IndexError):
            if not plan.contest:
                raise
            x = torch.full_like(problem.start(chunk), math.nan)  # a rival that fails on a schedule has lost there
        target = problem.reference(chunk, cell.guidance).end_of(sigmas, plan.target)
        parts.append(per_sample_error(x, target))
    return torch.cat(parts)


def _chunks(samples: list[int], size: int) -> Iterator[list[int]]:
    for i in range(0, len(samples), size):
        yield samples[i : i + size]


def select(plan: Plan, problem: Problem, cell: Cell) -> None:
    """Choose a schedule for every method on selection noise."""
    heats = [SCREEN, tuple(name for name in cell.schedules if name not in SCREEN)] if plan.contest else [plan.schedules]
    score: dict[str, float] = {}
    for heat in heats:
        limit = HOPELESS_IN_CONTEST * min((v for m, v in score.items() if not m.startswith("v3")), default=math.inf)
        for method in cell.methods:
            if score.get(method, 0.0) > limit and not method.startswith("v3"):
                continue
            for schedule in ("fitted",) if method in cell.own else heat:
                if (method, schedule) not in cell.selection:
                    first = errors_of(plan, problem, cell, method, schedule, plan.samples(plan.first))
                    cell.selection[method, schedule] = first
        score = {m: geometric_mean(cell.selection[m, cell.ranked(m)[0]]).item() for m in cell.methods}
    hopeless = HOPELESS_IN_CONTEST if plan.contest else HOPELESS
    limit = hopeless * min(v for m, v in score.items() if not m.startswith("v3"))
    rest = plan.samples(plan.selection, plan.first)
    for method in cell.methods:
        if not method.startswith("v3") and not score[method] <= limit:
            continue
        for schedule in cell.ranked(method)[:FINALISTS]:
            more = errors_of(plan, problem, cell, method, schedule, rest)
            cell.selection[method, schedule] = torch.cat([cell.selection[method, schedule], more])
        cell.chosen[method] = cell.ranked(method)[0]


def evaluate(plan: Plan, problem: Problem, cell: Cell) -> None:
    """Errors on evaluation noise of every method that was not dropped."""
    for method, schedule in cell.chosen.items():
        cell.evaluation[method] = errors_of(plan, problem, cell, method, schedule, plan.samples(plan.noises))


def check_references(plan: Plan, problem: Problem) -> list[dict[str, float]]:
    """How far the solutions with `reference_steps` and with twice as many differ, on one chunk per guidance."""
    rows = []
    samples = list(range(9))
    for guidance in plan.guidances:
        coarse, fine = (problem.reference(samples, guidance, plan.reference_steps * k) for k in (1, 2))
        error = per_sample_error(coarse.clean, fine.clean)
        rows.append({"guidance": guidance, "mean": error.mean().item(), "largest": error.max().item()})
    return rows


def report(cell: Cell) -> dict[str, Any]:
    """The cell's numbers: every method, and ours against the best rival."""
    rivals = cell.surviving("")
    best = cell.best(rivals)
    hindsight = min(rivals, key=lambda m: geometric_mean(cell.evaluation[m]).item())
    ours: dict[str, Any] = {}
    for prefix in (FITTED, WITH, WITHOUT):
        mine = cell.surviving(prefix)
        for label, name in (("as recommended", prefix + "auto"), ("best setting", cell.best(mine) if mine else "")):
            if name in mine and not (prefix == FITTED and label == "best setting"):
                ours[prefix + label] = {
                    "method": name,
                    "schedule": cell.chosen[name],
                    "ratio": bootstrap_ratio(cell.evaluation[name], cell.evaluation[best]),
                    "ratio_to_best_in_hindsight": bootstrap_ratio(cell.evaluation[name], cell.evaluation[hindsight]),
                }
    for name in cell.surviving(FITTED):
        if name != FITTED + "auto":
            ratio = bootstrap_ratio(cell.evaluation[name], cell.evaluation[best])
            ours[name] = {"method": name, "schedule": "fitted", "ratio": ratio, "ratio_to_best_in_hindsight": ratio}
    methods = {m: {"schedule": cell.chosen[m], **summary(e)} for m, e in cell.evaluation.items()}
    return {
        "guidance": cell.guidance,
        "steps": cell.steps,
        "best_rival": {"method": best, "schedule": cell.chosen[best]},
        "best_rival_in_hindsight": {"method": hindsight, "schedule": cell.chosen[hindsight]},
        "ours": ours,
        "methods": methods,
        "dropped": [m for m in cell.methods if m not in cell.chosen],
    }


def print_cell(row: dict[str, Any]) -> None:
    """One cell as text."""
    best, methods = row["best_rival"], row["methods"]
    rival = methods[best["method"]]
    print(
        f"\nguidance {row['guidance']:g}, {row['steps']} steps: best rival {best['method']} on {best['schedule']}, "
        f"error {rival['geometric_mean']:.3g} (geometric mean), {rival['median']:.3g} (median), {rival['mean']:.3g} (mean)"
    )
    for name, our in row["ours"].items():
        mine, ratio = methods[our["method"]], our["ratio"]
        geometric, mean = ("{:.3f} [{:.3f}, {:.3f}]".format(*ratio[k]) for k in ("geometric_mean", "mean"))
        setting = our["method"].split(": ", 1)[1]
        values = f"{mine['geometric_mean']:.3g}, {mine['median']:.3g}, {mine['mean']:.3g}"
        print(f"  {name:<31} {values}  ratio {geometric}, of means {mean}")
        print(f"  {'':<31} {setting}; {our['schedule']}")


def steps_to_reach(rows: list[dict[str, Any]]) -> list[str]:
    """Per guidance scale: the fewest steps of the run at which the best rival's error is at most ours at 6."""
    lines = []
    for guidance in sorted({r["guidance"] for r in rows}):
        mine = {r["steps"]: r for r in rows if r["guidance"] == guidance}
        name = FITTED + "as recommended"
        if 6 not in mine or name not in mine[6]["ours"]:
            continue
        ours = mine[6]["methods"][mine[6]["ours"][name]["method"]]["geometric_mean"]
        errors = {n: r["methods"][r["best_rival"]["method"]]["geometric_mean"] for n, r in mine.items()}
        enough = [n for n in sorted(errors) if errors[n] <= ours]
        count = str(enough[0]) if enough else f"more than {max(errors)}"
        lines.append(f"guidance {guidance:g}: our 6-step error takes the best rival {count} steps")
    return lines


def _expected(plan: Plan, cells: list[Cell], problems: list[Problem]) -> int:
    """Network evaluations that the run takes at most; solutions in the cache cost nothing."""
    total = 0
    for cell in cells:
        runs = len(cell.methods) * (len(cell.schedules) * plan.first + plan.noises)
        runs += len(cell.methods) * min(FINALISTS, len(plan.schedules)) * (plan.selection - plan.first)
        total += runs * cell.cost
    for guidance in plan.guidances:
        for problem, count in zip(problems, (plan.selection, plan.noises), strict=True):
            if not problem.is_cached(plan.samples(count), guidance):
                total += math.ceil(count / 9) * 9 * plan.reference_steps * (1 if guidance == 1 else 2)
        if not problems[0].is_cached(range(9), guidance, 2 * plan.reference_steps):
            total += 9 * 2 * plan.reference_steps * (1 if guidance == 1 else 2)
    return total


NUMBERS = ("noises", "selection", "first", "batch", "target")


def _arguments() -> tuple[Plan, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small run that shows the program works")
    parser.add_argument("--noises", type=int, help="evaluation samples (64)")
    parser.add_argument("--selection", type=int, help="selection samples (18)")
    parser.add_argument("--first", type=int, help="of these, samples on which every schedule is tried (5)")
    parser.add_argument("--guidance", type=float, nargs="+", help="guidance scales (1 2 4 7.5)")
    parser.add_argument("--batch", type=int, help="samples in a batch (32)")
    target = "compare with the picture at sigma 0 (clean, default), or with the solution where the schedule ends (end)"
    parser.add_argument("--target", choices=("clean", "end"), help=target)
    parser.add_argument("--ems", type=Path, help="statistics (stats/*.ems.safetensors)")
    parser.add_argument("--steps", type=int, nargs="+", help="step counts (5 6 8 10)")
    parser.add_argument("--contest", action="store_true", help="every rival and schedule, and the fitted schedule")
    parser.add_argument("--classes", type=lambda t: tuple(map(int, t.split(","))), help="judge on these only, such as 1,3,5,7")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", type=Path, default=OUT / "quality.json", help="where the numbers go")
    args = parser.parse_args()
    plan = QUICK if args.quick else Plan()
    given = {k: getattr(args, k) for k in (*NUMBERS, "contest", "classes") if getattr(args, k) is not None}
    if args.contest:
        given["ours"] = ("auto",)
    if args.steps:
        given["steps"] = tuple(args.steps)
    if args.guidance:
        given["guidances"] = tuple(args.guidance)
    plan = Plan(**{**plan.__dict__, **given})
    if not (plan.noises >= 2 and plan.selection >= plan.first and plan.batch >= 1):
        parser.error(f"needs at least 2 noises, {plan.first} selection samples and a batch of 1")
    return plan, args


def main() -> None:
    plan, args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    ems_at = load_ems(args.ems)
    with tqdm(unit="image", unit_scale=True, file=sys.stderr, smoothing=0) as bar:
        wrap = partial(Counted, bar=bar)
        choosing = Problem(SELECTION_SEED, plan.reference_steps, wrap)
        judging = Problem(EVALUATION_SEED, plan.reference_steps, wrap)
        cells = [Cell(g, n, methods_at(plan, ems_at(g))) for n in plan.steps for g in plan.guidances]
        for cell in cells if plan.contest else ():
            add_contest(plan, cell, choosing, getattr(ems_at, "__self__", None))
        bar.total = _expected(plan, cells, [choosing, judging])
        convergence = check_references(plan, choosing)
        rows: list[dict[str, Any]] = []
        facts = {"weights": judging.weights_hash, "plan": plan.__dict__}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        for cell in cells:
            bar.set_description(f"guidance {cell.guidance:g}, {cell.steps} steps")
            select(plan, choosing, cell)
            evaluate(plan, judging, cell)
            rows.append(report(cell))
            args.json.write_text(json.dumps({**facts, "convergence": convergence, "cells": rows}, indent=1))
    for check in convergence:
        print(
            f"guidance {check['guidance']:g}: solutions of {plan.reference_steps} and {2 * plan.reference_steps} steps "
            f"differ by {check['mean']:.2g} in mean square, at most {check['largest']:.2g}"
        )
    for row in rows:
        print_cell(row)
    print("", *steps_to_reach(rows), sep="\n")
    print(f"\nwritten to {args.json}")


if __name__ == "__main__":
    main()
