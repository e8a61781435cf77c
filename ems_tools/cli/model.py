"""The model that a command measures: the options that name it, and the `Source` that they mean."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ...sampler import EDM, Flow, NoiseSchedule, Space, VPDiscrete
from .. import embedded
from ..embedded.denoiser import WEIGHTS
from ..estimate.job import EstimateError, Job, Model, denoiser_for, sample_noise
from ..estimate.source import Source
from .plugs import plugs

__all__ = ["add_model_options", "add_running_options", "scales", "seconds_of", "shape", "source_of"]


def scales(text: str) -> tuple[float, ...]:
    """Guidance scales from "1,4". Raises ValueError."""
    values = tuple(sorted({float(v) for v in text.split(",")}))
    if not values or not all(0 < v <= 1000 for v in values):
        raise ValueError
    return values


def shape(text: str) -> tuple[int, ...]:
    """Whole numbers above 0 from "4,64,64". Raises ValueError."""
    values = tuple(int(v) for v in text.split(","))
    if not values or min(values) < 1:
        raise ValueError
    return values


def _classes(text: str) -> tuple[int, ...]:
    values = tuple(int(v) for v in text.split(","))
    if not values or not all(0 <= v <= 8 for v in values):
        raise ValueError
    return values


scales.__name__, shape.__name__, _classes.__name__ = "list of guidance scales", "shape", "list of classes"  # for argparse


def count(text: str) -> int:
    """A whole number above 0. Raises ValueError."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def device(text: str) -> str:
    """A device that is there. Raises argparse.ArgumentTypeError."""
    try:
        torch.zeros(1, device=text)
    except Exception as error:  # torch raises of many kinds
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here ({str(error).splitlines()[0]:.120})") from None
    return text


count.__name__ = "whole number above 0"


def add_model_options(p: argparse.ArgumentParser) -> None:
    """Options that say which model to measure, for `source_of`."""
    p.add_argument("--model", help="module:function that returns a denoiser (default: the embedded model)")
    p.add_argument("--shape", type=shape, help="latent shape C,H,W of a --model")
    p.add_argument("--sigma-min", type=float, help="smallest noise level of a --model (a flow: smallest t)")
    p.add_argument("--sigma-max", type=float, help="largest noise level of a --model (a flow: largest t)")
    p.add_argument("--space", choices=[s.value for s in Space], default="sigma", help="what x and levels are (sigma)")
    p.add_argument("--name", help="name of the model, kept in the file")
    p.add_argument("--classes", type=_classes, help="of the embedded model, comma-separated (all)")
    for plug in plugs():
        plug.add_model_options(p)


def add_running_options(p: argparse.ArgumentParser) -> None:
    """Options that say on what and in which pieces a model runs."""
    p.add_argument("--batch", type=count, default=16, help="samples at once; halved when memory runs out (16)")
    p.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16", "float64"), default="float32", help="of x")


def source_of(args: argparse.Namespace) -> Source:
    """The model that `add_model_options` describes, at `args.guidance`. Raises EstimateError."""
    for plug in plugs():
        found = plug.source_of(args)
        if found is not None:
            if args.passes and found.conditional is None:
                raise EstimateError("--passes: of this model the conditional answer cannot be had alone; leave it out")
            return found
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
    identity = {"name": args.name or args.model.replace(":", "."), "source": args.model}
    alone = _denoiser(make, 1.0, args.model) if args.passes else None
    return Source(models, args.shape, schedule, identity, conditional=alone)


def _embedded(args: argparse.Namespace) -> Source:
    network = embedded.load_network(device=args.device, dtype=getattr(torch, args.dtype))
    labels = torch.arange(embedded.NULL_CLASS) if args.classes is None else torch.tensor(args.classes)
    models: dict[float, Model] = {g: embedded.GuidedDenoiser(network, labels, g) for g in args.guidance}
    identity = {
        "name": args.name or "embedded-emoji",
        "prediction": "edm",
        "sha256": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(),
    }
    if args.classes is not None:
        identity["classes"] = ", ".join(map(str, args.classes))
    alone = embedded.GuidedDenoiser(network, labels, 1.0)
    return Source(models, embedded.SHAPE, VPDiscrete.linear(), identity, conditional=alone)


def _imported(name: str) -> Callable[[float], Model]:
    module, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # it stays: the model may import more of its folder later
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # anything can go wrong while somebody's module is imported
        what = f"{type(error).__name__}: {error}"
        raise EstimateError(f"--model {name} cannot be loaded ({what}): give it as module:function") from error
    if not callable(found):
        raise EstimateError(f"--model {name} is not a function that returns a denoiser")
    return found


def _denoiser(make: Callable[[float], Model], guidance: float, name: str) -> Model:
    try:
        model = make(guidance)
    except Exception as error:
        raise EstimateError(f"{name}({guidance:g}) failed ({type(error).__name__}: {error})") from error
    if not callable(model):
        raise EstimateError(f"{name}({guidance:g}) returned {type(model).__name__}, not a denoiser D(x, sigma)")
    return model


def seconds_of(source: Source, job: Job, args: argparse.Namespace) -> float:
    """Seconds per evaluation, from one batch (after one that warms up)."""
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
