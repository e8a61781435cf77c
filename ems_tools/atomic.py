"""Write a file whole or not at all."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

__all__ = ["write_atomic"]


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Put `data` at `path` in one step; whoever reads it, at any moment, finds the old file or the new one.

    Written to a temporary file in the same folder, flushed to the disk, then renamed. On any failure the old file stays
    and the temporary one is removed; only a killed process leaves one behind (`.name.*.tmp`).

    Raises:
        OSError: as the system reports it (no such folder, disk full, no permission).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _replace(source: Path, target: Path) -> None:
    """os.replace; on Windows it fails while another process has the target open, so try for a second."""
    for _ in range(20 if os.name == "nt" else 0):
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(0.05)
    os.replace(source, target)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can open a folder (not on Windows)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems refuse; the file itself is safe
    finally:
        os.close(descriptor)
