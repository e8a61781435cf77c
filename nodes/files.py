"""Statistics files in the graph: load, apply to a MODEL, save, inspect, merge."""

from __future__ import annotations

from pathlib import Path

from . import host
from .find import Attached, Handle, attach, library
from .graph import executing
from .protocols import Patcher

__all__ = ["ApplyNode", "InspectNode", "LoadNode", "MergeNode", "SaveNode"]

CATEGORY = "DPM-Solver-v3"
NOTHING = "(no EMS file of your own yet)"
_STRENGTHS = ["auto", "0", "0.25", "0.5", "0.75", "1"]


class LoadNode:
    """A statistics file by name."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("EMS",)
    DESCRIPTION = (
        "Load empirical model statistics (EMS), a file *.ems.safetensors, from models/ems, output/ems or the pack's own stats."
    )
    SEARCH_ALIASES = ("load ems", "empirical model statistics")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, object]:
        own, shipped = names_by_origin()
        names = [*(own or [NOTHING]), *shipped]  # the first one is preselected: never the pack's own toy
        tooltip = "Files in models/ems, output/ems and the pack's stats folder."
        return {"required": {"ems_name": (names, {"tooltip": tooltip})}, "hidden": {"extra_pnginfo": "EXTRA_PNGINFO"}}

    @classmethod
    def IS_CHANGED(cls, ems_name: str, extra_pnginfo: object = None) -> str:
        path = dict(library().paths()).get(ems_name)
        try:
            status = path.stat() if path else None
        except OSError:
            status = None
        return f"{ems_name} {status.st_size} {status.st_mtime_ns}" if status else ems_name

    @classmethod
    def VALIDATE_INPUTS(cls, ems_name: str) -> bool | str:
        from ..ems_tools.file.layout import SUFFIX

        if ems_name in dict(library().paths()) or ems_name.endswith(SUFFIX):  # it may be in the workflow: seen when it runs
            return True
        return f"There is no EMS file {ems_name!r}. Compute one with 'Compute EMS', or put one into models/ems."

    def load(self, ems_name: str, extra_pnginfo: object = None) -> tuple[Handle]:
        """A file of the folders, else the one that the workflow carries. Raises EMSError, which says what is wrong with it."""
        if ems_name not in dict(library().paths()):
            return (_carried(ems_name, extra_pnginfo),)
        entry = library().get(ems_name)
        assert entry.file is not None
        return (Handle(entry.file, entry.name, entry.path),)


def names_by_origin() -> tuple[list[str], list[str]]:
    """Names of the files in the host's folders, and of those that come with the pack."""
    paths, stats = library().paths(), host.ems_folders()[-1]
    return [n for n, p in paths if not p.is_relative_to(stats)], [n for n, p in paths if p.is_relative_to(stats)]


def _carried(name: str, extra_pnginfo: object) -> Handle:
    """The EMS of this name, or the only one, that "Save EMS" put into the workflow."""
    from ..ems_tools.share.library import safe_name
    from ..ems_tools.share.workflow import embedded_files, unpack

    found = embedded_files(_workflow(extra_pnginfo))
    value = found.get(safe_name(name)) or (next(iter(found.values())) if len(found) == 1 else None)
    if value is None:
        raise host.HostError(
            f"There is no EMS file {name!r}, and the workflow carries none. Compute one with 'Compute EMS', "
            "or put one into models/ems."
        )
    real, file = unpack(value)
    host.LOG.info("%s is not in the folders: the EMS %s in the workflow is used", name, real)
    return Handle(file, f"{real} (from the workflow)")


def _workflow(extra_pnginfo: object) -> object:
    """The workflow that images are saved with; some hosts hand it over in a list. None if there is none."""
    if isinstance(extra_pnginfo, list):
        extra_pnginfo = extra_pnginfo[0] if extra_pnginfo else None
    return extra_pnginfo.get("workflow") if isinstance(extra_pnginfo, dict) else None


class ApplyNode:
    """Statistics attached to a MODEL: used by dpm_solver_v3 whatever sampler node follows."""

    CATEGORY = CATEGORY
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = (
        "Attach empirical model statistics (EMS) to a model; the sampler dpm_solver_v3 then uses them. Without an EMS "
        "it takes the steps that are good on many models."
    )
    SEARCH_ALIASES = ("apply ems", "empirical model statistics")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, object]:
        strength = {"default": "auto", "tooltip": "How much of the statistics to use; auto: what was measured best."}
        return {
            "required": {"model": ("MODEL",), "strength": (_STRENGTHS, strength)},
            "optional": {"ems": ("EMS", {"tooltip": "Left open: no EMS, even if a file for this checkpoint exists."})},
        }

    def apply(self, model: Patcher, strength: str, ems: Handle | None = None) -> tuple[Patcher]:
        """A clone of the MODEL."""
        return (attach(model, Attached(ems, strength if strength == "auto" else float(strength))),)


class SaveNode:
    """Write an EMS into output/ems."""

    CATEGORY = CATEGORY
    FUNCTION = "save"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("path",)
    OUTPUT_NODE = True
    DESCRIPTION = (
        "Write empirical model statistics (EMS; loaded, merged, ...) into output/ems. A different file of that name "
        "stays: a number is added."
    )
    SEARCH_ALIASES = ("save ems", "empirical model statistics")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, object]:
        name = {"default": "my-model", "tooltip": "File name without ending."}
        moments = {
            "default": False,
            "tooltip": "Keep the sums that Merge EMS needs, if the EMS has them. Makes the file much larger.",
        }
        embed = {
            "default": False,
            "tooltip": "Images of this run carry the EMS in their workflow; Load EMS uses it elsewhere. Adds some KB each.",
        }
        return {
            "required": {"ems": ("EMS",), "name": ("STRING", name), "keep_moments": ("BOOLEAN", moments)},
            "optional": {"embed_in_workflow": ("BOOLEAN", embed)},
            "hidden": {"extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def IS_CHANGED(cls, embed_in_workflow: bool = False, **inputs: object) -> float | bool:
        """Every run has a workflow of its own to put the EMS into."""
        return float("nan") if embed_in_workflow else False

    def save(
        self, ems: Handle, name: str, keep_moments: bool = False, embed_in_workflow: bool = False, extra_pnginfo: object = None
    ) -> dict[str, object]:
        """The path as STRING. Raises EMSError if the EMS is too large for a workflow."""
        file = ems.file if keep_moments or not ems.file.moments else ems.file.compacted()
        path = free_path(name, file.encode())
        if not path.exists():
            file.save(path)
        host.LOG.info("wrote %s", path)
        if embed_in_workflow:
            self._embed(ems, path.name, extra_pnginfo)
        return {"ui": {"text": [str(path)]}, "result": (str(path),)}

    def _embed(self, ems: Handle, saved_as: str, extra_pnginfo: object) -> None:
        """Under the name that Load EMS asks for, where the EMS came from a file."""
        from ..ems_tools.share.workflow import with_file

        workflow = _workflow(extra_pnginfo)
        if isinstance(workflow, dict):
            with_file(workflow, ems.name if ems.path else saved_as, ems.file)
        else:
            host.LOG.warning("Save EMS: this run has no workflow to put the EMS into (it was queued through the API)")


def free_path(name: str, data: bytes) -> Path:
    """The first of name, name_2, name_3, ... in output/ems that does not exist or holds these very bytes."""
    from ..ems_tools.file.layout import SUFFIX
    from ..ems_tools.share.library import safe_name

    folder = host.output_folder()
    folder.mkdir(parents=True, exist_ok=True)
    stem = safe_name(name).removesuffix(SUFFIX)
    for k in range(1, 1000):
        path = folder / f"{stem if k == 1 else f'{stem}_{k}'}{SUFFIX}"
        if not path.exists() or (path.stat().st_size == len(data) and path.read_bytes() == data):
            return path
    raise host.HostError(f"{folder} holds 999 files called {stem}: choose another name")


class InspectNode:
    """What a statistics file says, as a plot and as text."""

    CATEGORY = CATEGORY
    FUNCTION = "inspect"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("plot", "text")
    OUTPUT_NODE = True
    DESCRIPTION = (
        "Draw what empirical model statistics (EMS) gain, and print all that they hold. Lists refused files of the folders."
    )
    SEARCH_ALIASES = ("inspect ems", "plot ems", "empirical model statistics")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, object]:
        tooltip = "Draw the statistics l, s and b themselves, too, not only what they gain."
        return {
            "required": {"ems": ("EMS",)},
            "optional": {"statistics": ("BOOLEAN", {"default": False, "tooltip": tooltip})},
        }

    def inspect(self, ems: Handle, statistics: bool = False) -> dict[str, object]:
        """IMAGE [1, H, W, 3] and STRING."""
        from ..ems_tools.show.describe import gain_of, lines_of
        from .pictures import ems_picture

        host.say(f"connect plot to Preview Image; {gain_of(ems.file) or 'no steps were fitted'}", executing().node)
        bad = [f"refused: {e.name}: {e.problem}" for e in library().entries() if e.problem]
        text = "\n".join([ems.name, *lines_of(ems.file), *(["", *bad] if bad else [])])
        return {"ui": {"text": [text]}, "result": (ems_picture(ems.file, ems.name, statistics), text)}


class MergeNode:
    """Add up estimates of one model made with different seeds."""

    CATEGORY = CATEGORY
    FUNCTION = "merge"
    RETURN_TYPES = ("EMS",)
    DESCRIPTION = (
        "Add up empirical model statistics (EMS) of one model computed with different seeds and keep_moments. The result "
        "has no evidence yet."
    )
    SEARCH_ALIASES = ("merge ems", "empirical model statistics")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, object]:
        return {
            "required": {"ems_1": ("EMS",), "ems_2": ("EMS",)},
            "optional": {"ems_3": ("EMS",), "ems_4": ("EMS",)},
        }

    def merge(self, **parts: Handle) -> tuple[Handle]:
        """Raises EMSFileError that names the EMS which does not fit."""
        from ..ems_tools.estimate.merge import merge_files

        files = [(handle.name, handle.file) for _, handle in sorted(parts.items()) if handle is not None]
        return (Handle(merge_files(list(files)), " + ".join(name for name, _ in files)),)
