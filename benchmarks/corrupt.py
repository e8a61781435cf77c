"""Corrupted statistics files: is each refused, with a message, quickly, in little memory?

    python benchmarks/corrupt.py            # 2,000 files, about a minute
    python benchmarks/corrupt.py --files 200

Every file is read by a process of its own (forked, so not on Windows). "signed" kinds have a right checksum and a right
header, as a forger would write them; what they hold is wrong.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpm_solver_v3.ems_tools.file import layout as format_
from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.reader import EMSFileError, load_ems_file
from dpm_solver_v3.ems_tools.file.rows import EMSMeta, EvidenceRow, FittedRow, RecommendedSetting
from dpm_solver_v3.sampler import FittedSteps, Settings

__all__ = ["KINDS", "corrupted", "example"]

Parts = tuple[dict[str, str], dict[str, Tensor]]
SECONDS, MIB = 1.0, 200.0


def example(channels: int = 3, spatial: tuple[int, ...] = (), moments: bool = True, scales: int = 2, n: int = 40) -> EMSFile:
    """A whole file of invented numbers."""
    draw = torch.Generator().manual_seed(0)
    guidance = torch.tensor([1.0, 2.0, 4.0, 7.5], dtype=torch.float64)[:scales]
    shape = (scales, n + 1, channels, *spatial)
    l, s, b = torch.randn(3, *shape, generator=draw).unbind()
    evidence, advice = [], []
    for g in guidance.tolist():
        for steps in (5, 10):
            for split in ("calibration", "report"):
                evidence.append(EvidenceRow(g, "uniform_lambda", steps, split, 0.02, 0.01, 0.03))
            lambdas = tuple(torch.linspace(-2.68, 3.53, steps + 1).tolist())
            advice.append(RecommendedSetting(g, "uniform_lambda", lambdas, Settings(order=3, strength=0.5)))
    meta = EMSMeta(
        space="sigma",
        sigma_min=0.03,
        sigma_max=14.6,
        schedule="scaled linear",
        model={"name": "example – модель", "sha256": "ab" * 32},
        grid={"kind": "uniform in lambda"},
        estimate={"samples": 32, "resolution": (3, 32, 32), "rms": 1e-3, "until": None, "guided": True},
        evidence=tuple(evidence),
        recommendation=tuple(advice),
        program="0.1.0",
        date="2025-01-01",
        foreign={"modelspec.title": "example"},
        partial=_begun(guidance.tolist()),
    )
    grid = torch.linspace(-2.68, 3.53, n + 1, dtype=torch.float64)
    errors = {name: torch.rand(shape, generator=draw).half() for name in "lsb"}
    sums = {"sums.0": torch.randn(9, 4, n + 1, channels, generator=draw, dtype=torch.float64)} if moments else {}
    return EMSFile(grid, guidance, l, s, b, meta, errors, sums)


def _begun(scales: list[float]) -> tuple[FittedRow, ...]:
    """Rows for image to image: two beginnings at each guidance scale."""
    rows = []
    for g, first in ((g, first) for g in scales for first in (-2.0, 0.0)):
        steps = FittedSteps((first, first + 1.5, first + 3.0), (0.3, 0.2, 0.0), ((0.7,), (-0.1, 0.9), (0.0, -0.2, 1.2)))
        errors, ratio = ((0.01,) * 3, (0.02,) * 3), (0.5, 0.4, 0.6)
        rows.append(FittedRow(g, 3, steps.lambdas, steps, *errors, "UniPC 2 on Karras", ratio, 5))
    return tuple(rows)


# --- Bytes that changed on the way


def _truncated(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def _bit_flip(data: bytes, draw: random.Random) -> bytes:
    return _flipped(data, draw.randrange(len(data)), draw)


def _bit_flip_in_header(data: bytes, draw: random.Random) -> bytes:
    return _flipped(data, draw.randrange(8 + int.from_bytes(data[:8], "little")), draw)


def _flipped(data: bytes, at: int, draw: random.Random) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


def _overwritten(data: bytes, draw: random.Random) -> bytes:
    at, n = draw.randrange(len(data)), draw.randrange(1, 200)
    return data[:at] + draw.randbytes(len(data[at : at + n])) + data[at + n :]


def _lengthened(data: bytes, draw: random.Random) -> bytes:
    return data + draw.randbytes(draw.randrange(1, 5000))


def _spliced(data: bytes, draw: random.Random) -> bytes:
    at, n = draw.randrange(len(data)), draw.randrange(1, 200)
    return data[:at] + data[min(at + n, len(data)) :]


def _random_bytes(data: bytes, draw: random.Random) -> bytes:
    return draw.randbytes(draw.randrange(0, 4096))


def _zip_or_pickle(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.5:
        return pickle.dumps({"l": [draw.random() for _ in range(50)]}, protocol=draw.choice([0, 2, 4, 5]))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", draw.randbytes(500))
    return buffer.getvalue()


# --- Headers made to hurt


def _with_header(data: bytes, text: bytes, length: int | None = None) -> bytes:
    old = int.from_bytes(data[:8], "little")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data[8 + old :]


def _header_of(data: bytes) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found


def _huge_header(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.5:
        return _with_header(data, data[8:1000], draw.choice([2**63, 2**64 - 1, 10**9, 2**20 + 1, 2**31]))
    text = json.dumps({f"t{i}": draw.random() for i in range(draw.choice([35_000, 60_000]))}).encode()
    return _with_header(data, text)


def _deep_json(data: bytes, draw: random.Random) -> bytes:
    depth = draw.choice([2_000, 50_000, 400_000])
    opening = draw.choice([b"[", b'{"a":'])
    return _with_header(data, opening * min(depth, (2**20 - 2) // len(opening)))


def _odd_json(data: bytes, draw: random.Random) -> bytes:
    texts = [b"", b"null", b"[]", b"{}", b"{" + b"1" * 400_000, b"NaN", b"\xff\xfe{}", b'{"a":"\\ud800"}']
    texts += [b'{"__metadata__":[]}', b'{"__metadata__":{"format":3}}']
    texts += [b'{"l":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}']
    return _with_header(data, draw.choice(texts) + b" " * draw.randrange(8))


def _offsets(data: bytes, draw: random.Random) -> bytes:
    header = _header_of(data)
    name = draw.choice([n for n in header if n != "__metadata__"])
    begin: int
    end: int
    begin, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = draw.choice(
        [[begin + 8, end + 8], [0, end - begin], [end, begin], [-8, 0], [begin, 2**62], [begin], [begin, end, end], "0"]
    )
    if header[name]["data_offsets"] == [begin, end]:
        header[name]["data_offsets"] = [begin, end + 4]
    return _with_header(data, json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())


def _respelled(data: bytes, draw: random.Random) -> bytes:
    """The same content under a header that no writer of ours writes."""
    header, length = _header_of(data), int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length]
    ways = [
        text + b" " * (8 * draw.randrange(1, 9)),
        text.rstrip(b" ") + b"\n",
        json.dumps(header).encode(),
        json.dumps(dict(reversed(header.items())), separators=(",", ":"), ensure_ascii=False).encode(),
        text.replace(b'"dtype"', b'"\\u0064type"', draw.randrange(1, 4)),
    ]
    return _with_header(data, draw.choice(ways))


# --- Signed: everything right but the content


def _parts(data: bytes) -> Parts:
    from safetensors.torch import load

    return dict(_header_of(data)["__metadata__"]), load(data)


def _signed(parts: Parts) -> bytes:
    metadata, tensors = parts
    metadata["content_sha256"] = format_.content_hash(metadata, tensors)
    kinds = {name: (format_.DTYPE_NAMES[v.dtype], tuple(v.shape)) for name, v in tensors.items()}
    header = format_.header(metadata, kinds)
    body = b"".join(format_.raw_bytes(tensors[name]) for name in format_.order(kinds))
    return len(header).to_bytes(8, "little") + header + body


def _signed_change(change: Callable[[dict[str, str], dict[str, Tensor], random.Random], object]) -> Change:
    def make(data: bytes, draw: random.Random) -> bytes:
        metadata, tensors = _parts(data)
        change(metadata, tensors, draw)
        return _signed((metadata, tensors))

    return make


def _bad_value(metadata: dict[str, str], tensors: dict[str, Tensor], draw: random.Random) -> None:
    value = tensors[draw.choice(sorted(tensors))].view(-1)
    value[draw.randrange(len(value))] = draw.choice([float("nan"), float("inf"), float("-inf")])


def _out_of_range(metadata: dict[str, str], tensors: dict[str, Tensor], draw: random.Random) -> None:
    name = draw.choice(["l", "s", "b", "lambdas", "guidance"])
    value = tensors[name].view(-1)
    value[draw.randrange(len(value))] = draw.choice([2e4, -2e4, 1e30])


def _wrong_order(metadata: dict[str, str], tensors: dict[str, Tensor], draw: random.Random) -> None:
    name = draw.choice(["lambdas", "guidance"])
    i = draw.randrange(1, len(tensors[name]))
    tensors[name][i] = tensors[name][i - 1] - draw.choice([0.0, 1e-3])


def _wrong_shape(metadata: dict[str, str], tensors: dict[str, Tensor], draw: random.Random) -> None:
    name = draw.choice([n for n in tensors if not n.startswith("moments")])
    value = tensors[name]
    ways = [value.flatten()[:-1], value[None], value[:0] if draw.random() < 0.3 else value[..., :-1]]
    tensors[name] = draw.choice([w for w in ways if w.shape != value.shape]).contiguous()


def _wrong_dtype(metadata: dict[str, str], tensors: dict[str, Tensor], draw: random.Random) -> None:
    name = draw.choice([n for n in tensors if not n.endswith("_se")])
    tensors[name] = tensors[name].half() if name != "guidance" else tensors[name].float()


def _missing_tensor(metadata: dict[str, str], tensors: dict[str, Tensor], draw: random.Random) -> None:
    del tensors[draw.choice([n for n in tensors if not n.startswith("moments")])]


def _extra_tensor(metadata: dict[str, str], tensors: dict[str, Tensor], draw: random.Random) -> None:
    tensors[draw.choice(["x", "../l", "moments.", "moments.a/b", "L", "l_SE", "moments.\x1b[2J"])] = torch.zeros(3)


def _wrong_version(metadata: dict[str, str], tensors: dict[str, Tensor], draw: random.Random) -> None:
    key = draw.choice(["format", "format_version"])
    metadata[key] = draw.choice(["2", "99", "", "one", "-1", "1.0", "٢", "9" * 5000])


def _missing_metadata(metadata: dict[str, str], tensors: dict[str, Tensor], draw: random.Random) -> None:
    del metadata[draw.choice(["model", "noise", "grid", "estimate", "evidence", "recommendation", "format"])]


def _wrong_metadata(metadata: dict[str, str], tensors: dict[str, Tensor], draw: random.Random) -> None:
    key = draw.choice(["model", "noise", "grid", "estimate", "evidence", "recommendation", "partial"])
    bad = ["", "{", "[]", "3", "null", '"a"', "[" * 100_000, '{"a":{"b":1}}']
    bad += ['{"a":NaN}', '{"a":1e999}', '{"a":1,"a":2}']
    bad += ['{"a":"\\u001b[2J"}', '{"a":"\\ud800"}', '{"a":' + "9" * 100_000 + "}", '{"a":[[1]]}']
    metadata[key] = draw.choice(bad)


def _wrong_row(metadata: dict[str, str], tensors: dict[str, Tensor], draw: random.Random) -> None:
    key = draw.choice(["evidence", "recommendation", "partial"])
    table = json.loads(metadata[key])
    row = draw.choice(table["rows"])
    at = draw.choice([i for i, v in enumerate(row) if v is not None])
    row[at] = draw.choice([-1e6, [], {}, "x" * 5000, "\x1b[31m", [[]], 10**400] + ([None] if at < 3 else []))
    metadata[key] = json.dumps(table)


Change = Callable[[bytes, random.Random], bytes]
KINDS: dict[str, Change] = {
    "truncated": _truncated,
    "bit flip": _bit_flip,
    "bit flip in the header": _bit_flip_in_header,
    "overwritten": _overwritten,
    "lengthened": _lengthened,
    "bytes cut out": _spliced,
    "random bytes": _random_bytes,
    "zip or pickle": _zip_or_pickle,
    "huge header": _huge_header,
    "deep JSON": _deep_json,
    "odd JSON": _odd_json,
    "overlapping or wrong offsets": _offsets,
    "header respelled": _respelled,
    "signed: NaN or infinite": _signed_change(_bad_value),
    "signed: out of range": _signed_change(_out_of_range),
    "signed: not increasing": _signed_change(_wrong_order),
    "signed: wrong shape": _signed_change(_wrong_shape),
    "signed: wrong dtype": _signed_change(_wrong_dtype),
    "signed: missing tensor": _signed_change(_missing_tensor),
    "signed: extra tensor": _signed_change(_extra_tensor),
    "signed: wrong version": _signed_change(_wrong_version),
    "signed: missing metadata": _signed_change(_missing_metadata),
    "signed: wrong metadata": _signed_change(_wrong_metadata),
    "signed: wrong row": _signed_change(_wrong_row),
}
"""Each turns the bytes of a good file into bytes that must be refused."""


def corrupted(good: bytes, kind: str, seed: int) -> bytes:
    """A corrupted file; the same for the same seed."""
    draw = random.Random(f"{kind} {seed}")
    while (data := KINDS[kind](good, draw)) == good:
        pass
    return data


def _read_alone(path: Path) -> tuple[str, float, float]:
    """What reading does in a forked process: "refused" and so on, seconds, MiB beyond what the process had before."""
    import resource  # not on Windows, where the tests still use the kinds

    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        try:
            load_ems_file(path)
            outcome = "ACCEPTED"
        except EMSFileError as error:
            outcome = "refused" if str(error).startswith(str(path)) and "\n" not in str(error) else "UNCLEAR MESSAGE"
        except BaseException as error:
            outcome = f"RAISED {type(error).__name__}"
        seconds = time.perf_counter() - began
        unit = 2**20 if sys.platform == "darwin" else 1024
        extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit
        os.write(writer, json.dumps([outcome, seconds, extra]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        report = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status or not report:
        return f"CRASHED ({status})", 0.0, 0.0
    outcome, seconds, extra = json.loads(report)
    return outcome, seconds, extra


def main() -> int:
    """Print the table; 1 if any file was accepted, crashed the reader, or took too much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000)
    files = parser.parse_args().files
    torch.set_num_threads(1)
    bases = [example().encode(), example(moments=False, n=60, scales=4).encode(), example(4, (16, 16), n=30).encode()]
    print(f"{files} files made from 3 good ones of {', '.join(f'{len(b) / 1024:.0f}' for b in bases)} KiB")
    names = list(KINDS)
    counts = {name: [0, 0, 0.0, 0.0] for name in names}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bad.ems.safetensors"
        for base in bases:  # the good ones are read, so that refusing everything would be noticed
            path.write_bytes(base)
            if (outcome := _read_alone(path)[0]) != "ACCEPTED":
                failures.append(f"a good file: {outcome}")
        for i in range(files):
            name = names[i % len(names)]
            path.write_bytes(corrupted(bases[i // len(names) % len(bases)], name, i))
            outcome, seconds, extra = _read_alone(path)
            count = counts[name]
            count[:] = [count[0] + 1, count[1] + (outcome == "refused"), max(count[2], seconds), max(count[3], extra)]
            if outcome != "refused" or seconds > SECONDS or extra > MIB:
                failures.append(f"{name}, number {i}: {outcome}, {seconds:.2f} s, {extra:.0f} MiB")
    print(f"{'kind':<30} {'files':>6} {'refused':>8} {'slowest, s':>11} {'most memory, MiB':>17}")
    for name, (n, refused, seconds, extra) in counts.items():
        print(f"{name:<30} {n:6} {refused:8} {seconds:11.4f} {extra:17.1f}")
    total = [sum(c[0] for c in counts.values()), sum(c[1] for c in counts.values())]
    worst = [max(c[2] for c in counts.values()), max(c[3] for c in counts.values())]
    print(f"{'all':<30} {total[0]:6} {total[1]:8} {worst[0]:11.4f} {worst[1]:17.1f}")
    for failure in failures[:20]:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
