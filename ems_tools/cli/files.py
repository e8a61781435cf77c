"""`ems inspect`, `verify`, `merge`, `convert` and `plot`: what is done with finished files."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ...sampler import EMSError
from ..estimate.merge import merge_files
from ..file.contents import EMSFile
from ..file.convert import PRESETS, convert_npz, lambda_range
from ..file.layout import SUFFIX
from ..file.reader import EMSFileError, load_ems_file
from ..judge.consistency import consistency_problems
from ..judge.measure import SAMPLES
from ..judge.spot_check import ALPHA, spot_check
from ..show.describe import facts_of, lines_of
from ..show.draw import plot_ems
from .model import add_model_options, add_running_options, source_of
from .plugs import Commands

__all__ = ["add_convert", "add_inspect", "add_merge", "add_plot", "add_verify", "command"]


def command(commands: Commands, name: str, summary: str, text: str, run: Callable[..., int]) -> argparse.ArgumentParser:
    """Register a command with its help; `run` takes the parsed arguments and gives the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=text, formatter_class=raw)
    parser.set_defaults(run=run)
    return parser


# --- inspect


def add_inspect(commands: Commands) -> None:
    """Register `ems inspect`."""
    text = f"Print what a statistics file holds.\n\n    ems inspect model{SUFFIX}\n    ems inspect model{SUFFIX} --json"
    parser = command(commands, "inspect", "print what a file holds", text, _inspect)
    parser.add_argument("file", type=Path, help=f"a *{SUFFIX} file")
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object")


def _inspect(args: argparse.Namespace) -> int:
    file = load_ems_file(args.file)
    facts = facts_of(file)
    if args.json:
        print(json.dumps({"path": str(args.file), "bytes": args.file.stat().st_size, **facts}, indent=1))
        return 0
    print(f"{args.file}: {args.file.stat().st_size / 1024:.1f} KiB, format checked, checksum right")
    print("\n".join(lines_of(file)))
    return 0


# --- verify


def add_verify(commands: Commands) -> None:
    """Register `ems verify`."""
    text = (
        "Check files: format, checksum, shapes and ranges; that l, s, b are what the moments give, where it keeps them;\n"
        "that the evidence supports the recommendation (never worse than data prediction on calibration noise).\n"
        f"With --model also on the model: {SAMPLES} fresh trajectories tell this model's statistics from others.\n\n"
        f"    ems verify stats/*{SUFFIX}\n"
        f"    ems verify stats/embedded-emoji{SUFFIX} --model embedded\n"
        f"    ems verify my{SUFFIX} --model my_model:denoiser --shape 4,64,64 --sigma-min 0.0292 --sigma-max 14.61"
    )
    parser = command(commands, "verify", "check files, alone or on their model", text, _verify)
    parser.add_argument("files", type=Path, nargs="+", metavar="file", help=f"*{SUFFIX} files")
    add_model_options(parser)
    add_running_options(parser)
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"trajectories per guidance scale ({SAMPLES})")
    parser.add_argument("--alpha", type=float, default=ALPHA, help=f"how often a right file may fail ({ALPHA})")
    parser.add_argument("--seed", type=int, help="of the fresh noise (default: random, so that no file is made for it)")


def _verify(args: argparse.Namespace) -> int:
    if not 4 <= args.samples <= 4096 or not 0 < args.alpha < 1:
        raise EMSError("--samples must lie in 4 .. 4096 and --alpha between 0 and 1")
    bad = 0
    for path in args.files:
        try:
            file = load_ems_file(path)
        except EMSFileError as error:
            problems, notes = [error.what], []
        else:
            problems, notes = consistency_problems(file), _notes(file)
            if args.model is not None and not problems:
                problems, tried = _try_on_model(file, args)
                notes += tried
        for problem in problems:
            print(f"ems verify: {path}: {problem}", file=sys.stderr)
        if not problems:
            print(f"{path}: ok{''.join(f'; {note}' for note in notes)}")
        bad += bool(problems)
    return 1 if bad else 0


def _try_on_model(file: EMSFile, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Problems, and what was done in words."""
    embedded = args.model == "embedded"
    given = {**vars(args), "model": None if embedded else args.model, "guidance": tuple(file.guidance.tolist())}
    source = source_of(argparse.Namespace(**given))
    result = spot_check(
        file,
        source,
        seed=secrets.randbits(48) if args.seed is None else args.seed,
        samples=args.samples,
        alpha=args.alpha,
        batch=args.batch,
        device=args.device,
        dtype=getattr(torch, args.dtype),
    )
    notes = [result.in_words()]
    mine, theirs = source.identity.get("sha256"), file.meta.model.get("sha256")
    if mine and theirs and mine != theirs:
        notes.append("the checkpoint tried is not the one that the file names")
    return result.problems, notes


def _notes(file: EMSFile) -> list[str]:
    """What is allowed and still good to know."""
    notes = ["checksum right"]
    if not file.moments:
        notes.append("no moments to compute l, s, b again from")
    reports = [r for r in file.meta.evidence if r.split == "report"]
    lost = sum(r.ems > r.data_prediction for r in reports)
    if not file.meta.evidence and file.meta.fitted:
        return [*notes, "the statistics themselves have not been tried on any schedule, so they are used on none"]
    if not file.meta.evidence:
        return [*notes, "no evidence: these statistics have not been tried"]
    return [*notes, f"on report noise no worse than data prediction in {len(reports) - lost} of {len(reports)} cases"]


# --- convert


def add_convert(commands: Commands) -> None:
    """Register `ems convert`."""
    width = max(map(len, PRESETS))
    presets = "\n".join(
        f"  {name:<{width}}  {lambda_range(name)[0]:6.3f} .. {lambda_range(name)[1]:5.3f}  {what}"
        for name, (what, _) in PRESETS.items()
    )
    text = (
        "Convert the l.npz and sb.npz of the paper's authors. The files do not say which range of lambda they cover:\n"
        "give a preset, or the range from the noisy to the clean end.\n\n"
        f"    ems convert l.npz sb.npz --preset sd-v1 --guidance 7.5 --out sd{SUFFIX}\n\npresets:\n{presets}"
    )
    parser = command(commands, "convert", "import the authors' files", text, _convert)
    parser.add_argument("l", type=Path, help="l.npz")
    parser.add_argument("sb", type=Path, help="sb.npz")
    parser.add_argument("--out", type=Path, required=True, help=f"file to write, *{SUFFIX}")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--preset", choices=sorted(PRESETS), metavar="NAME", help="range of lambda by name, see above")
    where.add_argument("--range", type=float, nargs=2, metavar=("FIRST", "LAST"), help="of lambda: -2.682 3.535, say")
    parser.add_argument("--guidance", type=float, default=1.0, help="scale that the statistics were computed for (1)")
    kind = "keep every position (fits one latent size only); default: mean over positions, fits all sizes"
    parser.add_argument("--per-element", action="store_true", help=kind)
    parser.add_argument("--name", default="", help="the model's name, kept in the file")
    parser.add_argument("--date", default="", help="date to note in the file")


def _convert(args: argparse.Namespace) -> int:
    _check_output(args.out)
    span = lambda_range(args.preset) if args.preset else tuple(args.range)
    model = {"name": args.name or args.preset or args.l.resolve().parent.name}
    kept = {"per_element": args.per_element, "date": args.date}
    file = convert_npz(args.l, args.sb, span, guidance=args.guidance, model=model, **kept)
    file.save(args.out)
    size = f"{args.out.stat().st_size / 1024:.1f} KiB"
    print(f"Wrote {args.out}, {size}. It has no evidence: nothing tells whether it helps.")
    return 0


def _check_output(path: Path) -> None:
    if not path.name.endswith(SUFFIX):
        raise EMSError(f"{path}: the name of a statistics file ends in {SUFFIX}")


# --- plot


def add_plot(commands: Commands) -> None:
    """Register `ems plot`."""
    text = f"Draw l, s, b and the evidence.\n\n    ems plot model{SUFFIX} --out model.svg\n\nA .png needs Pillow."
    parser = command(commands, "plot", "draw l, s, b and the evidence", text, _plot)
    parser.add_argument("file", type=Path, help=f"a *{SUFFIX} file")
    parser.add_argument("--out", type=Path, help="picture to write, .svg or .png (default: beside the file, .svg)")


def _plot(args: argparse.Namespace) -> int:
    out = args.out or args.file.with_name(args.file.name.removesuffix(SUFFIX) + ".svg")
    plot_ems(load_ems_file(args.file), out)
    print(f"Wrote {out}")
    return 0


# --- merge


def add_merge(commands: Commands) -> None:
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
