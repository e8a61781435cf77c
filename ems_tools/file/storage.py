"""Write a file whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["write_atomic", "write_new"]

_LEFTOVER_SECONDS = 24 * 3600.0


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Put `data` at `path` in one step; whoever reads it, at any moment, finds the old file or the new one.

    Written to a temporary file in the same folder, flushed to the disk, then renamed. On any failure the old file stays
    and the temporary one is removed; only a killed process leaves one behind (`.name.*.tmp`), and the next write of that name
    removes it once it is a day old.

    A link is followed: the file that it points to is replaced, and the link stays.

    Raises:
        OSError: as the system reports it (no such folder, disk full, no permission), or that `path` is no regular file.
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a device or a pipe"
        raise OSError(errno.EINVAL, f"is {what}, not a file that could be replaced", str(path))
    _write(path, data, _replace)


def write_new(path: str | os.PathLike[str], data: bytes) -> None:
    """The same for a file that must not exist yet. Raises FileExistsError if it does, whoever made it; other OSError."""
    _write(Path(path), data, _place)


def _write(path: Path, data: bytes, put: Callable[[Path, Path], None]) -> None:
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        put(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _remove_leftovers(path: Path) -> None:
    """Temporary files of this name that no writer can still be at work on. Failing at it is no failure of the write."""
    try:
        mine = re.compile(re.escape(f".{path.name}.") + r"\d+-[0-9a-f]{8}\.tmp")
        old = [e for e in os.scandir(path.parent) if mine.fullmatch(e.name)]
        for entry in old:
            age = _now_in(path.parent) - entry.stat(follow_symlinks=False).st_mtime
            if age > _LEFTOVER_SECONDS and not _is_alive(int(entry.name.rsplit(".", 2)[1].split("-")[0])):
                os.unlink(entry.path)
    except OSError:
        pass


def _now_in(folder: Path) -> float:
    """The time by the clock of the file system, which may not be this computer's."""
    mark = folder / f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    mark.touch()
    try:
        return mark.stat().st_mtime
    finally:
        mark.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    """Whether a process of this number runs on this computer. Where the system cannot tell, age alone decides."""
    if os.name != "posix" or pid == os.getpid():
        return pid == os.getpid()
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _place(source: Path, target: Path) -> None:
    """Rename where nothing is; a hard link fails if there is something, in one step."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        return _replace(source, target)
    source.unlink(missing_ok=True)
    return None


def _replace(source: Path, target: Path) -> None:
    """os.replace; on Windows it fails while another process has the target open, so try for a second."""
    for _ in range(20 if os.name == "nt" else 0):
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(0.05)
    os.replace(source, target)
    return None


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
