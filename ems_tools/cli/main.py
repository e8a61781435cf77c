"""The command line `ems`. Exit status: 0 done, 1 refused or failed (one line on stderr says why), 2 wrong usage."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from ...sampler import EMSError, SamplingError
from ..estimate.job import EstimateError
from .compute import add_compute, add_fit
from .files import add_convert, add_inspect, add_merge, add_plot, add_verify
from .plugs import Commands, plugs
from .share import add_index, add_pull, add_share

__all__ = ["main"]

REFUSALS = (EMSError, EstimateError, SamplingError, OSError)
"""Errors whose message is for the user; others are bugs and keep their traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ems` with these arguments (default: the process's). Returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a model's name may not be in the terminal's character set
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or usage
        return stop.code if isinstance(stop.code, int) else 2
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `ems inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except REFUSALS as error:
        print(f"ems {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"ems {args.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from ... import __version__

    parser = argparse.ArgumentParser(prog="ems", description="Compute and handle EMS, the statistics of DPM-Solver-v3.")
    parser.add_argument("--version", action="version", version=f"ems {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (*COMMANDS, *(add for plug in plugs() for add in plug.COMMANDS)):
        add(commands)
    return parser


COMMANDS: tuple[Callable[[Commands], None], ...] = (
    add_compute,
    add_fit,
    add_inspect,
    add_verify,
    add_merge,
    add_convert,
    add_plot,
    add_share,
    add_pull,
    add_index,
)
"""Each registers one command and sets `run`, a function from the parsed arguments to the exit status."""


if __name__ == "__main__":
    sys.exit(main())
