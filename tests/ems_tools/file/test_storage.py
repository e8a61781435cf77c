"""Writing a file: what is no file is left alone, links stay, live temporary files too."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dpm_solver_v3.ems_tools.file import storage
from dpm_solver_v3.ems_tools.file.storage import write_atomic


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    target.write_bytes(b"old")
    try:
        link.symlink_to(target)
    except OSError:
        pytest.skip("no links here")
    write_atomic(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(OSError, match="device or a pipe"):
        write_atomic(path, b"new")
    assert path.is_fifo()


@pytest.mark.skipif(os.name != "posix", reason="needs process numbers")
def test_a_clock_that_is_behind_deletes_no_live_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = tmp_path / f".a.{os.getppid()}-{'0' * 8}.tmp"
    left = tmp_path / f".a.{2**22 + 5}-{'0' * 8}.tmp"
    for path in (live, left):
        path.write_bytes(b"")
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    monkeypatch.setattr(storage.time, "time", lambda: 4e9)
    write_atomic(tmp_path / "a", b"data")
    assert live.exists() and not left.exists()
