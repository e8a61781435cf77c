"""The statistics files of a host's folders: what is there, which are unusable and why, and which one fits a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..file.contents import EMSFile
from ..file.layout import SUFFIX
from ..file.reader import EMSFileError, load_ems_file
from .identity import ModelIdentity

__all__ = ["Entry", "Library", "Match", "safe_name"]

How = Literal["exact", "name", "architecture"]
_MAX_FILES = 5000


@dataclass(frozen=True)
class Entry:
    """One file; `file` is None where `problem` says what is wrong with it."""

    path: Path
    name: str
    file: EMSFile | None
    problem: str = ""

    @property
    def identity(self) -> ModelIdentity:
        """Of the model that the statistics were made for."""
        return ModelIdentity.from_facts(self.file.meta.model) if self.file else ModelIdentity()


@dataclass(frozen=True)
class Match:
    """The file for a model, and by what it was found."""

    entry: Entry
    how: How


class Library:
    """All `*.ems.safetensors` below some folders. Files are read when first asked for, and again when they change."""

    def __init__(self, folders: Iterable[str | os.PathLike[str]] = ()) -> None:
        self.folders = [Path(f) for f in folders]
        self._read: dict[Path, tuple[tuple[int, int], Entry]] = {}

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
        if entry.file is None:
            raise EMSFileError(path, entry.problem)
        return entry

    def find(self, model: ModelIdentity, *, channels: int | None = None, same_architecture: bool = False) -> Match | None:
        """The file that fits best: by fingerprint, by checkpoint name, or (if allowed) by architecture.

        Files of another number of latent channels never fit. Among equals those of the same prediction come first (one
        network can be run as another kind), then the newest date, then the name.
        """
        usable = [e for e in self.entries() if e.file and (channels is None or e.file.channels == channels)]

        def rank(e: Entry) -> tuple[bool, str, str]:
            return e.identity.prediction == model.prediction, e.file.meta.date if e.file else "", e.name

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
                return Entry(path, name, None, what)
            status = path.stat()
            stamp = (status.st_size, status.st_mtime_ns)
            known = self._read.get(path)
            if known is None or known[0] != stamp:
                known = self._read[path] = (stamp, Entry(path, name, load_ems_file(path)))
            return known[1]
        except EMSFileError as error:
            entry = Entry(path, name, None, error.what)
            self._read[path] = (stamp, entry)
            return entry
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
            return Entry(path, name, None, str(error))

    def _holds(self, real: Path) -> bool:
        return any(real.is_relative_to(folder.resolve()) for folder in self.folders)


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
    reserved = {"con", "prn", "aux", "nul", *(f"{d}{k}" for d in ("com", "lpt") for k in range(1, 10))}
    if not kept or kept.split(".")[0].casefold() in reserved:
        kept = f"ems_{kept}".rstrip("_")
    return kept + SUFFIX
