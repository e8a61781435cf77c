"""Which statistics a picture uses: the file that the user names, the checkpoint's own, or none; and files by their title."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from ..ems_tools.hosting import Origin, Run, TrustBook, choose_statistics
from ..ems_tools.share.identity import ModelIdentity
from ..ems_tools.share.library import Entry, Library
from ..sampler import EMS
from . import host, model

__all__ = [
    "AUTOMATIC",
    "NONE",
    "Found",
    "facts_of",
    "find",
    "find_entry",
    "fingerprint",
    "library",
    "named",
    "title_of",
    "titles",
    "trust",
]

AUTOMATIC, NONE = "automatic", "none"
_SUFFIX = ".ems.safetensors"


@dataclass(frozen=True)
class Found:
    """Statistics for a run, or None; `title` for the picture's record; `message` says what was found and what to do.

    `missing`: there is no file for this checkpoint, so computing one would help.
    """

    ems: EMS | None
    message: str
    title: str = NONE
    origin: Origin | None = None
    missing: bool = False


@lru_cache(maxsize=1)
def trust() -> TrustBook:
    """What is known of statistics files: computed here, tried, or found wrong."""
    return TrustBook(host.data_folder() / "cache" / "dpm-solver-v3-trust.json")


@lru_cache(maxsize=1)
def _library() -> Library:
    return Library()


def library() -> Library:
    """All statistics files of the host's folders."""
    found = _library()
    found.folders = host.ems_folders()
    return found


def fingerprint(path: Path) -> str:
    """First ten hex digits of the file's SHA-256, as hosts show checkpoints'. Raises OSError."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1000)
def _digest(path: Path, size: int, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:10]


def title_of(entry: Entry) -> str:
    """As "name [fingerprint]": what menus and pictures' records show."""
    return f"{entry.name.removesuffix(_SUFFIX)} [{fingerprint(entry.path)}]"


def titles() -> list[str]:
    """Titles of all usable files."""
    return [title_of(e) for e in library().entries() if not e.problem]


def named(text: str) -> Entry:
    """The usable file that `text` means: its title, else its fingerprint alone, else its name. Raises HostError."""
    name, _, mark = text.strip().removesuffix("]").rpartition("[")
    entries = [e for e in library().entries() if not e.problem]
    by_mark = [e for e in entries if mark and fingerprint(e.path) == mark.strip()]
    by_name = [e for e in entries if e.name.removesuffix(_SUFFIX) == (name or mark).strip().removesuffix(_SUFFIX)]
    if found := [e for e in by_mark if e in by_name] or by_mark or by_name:
        return found[0]
    raise host.HostError(f"there is no EMS file {text!r} in {' or '.join(map(str, library().folders))}")


def facts_of(run: model.Running, guidance: float | None, sampler: str | None = None) -> Run:
    """What is known of a run, for the rules that all hosts share. Raises HostError for a model without noise levels."""
    unknown = "the host does not say which picture this is for, so its CFG scale is not known"
    return Run(model.level_table(run), guidance, model.guider_of(run), sampler, unknown)


def find(run: model.Running, x: Tensor, guidance: float, wanted: str = AUTOMATIC, same_architecture: bool = False) -> Found:
    """Statistics for latents like x [B, C, ...]. A file that is missing or does not fit never stops a run."""
    entry, reason = find_entry(run, x.shape[1], wanted, same_architecture)
    file = None if entry is None else entry.file
    if entry is None or file is None:
        return Found(None, reason, missing=wanted == AUTOMATIC)
    found = choose_statistics(file, entry.name, reason, facts_of(run, guidance), tuple(x.shape))
    if found.ems is None:
        return Found(None, found.message)
    origin = Origin(file, entry.name)
    refusal = trust().refusal(origin)
    return Found(None, refusal) if refusal else Found(found.ems, found.message, title_of(entry), origin)


def find_entry(
    run: model.Running, channels: int | None, wanted: str = AUTOMATIC, same_architecture: bool = False
) -> tuple[Entry | None, str]:
    """The file to use and why, or None and what to do about it."""
    if wanted == NONE:
        return None, "sampling without EMS, as asked for"
    if wanted != AUTOMATIC:
        try:
            entry = named(wanted)
        except host.HostError as error:
            return None, f"{error}: sampling without statistics"
        note = "" if wanted.strip() in (title_of(entry), entry.name, entry.name.removesuffix(_SUFFIX)) else f", for {wanted}"
        return entry, f"as asked for{note}{_of_another(entry, model.identity_of(run))}"
    identity = model.identity_of(run)
    match = library().find(identity, channels=channels, same_architecture=same_architecture)
    if match is None:
        bad = [e.name for e in library().entries() if e.problem]
        refused = f" ({len(bad)} unusable files, see the tab EMS: {', '.join(bad[:3])})" if bad else ""
        size = "" if channels is None else f", {channels} channels"
        what = f"{identity.name or 'this model'} ({identity.architecture}{size})"
        todo = "Compute them once in the tab EMS, or put their file into models/ems"
        return None, f"no EMS for {what}{refused}: sampling without statistics. {todo}"
    reasons = {
        "exact": "made for this checkpoint",
        "name": "of a checkpoint with the same name; for its own, compute them in the tab EMS",
        "architecture": "of another checkpoint of the same architecture; for its own, compute them in the tab EMS",
    }
    return match.entry, reasons[match.how]


def _of_another(entry: Entry, loaded: ModelIdentity) -> str:
    """A clause that warns if the file was made for another checkpoint than the loaded one, as far as both are known."""
    made_for = entry.identity
    known = any(getattr(made_for, kind) and getattr(loaded, kind) for kind in ("sha256", "content"))
    if not known or loaded.same_as(made_for):
        return ""
    return f", though it was made for another checkpoint ({made_for.name or 'unknown'}); 'automatic' finds the loaded one's own"
