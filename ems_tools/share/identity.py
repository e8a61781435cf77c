"""Which model a statistics file belongs to: fingerprints of checkpoints that survive renaming and edits of the header.

A checkpoint of several GB is not read whole. Its content fingerprint is the SHA-256 of every tensor's name, dtype and shape and
of blocks of up to 256 tensors: training, merging or casting a model changes all of its weights, so blocks are enough to
tell two checkpoints apart. They do not prove that nobody forged one; nothing here rests on that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..file.rows import MAX_TEXT
from ..file.storage import write_atomic

__all__ = ["FingerprintCache", "ModelIdentity", "content_fingerprint", "one_line_of", "weights_fingerprint"]

_TENSORS, _BLOCK = 256, 4096
_MAX_HEADER = 256 * 2**20
_WEIGHTS, _VALUES = 64, 64
_CACHE_FORMAT, _CACHE_ENTRIES = "dpm-solver-v3-fingerprints-1", 2000


@dataclass(frozen=True)
class ModelIdentity:
    """What is known of a model; empty strings where nothing is.

    Args:
        name: the checkpoint's file name without folder and ending.
        content: `content_fingerprint` of its file.
        weights: `weights_fingerprint`, where no file is known.
        sha256: of the whole file, where the host has it.
        architecture: the host's name of the kind of model ("SDXL", "Flux", ...).
        prediction: what the network predicts ("EPS", "V_PREDICTION", ...).
        patches: LoRAs and other changes on top; they do not change the identity.
    """

    name: str = ""
    content: str = ""
    weights: str = ""
    sha256: str = ""
    architecture: str = ""
    prediction: str = ""
    patches: str = ""

    def __post_init__(self) -> None:
        """Names come from files and prompts of all sorts: they become what a statistics file can keep."""
        for f in fields(self):
            object.__setattr__(self, f.name, one_line_of(getattr(self, f.name)))

    @classmethod
    def from_facts(cls, facts: Mapping[str, object]) -> ModelIdentity:
        """From a file's `meta.model`; what is missing or no text is empty."""
        values = {f.name: facts.get(f.name, "") for f in fields(cls)}
        return cls(**{name: value if isinstance(value, str) else "" for name, value in values.items()})

    def facts(self) -> dict[str, str]:
        """What is known, for a file's `meta.model`."""
        return {name: value for name, value in asdict(self).items() if value}

    def same_as(self, other: ModelIdentity) -> bool:
        """Whether the surest fingerprint that both have is equal."""
        for kind in ("sha256", "content", "weights"):
            mine, theirs = getattr(self, kind), getattr(other, kind)
            if mine and theirs:
                return bool(mine == theirs)
        return False


def content_fingerprint(path: str | os.PathLike[str]) -> str:
    """16 bytes of SHA-256 in hexadecimal over a checkpoint file's content; reads about 1 MB of it.

    A safetensors file is told by its tensors, whatever its metadata and their order; any other file by its size and
    blocks spread over it, and nothing in it is executed. Raises OSError.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        tensors = _safetensors(file, size)
        digest = hashlib.sha256(b"safetensors" if tensors else b"file %d" % size)
        for spec, start, end in tensors or _even(size):
            digest.update(spec.encode())
            if end > start:
                file.seek(start + max(0, end - start - _BLOCK) // 2)
                digest.update(file.read(min(_BLOCK, end - start)))
    return digest.hexdigest()[:32]


def _even(size: int) -> list[tuple[str, int, int]]:
    step = max(size // _TENSORS, 1)
    return [("", at, min(at + step, size)) for at in range(0, size, step)]


def _safetensors(file: BinaryIO, size: int) -> list[tuple[str, int, int]]:
    """(name, dtype and shape; start; end) of every tensor by name; the blocks of all but 256 left empty. [] if it is none."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        return []
    try:
        header = json.loads(file.read(length))
        tensors = sorted((n, v) for n, v in header.items() if n != "__metadata__")
        found = []
        for k, (name, value) in enumerate(tensors):
            start, end = (8 + length + int(offset) for offset in value["data_offsets"])
            chosen = k * _TENSORS // len(tensors) != (k - 1) * _TENSORS // len(tensors) and 0 <= start <= end <= size
            spec = f"{name}|{value['dtype']}|{value['shape']}|"
            found.append((spec, start, end) if chosen else (spec, 0, 0))
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """The same idea for weights in memory, where no file is known: names, shapes, and 64 values of 64 tensors.

    The values of one device are fetched in one transfer. The fingerprint depends on the dtype that the host loaded.
    """
    names = sorted(state)
    digest = hashlib.sha256("".join(f"{n}|{tuple(state[n].shape)}|" for n in names).encode())
    chosen = [state[n] for n in names[:: max(len(names) // _WEIGHTS, 1)][:_WEIGHTS] if state[n].numel()]
    parts: dict[torch.device, list[Tensor]] = {}
    for tensor in chosen:
        flat = tensor.detach().reshape(-1)
        parts.setdefault(tensor.device, []).append(flat[:: max(len(flat) // _VALUES, 1)][:_VALUES].float())
    for device in sorted(parts, key=str):
        digest.update(torch.cat(parts[device]).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def one_line_of(text: str, limit: int = MAX_TEXT) -> str:
    """Any text as the one line of printable characters that metadata holds, at most `limit` of them.

    Line ends, tabs and the many kinds of spaces become a space, invisible characters (joiners, control codes, halves of a
    surrogate pair) nothing. So two texts that look alike are mostly kept alike.
    """
    spaced = "".join(" " if c.isspace() else c for c in text)
    return " ".join("".join(c for c in spaced if c.isprintable()).split())[:limit].rstrip()


class FingerprintCache:
    """Fingerprints by path, size and time of change, in one small JSON file in the host's user folder.

    A cache that cannot be read or written costs time, never the result.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._entries: dict[str, list[object]] | None = None

    def fingerprint(self, file: str | os.PathLike[str]) -> str:
        """`content_fingerprint` of the file. Raises OSError."""
        name, status = os.path.abspath(file), os.stat(file)
        stamp = [status.st_size, status.st_mtime_ns]
        entries = self._load()
        known = entries.get(name)
        if isinstance(known, list) and known[:2] == stamp and len(known) == 3 and isinstance(known[2], str):
            return known[2]
        entries.pop(name, None)
        entries[name] = [*stamp, content_fingerprint(file)]
        while len(entries) > _CACHE_ENTRIES:
            del entries[next(iter(entries))]
        self._save(entries)
        return str(entries[name][2])

    def _load(self) -> dict[str, list[object]]:
        if self._entries is None:
            self._entries = {}
            try:
                if self.path is not None and self.path.stat().st_size < 2**24:
                    stored = json.loads(self.path.read_text(encoding="utf-8"))
                    if stored["format"] == _CACHE_FORMAT and isinstance(stored["files"], dict):
                        self._entries = stored["files"]
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                pass
        return self._entries

    def _save(self, entries: Mapping[str, list[object]]) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, json.dumps({"format": _CACHE_FORMAT, "files": entries}, indent=0).encode())
        except OSError:
            pass
