"""Read a statistics file without trust: everything is checked before it is used, and nothing is executed."""

from __future__ import annotations

import os
import stat

from torch import Tensor

from ...sampler import EMSError
from .contents import STATISTICS, EMSFile
from .layout import DAMAGED, MAX_FILE_BYTES, SUFFIX, content_hash, opened, parse_meta, too_large
from .rows import EMSMeta

__all__ = ["EMSFileError", "decode_ems_file", "load_ems_file", "read_bytes"]


class EMSFileError(EMSError):
    """A statistics file that is refused. `path` is the file, `what` is wrong with it and what to do."""

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        super().__init__(str(path), what)
        self.path, self.what = str(path), what

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


def load_ems_file(path: str | os.PathLike[str]) -> EMSFile:
    """Read a statistics file, checking all of it; executes nothing.

    Raises:
        EMSFileError: the file is missing, too large, damaged or not a statistics file; the message says what to do.
    """
    return decode_ems_file(read_bytes(path), path)


def read_bytes(path: str | os.PathLike[str]) -> bytearray:
    """A regular file's bytes, no more than a statistics file may have. Raises EMSFileError."""
    try:
        status = os.stat(path)
        regular, small = stat.S_ISREG(status.st_mode), status.st_size <= MAX_FILE_BYTES
        data = bytearray(status.st_size if regular and small else 0)
        if regular and small:
            with open(path, "rb") as file:
                del data[file.readinto(data) :]
    except FileNotFoundError:
        raise EMSFileError(path, "there is no such file: check the name and the folder") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise EMSFileError(path, f"cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not regular:
        raise EMSFileError(path, f"is not a file: give the name of a *{SUFFIX} file")
    if not small:
        raise EMSFileError(path, too_large(status.st_size))
    return data


def decode_ems_file(data: bytes | bytearray, path: str | os.PathLike[str] = "EMS") -> EMSFile:
    """The file whose bytes these are; `path` names it in messages. Raises EMSFileError.

    A bytearray becomes the file's own memory: nobody may write to it any more.
    """
    try:
        return _decode(data if isinstance(data, bytearray) else bytearray(data))
    except EMSError as error:
        raise EMSFileError(path, str(error)) from error


def _decode(data: bytearray) -> EMSFile:
    metadata, values = opened(data)
    if content_hash(metadata, values) != metadata.get("content_sha256"):
        raise EMSError(f"the content does not match its checksum (content_sha256); {DAMAGED}")
    missing = [name for name in ("lambdas", "guidance", *STATISTICS) if name not in values]
    if missing:
        raise EMSError(f"tensor '{missing[0]}' is missing; {DAMAGED}")
    try:
        return _build(parse_meta(metadata), values)
    except EMSError as error:
        raise EMSError(f"{error}; the file is not a valid statistics file: get another, or compute it anew") from error


def _build(meta: EMSMeta, values: dict[str, Tensor]) -> EMSFile:
    main = {name: values.pop(name) for name in ("lambdas", "guidance", *STATISTICS)}
    errors = {name.removesuffix("_se"): values.pop(name) for name in list(values) if name in ("l_se", "s_se", "b_se")}
    moments = {name.removeprefix("moments."): values.pop(name) for name in list(values) if name.startswith("moments.")}
    if values:
        raise EMSError(f"tensor {min(values)!r:.80} does not belong in a statistics file")
    return EMSFile(**main, meta=meta, errors=errors or None, moments=moments, taken=True)
