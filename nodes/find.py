"""Which statistics a run uses: attached to the MODEL, made for this very checkpoint, for its name, for its kind, or none."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..ems_tools.hosting import Origin, Statistics, TrustBook, choose_statistics
from ..sampler import EMS
from . import host
from .graph import Place, all_links, executing, input_path
from .model import Running, streams_of
from .protocols import Options, Patcher

if TYPE_CHECKING:
    from ..ems_tools.file.contents import EMSFile
    from ..ems_tools.share.identity import FingerprintCache, ModelIdentity
    from ..ems_tools.share.library import Library

__all__ = [
    "ATTACHMENT",
    "Attached",
    "Found",
    "Handle",
    "attach",
    "channels_of",
    "find",
    "find_file",
    "identity_of",
    "library",
    "none_for",
    "trust",
]

ATTACHMENT = "dpm_solver_v3"
"""Key in `model_options`: it reaches the sampler function, even that of the plain KSampler."""


@dataclass(frozen=True)
class Handle:
    """What flows along an EMS wire."""

    file: EMSFile
    name: str
    path: Path | None = None


@dataclass(frozen=True)
class Attached:
    """What "Apply EMS" leaves on a MODEL: statistics (None: sample without), and their factor if not "auto"."""

    handle: Handle | None
    strength: float | str = "auto"

    def __deepcopy__(self, memo: object) -> Attached:
        """The host copies model_options deeply; this is immutable."""
        return self


@dataclass(frozen=True)
class Found:
    """Statistics for a run, or None, and in `message` what was found and what to do.

    `missing`: there is no file for this model, so computing one would help. `origin`: the file, for its trial on first use.
    """

    ems: EMS | None
    message: str
    strength: float | str = "auto"
    warn: bool = False
    missing: bool = False
    origin: Origin | None = None


@lru_cache(maxsize=1)
def _cache() -> FingerprintCache:
    from ..ems_tools.share.identity import FingerprintCache

    return FingerprintCache(host.user_file("fingerprints.json"))


@lru_cache(maxsize=1)
def trust() -> TrustBook:
    """What is known of statistics files: computed here, tried, or found wrong."""
    return TrustBook(host.user_file("trust.json"))


@lru_cache(maxsize=1)
def _library() -> Library:
    from ..ems_tools.share.library import Library

    return Library()


def library() -> Library:
    """All statistics files of the host's folders."""
    found = _library()
    found.folders = host.ems_folders()
    return found


def attach(model: Patcher, attached: Attached) -> Patcher:
    """A clone of the MODEL that carries `attached`."""
    clone = model.clone()
    clone.model_options = {**clone.model_options, ATTACHMENT: attached}
    return clone


def identity_of(patcher: Patcher | None, place: Place) -> ModelIdentity:
    """Identity of a MODEL: its file's fingerprint where the file is known, else its weights'."""
    from ..ems_tools.share.identity import ModelIdentity, weights_fingerprint

    model = getattr(patcher, "model", None)
    kind = getattr(model, "model_config", None)
    identity = ModelIdentity(
        architecture=type(kind).__name__ if kind is not None else type(model).__name__,
        prediction=str(getattr(getattr(model, "model_type", None), "name", "")),
        patches=_patches(patcher, place),
    )
    path = _checkpoint(patcher, place)
    if path is not None:
        try:
            return replace(identity, name=_stem(path), content=_cache().fingerprint(path))
        except OSError as error:
            host.LOG.warning("%s cannot be read: %s", path, error)
    try:
        return replace(identity, weights=weights_fingerprint(_weights(patcher)))
    except Exception as error:  # quantised or absent weights refuse in many ways; then there is no exact match
        host.LOG.debug("no fingerprint of the weights: %s", error)
        return identity


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _checkpoint(patcher: Patcher | None, place: Place) -> str | None:
    """The one file that the MODEL was loaded from; None if there are several (a merge) or none is known."""
    init = getattr(patcher, "cached_patcher_init", None)
    arguments = init[1] if isinstance(init, (tuple, list)) and len(init) > 1 else ()
    if arguments and isinstance(arguments[0], str) and os.path.isfile(arguments[0]):
        return str(arguments[0])
    values = (value for inputs in all_links(place) for value in inputs.values())
    found = {path for path in map(input_path, values) if path}
    return found.pop() if len(found) == 1 else None


def _patches(patcher: Patcher | None, place: Place) -> str:
    """LoRAs on the way from the loader, and how many weights are patched."""
    count = len(getattr(patcher, "patches", None) or ())
    if not count:
        return ""
    loras = []
    for inputs in all_links(place):
        name = inputs.get("lora_name")
        if isinstance(name, str):
            loras.append(f"{_stem(name)} {inputs.get('strength_model', 1)}")
    return ", ".join([*loras[:8], f"{count} patched weights"])


def _weights(patcher: Patcher | None) -> dict[str, Tensor]:
    """The network's own weights; where a patch is applied at the moment, what was there before."""
    if patcher is None:
        return {}
    state = dict(patcher.model.diffusion_model.state_dict())
    for key, kept in (getattr(patcher, "backup", None) or {}).items():
        name = key.removeprefix("diffusion_model.")
        if name in state:
            state[name] = getattr(kept, "weight", kept)
    return {name: value for name, value in state.items() if type(value) in (Tensor, _parameter())}


def _parameter() -> type:
    from torch.nn import Parameter

    return Parameter


def find(run: Running, x: Tensor, options: Options, same_architecture: bool = False) -> Found:
    """Statistics for latents like x [B, C, ...]; `options` are the run's model_options. Never raises for a bad file."""
    streams = streams_of(run.patcher, x)
    if len(streams) > 1:  # each has channels of its own, and in the pack no axis is left that tells them apart
        shapes = " and ".join("x".join(map(str, shape)) for shape in streams if shape)
        told = f"several latents packed into one{f' ({shapes})' if shapes else ''}: sampling without EMS"
        return Found(None, f"{told}; for steps take a usual scheduler, none are fitted to them", warn=True)
    attached = options.get(ATTACHMENT)
    if isinstance(attached, Attached):
        if attached.handle is None:
            return Found(None, "sampling without EMS, as asked for by Apply EMS")
        return _of(attached.handle, "attached to the model", run, x, attached.strength)
    identity = identity_of(run.patcher, executing())
    match = library().find(identity, channels=x.shape[1], same_architecture=same_architecture)
    if match is None or match.entry.file is None:
        return Found(None, none_for(identity), missing=True)
    handle = Handle(match.entry.file, match.entry.name, match.entry.path)
    if match.how == "exact":
        return _of(handle, "made for this checkpoint", run, x)
    reason = "of a checkpoint with the same name" if match.how == "name" else "of another checkpoint of the same architecture"
    return replace(_of(handle, f"{reason}; for its own, run Compute EMS", run, x), warn=True)


def _of(handle: Handle, reason: str, run: Running, x: Tensor, strength: float | str = "auto") -> Found:
    found: Statistics = choose_statistics(handle.file, handle.name, reason, run.facts(), tuple(x.shape))
    return Found(found.ems, found.message, strength, found.warn, origin=Origin(handle.file, handle.name))


def channels_of(patcher: Patcher | None) -> int | None:
    """Latent channels of a MODEL, None if it does not say."""
    channels = getattr(getattr(getattr(patcher, "model", None), "latent_format", None), "latent_channels", None)
    return channels if isinstance(channels, int) else None


def find_file(patcher: Patcher | None) -> Handle | None:
    """The statistics file that sampling with this MODEL would use, if there is one."""
    attached = (getattr(patcher, "model_options", None) or {}).get(ATTACHMENT)
    if isinstance(attached, Attached):
        return attached.handle
    match = library().find(identity_of(patcher, executing()), channels=channels_of(patcher))
    if match is None or match.entry.file is None:
        return None
    return Handle(match.entry.file, match.entry.name, match.entry.path)


def none_for(identity: ModelIdentity) -> str:
    """That there is no file, in one line."""
    bad = [e.name for e in library().entries() if e.problem]
    refused = f" ({len(bad)} unusable files, see Inspect EMS: {', '.join(bad[:3])})" if bad else ""
    return f"no EMS for {identity.name or 'this model'}{refused}: run Compute EMS once"
