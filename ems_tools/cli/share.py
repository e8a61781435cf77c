"""`ems index`, `ems share` and `ems pull`: collections of statistics files."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...sampler import EMSError
from ..file.layout import SUFFIX
from ..file.reader import load_ems_file
from ..share.hub import Hub, NotThere
from ..share.index import INDEX, MAX_INDEX_BYTES, Hashes, IndexEntry, decode_index, encode_index, index_of, write_index
from ..share.publish import Labels, contribution, files_for_hub, push
from ..share.pull import pull
from .plugs import Commands

__all__ = ["add_index", "add_pull", "add_share"]


_STATED = ("architecture", "licence", "author")


def _parser(commands: Commands, name: str, summary: str, text: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=text, formatter_class=raw)
    return parser


def _add_hub(p: argparse.ArgumentParser) -> None:
    p.add_argument("--endpoint", help="address of another Hub (default: the variable HF_ENDPOINT, else huggingface.co)")
    p.add_argument("--cache", type=Path, help="another cache folder than huggingface_hub's")


# --- index


def add_index(commands: Commands) -> None:
    """Register `ems index`."""
    text = (
        f"Write {INDEX}: every statistics file of a folder with its checkpoint's hashes, guidance scales, evidence, licence,\n"
        "author. Collections are searched by it.\n\n    ems index stats\n    ems index stats --check"
    )
    p = _parser(commands, "index", "list a folder's files in an index", text)
    p.add_argument("folder", type=Path, help=f"holds *{SUFFIX} files")
    p.add_argument("--checkpoint", type=Path, action="append", default=[], help="a model's file at hand, to add its hashes")
    for name in _STATED:
        p.add_argument(f"--{name}", default="", help=f"{name} of files that name none; kept in the index from then on")
    p.add_argument("--check", action="store_true", help="write nothing; status 1 if the index is not current")
    p.set_defaults(run=run_index)


def known_checkpoints(paths: list[Path]) -> list[Hashes]:
    """Hashes of these checkpoints and of the embedded model's."""
    from ..embedded.denoiser import WEIGHTS

    return [Hashes.of_checkpoint(path) for path in [WEIGHTS, *paths] if path != WEIGHTS or path.exists()]


def run_index(args: argparse.Namespace) -> int:
    """Run `ems index`."""
    if not args.folder.is_dir():
        raise EMSError(f"{args.folder} is not a folder")
    path = args.folder / INDEX
    given = {name: getattr(args, name) for name in _STATED if getattr(args, name)}
    entries = _completed(index_of(args.folder, known_checkpoints(args.checkpoint)), path, given)
    if args.check:
        if not path.is_file() or path.stat().st_size > MAX_INDEX_BYTES or path.read_bytes() != encode_index(entries):
            raise EMSError(f"{path} is not current: run 'ems index {args.folder}'")
        print(f"{path}: current, {len(entries)} file(s)")
        return 0
    print(f"Wrote {write_index(args.folder, entries)}: {len(entries)} file(s)")
    return 0


def _completed(entries: list[IndexEntry], path: Path, given: dict[str, str]) -> list[IndexEntry]:
    """Entries with what was stated of files that do not say it themselves: now, or in the index before."""
    before: dict[str, IndexEntry] = {}
    if path.is_file() and path.stat().st_size <= MAX_INDEX_BYTES:
        before = {e.file: e for e in decode_index(path.read_bytes())}
    completed = []
    for entry in entries:
        old = before.get(entry.file)
        stated: dict[str, Any] = {
            name: given.get(name) or getattr(old, name, "") for name in _STATED if not getattr(entry, name)
        }
        completed.append(replace(entry, **stated))
    return completed


# --- share


def add_share(commands: Commands) -> None:
    """Register `ems share`."""
    text = (
        "Prepare a file for others: leave out paths, prompts and user names, name the checkpoint by its hashes, write a card\n"
        "with plot and evidence. Nothing leaves this computer without --push and --yes.\n\n"
        f"    ems share my{SUFFIX} --checkpoint my.safetensors --author me --licence cc0-1.0 --out shared\n"
        f"    ems share my{SUFFIX} --checkpoint my.safetensors --push me/ems          # shows what would be sent\n"
        f"    ems share my{SUFFIX} --checkpoint my.safetensors --push me/ems --yes"
    )
    p = _parser(commands, "share", "prepare a file for others, and publish it", text)
    p.add_argument("file", type=Path, help=f"a *{SUFFIX} file")
    p.add_argument("--checkpoint", type=Path, help="the model's file: adds its hashes, by which others find the statistics")
    p.add_argument("--name", default="", help="file name to publish under (default: the model's name)")
    p.add_argument("--title", default="", help="title in the file")
    p.add_argument("--author", default="", help="your name or alias in the file (default: none)")
    p.add_argument("--licence", "--license", default="cc0-1.0", help="of the file, as the Hub spells it (cc0-1.0)")
    p.add_argument("--keep-prompts", action="store_true", help="keep what the file says of prompts")
    p.add_argument("--out", type=Path, default=Path("shared"), help="folder to write into (shared)")
    p.add_argument("--push", metavar="REPO", help="Hub repository user/name to publish in (needs huggingface_hub)")
    p.add_argument("--yes", action="store_true", help="with --push: really send it")
    _add_hub(p)
    p.set_defaults(run=run_share)


def run_share(args: argparse.Namespace) -> int:
    """Run `ems share`."""
    hub = Hub(args.push, args.endpoint, args.cache) if args.push else None
    labels = Labels(args.author, args.licence, args.title)
    item = contribution(load_ems_file(args.file), labels, args.name, args.checkpoint, args.keep_prompts)
    for path in item.save(args.out):
        print(f"Wrote {path}")
    print("Left out: " + (", ".join(item.left_out) if item.left_out else "nothing"))
    if not item.entry.checkpoint.sha256 and not item.entry.checkpoint.content:
        print("The file names no hash of its checkpoint, so nobody finds it by one: give --checkpoint")
    if hub is None:
        return 0
    if not args.yes:
        try:
            files = files_for_hub(hub, item, labels)
        except NotThere:
            files = dict(item.parts)
        print(f"Would commit to {hub.repo} (give --yes to do it):")
        for name, data in sorted(files.items()):
            print(f"  {name}, {len(data)} bytes")
        return 0
    print(f"Published in {hub.repo}: {push(hub, item, labels)}")
    return 0


# --- pull


def add_pull(commands: Commands) -> None:
    """Register `ems pull`."""
    text = (
        "Find the statistics of a checkpoint in a Hub repository by its hashes, verify them and put them into a folder.\n"
        "A file that is there already is never overwritten. Needs huggingface_hub.\n\n"
        "    ems pull --repo user/ems --checkpoint my.safetensors --to ComfyUI/models/ems\n"
        "    ems pull --repo user/ems --hash 6ce0161689 --offline"
    )
    p = _parser(commands, "pull", "fetch a checkpoint's file from a collection", text)
    p.add_argument("--repo", required=True, help="Hub repository, user/name")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="the model's file")
    what.add_argument("--hash", help="its SHA-256, AutoV2 (first 10 digits of it) or content fingerprint")
    p.add_argument("--to", type=Path, default=Path(), help="folder to install into (this one)")
    p.add_argument("--offline", action="store_true", help="use what was fetched before; no network")
    _add_hub(p)
    p.set_defaults(run=run_pull)


def hashes_named(text: str) -> Hashes:
    """From what a user typed. Raises EMSError."""
    value = text.strip().lower().removeprefix("0x")
    if not re.fullmatch(r"[0-9a-f]{10}|[0-9a-f]{32}|[0-9a-f]{64}", value):
        raise EMSError(f"{text!r:.80} is no hash: 64 digits (SHA-256), 10 (AutoV2) or 32 (content fingerprint), 0-9 and a-f")
    return Hashes(content=value) if len(value) == 32 else Hashes(sha256=value)


def run_pull(args: argparse.Namespace) -> int:
    """Run `ems pull`."""
    wanted = hashes_named(args.hash) if args.hash else Hashes.of_checkpoint(args.checkpoint)
    done = pull(Hub(args.repo, args.endpoint, args.cache, args.offline), wanted, args.to)
    what = "Wrote" if done.new else "Was there already:"
    entry = done.entry
    evidence = "no evidence" if entry.ratio is None else f"better than without EMS in {entry.better} of {entry.cases} cases"
    size = f"{entry.bytes / 1024:.1f} KiB, whole and without contradictions, not tried on the model"
    print(f"{what} {done.path}, {size}; {evidence}; licence {entry.licence or 'not named'}")
    return 0
