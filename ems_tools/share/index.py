"""The index of a collection of statistics files, `index.json`: what there is, for which checkpoint, how good, by whom.

Generated from the files (`ems index FOLDER`), never written by hand; a Hub repository and the bundled `stats/` have the same.
Reading one trusts nothing: size, depth, types, lengths and every file name are checked, and what an index says of a file is
compared with the file itself before that is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ...sampler import EMSError
from ..file.contents import EMSFile
from ..file.layout import MAX_FILE_BYTES, SUFFIX
from ..file.reader import decode_ems_file, read_bytes
from ..file.rows import MAX_TEXT, advice_by_case, error_ratio
from ..file.storage import write_atomic
from .identity import ModelIdentity, content_fingerprint
from .library import safe_name

__all__ = [
    "INDEX",
    "MAX_INDEX_BYTES",
    "Hashes",
    "IndexEntry",
    "decode_index",
    "encode_index",
    "entry_of",
    "index_of",
    "mean_ratio",
    "write_index",
]

INDEX = "index.json"
MAX_INDEX_BYTES, MAX_ENTRIES = 8 * 2**20, 20_000
_FORMAT = "dpm-solver-v3-ems-index-1"
_HEX = re.compile(r"[0-9a-f]{0,64}")


@dataclass(frozen=True)
class Hashes:
    """What a checkpoint is found by; empty where unknown. Hexadecimal, lower case.

    Args:
        sha256: of the whole file; Civitai's AutoV2 is its first 10 digits.
        content: `identity.content_fingerprint`, which survives renaming and edits of the header.
        weights: `identity.weights_fingerprint`, of a model in memory.
    """

    sha256: str = ""
    content: str = ""
    weights: str = ""

    @classmethod
    def of(cls, identity: ModelIdentity) -> Hashes:
        """Of a model; what is no hash is left empty."""
        found = {f.name: getattr(identity, f.name).lower() for f in fields(cls)}
        return cls(**{name: value if _HEX.fullmatch(value) else "" for name, value in found.items()})

    @classmethod
    def of_checkpoint(cls, path: str | os.PathLike[str]) -> Hashes:
        """Of a checkpoint file, read whole. Raises OSError."""
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return cls(digest.hexdigest(), content_fingerprint(path))

    @property
    def autov2(self) -> str:
        """The first 10 digits of `sha256`."""
        return self.sha256[:10]

    def match(self, other: Hashes) -> bool:
        """Whether the surest hash that both have agrees; an AutoV2 (a sha256 of 10 digits) agrees with its full one."""
        a, b = self.sha256, other.sha256
        if min(len(a), len(b)) >= 10:
            return a.startswith(b) or b.startswith(a)
        for name in ("content", "weights"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine and theirs:
                return bool(mine == theirs)
        return False


@dataclass(frozen=True)
class IndexEntry:
    """One file of a collection.

    Args:
        file: its name in the folder; no folders in it.
        bytes, sha256, content_sha256: of the statistics file.
        name, architecture, prediction, checkpoint: the model it is for.
        autov2: of the checkpoint, for people who look for it.
        guidance, channels, space: what it covers.
        cases: of the evidence, on noise that chose nothing; `better` of them beat data prediction; `ratio` is the geometric
            mean of the errors' ratio (below 1: the statistics help).
        fitted: step counts with fitted schedules.
        licence, author: of the file.
    """

    file: str
    bytes: int
    sha256: str
    content_sha256: str
    name: str = ""
    architecture: str = ""
    prediction: str = ""
    checkpoint: Hashes = field(default_factory=Hashes)
    autov2: str = ""
    guidance: tuple[float, ...] = ()
    channels: int = 0
    space: str = ""
    cases: int = 0
    better: int = 0
    ratio: float | None = None
    steps: tuple[int, ...] = ()
    fitted: tuple[int, ...] = ()
    licence: str = ""
    author: str = ""

    def __post_init__(self) -> None:
        if not self.file.endswith(SUFFIX) or safe_name(self.file) != self.file or self.file.startswith("."):
            raise EMSError(f"the file name {self.file!r:.120} is not a plain name that ends in {SUFFIX}")
        if not 0 < self.bytes <= MAX_FILE_BYTES:
            raise EMSError(f"{self.file}: {self.bytes} bytes are not what a statistics file may have")
        for what in ("sha256", "content_sha256"):
            if not re.fullmatch(r"[0-9a-f]{64}", getattr(self, what)):
                raise EMSError(f"{self.file}: {what} is no SHA-256")


def entry_of(data: bytes | bytearray, name: str, checkpoints: Iterable[Hashes] = ()) -> IndexEntry:
    """The entry of a statistics file's bytes. Raises EMSError.

    Args:
        checkpoints: hashes of checkpoint files at hand; they complete those in the file.
    """
    file = decode_ems_file(data, name)
    identity = ModelIdentity.from_facts(file.meta.model)
    known = Hashes.of(identity)
    for other in checkpoints:
        if known.match(other):
            known = Hashes(other.sha256 or known.sha256, known.content or other.content, known.weights or other.weights)
    reports = [r for r in file.meta.evidence if r.split == "report" and r.data_prediction > 0]
    return IndexEntry(
        file=name,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        content_sha256=_content_hash_of(data),
        name=identity.name,
        architecture=identity.architecture,
        prediction=identity.prediction,
        checkpoint=known,
        autov2=known.autov2,
        guidance=tuple(file.guidance.tolist()),
        channels=file.channels,
        space=file.meta.space,
        cases=len(reports),
        better=sum(r.ems < r.data_prediction for r in reports),
        ratio=mean_ratio(file),
        steps=tuple(sorted({n for _, _, n in advice_by_case(file.meta)})),
        fitted=tuple(sorted({r.steps for r in file.meta.fitted if r.coefficients is not None})),
        licence=file.meta.foreign.get("modelspec.license", ""),
        author=file.meta.foreign.get("modelspec.author", ""),
    )


def mean_ratio(file: EMSFile) -> float | None:
    """Geometric mean of (error with EMS / error without) over the report rows, to 4 digits; None without evidence."""
    rows = [r for r in file.meta.evidence if r.split == "report" and r.data_prediction > 0]
    if not rows:
        return None
    logs = [math.log(error_ratio(r)) for r in rows]
    return float(f"{math.exp(sum(logs) / len(logs)):.4g}")


def _content_hash_of(data: bytes | bytearray) -> str:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return str(header["__metadata__"]["content_sha256"])


def index_of(folder: Path, checkpoints: Iterable[Hashes] = ()) -> list[IndexEntry]:
    """Entries of all statistics files directly in `folder`, by name. Raises EMSFileError for a bad file, OSError."""
    known = list(checkpoints)
    paths = sorted(p for p in folder.iterdir() if p.name.endswith(SUFFIX) and not p.name.startswith("."))
    entries = []
    for path in paths:
        entries.append(entry_of(read_bytes(path), path.name, known))
    return entries


def encode_index(entries: Iterable[IndexEntry]) -> bytes:
    """The file's bytes: one entry a block, by name, so that changes are easy to read."""
    rows = [{k: v for k, v in asdict(e).items() if v not in ("", None, ())} for e in sorted(entries, key=lambda e: e.file)]
    for row in rows:
        row["checkpoint"] = {k: v for k, v in row["checkpoint"].items() if v}
    text = json.dumps({"format": _FORMAT, "files": rows}, indent=1, ensure_ascii=False, allow_nan=False, sort_keys=True)
    return text.encode() + b"\n"


def write_index(folder: Path, entries: Iterable[IndexEntry]) -> Path:
    """Write `index.json` into the folder, atomically."""
    path = folder / INDEX
    write_atomic(path, encode_index(entries))
    return path


def decode_index(data: bytes | bytearray) -> list[IndexEntry]:
    """The entries of an index. Raises EMSError for anything that `encode_index` would not write (unknown keys aside)."""
    if len(data) > MAX_INDEX_BYTES:
        raise EMSError(f"the index has {len(data) >> 20} MiB, more than the {MAX_INDEX_BYTES >> 20} allowed")
    try:
        plain = json.loads(data.decode(), parse_constant=_refuse, parse_int=_short_int)
    except RecursionError:
        raise EMSError("the index is nested too deep") from None
    except ValueError as error:
        raise EMSError(f"the index is not valid JSON ({error!s:.100})") from None
    if not isinstance(plain, dict) or plain.get("format") != _FORMAT:
        raise EMSError(f"the index is not of the format {_FORMAT}: update DPM-Solver-v3, or ask its maintainer")
    rows = plain.get("files")
    if not isinstance(rows, list) or len(rows) > MAX_ENTRIES:
        raise EMSError(f"the index must list at most {MAX_ENTRIES} files")
    entries = [_entry(row) for row in rows]
    if len({e.file.casefold() for e in entries}) != len(entries):
        raise EMSError("the index names a file twice")
    return entries


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _short_int(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError("a number is too long")
    return int(digits)


_TEXTS = ("file", "sha256", "content_sha256", "name", "architecture", "prediction", "autov2", "space", "licence", "author")
_COUNTS = ("bytes", "channels", "cases", "better")
_LISTS = ("guidance", "steps", "fitted")


def _entry(row: object) -> IndexEntry:
    if not isinstance(row, dict) or not {"file", "bytes", "sha256", "content_sha256"} <= row.keys():
        raise EMSError("an entry of the index lacks file, bytes, sha256 or content_sha256")
    values: dict[str, Any] = {name: _text(name, row[name]) for name in _TEXTS if name in row}
    for name in _COUNTS:
        if name in row:
            if type(row[name]) is not int or not 0 <= row[name] < 2**40:
                raise EMSError(f"the index has a bad {name}: {row[name]!r:.60}")
            values[name] = row[name]
    for name in _LISTS:
        if name in row:
            values[name] = tuple(_numbers(name, row[name]))
    if row.get("ratio") is not None:
        values["ratio"] = _numbers("ratio", [row["ratio"]])[0]
    values["checkpoint"] = _hashes(row.get("checkpoint", {}))
    return IndexEntry(**values)


def _hashes(plain: object) -> Hashes:
    if not isinstance(plain, Mapping):
        raise EMSError("the index has bad hashes of a checkpoint")
    found = {f.name: _text(f.name, plain.get(f.name, "")) for f in fields(Hashes)}
    if not all(_HEX.fullmatch(v) for v in found.values()):
        raise EMSError("the index has a hash that is not hexadecimal")
    return Hashes(**found)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise EMSError(f"the index's {name} must be one line of plain text")
    return value


def _numbers(name: str, values: object) -> list[float]:
    if not isinstance(values, list) or len(values) > 256:
        raise EMSError(f"the index's {name} must be a short list of numbers")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
            raise EMSError(f"the index's {name} holds {value!r:.60}, which is no usable number")
    return values
