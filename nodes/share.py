"""The node "Find EMS": the statistics of this checkpoint from the folders or, if the user says so, from a Hub repository."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import host
from .find import Handle, channels_of, identity_of, library
from .graph import Place, Prompt
from .protocols import Patcher

if TYPE_CHECKING:
    from ..ems_tools.share.identity import ModelIdentity

__all__ = ["FindNode"]


class FindNode:
    """EMS for a MODEL, by its checkpoint's hashes."""

    CATEGORY = "DPM-Solver-v3"
    FUNCTION = "find"
    RETURN_TYPES = ("EMS", "STRING")
    RETURN_NAMES = ("ems", "text")
    OUTPUT_NODE = True
    DESCRIPTION = (
        "Find the empirical model statistics (EMS) of this checkpoint: in models/ems and output/ems, and with online in a "
        "Hugging Face repository of EMS files. What is fetched is verified and put into output/ems; no file is overwritten."
    )
    SEARCH_ALIASES = ("find ems", "download ems", "empirical model statistics")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, object]:
        online = {"default": False, "tooltip": "Ask the repository if no file here fits. Off: nothing goes over the network."}
        repository = {"default": "", "tooltip": "A Hugging Face repository of EMS files: user/name."}
        return {
            "required": {"model": ("MODEL",)},
            "optional": {"online": ("BOOLEAN", online), "repository": ("STRING", repository)},
            "hidden": {"unique_id": "UNIQUE_ID", "prompt": "PROMPT"},
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: object) -> float:
        """Files come and go: look every time."""
        return float("nan")

    def find(
        self,
        model: Patcher,
        online: bool = False,
        repository: str = "",
        unique_id: object = None,
        prompt: Prompt | None = None,
    ) -> dict[str, object]:
        """EMS and how it was found. Raises HostError or EMSError, whose message says what to do."""
        identity = identity_of(model, Place(prompt or {}, str(unique_id)))
        match = library().find(identity, channels=channels_of(model))
        if match is not None and match.entry.file is not None and (match.how == "exact" or not online):
            by = "made for this checkpoint" if match.how == "exact" else "for a checkpoint of the same name"
            return self._answer(Handle(match.entry.file, match.entry.name, match.entry.path), f"found here, {by}")
        if not online:
            raise host.HostError(
                f"There is no EMS for {identity.name or 'this model'} in models/ems or output/ems. Compute one with "
                "'Compute EMS', or turn on 'online' and name a repository."
            )
        return self._fetched(identity, repository.strip())

    def _fetched(self, identity: ModelIdentity, repository: str) -> dict[str, object]:
        from ..ems_tools.share.hub import Hub
        from ..ems_tools.share.index import Hashes
        from ..ems_tools.share.pull import pull

        if not repository:
            raise host.HostError("Name the repository to look in: user/name.")
        done = pull(Hub(repository), Hashes.of(identity), host.output_folder())
        entry = done.entry
        evidence = "no evidence" if entry.ratio is None else f"better than without EMS in {entry.better} of {entry.cases} cases"
        what = "fetched" if done.new else "was here already"
        trust = "whole and without contradictions, tried on the model when it is first used"
        text = f"{what} from {repository}, {trust}; {evidence}; licence {entry.licence or 'not named'}"
        return self._answer(Handle(done.file, done.path.name, done.path), text)

    def _answer(self, handle: Handle, text: str) -> dict[str, object]:
        line = f"{handle.name}: {text}"
        host.log(line)
        return {"ui": {"text": [line]}, "result": (handle, line)}
