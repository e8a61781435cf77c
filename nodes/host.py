"""ComfyUI's lists, folders, node status and progress: what the pack adds to and asks of, with fallbacks for every release.

Facts in ComfyUI 0.3.10 to 0.30. Nothing of the host is replaced or reloaded; lists and dictionaries are added to in place.
"""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..ems_tools.hosting import one_line, printable
from .protocols import ModelSampling

__all__ = [
    "LOG",
    "HostError",
    "add_sampler",
    "add_scheduler",
    "category_of",
    "check_interrupt",
    "ems_folders",
    "loaded",
    "log",
    "output_folder",
    "progress_bar",
    "register_folder",
    "say",
    "say_first",
    "user_file",
]

LOG = logging.getLogger("DPM-Solver-v3")
_KEY = "ems"


class HostError(RuntimeError):
    """Something that the user should know; the message says what to do."""


def loaded(module: str) -> object:
    """A module of the host that is loaded already, or None."""
    return sys.modules.get(module)


def category_of(node: str, otherwise: str) -> str:
    """The menu category of one of the host's nodes, so that ours stand beside it in every release."""
    found = getattr(getattr(loaded("nodes"), "NODE_CLASS_MAPPINGS", {}).get(node), "CATEGORY", None)
    return found if isinstance(found, str) and found else otherwise


# --- the sampler list


def add_sampler(name: str, function: Callable[..., Tensor]) -> bool:
    """Put `function` into every KSampler's list as `name`. False if another pack has the name."""
    import comfy.k_diffusion.sampling as sampling
    import comfy.samplers as samplers

    attribute = f"sample_{name}"
    other = getattr(sampling, attribute, None)
    if other is not None and getattr(other, "__qualname__", "") != function.__qualname__:
        LOG.warning("the sampler name %r is another pack's: the node 'DPM-Solver-v3' works, the list entry is theirs", name)
        return False
    setattr(sampling, attribute, function)
    lists = [getattr(getattr(samplers, "KSampler", None), "SAMPLERS", None), getattr(samplers, "SAMPLER_NAMES", None)]
    for names in lists:
        if isinstance(names, list) and name not in names:
            names.append(name)
    return True


def add_scheduler(name: str, function: Callable[[ModelSampling, int], Tensor]) -> bool:
    """Put `function(model_sampling, steps)` into every scheduler list as `name`. False if another pack has the name."""
    import comfy.samplers as samplers

    handlers = samplers.SCHEDULER_HANDLERS
    other = getattr(handlers.get(name), "handler", None)
    if other is not None and getattr(other, "__qualname__", "") != function.__qualname__:
        LOG.warning("the scheduler name %r is another pack's: the list entry is theirs", name)
        return False
    handlers[name] = samplers.SchedulerHandler(function)
    for names in (samplers.SCHEDULER_NAMES, getattr(samplers.KSampler, "SCHEDULERS", None)):
        if isinstance(names, list) and name not in names:
            names.append(name)
    return True


# --- folders


def register_folder() -> None:
    """`models/ems` and `output/ems` as model folder "ems", beside those of extra_model_paths.yaml."""
    import folder_paths

    known = folder_paths.folder_names_and_paths
    paths, extensions = known.get(_KEY, ([], set()))
    paths, extensions = list(paths), set(extensions) | {".safetensors"}
    models = getattr(folder_paths, "models_dir", None)
    for folder in ([Path(models) / _KEY] if models else []) + [output_folder()]:
        if str(folder) not in paths:
            paths.append(str(folder))
    known[_KEY] = (paths, extensions)


def ems_folders() -> list[Path]:
    """Where statistics files are looked for: the host's folders, then the pack's own `stats/`."""
    import folder_paths

    paths = folder_paths.folder_names_and_paths.get(_KEY, ([], set()))[0]
    return [Path(p) for p in paths] + [Path(__file__).resolve().parents[1] / "stats"]


def output_folder() -> Path:
    """Where new files are written: models folders can be read-only."""
    import folder_paths

    return Path(folder_paths.get_output_directory()) / _KEY


def user_file(name: str) -> Path | None:
    """A file of ours in the host's user folder."""
    import folder_paths

    get = getattr(folder_paths, "get_user_directory", None)
    return Path(get()) / "dpm_solver_v3" / name if callable(get) else None


# --- what runs now


_LINE = 36
"""Letters of a line. The front end breaks longer ones within words, at what a new KSampler (270 pixels) holds; it shows two."""
_NOTES: dict[str, tuple[object, str]] = {}
"""By node: the prompt, and what begins all its messages in that prompt, because a node shows one message only."""


def say(text: str, node: str = "", first: bool = False) -> None:
    """Show `text` on the node in the front end, where the host can, after what `say_first` said in the same prompt.

    `first`: before it, because this is what must be seen.
    """
    server = getattr(getattr(loaded("server"), "PromptServer", None), "instance", None)
    send = getattr(server, "send_progress_text", None)
    prompt, note = _NOTES.get(node, (None, ""))
    if callable(send) and node:
        try:
            said = [note if prompt == getattr(server, "last_prompt_id", None) else "", text]
            shown = one_line(*(reversed(said) if first else said))
            lines = textwrap.wrap(shown, _LINE, break_long_words=False, break_on_hyphens=False)
            send("\n".join(lines), node)
        except Exception as error:
            LOG.debug("no node status: %s", error)


def say_first(text: str, brief: str, node: str) -> None:
    """Show `text` on the node, and `brief` before what it shows later in this prompt."""
    _NOTES.pop(node, None)
    say(text, node)
    server = getattr(getattr(loaded("server"), "PromptServer", None), "instance", None)
    _NOTES[node] = (getattr(server, "last_prompt_id", None), brief)


def log(text: str, *, warn: bool = False) -> None:
    """One line in the host's log, whatever characters a file's or a model's name has and whatever the console can print."""
    LOG.log(logging.WARNING if warn else logging.INFO, "%s", printable(text, getattr(sys.stderr, "encoding", None)))


def check_interrupt() -> None:
    """Raise the host's interrupt (a BaseException in some releases) if the user pressed cancel."""
    check = getattr(loaded("comfy.model_management"), "throw_exception_if_processing_interrupted", None)
    if callable(check):
        check()


def progress_bar(total: int, node: str) -> Callable[[int, object], None]:
    """update(done, preview or None); raises on interrupt."""
    import comfy.utils

    try:
        bar = comfy.utils.ProgressBar(total, node_id=node or None)
    except TypeError:
        bar = comfy.utils.ProgressBar(total)

    def update(done: int, preview: object = None) -> None:
        check_interrupt()
        bar.update_absolute(done, total, preview)

    return update
