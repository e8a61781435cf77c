"""`ems compute`, `ems fit` and `ems merge`: from a model, or from other files, to a statistics file."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...sampler import EDM, Flow, NoiseSchedule, SamplingError, Space, VPDiscrete
from ..compute import EFFORTS, compute_ems, evaluations, job_for, plan_for, with_fit
from ..estimate.merge import merge_files
from ..estimate.points import DivergedError
from ..estimate.run import EstimateError, Job, JobState, Model, Progress, forward_mode_works
from ..estimate.source import Source
from ..file.contents import SUFFIX, EMSFile, load_ems_file
from ..fit.run import FitPlan, evaluations_of_fit
from ..judge.calibrate import CalibrationPlan

__all__ = ["add_compute", "add_fit", "add_merge", "add_model_options", "add_running_options", "source_of"]

_COMPUTE = """\
Compute the statistics of a model: estimate l, s, b, try them on noise held out of the estimate, write a file.

Without --model it measures the embedded model:

    ems compute --effort quick --guidance 1,4

Any other model is given as module:function. The function takes the guidance scale and returns a denoiser
D(x, sigma) -> x0 for x [B, C, ...] and sigma [B], guided at that scale:

    ems compute --model my_model:denoiser --shape 4,64,64 --sigma-min 0.0292 --sigma-max 14.61 --guidance 1,7.5

A job that was interrupted or killed continues when the same command is given again.
"""


def _scales(text: str) -> tuple[float, ...]:
    values = tuple(sorted({float(v) for v in text.split(",")}))
    if not values or not all(0 < v <= 1000 for v in values):
        raise ValueError
    return values


def _shape(text: str) -> tuple[int, ...]:
    values = tuple(int(v) for v in text.split(","))
    if not values or min(values) < 1:
        raise ValueError
    return values


def _classes(text: str) -> tuple[int, ...]:
    values = tuple(int(v) for v in text.split(","))
    if not values or not all(0 <= v <= 8 for v in values):
        raise ValueError
    return values


_scales.__name__, _shape.__name__, _classes.__name__ = (
    "list of guidance scales",
    "shape",
    "list of classes",
)  # argparse names them in its messages


def add_compute(commands: Any) -> None:
    """Register `ems compute`."""
    p = commands.add_parser(
        "compute",
        help="compute a model's statistics",
        description=_COMPUTE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(p)
    p.add_argument("--out", type=Path, help=f"file to write (default: NAME{SUFFIX})")
    p.add_argument("--guidance", type=_scales, default=(1.0,), help="guidance scales, comma-separated (1)")
    p.add_argument("--effort", choices=sorted(EFFORTS), default="standard", help="how much to measure (standard)")
    p.add_argument("--samples", type=int, help="trajectories per guidance scale (by effort)")
    p.add_argument("--intervals", type=int, help="intervals of the grid of lambda (by effort)")
    p.add_argument("--probes", type=int, help="Jacobian probes per point (1)")
    p.add_argument("--points", choices=("trajectory", "renoised"), default="trajectory", help="where to measure")
    p.add_argument(
        "--jacobian",
        choices=("difference", "forward", "auto"),
        default="difference",
        help="by finite differences, in forward mode, or in forward mode if the model allows it (difference)",
    )
    p.add_argument("--per-element", action="store_true", help="statistics per latent element: one size only, large")
    p.add_argument("--until", type=float, help="stop when the standard errors of l, s and b (rms) are at most this")
    p.add_argument("--no-evidence", action="store_true", help="leave out calibration, recommendation and fit")
    p.add_argument("--no-fit", action="store_true", help="leave out the fitted schedules; 'ems fit' can add them later")
    p.add_argument("--keep-moments", action="store_true", help="keep the moments, to merge or extend the file later")
    p.add_argument("--extend", type=Path, help="begin with the moments of this finished file")
    p.add_argument("--seed", type=int, default=0, help="of start noise and probes (0)")
    add_running_options(p)
    p.add_argument("--dry-run", action="store_true", help="show the plan only")
    p.set_defaults(run=run_compute)


def add_model_options(p: argparse.ArgumentParser) -> None:
    """Options that say which model to measure, for `source_of`."""
    p.add_argument("--model", help="module:function that returns a denoiser (default: the embedded model)")
    p.add_argument("--shape", type=_shape, help="latent shape C,H,W of a --model")
    p.add_argument("--sigma-min", type=float, help="smallest noise level of a --model (a flow: smallest t)")
    p.add_argument("--sigma-max", type=float, help="largest noise level of a --model (a flow: largest t)")
    p.add_argument("--space", choices=[s.value for s in Space], default="sigma", help="what x and levels are (sigma)")
    p.add_argument("--name", help="name of the model, kept in the file")
    p.add_argument("--classes", type=_classes, help="of the embedded model, comma-separated (all)")


def add_running_options(p: argparse.ArgumentParser) -> None:
    """Options that say on what and in which pieces a model runs."""
    p.add_argument("--batch", type=int, default=16, help="samples at once; halved when memory runs out (16)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16", "float64"), default="float32", help="of x")


def run_compute(args: argparse.Namespace) -> int:
    """Run `ems compute`. Returns the exit status; raises EstimateError for the user."""
    source = source_of(args)
    job, plan = _job(args, source)
    out = args.out or Path(f"{source.identity['name']}{SUFFIX}")
    extend = load_ems_file(args.extend) if args.extend else None
    if extend is not None and not extend.moments:
        raise EstimateError(f"{args.extend} has no moments to extend: it was made without --keep-moments")
    total = evaluations(job, plan)
    scales = ", ".join(f"{g:g}" for g in job.guidance)
    evidence = "left out" if plan is None else f"on {plan.calibration} + {plan.report} noises"
    if plan is not None and plan.fit is not None:
        cost = evaluations_of_fit(plan.fit, len(job.lambdas), len(job.guidance))
        evidence += f"; {_fit_in_words(plan.fit)}, {cost} of the evaluations"
    print(
        f"{source.identity['name']}: guidance {scales}; {job.samples} trajectories of {len(job.lambdas)} points each, "
        f"{job.probes} probe(s) a point; evidence {evidence}"
    )
    seconds = _seconds_of(source, job, args) * total
    print(f"Plan: {total} denoiser evaluations, about {_duration(seconds)} here. Writes {out}")
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
    except (SamplingError, DivergedError) as error:
        raise EstimateError(str(error)) from error
    print(f"Wrote {out}, {out.stat().st_size / 1024:.1f} KiB. 'ems inspect {out}' shows it.")
    return _verdict(file)


def _verdict(file: EMSFile) -> int:
    for row in file.meta.evidence:
        if row.split == "report":
            ratio = row.ems / row.data_prediction if row.data_prediction else 1.0
            print(f"  guidance {row.guidance:g}, {row.schedule}, {row.steps} steps: error {ratio:.2f} of data prediction's")
    return _fit_verdict(file)


def _fit_verdict(file: EMSFile) -> int:
    for row in file.meta.fitted:
        value, low, high = row.ratio
        kept = "" if row.coefficients else "; the fixed schedule is kept"
        print(
            f"  guidance {row.guidance:g}, fitted, {row.steps} steps: error {value:.2f} [{low:.2f}, {high:.2f}] of "
            f"{row.fixed_schedule}'s, on {row.noises} noises of no other use{kept}"
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


def add_fit(commands: Any) -> None:
    """Register `ems fit`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser("fit", help="fit few-step schedules to a model", description=_FIT, formatter_class=raw)
    p.add_argument("file", type=Path, help=f"the model's *{SUFFIX} file")
    add_model_options(p)
    p.add_argument("--out", type=Path, help="file to write (default: the same file)")
    p.add_argument("--effort", choices=sorted(EFFORTS), default="standard", help="how much to try (standard)")
    p.add_argument("--steps", type=_shape, help="step counts to fit, comma-separated (by effort)")
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
    fit = plan_for(source, effort).fit
    assert fit is not None
    fit = replace(fit, steps=tuple(args.steps)) if args.steps else fit
    out = args.out or args.file
    job = replace(job_for(source, effort, args.seed), lambdas=tuple(file.lambdas.tolist()))
    total = evaluations_of_fit(fit, len(job.lambdas), len(job.guidance))
    seconds = _seconds_of(source, job, args) * total
    scales = ", ".join(f"{g:g}" for g in job.guidance)
    print(f"{_fit_in_words(fit)}, at guidance {scales}".capitalize())
    print(f"Plan: {total} denoiser evaluations, about {_duration(seconds)} here. Writes {out}")
    if args.dry_run:
        return 0
    state = JobState.open(out.with_name(out.name + ".fit.partial"), job)
    begun = state.facts.setdefault("effort", [args.effort, list(fit.steps)])
    if begun != [args.effort, list(fit.steps)]:
        raise EstimateError(f"{state.path} holds a fit begun with effort and steps {begun}: finish it so, or delete it")
    try:
        with _Bar() as bar:
            options = {"batch": args.batch, "device": args.device, "dtype": getattr(torch, args.dtype), "progress": bar}
            file = with_fit(file, source, job, fit, state, **options)
    except KeyboardInterrupt:
        print(f"\nInterrupted. What was fitted is in {state.path}: give the same command to continue.", file=sys.stderr)
        return 130
    except (SamplingError, DivergedError) as error:
        raise EstimateError(str(error)) from error
    file.save(out)
    state.delete()
    print(f"Wrote {out}, {out.stat().st_size / 1024:.1f} KiB.")
    return _fit_verdict(file)


def source_of(args: argparse.Namespace) -> Source:
    """The model that `add_model_options` describes, at `args.guidance`. Raises EstimateError."""
    if args.model is None:
        return _embedded(args)
    missing = [f"--{n.replace('_', '-')}" for n in ("shape", "sigma_min", "sigma_max") if getattr(args, n) is None]
    if missing:
        raise EstimateError(f"--model needs {', '.join(missing)} too")
    make = _imported(args.model)
    models = {g: _denoiser(make, g, args.model) for g in args.guidance}
    if args.space == Space.FLOW.value:
        schedule: NoiseSchedule = Flow(time_min=args.sigma_min, time_max=args.sigma_max)
    else:
        schedule = EDM(args.sigma_min, args.sigma_max)
    if not 0 < args.sigma_min < args.sigma_max:
        raise EstimateError("--sigma-min must be above 0 and below --sigma-max")
    return Source(models, args.shape, schedule, {"name": args.name or args.model.replace(":", "."), "source": args.model})


def _embedded(args: argparse.Namespace) -> Source:
    from .. import embedded
    from ..embedded.denoiser import WEIGHTS

    network = embedded.load_network(device=args.device, dtype=getattr(torch, args.dtype))
    labels = torch.arange(embedded.NULL_CLASS) if args.classes is None else torch.tensor(args.classes)
    models: dict[float, Model] = {g: embedded.GuidedDenoiser(network, labels, g) for g in args.guidance}
    import hashlib

    identity = {
        "name": args.name or "embedded-emoji",
        "prediction": "edm",
        "sha256": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(),
    }
    if args.classes is not None:
        identity["classes"] = ", ".join(map(str, args.classes))
    return Source(models, embedded.SHAPE, VPDiscrete.linear(), identity)


def _imported(name: str) -> Callable[[float], Model]:
    module, _, function = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise EstimateError(f"--model {name} cannot be loaded ({error}): give it as module:function") from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise EstimateError(f"--model {name} is not a function that returns a denoiser")
    return found


def _denoiser(make: Callable[[float], Model], guidance: float, name: str) -> Model:
    model = make(guidance)
    if not callable(model):
        raise EstimateError(f"{name}({guidance:g}) returned {type(model).__name__}, not a denoiser D(x, sigma)")
    return model


def _job(args: argparse.Namespace, source: Source) -> tuple[Job, CalibrationPlan | None]:
    effort = EFFORTS[args.effort]
    given = {n: getattr(args, n) for n in ("samples", "intervals", "probes") if getattr(args, n) is not None}
    effort = replace(effort, **given)
    job = job_for(source, effort, args.seed, source=args.points, per_element=args.per_element)
    method = args.jacobian
    if method == "auto":
        works = forward_mode_works(next(iter(source.models.values())), job, args.device, getattr(torch, args.dtype))
        method = "forward" if works else "difference"
        print(f"Jacobian: {'forward mode works' if works else 'forward mode fails with this model, finite differences'}")
    groups = 4 if args.per_element else job.groups
    plan = None if args.no_evidence else plan_for(source, effort)
    if plan is not None and args.no_fit:
        plan = replace(plan, fit=None)
    return replace(job, probe_method=method, groups=groups), plan


def _seconds_of(source: Source, job: Job, args: argparse.Namespace) -> float:
    """Seconds per evaluation, from one batch (after one that warms up)."""
    import time

    from ..estimate.run import denoiser_for, sample_noise

    samples = list(range(min(args.batch, job.samples)))
    denoiser = denoiser_for(source.models[job.guidance[-1]], samples, job.space)
    noise = sample_noise(job, samples)[0].to(args.device, getattr(torch, args.dtype))
    lam = job.lambdas[len(job.lambdas) // 2]
    took = 0.0
    try:
        for _ in range(2):
            began = time.perf_counter()
            with torch.no_grad():
                denoiser(noise, lam).sum().item()
            took = time.perf_counter() - began
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise EstimateError(f"the model fails on x {tuple(noise.shape)}: {error}") from error
    return took / len(samples)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _Bar:
    """A tqdm bar per stage, fed by `Progress`."""

    def __enter__(self) -> _Bar:
        self.note, self.bar = None, None
        return self

    def __call__(self, p: Progress) -> None:
        from tqdm import tqdm

        key = (p.stage, "" if p.stage == "estimate" else p.note)
        if self.note != key:
            self.__exit__()
            self.note, self.bar = key, tqdm(total=p.total, unit="eval", desc=p.stage, smoothing=0.1)  # type: ignore[assignment]
        assert self.bar is not None
        self.bar.set_postfix_str(p.note, refresh=False)
        self.bar.update(p.done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def add_merge(commands: Any) -> None:
    """Register `ems merge`."""
    p = commands.add_parser(
        "merge",
        help="add up files that keep their moments",
        description="Add the moments of files of one model on the same grid, computed with different --seed and with\n"
        "--keep-moments (on several machines, say). The result has no evidence: give it to\n"
        "'ems compute --extend MERGED --samples TOTAL' to try it.\n\n"
        "    ems merge a.ems.safetensors b.ems.safetensors --out ab.ems.safetensors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("files", nargs="+", type=Path, help="two or more files")
    p.add_argument("--out", type=Path, required=True, help="file to write")
    p.set_defaults(run=run_merge)


def run_merge(args: argparse.Namespace) -> int:
    """Run `ems merge`."""
    merged = merge_files([(path, load_ems_file(path)) for path in args.files])
    merged.save(args.out)
    print(f"Wrote {args.out}: {len(args.files)} files, {merged.meta.estimate['samples']} samples. It has no evidence yet.")
    return 0
