"""Servers that tests of several folders start."""

from __future__ import annotations

import signal
import subprocess


def end(process: subprocess.Popen[bytes] | None) -> None:
    """Ask a process to end, and kill it if it does not within ten seconds."""
    if process is not None and process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
