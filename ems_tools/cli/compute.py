"""`ems compute` and `ems fit`: from a model to a statistics file."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..compute import (
    EFFORTS,
    FINER,
    compute_ems,
    evaluations,
    evaluations_of_fits,
    is_result_of,
    job_for,
    plan_for,
    with_fit,
)
from ..estimate.job import EstimateError, Job, JobState, Progress
from ..estimate.source import Source
from ..file.contents import EMSFile
from ..file.layout import SUFFIX
from ..file.reader import EMSFileError, load_ems_file
from ..fit.run import FitPlan
from ..judge.calibrate import CalibrationPlan
from ..share.library import safe_name
from ..show.describe import beginning_of, rival_in_words
from .model import add_model_options, add_running_options, scales, seconds_of, shape, source_of
from .plugs import Commands

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["add_compute", "add_fit"]

_COMPUTE = """\
Compute the statistics of a model: estimate l, s, b, try them on noise held out of the estimate, write a file.

Without --model it measures the embedded model:

    ems compute --effort quick --guidance 1,4

Any other model is given as module:function. The function takes the guidance scale and returns a denoiser
D(x, sigma) -> x0 for x [B, C, ...] and sigma [B], guided at that scale:

    ems compute --model my_model:denoiser --shape 4,64,64 --sigma-min 0.0292 --sigma-max 14.61 --guidance 1,7.5

A job that was interrupted or killed continues when the same command is given again.
"""


def add_compute(commands: Commands) -> None:
    """Register `ems compute`."""
    p = commands.add_parser(
        "compute",
        help="compute a model's statistics",
        description=_COMPUTE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(p)
    p.add_argument("--out", type=Path, help=f"file to write (default: NAME{SUFFIX})")
    p.add_argument("--guidance", type=scales, default=(1.0,), help="guidance scales, comma-separated (1)")
    p.add_argument("--effort", choices=sorted(EFFORTS), default="standard", help="how much to measure (standard)")
    p.add_argument("--samples", type=int, help="trajectories per guidance scale (by effort)")
    p.add_argument("--intervals", type=int, help="intervals of the grid of lambda (by effort)")
    p.add_argument("--probes", type=int, help="Jacobian probes per point (1)")
    p.add_argument("--steps", type=shape, default=(), help="fit these step counts only, comma-separated: one costs half")
    p.add_argument("--per-element", action="store_true", help="statistics per latent element: one size only, large")
    _add_kinds(p)
    p.add_argument("--until", type=float, help="stop when the standard errors of l, s and b (rms) are at most this")
    p.add_argument("--no-evidence", action="store_true", help="leave out calibration, recommendation and fit")
    p.add_argument("--no-fit", action="store_true", help="leave out the fitted schedules; 'ems fit' can add them later")
    p.add_argument("--keep-moments", action="store_true", help="keep the moments, to merge or extend the file later")
    p.add_argument("--extend", type=Path, help="begin with the moments of this finished file")
    p.add_argument("--seed", type=int, default=0, help="of start noise and probes (0)")
    add_running_options(p)
    p.add_argument("--dry-run", action="store_true", help="show the plan only")
    p.set_defaults(run=run_compute)


def _add_kinds(parser: argparse.ArgumentParser) -> None:
    """What else is fitted, where asked for."""
    told = "also fit steps in fewer passes of the network, for guidance: up to four times the cost of the fit"
    parser.add_argument("--passes", action="store_true", help=told)
    told = "also fit steps for image to image and hires fix: several times the cost of the fit, so name the step counts"
    parser.add_argument("--image-to-image", action="store_true", help=told)


def run_compute(args: argparse.Namespace) -> int:
    """Run `ems compute`. Returns the exit status; raises EstimateError for the user."""
    source = source_of(args)
    job, plan = _job(args, source)
    out = _place(args, source, job, plan)
    extend = load_ems_file(args.extend) if args.extend else None
    if extend is not None and not extend.moments:
        raise EstimateError(f"{args.extend} has no moments to extend: it was made without --keep-moments")
    _print_plan(args, source, job, plan, out)
    if args.dry_run:
        return 0
    if out.with_name(out.name + ".partial").exists():
        print(f"Continues the job begun in {out}.partial")
    try:
        with _Bar() as bar:
            file = compute_ems(
                source,
                job,
                plan,
                out,
                batch=args.batch,
                device=args.device,
                dtype=getattr(torch, args.dtype),
                until=args.until,
                keep_moments=args.keep_moments,
                extend=extend,
                progress=bar,
            )
    except KeyboardInterrupt:
        print(f"\nInterrupted. What was measured is in {out}.partial: give the same command to continue.", file=sys.stderr)
        return 130
    print(f"Wrote {out}, {out.stat().st_size / 1024:.1f} KiB. 'ems inspect {out}' shows it.")
    return _verdict(file)


def _print_plan(args: argparse.Namespace, source: Source, job: Job, plan: CalibrationPlan | None, out: Path) -> None:
    total = evaluations(job, plan)
    scales = ", ".join(f"{g:g}" for g in job.guidance)
    evidence = "left out" if plan is None else f"on {plan.calibration} + {plan.report} noises"
    if plan is not None and plan.fit is not None:
        cost = evaluations_of_fits(job, plan.fit, min(job.samples, plan.fit.noises))
        evidence += f"; {_fit_in_words(plan.fit)}, {cost} of the evaluations"
    print(
        f"{source.identity['name']}: guidance {scales}; {job.samples} trajectories of {len(job.lambdas)} points each, "
        f"{job.probes} probe(s) a point; evidence {evidence}"
    )
    seconds = seconds_of(source, job, args) * total
    print(f"Plan: {total} denoiser evaluations, about {_duration(seconds)} here. Writes {out}")


def _place(args: argparse.Namespace, source: Source, job: Job, plan: CalibrationPlan | None) -> Path:
    """The file to write; where none is given: the model's name, with the hash of its checkpoint that Civitai shows.

    A finished file of another request is never replaced: an own name is numbered, a given one refused.

    Raises:
        EstimateError: `--out` holds something else.
    """
    if args.out is not None:
        if not _is_free(args.out, args, source, job, plan):
            raise EstimateError(f"{args.out} holds another result, which is not replaced: give another --out, or delete it")
        return Path(args.out)
    stem, digest = source.identity["name"], source.identity.get("sha256", "")
    known = digest and "architecture" in source.identity  # a host's checkpoint; the embedded model is one of a kind
    stem = safe_name(f"{stem}-{digest[:10]}" if known else stem).removesuffix(SUFFIX)
    for k in range(1, 1000):
        path = Path(f"{stem if k == 1 else f'{stem}_{k}'}{SUFFIX}")
        if _is_free(path, args, source, job, plan):
            return path
    raise EstimateError(f"there are 999 files called {stem}: give another --out")


def _is_free(path: Path, args: argparse.Namespace, source: Source, job: Job, plan: CalibrationPlan | None) -> bool:
    """Whether nothing is lost by writing there: no file, the result of this very request, or the file to be extended."""
    if not path.is_file() or (args.extend is not None and path.resolve() == args.extend.resolve()):
        return True
    try:
        return is_result_of(load_ems_file(path), source, job, plan)
    except EMSFileError:
        return False


def _verdict(file: EMSFile) -> int:
    for row in file.meta.evidence:
        if row.split == "report":
            ratio = row.ems / row.data_prediction if row.data_prediction else 1.0
            print(f"  guidance {row.guidance:g}, {row.schedule}, {row.steps} steps: error {ratio:.2f} of data prediction's")
    return _fit_verdict(file)


def _fit_verdict(file: EMSFile) -> int:
    for row in file.meta.fitted:
        value, low, high = row.ratio
        kept = "" if row.coefficients and value != 1 else "; its steps are used"
        print(
            f"  guidance {row.guidance:g}, fitted, {row.steps} steps: error {value:.2f} [{low:.2f}, {high:.2f}] of "
            f"that of {rival_in_words(row.fixed_schedule)}, on {row.noises} noises of no other use{kept}"
        )
    for row in file.meta.passes:
        value, low, high = row.ratio
        print(
            f"  guidance {row.guidance:g}, {row.passes} passes in {row.steps} steps: error {value:.2f} [{low:.2f}, {high:.2f}] "
            f"of that of {rival_in_words(row.fixed_schedule)}"
        )
    for row in file.meta.partial:
        value, low, high = row.ratio
        print(
            f"  guidance {row.guidance:g}, image to image from sigma {beginning_of(row):.3g}, {row.steps} steps: "
            f"error {value:.2f} [{low:.2f}, {high:.2f}] of that of {rival_in_words(row.fixed_schedule)}"
        )
    return 0


def _fit_in_words(fit: FitPlan) -> str:
    counts = ", ".join(map(str, fit.steps))
    return f"fit for {counts} steps on {fit.noises} noises, judged on {fit.held_out} others"


_FIT = """\
Fit schedules and coefficients for few steps to a model, and add them to its statistics file. Sampling with these statistics on
the schedule "fitted" then uses them. Without --model it is the embedded model's file.

    ems fit model.ems.safetensors --model my_model:denoiser --shape 4,64,64 --sigma-min 0.0292 --sigma-max 14.61

An interrupted fit continues when the same command is given again.
"""


def add_fit(commands: Commands) -> None:
    """Register `ems fit`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser("fit", help="fit few-step schedules to a model", description=_FIT, formatter_class=raw)
    p.add_argument("file", type=Path, help=f"the model's *{SUFFIX} file")
    add_model_options(p)
    p.add_argument("--out", type=Path, help="file to write (default: the same file)")
    p.add_argument("--effort", choices=sorted(EFFORTS), default="standard", help="how much to try (standard)")
    p.add_argument("--steps", type=shape, help="step counts to fit, comma-separated (by effort)")
    _add_kinds(p)
    p.add_argument("--seed", type=int, default=0, help="of start noise (0)")
    add_running_options(p)
    p.add_argument("--dry-run", action="store_true", help="show the plan only")
    p.set_defaults(run=run_fit)


def run_fit(args: argparse.Namespace) -> int:
    """Run `ems fit`. Returns the exit status; raises EstimateError for the user."""
    file = load_ems_file(args.file)
    args.guidance = tuple(file.guidance.tolist())
    source = source_of(args)
    if source.schedule.space.value != file.meta.space:
        raise EstimateError(f"{args.file} is in {file.meta.space} space, the model in {source.schedule.space.value} space")
    effort = EFFORTS[args.effort]
    fit = plan_for(source, effort, passes=args.passes, image_to_image=args.image_to_image).fit
    assert fit is not None
    fit = replace(fit, steps=tuple(args.steps)) if args.steps else fit
    most = (len(file.lambdas) - 1) // FINER
    if max(fit.steps) > most:
        raise EstimateError(
            f"{args.file} was computed on {len(file.lambdas)} noise levels, too few to judge a fit of more than {most} steps: "
            f"name fewer with --steps, or compute it anew with `ems compute --steps {max(fit.steps)}`"
        )
    out = args.out or args.file
    job = replace(job_for(source, effort, args.seed), lambdas=tuple(file.lambdas.tolist()))
    total = evaluations_of_fits(job, fit)
    seconds = seconds_of(source, job, args) * total
    scales = ", ".join(f"{g:g}" for g in job.guidance)
    print(f"{_fit_in_words(fit)}, at guidance {scales}".capitalize())
    print(f"Plan: {total} denoiser evaluations, about {_duration(seconds)} here. Writes {out}")
    if args.dry_run:
        return 0
    state = JobState.open(out.with_name(out.name + ".fit.partial"), job)
    mine = [args.effort, list(fit.steps), fit.passes, *(["image to image"] if fit.partial else [])]
    begun = state.facts.setdefault("effort", mine)
    if begun != mine:
        raise EstimateError(f"{state.path} holds a fit begun with effort and steps {begun}: finish it so, or delete it")
    try:
        with _Bar() as bar:
            options = {"batch": args.batch, "device": args.device, "dtype": getattr(torch, args.dtype), "progress": bar}
            file = with_fit(file, source, job, fit, state, **options)
    except KeyboardInterrupt:
        print(f"\nInterrupted. What was fitted is in {state.path}: give the same command to continue.", file=sys.stderr)
        return 130
    file.save(out)
    state.delete()
    print(f"Wrote {out}, {out.stat().st_size / 1024:.1f} KiB.")
    return _fit_verdict(file)


def _job(args: argparse.Namespace, source: Source) -> tuple[Job, CalibrationPlan | None]:
    effort = EFFORTS[args.effort]
    given = {n: getattr(args, n) for n in ("samples", "intervals", "probes") if getattr(args, n) is not None}
    effort = replace(effort, **given)
    job = job_for(source, effort, args.seed, args.steps, per_element=args.per_element)
    groups = 4 if args.per_element else job.groups
    plan = None if args.no_evidence else plan_for(source, effort, args.steps, args.passes, args.image_to_image)
    if plan is not None and args.no_fit:
        plan = replace(plan, fit=None)
    return replace(job, groups=groups), plan


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _Bar:
    """A tqdm bar per stage, fed by `Progress`."""

    def __enter__(self) -> _Bar:
        self.note: tuple[str, str] | None = None
        self.bar: tqdm | None = None
        return self

    def __call__(self, p: Progress) -> None:
        from tqdm import tqdm

        key = (p.stage, "" if p.stage == "estimate" else p.note)
        if self.note != key:
            self.__exit__()
            self.note, self.bar = key, tqdm(total=p.total, unit="eval", desc=p.stage, smoothing=0.1)
        assert self.bar is not None
        self.bar.set_postfix_str(p.note, refresh=False)
        self.bar.update(p.done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
