"""The layout of a statistics file `*.ems.safetensors` on the disk: header, checksum, JSON, and their checks.

A safetensors file (8 bytes of header length, a JSON header, raw tensors) with

| tensor                | shape                    | dtype            |                                             |
|-----------------------|--------------------------|------------------|---------------------------------------------|
| `lambdas`             | [N+1]                    | float64          | half log-SNR, increasing, in [-30, 30]      |
| `guidance`            | [G]                      | float64          | covered scales, increasing, 0.001 to 1000   |
| `l`, `s`, `b`         | [G, N+1, C, (*spatial)]  | float32, float64 | within +-100, +-100, +-1e4                  |
| `l_se`, `s_se`, `b_se`| the same, or 1 for N+1   | float16 to 64    | standard errors, optional; see `compacted`  |
| `moments.<name>`      | any                      | float64          | to extend or merge the estimate, optional   |

and string metadata: `format`, `format_version`, `content_sha256`, `program`, `date`, and JSON in `model`, `noise`,
`grid`, `estimate`, `evidence`, `recommendation`, and where there is any, `fitted`. Keys that begin with `modelspec.` or `ss_`
are kept as they are. Version 2 is for files with `passes`, steps in fewer passes, version 3 for files with `partial`, steps for
image to image (and perhaps `passes`); else they are alike.

Reading executes nothing. Size and header length are checked before anything is parsed, every type, shape, dtype, offset
and range before it is used. `content_sha256` covers names, dtypes, shapes, bytes and metadata, and the header must be
spelled exactly as `header` spells it; so any changed bit is noticed, and equal content means equal bytes.

No check has a deadline of its own: the bounds on bytes, points and rows hold all of them to seconds, and their time grows with
the size (`benchmarks/hostile.py --heaviest`; a download has a deadline, `share.hub`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ...sampler import EMSError, FittedSteps, Settings
from .rows import MAX_FITTED_STEPS, EMSMeta, EvidenceRow, FittedRow, RecommendedSetting, check_count, number

__all__ = [
    "DAMAGED",
    "DTYPES",
    "DTYPE_NAMES",
    "FORMAT",
    "MAX_FILE_BYTES",
    "MAX_HEADER_BYTES",
    "SUFFIX",
    "content_hash",
    "encoded",
    "fitted_row",
    "fitted_values",
    "header",
    "metadata_of",
    "opened",
    "order",
    "parse_meta",
    "raw_bytes",
    "too_large",
]

FORMAT, VERSIONS = "dpm-solver-v3-ems", ("1", "2", "3")
SUFFIX = ".ems.safetensors"
MAX_FILE_BYTES, MAX_HEADER_BYTES = 256 * 2**20, 2**20
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
DAMAGED = "the file is damaged or was changed by another program: get it again, or compute it anew"


def encoded(meta: EMSMeta, tensors: Mapping[str, Tensor]) -> bytes:
    """A file's bytes. Raises EMSError where they are more than a file may have."""
    texts = metadata_of(meta)
    texts["content_sha256"] = content_hash(texts, tensors)
    kinds = {name: (DTYPE_NAMES[v.dtype], tuple(v.shape)) for name, v in tensors.items()}
    text = header(texts, kinds)
    if len(text) > MAX_HEADER_BYTES:
        raise EMSError(f"the metadata are too long: {len(text)} bytes, {MAX_HEADER_BYTES} are allowed")
    data = b"".join([len(text).to_bytes(8, "little"), text, *(raw_bytes(tensors[name]) for name in order(kinds))])
    if len(data) > MAX_FILE_BYTES:
        size = f"{len(data) / 2**20:.0f} MiB, {MAX_FILE_BYTES >> 20} are allowed"
        raise EMSError(f"the file would have {size}: leave the moments out, or use per-channel statistics")
    return data


_SETTINGS = tuple(f.name for f in fields(Settings))
_EVIDENCE_COLUMNS = tuple(f.name for f in fields(EvidenceRow))
_ADVICE_COLUMNS = ("guidance", "schedule", "lambdas", *_SETTINGS)
_FITTED_COLUMNS = (
    *("guidance", "steps", "lambdas", "start", "decay", "weights"),
    *("fitted", "fixed", "fixed_schedule", "ratio", "noises"),
)
# tables of fitted rows, each of which may be missing
_TABLES = {"fitted": _FITTED_COLUMNS, "passes": (*_FITTED_COLUMNS, "guided"), "partial": _FITTED_COLUMNS}


def metadata_of(meta: EMSMeta) -> dict[str, str]:
    """The header's metadata, without the checksum."""
    noise = {name: getattr(meta, name) for name in ("space", "sigma_min", "sigma_max", "schedule")}
    plain = {
        "model": dict(meta.model),
        "noise": noise,
        "grid": dict(meta.grid),
        "estimate": dict(meta.estimate),
        "evidence": {"columns": _EVIDENCE_COLUMNS, "rows": [evidence_values(row) for row in meta.evidence]},
        "recommendation": {"columns": _ADVICE_COLUMNS, "rows": [advice_values(row) for row in meta.recommendation]},
    }
    for name, columns in _TABLES.items():
        if rows := getattr(meta, name):
            plain[name] = {"columns": columns, "rows": [fitted_values(row) for row in rows]}
    version = _version(meta.passes, meta.partial)
    texts = {"format": FORMAT, "format_version": version, "program": meta.program, "date": meta.date}
    return {**meta.foreign, **texts, **{name: _json(value) for name, value in plain.items()}}


def _version(passes: object, partial: object) -> str:
    """The oldest version that knows these tables."""
    return VERSIONS[2 if partial else 1 if passes else 0]


def fitted_values(row: FittedRow) -> list[object]:
    """A fitted row as JSON-serialisable values; no coefficients are three nulls. One of fewer passes ends with `guided`."""
    c = row.coefficients
    parts: list[object] = [None, None, None] if c is None else [c.start, c.decay, c.weights]
    tail: list[object] = [row.fitted, row.fixed, row.fixed_schedule, row.ratio, row.noises]
    more = [c.guided] if c is not None and c.guided else []
    return [row.guidance, row.steps, row.lambdas, *parts, *tail, *more]


def evidence_values(row: EvidenceRow) -> list[object]:
    """An evidence row as JSON-serialisable values; `EvidenceRow(*values)` is the inverse."""
    return list(vars(row).values())


def advice_values(row: RecommendedSetting) -> list[object]:
    """A recommendation as JSON-serialisable values; JSON has no infinity, so "no limit" is null."""
    settings = [None if v == math.inf else v for v in vars(row.settings).values()]  # in the order of `_SETTINGS`
    return [row.guidance, row.schedule, row.lambdas, *settings]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=True)


_Kind: TypeAlias = "tuple[str, tuple[int, ...]]"  # dtype and shape as the header names them


def order(kinds: Mapping[str, _Kind]) -> list[str]:
    """Wide dtypes first, which keeps every tensor aligned."""
    return sorted(kinds, key=lambda name: (-DTYPES[kinds[name][0]].itemsize, name))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values, little-endian; not copied where they lie so."""
    array = tensor.numpy()
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data


def header(metadata: Mapping[str, str], kinds: Mapping[str, _Kind]) -> bytes:
    """The one spelling of a header: keys in a fixed order, no spaces but those that fill up to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in order(kinds):
        dtype, shape = kinds[name]
        end = offset + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def content_hash(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over metadata (but itself) and tensors, each part preceded by its length."""
    digest = hashlib.sha256()

    def feed(*parts: bytes | memoryview) -> None:
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)

    for key in sorted(set(metadata) - {"content_sha256"}):
        feed(b"metadata", key.encode(), metadata[key].encode())
    for name in sorted(tensors):
        value = tensors[name]
        kind = f"{DTYPE_NAMES[value.dtype]} {list(value.shape)}"
        feed(b"tensor", name.encode(), kind.encode(), raw_bytes(value))
    return digest.hexdigest()


def too_large(size: int) -> str:
    """In words, that a file of this size is refused."""
    return f"has {size / 2**20:.0f} MiB, more than the {MAX_FILE_BYTES >> 20} that a statistics file may have"


def opened(data: bytearray) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file whose layout is right: size, header, version, offsets. Raises EMSError for any other.

    The tensors are views of `data`, for a large file fills the memory once and not twice.
    """
    text, payload = _split(data)
    metadata, tensors = _parse_header(text)
    _check_version(metadata)
    _check_layout(text, payload, metadata, tensors)
    return metadata, {name: _view(payload, *place) for name, place in tensors.items()}


def _view(payload: memoryview, dtype: str, shape: tuple[int, ...], place: tuple[int, int]) -> Tensor:
    array = np.frombuffer(payload[slice(*place)], np.dtype(f"<f{DTYPES[dtype].itemsize}"))
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False)).reshape(shape)


def _split(data: bytearray) -> tuple[bytearray, memoryview]:
    if len(data) > MAX_FILE_BYTES:
        raise EMSError(too_large(len(data)))
    if len(data) < 10:
        raise EMSError(f"has {len(data)} bytes, which is no statistics file; if a download was cut off, repeat it")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        kind = "not a safetensors file"
        if data[:4] == b"PK\3\4" or data[:1] == b"\x80" or data[:6] == b"\x93NUMPY":
            kind = "a zip, pickle or numpy file; the authors' l.npz and sb.npz go through 'ems convert'"
        raise EMSError(f"is no statistics file but {kind} (its header would have {length} bytes)")
    if length > len(data) - 8:
        raise EMSError(f"is cut off: {length} bytes of header announced, {len(data) - 8} there; get the file again")
    return data[8 : 8 + length], memoryview(data)[8 + length :]


def _parse_header(raw: bytearray) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...], tuple[int, int]]]]:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise EMSError(f"is not a safetensors file: the header is not text (byte {error.start}); {DAMAGED}") from error
    entries = _parse_json(text, "the header")
    if not isinstance(entries, dict):
        raise EMSError(f"is not a safetensors file: the header is no table of tensors; {DAMAGED}")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise EMSError(f"the header's metadata do not map text to text; {DAMAGED}")
    return metadata, {name: _parse_entry(name, entry) for name, entry in entries.items()}


def _parse_entry(name: str, entry: object) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise EMSError(f"tensor {name!r:.80} is not described by {', '.join(sorted(keys))}; {DAMAGED}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise EMSError(f"tensor {name!r:.80} is of type {dtype!r:.40}; statistics are {', '.join(DTYPES)}; {DAMAGED}")
    for what, values in (("shape", shape), ("data_offsets", offsets)):
        fits = isinstance(values, list) and len(values) <= 16
        if not fits or not all(type(v) is int and 0 <= v < 2**40 for v in values):
            raise EMSError(f"tensor {name!r:.80} has a bad {what}: {values!s:.80}; {DAMAGED}")
    if len(offsets) != 2:
        raise EMSError(f"tensor {name!r:.80} has bad data_offsets: {offsets!s:.80}; {DAMAGED}")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _check_version(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        found = f"format is {metadata['format']!r:.60}" if "format" in metadata else "it names no format"
        raise EMSError(f"is a safetensors file but holds no EMS ({found}): choose a file made by 'ems compute'")
    version = metadata.get("format_version", "")
    if version not in VERSIONS:
        if version.isascii() and version.isdigit() and len(version) < 6 and int(version) > int(VERSIONS[-1]):
            raise EMSError(f"has format version {version}, this program reads up to {VERSIONS[-1]}: update DPM-Solver-v3")
        raise EMSError(f"has format version {version!r:.40}, which does not exist; {DAMAGED}")


def _check_layout(
    text: bytearray,
    payload: memoryview,
    metadata: Mapping[str, str],
    tensors: Mapping[str, tuple[str, tuple[int, ...], tuple[int, int]]],
) -> None:
    """Tensors lie side by side from the first byte to the last, and the header is spelled as we spell it."""
    end = 0
    for name, (dtype, shape, (start, stop)) in sorted(tensors.items(), key=lambda item: item[1][2]):
        size = math.prod(shape) * DTYPES[dtype].itemsize
        if start != end or stop - start != size:
            where = f"lies at bytes {start} to {stop}, its place is {end} to {end + size}"
            raise EMSError(f"tensor {name!r:.80} {where}; {DAMAGED}")
        end = stop
    if end > len(payload):
        raise EMSError(f"is cut off: {end} bytes of tensors announced, {len(payload)} there; get the file again")
    if end < len(payload):
        raise EMSError(f"has {len(payload) - end} bytes after its last tensor; {DAMAGED}")
    try:
        spelling = header(metadata, {name: entry[:2] for name, entry in tensors.items()})
    except UnicodeEncodeError:  # a lone surrogate, which JSON can escape and UTF-8 cannot write
        spelling = b""
    if spelling != text:
        raise EMSError(f"the header is not spelled as a statistics file's; {DAMAGED}")


def parse_meta(metadata: dict[str, str]) -> EMSMeta:
    """The inverse of `metadata_of`. Raises EMSError for anything else."""
    left = {k: v for k, v in metadata.items() if k not in ("format", "format_version", "content_sha256")}
    program, date = left.pop("program", ""), left.pop("date", "")
    plain: dict[str, Any] = {}
    for name in ("model", "noise", "grid", "estimate", "evidence", "recommendation"):
        if name not in left:
            raise EMSError(f"metadata '{name}' is missing")
        plain[name] = _parse_json(left.pop(name), f"metadata '{name}'")
    tables = {name: _fitted_table(left, name, columns) for name, columns in _TABLES.items()}
    if _version(tables["passes"], tables["partial"]) != metadata.get("format_version"):
        raise EMSError("a file with steps for image to image is of version 3, one with steps in fewer passes of 2, others of 1")
    noise = plain.pop("noise")
    if not isinstance(noise, dict) or set(noise) != {"space", "sigma_min", "sigma_max", "schedule"}:
        raise EMSError("metadata 'noise' must hold space, sigma_min, sigma_max and schedule")
    evidence = tuple(EvidenceRow(*row) for row in _rows("evidence", plain.pop("evidence"), _EVIDENCE_COLUMNS))
    advice = tuple(advice_row(row) for row in _rows("recommendation", plain.pop("recommendation"), _ADVICE_COLUMNS))
    plain = {**plain, "evidence": evidence, "recommendation": advice, **tables}
    return EMSMeta(**noise, **plain, program=program, date=date, foreign=left)


def _fitted_table(left: dict[str, str], name: str, columns: tuple[str, ...]) -> tuple[FittedRow, ...]:
    """The rows of a table that may be missing, taken out of what is left."""
    if name not in left:
        return ()
    return tuple(map(fitted_row, _rows(name, _parse_json(left.pop(name), f"metadata '{name}'"), columns)))


def _rows(name: str, table: object, columns: tuple[str, ...]) -> list[list[Any]]:
    if not isinstance(table, dict) or set(table) != {"columns", "rows"} or table["columns"] != list(columns):
        raise EMSError(f"metadata '{name}' must be a table with the columns {', '.join(columns)}")
    rows = table["rows"]
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == len(columns) for row in rows):
        raise EMSError(f"metadata '{name}' must be a table whose rows have {len(columns)} values")
    return rows


def advice_row(row: list[Any]) -> RecommendedSetting:
    """The inverse of `advice_values`. Raises EMSError on anything else."""
    guidance, schedule, lambdas, *values = row
    chosen = dict(zip(_SETTINGS, values, strict=True))
    if chosen["corrector_below"] is None:
        chosen["corrector_below"] = math.inf
    check_count("a recommendation's order", chosen["order"], 1, 3)
    for name in ("strength", "corrector_below"):
        if isinstance(chosen[name], bool):
            raise EMSError(f"a recommendation's {name} must be a number")
    try:
        settings = Settings(**chosen)
    except (ValueError, TypeError) as error:
        raise EMSError(f"a recommendation cannot be used: {error!s:.200}") from error
    return RecommendedSetting(guidance, schedule, tuple(lambdas) if isinstance(lambdas, list) else lambdas, settings)


def fitted_row(values: list[Any]) -> FittedRow:
    """The inverse of `fitted_values`. Raises EMSError on anything else."""
    guidance, steps, lambdas, start, decay, weights, fitted, fixed, schedule, ratio, noises, *more = values
    guided = more[0] if more else ()
    if not isinstance(guided, (list, tuple)) or len(guided) > MAX_FITTED_STEPS or not all(isinstance(v, bool) for v in guided):
        raise EMSError("a row of fewer passes must say true or false of each evaluation")

    def numbers(value: object) -> tuple[float, ...]:
        if not isinstance(value, (list, tuple)) or len(value) > 2 * MAX_FITTED_STEPS:
            raise EMSError("a fitted row must hold short lists of numbers")
        return tuple(number("a fitted row's number", v, -1e31, 1e31) for v in value)

    where, coefficients = numbers(lambdas), None
    if (start, decay, weights) != (None, None, None):
        if not isinstance(weights, (list, tuple)) or len(weights) > MAX_FITTED_STEPS:
            raise EMSError("a fitted row's weights must be a short list")
        try:
            coefficients = FittedSteps(where, numbers(decay), tuple(map(numbers, weights)), numbers([start])[0], tuple(guided))
        except ValueError as error:
            raise error if isinstance(error, EMSError) else EMSError(str(error)) from error
    return FittedRow(guidance, steps, where, coefficients, numbers(fitted), numbers(fixed), schedule, numbers(ratio), noises)


def _parse_json(text: str, what: str) -> object:
    try:
        return json.loads(text, parse_constant=_no_constant, parse_int=_short_int, object_pairs_hook=_no_repeats)
    except RecursionError:
        raise EMSError(f"{what} is nested too deep; {DAMAGED}") from None
    except ValueError as error:
        raise EMSError(f"{what} is not valid JSON ({error!s:.100}); {DAMAGED}") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _short_int(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError("a number is too long")
    return int(digits)


def _no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found
