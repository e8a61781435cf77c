"""Fetch the statistics file of a checkpoint from a Hub repository: by hashes, bounded, verified, never over another file.

The repository's index says which file is for which checkpoint. What arrives is believed only after all of: its size and
SHA-256 are those of the index, it is a valid statistics file without contradictions, and it names the checkpoint itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...sampler import EMSError
from ..file.contents import EMSFile
from ..file.layout import SUFFIX
from ..file.reader import decode_ems_file
from ..file.storage import write_new
from ..judge.consistency import consistency_problems
from .hub import Hub
from .identity import ModelIdentity
from .index import INDEX, MAX_INDEX_BYTES, Hashes, IndexEntry, decode_index, entry_of
from .library import SHARED, safe_name

__all__ = ["Pulled", "candidates", "fetch_entry", "install", "pull"]


@dataclass(frozen=True)
class Pulled:
    """A file that is now in the folder; `new` tells whether it was written or there already.

    `entry` is made from the file: what an index claims of evidence or licence is not passed on.
    """

    path: Path
    file: EMSFile
    entry: IndexEntry
    new: bool


def candidates(entries: Iterable[IndexEntry], wanted: Hashes, channels: int | None = None) -> list[IndexEntry]:
    """Entries for this checkpoint, the one with the most evidence first."""
    found = [e for e in entries if wanted.match(e.checkpoint) and channels in (None, e.channels)]
    return sorted(found, key=lambda e: (-e.cases, e.ratio if e.ratio is not None else 9.0, e.file))


def fetch_entry(hub: Hub, entry: IndexEntry, wanted: Hashes) -> tuple[bytes, EMSFile]:
    """The file of an entry, verified. Raises EMSError."""
    place = f"{hub.repo}: {entry.file}"
    data = hub.fetch(entry.file, entry.bytes)
    if _other(data, entry) and not hub.offline:
        data = hub.fetch(entry.file, entry.bytes, anew=True)  # a bit of the copy in the cache may have flipped
    if _other(data, entry):
        raise EMSError(f"{place} is not the file that the index describes (its SHA-256 differs): nothing was installed")
    file = decode_ems_file(data, place)
    problems = consistency_problems(file)
    if problems:
        raise EMSError(f"{place} contradicts itself ({problems[0]}): nothing was installed")
    if not wanted.match(Hashes.of(ModelIdentity.from_facts(file.meta.model))):
        raise EMSError(f"{place} is for another checkpoint than the index says: nothing was installed")
    return data, file


def _other(data: bytes, entry: IndexEntry) -> bool:
    """Whether these bytes are not those that the index describes."""
    return len(data) != entry.bytes or hashlib.sha256(data).hexdigest() != entry.sha256


def install(data: bytes, name: str, folder: Path) -> tuple[Path, bool]:
    """Put a checked file of others into `folder`/shared under its name or, where another file has that, a numbered one.

    Returns the path, and whether it was written (equal bytes are left as they are). Raises EMSError, OSError.
    """
    folder = folder / SHARED
    folder.mkdir(parents=True, exist_ok=True)
    stem = safe_name(name).removesuffix(SUFFIX)
    for k in range(1, 1000):
        path = folder / f"{stem if k == 1 else f'{stem}_{k}'}{SUFFIX}"
        if path.is_symlink():
            continue  # whatever it points to is not ours to judge
        if not path.exists():
            try:
                write_new(path, data)
            except FileExistsError:  # another process was faster
                pass
            else:
                return path, True
        if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
            return path, False
    raise EMSError(f"{folder} holds 999 files called {stem}: remove some")


def pull(hub: Hub, wanted: Hashes, folder: Path, channels: int | None = None) -> Pulled:
    """Find, fetch, verify and install. Raises EMSError, OSError."""
    if wanted == Hashes():
        raise EMSError("nothing is known of the checkpoint to look for: give its file or its SHA-256")
    found = candidates(decode_index(hub.fetch(INDEX, MAX_INDEX_BYTES)), wanted, channels)
    if not found:
        shown = wanted.autov2 or wanted.content or wanted.weights
        raise EMSError(f"{hub.repo} has no statistics for the checkpoint {shown}: compute them with 'ems compute'")
    data, file = fetch_entry(hub, found[0], wanted)
    path, new = install(data, found[0].file, folder)
    return Pulled(path, file, entry_of(data, found[0].file), new)
