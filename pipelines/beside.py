"""The statistics file beside a scheduler's configuration: written, found again, fetched from the Hub.

In memory the configuration holds an absolute path, so that `from_config` of it works anywhere. In a saved folder it holds the
name of the copy that lies beside it, so that the folder can be moved, shared and pushed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..ems_tools.file.contents import EMSFile
from ..ems_tools.file.layout import SUFFIX
from ..ems_tools.file.reader import EMSFileError
from .protocols import Config, Configured, Scheduler

__all__ = ["NAME", "absolute", "find", "saved"]

NAME = f"scheduler{SUFFIX}"


def absolute(path: str | os.PathLike[str] | None) -> str | None:
    """The path as the configuration keeps it in memory."""
    return None if path is None else os.path.abspath(path)


@contextmanager
def saved(scheduler: Scheduler, folder: str | os.PathLike[str], file: EMSFile | None) -> Iterator[None]:
    """Write `file` into `folder`; within the context the scheduler's configuration names that copy. Raises OSError."""
    if file is None:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    file.save(Path(folder) / NAME)
    before = scheduler.config["ems"]
    scheduler.register_to_config(ems=NAME)
    try:
        yield
    finally:
        scheduler.register_to_config(ems=before)


def find(cls: Configured, place: str | os.PathLike[str], subfolder: str | None, options: Config) -> str | None:
    """The path of the statistics file that the configuration in `place` (a folder, or a repository of the Hub) names.

    Raises:
        EMSFileError: the configuration leads out of its folder, or its file is not there.
    """
    wanted = cls.load_config(place, subfolder=subfolder, **{k: v for k, v in options.items() if k in _HUB}).get("ems")
    if not wanted or os.path.isabs(wanted):
        return None if not wanted else str(wanted)
    if os.path.basename(wanted) != wanted or not wanted.endswith(SUFFIX):
        raise EMSFileError(wanted, f"the configuration in {place} may name a *{SUFFIX} file beside it only")
    if os.path.isdir(place):
        path = os.path.join(place, subfolder or "", wanted)
        if not os.path.isfile(path):
            raise EMSFileError(path, "the scheduler's configuration names this file, and it is not there")
        return path
    from huggingface_hub import hf_hub_download

    return str(hf_hub_download(str(place), wanted, subfolder=subfolder, **{k: v for k, v in options.items() if k in _HUB}))


_HUB = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
