"""A statistics file inside a workflow (and so inside the images made with it): base64 of the compressed file.

What comes out is read as any file from a stranger is: bounded, checked whole, data only.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping

from ...sampler import EMSError
from ..file.contents import EMSFile
from ..file.reader import decode_ems_file
from .library import safe_name
from .private import cleaned

__all__ = ["KEY", "MAX_EMBEDDED", "embedded_files", "pack", "unpack", "with_file"]

KEY = "dpm_solver_v3_ems"
"""In the workflow's `extra`, which front ends keep when they open and save it."""
MAX_EMBEDDED = 256 * 1024
"""Bytes of a file that may travel so; a per-channel one has a few KB to 64."""
_MOST = 16


def pack(name: str, file: EMSFile) -> dict[str, object]:
    """What is put into a workflow: the file without what is private (`private.cleaned`).

    Raises EMSError for a file that is too large.
    """
    data = cleaned(file).encode()
    if len(data) > MAX_EMBEDDED:
        raise EMSError(
            f"{name}: {len(data) >> 10} KiB are too much for a workflow ({MAX_EMBEDDED >> 10} allowed): "
            "share the file itself; only per-channel statistics are small"
        )
    return {"name": safe_name(name), "data": base64.b64encode(zlib.compress(data, 9)).decode()}


def unpack(value: object) -> tuple[str, EMSFile]:
    """The name and the file. Raises EMSError."""
    name, text = (value.get("name"), value.get("data")) if isinstance(value, Mapping) else (None, None)
    if not isinstance(name, str) or not isinstance(text, str) or len(text) > 2 * MAX_EMBEDDED:
        raise EMSError("what the workflow holds as EMS is none (no name, no data, or too much)")
    clean = safe_name(name)
    unzip = zlib.decompressobj()
    try:
        data = unzip.decompress(base64.b64decode(text, validate=True), MAX_EMBEDDED + 1)
    except (binascii.Error, ValueError, zlib.error):
        raise EMSError(f"the EMS {clean!r} in the workflow is damaged: ask for the file itself") from None
    if len(data) > MAX_EMBEDDED or not unzip.eof or unzip.unused_data:
        raise EMSError(f"the EMS {clean!r} in the workflow is cut off or too large: ask for the file itself")
    return clean, decode_ems_file(data, f"{clean} (in the workflow)")


def with_file(workflow: dict[str, object], name: str, file: EMSFile) -> None:
    """Put the file into a workflow, in place; one of that name that is there already is replaced."""
    packed = pack(name, file)
    extra = workflow.get("extra")
    if not isinstance(extra, dict):
        extra = workflow["extra"] = {}
    known = extra.get(KEY)
    others = [v for v in known if isinstance(v, Mapping) and v.get("name") != packed["name"]] if isinstance(known, list) else []
    extra[KEY] = [*others[-(_MOST - 1) :], packed]


def embedded_files(workflow: object) -> dict[str, object]:
    """What a workflow carries, by name, not unpacked."""
    extra = workflow.get("extra") if isinstance(workflow, Mapping) else None
    known = extra.get(KEY) if isinstance(extra, Mapping) else None
    found: dict[str, object] = {}
    for value in known[:_MOST] if isinstance(known, list) else []:
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            found[safe_name(str(value["name"]))] = value
    return found
