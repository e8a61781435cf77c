"""Mutated inputs to everything that reads what others made: statistics file, authors' .npz, index, names, embedded text.

    python benchmarks/fuzz.py                     # 120,000 inputs, a few minutes on one core
    python benchmarks/fuzz.py --inputs 1000000 --seed 7

Each input is a good one, changed. "accepted": it is still valid (another date, say). Every outcome other than that or a refusal
in one clear line is a failure, and its seed is printed. Statistics
files are also signed anew after the change, so that the checksum does not shield the code behind it.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from dpm_solver_v3.ems_tools.file import layout as format_
from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.convert import convert_npz
from dpm_solver_v3.ems_tools.file.layout import SUFFIX
from dpm_solver_v3.ems_tools.file.reader import decode_ems_file
from dpm_solver_v3.ems_tools.file.rows import EMSMeta, EvidenceRow, FittedRow, RecommendedSetting
from dpm_solver_v3.ems_tools.judge.consistency import consistency_problems
from dpm_solver_v3.ems_tools.share.index import decode_index, encode_index, entry_of
from dpm_solver_v3.ems_tools.share.library import safe_name
from dpm_solver_v3.ems_tools.share.workflow import pack, unpack
from dpm_solver_v3.sampler import EMSError, FittedSteps, Settings

__all__ = ["KINDS", "run"]


def _small() -> EMSFile:
    draw = torch.Generator().manual_seed(0)
    l, s, b = torch.randn(3, 1, 5, 2, generator=draw).unbind()
    row = EvidenceRow(1.0, "karras", 3, "calibration", 0.02, 0.01, 0.03)
    advice = RecommendedSetting(1.0, "karras", (-2.0, 0.0, 1.0, 2.0), Settings(order=2))
    facts = {"name": "m", "sha256": "ab" * 32}
    meta = EMSMeta("sigma", 0.1, 8.0, "x", facts, {"points": 5}, {"samples": (3,)}, (row,), (advice,), "0.1", "2026-01-01")
    steps, errors = FittedSteps((-1.0, 1.0), (0.2, 0.0), ((0.8,), (-0.1, 1.1))), (0.1, 0.1, 0.1)
    begun = FittedRow(1.0, 2, steps.lambdas, steps, errors, errors, "k", (1.0, 0.9, 1.1), 4)
    meta = replace(meta, partial=(begun,))
    moments = {"sums.0": torch.rand(9, 2, 5, 2, generator=draw, dtype=torch.float64), "count.0": torch.ones(2).double()}
    return EMSFile(torch.linspace(-2, 2, 5, dtype=torch.float64), torch.ones(1).double(), l, s, b, meta, None, moments)


GOOD = _small().encode()
_INDEX = encode_index([entry_of(GOOD, f"{name}{SUFFIX}") for name in "ab"])
_WORDS = [
    b"null", b"true", b"1e999", b"-1", b"NaN", b'""', b"[]", b"{}", b"9" * 30, b'"\\ud800"', b"[" * 3000, b'"../../x"',
    b"\0", b"\xff", b"1e308", b"-0.0", b'"\\u001b[2J"', b"0", b"2", b"18446744073709551616",
]  # fmt: skip


def _npz_parts() -> tuple[bytes, bytes]:
    table: Any = np.zeros((3, 2, 2, 2), np.float32)
    parts = []
    for names in (("l",), ("s", "b")):
        buffer = io.BytesIO()
        np.savez(buffer, **dict.fromkeys(names, table))
        parts.append(buffer.getvalue())
    return parts[0], parts[1]


_L, _SB = _npz_parts()


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A few changes: bits, runs, cuts, insertions, words of JSON in place of values."""
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        at, n = draw.randrange(len(data) + 1), draw.choice((1, 1, 2, 8, 64))
        kind = draw.randrange(8)
        if kind == 0 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + draw.randbytes(n) + data[at + n :]
        elif kind == 2:
            data = data[:at]
        elif kind == 3:
            data = data[:at] + draw.randbytes(n) + data[at:]
        elif kind == 4:
            data = data[:at] + data[at + n :]
        elif kind == 5:
            data = data[:at] + draw.choice(_WORDS) + data[at + n :]
        elif kind == 6:
            other = draw.randrange(len(data) + 1)
            data = data[:at] + data[other : other + n] + data[at:]
        else:
            data = _value_replaced(data, draw)
    return data


def _value_replaced(data: bytes, draw: random.Random) -> bytes:
    """One value of the JSON text in `data` by another, so that the text stays JSON."""
    spots = [i for i, c in enumerate(data[:4000]) if c in b":,["]
    if not spots:
        return data
    at = draw.choice(spots) + 1
    end = next((i for i in range(at, min(len(data), at + 400)) if data[i] in b",]}"), at)
    return data[:at] + draw.choice(_WORDS) + data[end:]


def _read_file(draw: random.Random, folder: Path) -> None:
    decode_ems_file(mutated(GOOD, draw))


def _read_signed(draw: random.Random, folder: Path) -> None:
    """Metadata and tensors changed, then written with the right checksum, as a forger would."""
    tensors = load(GOOD)
    header = json.loads(GOOD[8 : 8 + int.from_bytes(GOOD[:8], "little")])
    metadata: dict[str, str] = header["__metadata__"]
    if draw.random() < 0.8:
        key = draw.choice(sorted(metadata))
        metadata[key] = mutated(metadata[key].encode(), draw).decode("utf-8", "replace")
    else:
        name = draw.choice(sorted(tensors))
        raw = bytearray(tensors[name].numpy().tobytes())
        at = draw.randrange(len(raw))
        raw[at : at + 8] = draw.randbytes(len(raw[at : at + 8]))
        tensors[name] = torch.frombuffer(raw, dtype=tensors[name].dtype).reshape(tensors[name].shape).clone()
    metadata["content_sha256"] = format_.content_hash(metadata, tensors)
    kinds = {name: (format_.DTYPE_NAMES[v.dtype], tuple(v.shape)) for name, v in tensors.items()}
    text = format_.header(metadata, kinds)
    body = b"".join(format_.raw_bytes(tensors[name]) for name in format_.order(kinds))
    file = decode_ems_file(len(text).to_bytes(8, "little") + text + body)
    consistency_problems(file)
    file.at(1.0)


def _read_foreign(draw: random.Random, folder: Path) -> None:
    """A safetensors file of other tensors."""
    shape = [draw.randrange(4) for _ in range(draw.randrange(4))]
    dtype = draw.choice([torch.float32, torch.float16, torch.int64, torch.bool, torch.bfloat16])
    data = save(
        {draw.choice(["l", "lambdas", "x"]): torch.zeros(shape, dtype=dtype)}, {"format": draw.choice(["pt", format_.FORMAT])}
    )
    decode_ems_file(mutated(data, draw))


def _convert(draw: random.Random, folder: Path) -> None:
    both = [mutated(_L, draw), _SB] if draw.random() < 0.5 else [_L, mutated(_SB, draw)]
    for name, data in zip(("l.npz", "sb.npz"), both, strict=True):
        (folder / name).write_bytes(data)
    convert_npz(folder / "l.npz", folder / "sb.npz", (-2.0, 2.0))


def _index(draw: random.Random, folder: Path) -> None:
    for entry in decode_index(mutated(_INDEX, draw)):
        assert "/" not in entry.file and "\\" not in entry.file and safe_name(entry.file) == entry.file


def _embedded(draw: random.Random, folder: Path) -> None:
    packed = pack("a", decode_ems_file(GOOD))
    for key in packed:
        if draw.random() < 0.5:
            packed[key] = draw.choice([None, 1, [], {}, "x" * 50, mutated(str(packed[key]).encode(), draw).decode("latin-1")])
    unpack(packed)


def _name(draw: random.Random, folder: Path) -> None:
    raw = mutated(draw.choice([b"../../etc/passwd", b"C:\\con", "模型.ems.safetensors".encode(), b"~/x\0y"]), draw)
    name = safe_name(raw.decode("utf-8", "replace"))
    path = (folder / name).resolve()
    assert path.parent == folder.resolve() and name.endswith(SUFFIX) and len(name) < 130


KINDS: dict[str, tuple[Callable[[random.Random, Path], None], float]] = {
    "statistics file": (_read_file, 0.3),
    "statistics file, signed": (_read_signed, 0.22),
    "other safetensors": (_read_foreign, 0.08),
    "authors' .npz": (_convert, 0.12),
    "index": (_index, 0.16),
    "file in a workflow": (_embedded, 0.06),
    "name": (_name, 0.06),
}
"""What is fed, and its share of the inputs."""


def run(inputs: int, seed: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Outcomes by kind, and failures. The same for the same arguments."""
    counts: dict[str, Counter[str]] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        for kind, (feed, share) in KINDS.items():
            count = counts[kind] = Counter()
            for i in range(max(round(inputs * share), 1)):
                outcome = _outcome(feed, random.Random(f"{seed} {kind} {i}"), Path(name))
                count[outcome if outcome in ("accepted", "refused") else "failed"] += 1
                if outcome not in ("accepted", "refused"):
                    failures.append(f"{kind}, seed {seed}, number {i}: {outcome}")
                count["inputs"] += 1
    return counts, failures


def _outcome(feed: Callable[[random.Random, Path], None], draw: random.Random, folder: Path) -> str:
    """ "accepted", "refused", or what went wrong."""
    try:
        feed(draw, folder)
    except EMSError as error:
        text = str(error)
        if "\n" in text or not text.isprintable() or not 10 < len(text) < 1000:
            return f"unclear message {text!r:.200}"
        return "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {error!s:.200}"
    return "accepted"


def main() -> int:
    """Print the counts; 1 if anything but a clean refusal came up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    counts, failures = run(args.inputs, args.seed)
    columns = ("inputs", "accepted", "refused", "failed")
    print(f"{'kind':<26} " + " ".join(f"{name:>9}" for name in columns))
    counts["all"] = sum(counts.values(), Counter())
    for kind, count in counts.items():
        print(f"{kind:<26} " + " ".join(f"{count[name]:9}" for name in columns))
    print(f"{time.monotonic() - began:.0f} s")
    for failure in failures[:20]:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
