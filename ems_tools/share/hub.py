"""A Hugging Face Hub repository of statistics files: fetch one small file, put several in one commit.

Needs huggingface_hub, which is imported only here and only when used. It keeps what it fetched in its own cache, from which a
machine without a network is served.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ...sampler import EMSError

__all__ = ["Hub", "NotThere", "seconds_for", "within"]


class NotThere(EMSError):
    """The repository or the file does not exist (or is private)."""


def _library() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise EMSError(
            "this needs huggingface_hub, which is not installed here: install it with 'pip install huggingface_hub', "
            "or download the file by hand and put it into the folder of statistics files"
        ) from None
    return huggingface_hub


@dataclass(frozen=True)
class Hub:
    """One repository of models.

    Args:
        repo: "user/name".
        endpoint: another address than the Hub's (default: HF_ENDPOINT, else the Hub).
        cache: another folder than huggingface_hub's own.
        offline: use the cache only.
        revision: branch, tag or commit.
    """

    repo: str
    endpoint: str | None = None
    cache: Path | None = None
    offline: bool = False
    revision: str = "main"

    def __post_init__(self) -> None:
        parts = self.repo.split("/")
        plain = all(p and not p.startswith((".", "-")) and all(c.isalnum() or c in "._-" for c in p) for p in parts)
        if len(parts) != 2 or not plain or not self.repo.isascii() or ".." in self.repo or len(self.repo) > 96:
            raise EMSError(f"{self.repo!r:.120} is not the name of a Hub repository: give it as user/name")

    def fetch(self, name: str, limit: int, anew: bool = False) -> bytes:
        """The bytes of a file in the repository, or those in the cache if the Hub cannot be reached.

        Nothing larger than `limit` is downloaded, and nothing for longer than `seconds_for(limit)`.

        Args:
            name: of the file.
            limit: bytes.
            anew: download it whatever the cache holds.

        Raises:
            NotThere: no such file or repository.
            EMSError: what else is wrong, and what to do.
        """
        return within(seconds_for(limit), self._place(name), lambda: self._fetch(name, limit, anew))

    def _fetch(self, name: str, limit: int, anew: bool) -> bytes:
        library = _library()
        if not self.offline:
            self._check_size(library, name, limit)
        options: dict[str, object] = {"revision": self.revision, "cache_dir": self.cache, "endpoint": self.endpoint}
        options["local_files_only"], options["force_download"] = self.offline, anew
        if "tqdm_class" in inspect.signature(library.hf_hub_download).parameters:
            options["tqdm_class"] = _bounded(limit)
        try:
            path = library.hf_hub_download(self.repo, name, **options)
            if os.stat(path).st_size > limit:
                raise EMSError(f"{self._place(name)} has more than the {limit} bytes allowed")
            with open(path, "rb") as file:
                return file.read(limit + 1)
        except EMSError:
            raise
        except Exception as error:  # the library passes on errors of several HTTP libraries
            raise self._explained(library, name, error) from error

    def _check_size(self, library: ModuleType, name: str, limit: int) -> None:
        url = library.hf_hub_url(self.repo, name, revision=self.revision, endpoint=self.endpoint)
        try:
            size = library.get_hf_file_metadata(url).size
        except Exception as error:
            if _is_absent(library, error):
                raise self._explained(library, name, error) from error
            return  # not reached: hf_hub_download then serves the cache, or says what is wrong
        if size is None or size > limit:
            told = "does not say its size" if size is None else f"has {size} bytes"
            raise EMSError(f"{self._place(name)} {told}; at most {limit} are downloaded")

    def put(self, files: Mapping[str, bytes], message: str, parent: str | None = None) -> str:
        """Commit files; the commit's address. `parent`: fail if the branch has moved on since. Raises EMSError."""
        library = _library()
        api = library.HfApi(endpoint=self.endpoint)
        operations = [library.CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()]
        try:
            done = api.create_commit(
                self.repo, operations, commit_message=message, revision=self.revision, parent_commit=parent
            )
        except Exception as error:
            raise self._explained(library, "", error) from error
        return str(getattr(done, "commit_url", ""))

    def head(self, create: bool = False) -> str:
        """The branch's newest commit. Raises NotThere, EMSError."""
        library = _library()
        api = library.HfApi(endpoint=self.endpoint)
        try:
            if create:
                api.create_repo(self.repo, exist_ok=True)
            return str(api.repo_info(self.repo, revision=self.revision).sha)
        except Exception as error:
            raise self._explained(library, "", error) from error

    def _place(self, name: str) -> str:
        return f"{self.repo}: {name}" if name else self.repo

    def _explained(self, library: ModuleType, name: str, error: Exception) -> EMSError:
        status = getattr(getattr(error, "response", None), "status_code", None)
        kind = type(error).__name__
        if _is_absent(library, error):
            what = "there is no such file or repository on the Hub (or it is private: log in with 'hf auth login')"
            return NotThere(f"{self._place(name)}: {what}")
        if kind == "LocalEntryNotFoundError" or (self.offline and isinstance(error, FileNotFoundError)):
            where = "is not in the cache" if self.offline else "the Hub cannot be reached, and it is not in the cache"
            return EMSError(f"{self._place(name)}: {where}; try again with a network")
        if status in (401, 403):
            return EMSError(f"{self._place(name)}: the Hub refuses ({status}): log in with 'hf auth login'")
        if status in (409, 412):
            return EMSError(f"{self._place(name)}: somebody else changed the repository just now: give the same command again")
        if status is not None and status >= 500:
            return EMSError(f"{self._place(name)}: the Hub has a problem of its own ({status}): try again later")
        return EMSError(f"{self._place(name)}: {kind}: {' '.join(str(error).split())[:200]}")


def seconds_for(size: int) -> float:
    """How long a download of this size may take: a minute, and what 16 KiB a second need."""
    return 60 + size / 2**14


def within(seconds: float, place: str, work: Callable[[], bytes]) -> bytes:
    """The result of `work`, which no server can draw out: after `seconds` it is left alone. Raises EMSError then."""
    result: list[bytes | BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run, name="EMS download", daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        raise EMSError(f"{place}: no answer within {seconds:.0f} s: the network or the server is too slow; try again later")
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def _is_absent(library: ModuleType, error: Exception) -> bool:
    names = ("EntryNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError", "RemoteEntryNotFoundError")
    mine = {c.__name__ for c in type(error).__mro__}
    return bool(mine & set(names)) and "LocalEntryNotFoundError" not in mine


def _bounded(limit: int) -> type:
    """A silent progress bar that stops the download beyond `limit` bytes, whatever size the server announced."""
    from tqdm import tqdm

    class Bounded(tqdm):
        def __init__(self, *args: object, **options: object) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})
            self.received = 0.0

        def update(self, n: float | None = 1) -> bool | None:
            self.received += n or 0
            if self.received > limit:
                raise EMSError(f"the server sends more than the {limit} bytes allowed")
            return None

    return Bounded
