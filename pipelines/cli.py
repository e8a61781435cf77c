"""`ems compute --diffusers` and `ems compare`: what this package adds to the command line. Imports diffusers when it is used.

`ems_tools.cli.plugs` finds this module by its name and calls what it offers: `add_model_options`, `source_of`, `COMMANDS`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..ems_tools.cli.plugs import Commands
from ..ems_tools.estimate.job import EstimateError
from ..ems_tools.estimate.source import Source
from ..ems_tools.hosting.jobs import PROMPTS

if TYPE_CHECKING:
    from .source import PipelineRequest

__all__ = ["COMMANDS", "add_model_options", "source_of"]

_COMPARE = """\
Run a pipeline with its own scheduler, diffusers' common ones and DPM-Solver-v3, and print how far their latents are from the
converged ones: a table for a model card, or a picture.

    ems compare --diffusers embedded --ems stats/embedded-emoji.ems.safetensors --guidance 4
    ems compare --diffusers stabilityai/stable-diffusion-xl-base-1.0 --variant fp16 --device cuda --guidance 7 --out card.md
"""


def add_model_options(p: argparse.ArgumentParser) -> None:
    """Options that name a pipeline and say how it is loaded and called."""
    group = p.add_argument_group("a pipeline of diffusers")
    place = "folder, one-file checkpoint, repository of the Hub, module:function that makes a pipeline, or 'embedded'"
    group.add_argument("--diffusers", metavar="PLACE", help=place)
    group.add_argument("--prompts", type=Path, metavar="FILE", help="text file, one prompt a line (default: a mixed set)")
    group.add_argument("--variant", help="of the weights' files, such as fp16, which also sets --weights")
    group.add_argument("--weights", choices=("float32", "float16", "bfloat16"), help="dtype of the pipeline (float32)")
    group.add_argument("--size", type=int, help="height and width in pixels (the pipeline's own)")
    group.add_argument("--offload", choices=("model", "sequential"), default="", help="keep weights in main memory until used")
    group.add_argument("--checkpoint", type=Path, help="the model as the one file that other hosts load, and know it by")
    group.add_argument("--call", type=_arguments, metavar="JSON", help="""more arguments of its call: '{"num_frames": 17}'""")


def _arguments(text: str) -> dict[str, object]:
    value = json.loads(text)  # a ValueError, which argparse reports
    if not isinstance(value, dict):
        raise ValueError
    return value


_arguments.__name__ = "JSON object"


def source_of(args: argparse.Namespace) -> Source | None:
    """The pipeline that `--diffusers` names, at `args.guidance`; None without it. Raises EstimateError."""
    if args.diffusers is None:
        return None
    request = _request(args)
    from .source import load_pipeline, source_for

    return source_for(load_pipeline(request), request, args.guidance)


def _request(args: argparse.Namespace) -> PipelineRequest:
    if importlib.util.find_spec("diffusers") is None:
        raise EstimateError("--diffusers needs the library diffusers: pip install diffusers transformers")
    from .source import PipelineRequest

    prompts = tuple(PROMPTS)
    if args.prompts is not None:
        prompts = tuple(line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip())
        if not prompts:
            raise EstimateError(f"{args.prompts} holds no prompt")
    if args.size is not None and args.size < 8:
        raise EstimateError(f"--size must be at least 8 pixels, not {args.size}")
    weights = args.weights or {"fp16": "float16", "bf16": "bfloat16"}.get(args.variant or "", "float32")
    return PipelineRequest(
        args.diffusers,
        prompts,
        args.variant,
        getattr(torch, weights),
        args.device,
        args.size,
        args.offload,
        args.checkpoint,
        args.call,
        args.name or "",
    )


def add_compare(commands: Commands) -> None:
    """Register `ems compare`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser("compare", help="compare schedulers on a pipeline", description=_COMPARE, formatter_class=raw)
    add_model_options(p)
    p.add_argument("--name", help="name of the model, for the table")
    p.add_argument("--ems", type=Path, help="the model's statistics file")
    p.add_argument("--guidance", type=_numbers, default=(5.0,), help="guidance scales, comma-separated (5)")
    p.add_argument("--steps", type=_counts, help="numbers of steps, comma-separated (5,6,8,10,12,15,20)")
    p.add_argument("--samples", type=int, default=4, help="start noises (4)")
    p.add_argument("--batch", type=int, default=4, help="of them run at once (4)")
    p.add_argument("--reference", type=int, default=200, help="steps of the converged latents (200)")
    p.add_argument("--seed", type=int, default=1, help="of the noises (1)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", type=Path, help="also write the tables here, as Markdown")
    p.add_argument("--plot", type=Path, help="draw the last table, .svg or .png")
    p.set_defaults(run=run_compare)


def _numbers(text: str) -> tuple[float, ...]:
    values = tuple(float(v) for v in text.split(","))
    if not all(0 < v <= 1000 for v in values):
        raise ValueError
    return values


def _counts(text: str) -> tuple[int, ...]:
    values = tuple(int(v) for v in text.split(","))
    if not all(1 <= v <= 1000 for v in values):
        raise ValueError
    return values


_numbers.__name__, _counts.__name__ = "list of guidance scales", "list of step counts"


def run_compare(args: argparse.Namespace) -> int:
    """Run `ems compare`. Returns the exit status; raises EstimateError for the user."""
    if args.diffusers is None:
        raise EstimateError("give the pipeline: --diffusers PLACE")
    if min(args.samples, args.batch) < 1 or args.reference < 10:
        raise EstimateError("--samples and --batch must be at least 1, --reference at least 10")
    if args.plot is not None and args.plot.suffix not in (".svg", ".png"):
        raise EstimateError(f"{args.plot}: a picture is written as .svg or .png")
    request = _request(args)
    from . import compare as tables
    from .source import load_pipeline, replay_of

    pipe = load_pipeline(request)
    replay = replay_of(pipe, request)
    lines: list[str] = []
    for guidance in args.guidance:
        result = tables.compare(
            replay,
            tables.entrants(replay, args.ems, guidance),
            guidance,
            model=request.name or Path(request.place).name,
            samples=args.samples,
            batch=args.batch,
            steps=args.steps or tables.STEPS,
            reference_steps=args.reference,
            seed=args.seed,
            progress=lambda text: print(text, file=sys.stderr, flush=True),
        )
        lines += ["", *tables.table_of(result)]
        print("\n".join(lines[-len(tables.table_of(result)) - 1 :]))
    if args.out is not None:
        args.out.write_text("\n".join(lines).lstrip() + "\n", encoding="utf-8")
    if args.plot is not None:
        tables.drawn(result, args.plot)
    return 0


COMMANDS: tuple[Callable[[Commands], None], ...] = (add_compare,)
