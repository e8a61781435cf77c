"""The statistics files of a host's folders: what is there, which are unusable and why, and which one fits a model."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from ..file.contents import EMSFile
from ..file.layout import SUFFIX
from ..file.reader import EMSFileError, load_ems_file
from .identity import ModelIdentity

__all__ = ["SHARED", "Entry", "Library", "Match", "safe_name"]

How = Literal["exact", "name", "architecture"]
_MAX_FILES = 5000
SHARED = "shared"
"""Folder, inside one of the library's, for files that came from others: they give way to the user's own."""
_KEPT_BYTES = 64 * 2**20
_NAME_BYTES = 180
"""Of a name in UTF-8: systems allow 255, of which a numbered, unfinished, temporary file's name takes up to 60."""
_WINDOWS_NAMES = {"con", "prn", "aux", "nul", *(f"{d}{k}" for d in ("com", "lpt") for k in "0123456789\u00b9\u00b2\u00b3")}


@dataclass(frozen=True, eq=False)
class Entry:
    """One file: what is needed to choose it. `problem` says what is wrong with one that cannot be used.

    Args:
        path, name: where it lies; its path within its folder, with "/".
        problem: "" for a usable file.
        identity: of the model that the statistics were made for.
        channels, date: of the file.
        read: gives its contents.
    """

    path: Path
    name: str
    problem: str = ""
    identity: ModelIdentity = field(default_factory=ModelIdentity)
    channels: int = 0
    date: str = ""
    read: Callable[[], EMSFile | None] = field(default=lambda: None, repr=False)

    @property
    def file(self) -> EMSFile | None:
        """The contents, read again where they are no longer in memory; None if the file cannot be used."""
        return None if self.problem else self.read()

    @property
    def shared(self) -> bool:
        """Whether it came from others."""
        return self.name.split("/")[0] == SHARED

    @property
    def day(self) -> datetime.date:
        """The file's date; one that is no date, or in the future, counts as the oldest."""
        try:
            found = datetime.date.fromisoformat(self.date[:10])
        except ValueError:
            return datetime.date.min
        return found if found <= datetime.date.today() + datetime.timedelta(days=1) else datetime.date.min


@dataclass(frozen=True)
class Match:
    """The file for a model, and by what it was found."""

    entry: Entry
    how: How


class Library:
    """All `*.ems.safetensors` below some folders. Files are read when first asked for, and again when they change.

    What tells which model a file is for is kept of every file; contents of the files used last, up to 64 MiB together.
    """

    def __init__(self, folders: Iterable[str | os.PathLike[str]] = ()) -> None:
        self.folders = [Path(f) for f in folders]
        self._known: dict[Path, tuple[tuple[int, int], Entry]] = {}
        self._contents: dict[Path, tuple[tuple[int, int], EMSFile]] = {}

    def paths(self) -> list[tuple[str, Path]]:
        """(name, path), by name; the name is the path within its folder, with "/". An earlier folder's name wins."""
        found: dict[str, Path] = {}
        for folder in self.folders:
            for path in _files(folder):
                found.setdefault(path.relative_to(folder).as_posix(), path)
        return sorted(found.items())

    def entries(self) -> list[Entry]:
        """Every file, the unusable ones with their problem."""
        return [self._entry(name, path) for name, path in self.paths()]

    def get(self, name: str) -> Entry:
        """The file of this name. Raises EMSFileError if there is none or it is refused."""
        path = dict(self.paths()).get(name)
        if path is None:
            raise EMSFileError(name, "there is no such statistics file in " + ", ".join(map(str, self.folders)))
        entry = self._entry(name, path)
        if entry.problem:
            raise EMSFileError(path, entry.problem)
        return entry

    def find(self, model: ModelIdentity, *, channels: int | None = None, same_architecture: bool = False) -> Match | None:
        """The file that fits best: by fingerprint, by checkpoint name, or (if allowed) by architecture.

        Files of another number of latent channels never fit. Among equals those of the same prediction come first (one
        network can be run as another kind), then the user's own, then the newest, then the name.
        """
        usable = [e for e in self.entries() if not e.problem and channels in (None, e.channels)]

        def rank(e: Entry) -> tuple[bool, bool, datetime.date, str]:
            return e.identity.prediction == model.prediction, not e.shared, e.day, e.name

        usable.sort(key=rank, reverse=True)
        tests: list[tuple[How, list[Entry]]] = [
            ("exact", [e for e in usable if model.same_as(e.identity)]),
            ("name", [e for e in usable if model.name and e.identity.name.casefold() == model.name.casefold()]),
        ]
        if same_architecture and model.architecture:
            kin = (model.architecture, model.prediction)
            alike = [e for e in usable if (e.identity.architecture, e.identity.prediction) == kin]
            tests.append(("architecture", alike))
        return next((Match(found[0], how) for how, found in tests if found), None)

    def _entry(self, name: str, path: Path) -> Entry:
        try:
            if path.is_symlink() and not self._holds(path.resolve()):
                what = "is a link that leads out of the folders of statistics files: put the file itself here"
                return Entry(path, name, what)
            stamp = _stamp(path)
            known = self._known.get(path)
            if known is None or known[0] != stamp or known[1].name != name:
                known = self._known[path] = (stamp, self._summary(path, name))
            return known[1]
        except EMSFileError as error:
            entry = Entry(path, name, error.what)
            self._known[path] = (stamp, entry)
            return entry
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
            return Entry(path, name, str(error) or "cannot be read")

    def _summary(self, path: Path, name: str) -> Entry:
        file = self._read(path)
        identity = ModelIdentity.from_facts(file.meta.model)
        return Entry(path, name, "", identity, file.channels, file.meta.date, partial(self._read_again, path))

    def _read_again(self, path: Path) -> EMSFile | None:
        try:
            return self._read(path)
        except (EMSFileError, OSError):  # it has gone or changed since it was listed; the next listing says so
            return None

    def _read(self, path: Path) -> EMSFile:
        """The contents, from memory if the file has not changed. Raises EMSFileError, OSError."""
        stamp = _stamp(path)
        found = self._contents.pop(path, None)
        if found is None or found[0] != stamp:
            found = (stamp, load_ems_file(path))
        self._contents[path] = found
        while len(self._contents) > 1 and sum(size for (size, _), _ in self._contents.values()) > _KEPT_BYTES:
            del self._contents[next(iter(self._contents))]
        return found[1]

    def _holds(self, real: Path) -> bool:
        return any(real.is_relative_to(folder.resolve()) for folder in self.folders)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _files(folder: Path) -> Iterator[Path]:
    count = 0
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(names):
            if name.endswith(SUFFIX) and not name.startswith("."):
                count += 1
                if count > _MAX_FILES:
                    return
                yield Path(root) / name


def safe_name(text: str) -> str:
    """A file name (with SUFFIX) made of what a user typed: no folders, no characters that a system refuses."""
    stem = text.removesuffix(SUFFIX)
    kept = "".join(c if c.isalnum() or c in " ._-()+" else "_" for c in stem).strip(" .")[:100]
    kept = kept.encode("utf-8", "ignore")[:_NAME_BYTES].decode("utf-8", "ignore").strip(" .")
    if not kept or kept.split(".")[0].rstrip(" ").casefold() in _WINDOWS_NAMES:
        kept = f"ems_{kept}".rstrip("_")
    return kept + SUFFIX
