"""Where the host stands in its graph, and what the graph says of a run that has not begun.

The host hands a scheduler function the noise levels and the number of steps, nothing else. Which MODEL, guidance scale and
sampler the steps are for is found in variables of the host's functions on the way (a KSampler has them all). The pack's own
scheduler node looks at the nodes that receive its steps. What neither says is not known.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .host import loaded
from .protocols import Patcher

__all__ = [
    "Asked",
    "Place",
    "Prompt",
    "Receiver",
    "agreed",
    "all_links",
    "asked",
    "executing",
    "input_path",
    "link_of",
    "receivers",
]

Inputs = Mapping[str, object]
Prompt = Mapping[str, Any]
"""Node id -> {"class_type", "inputs"}, as the host keeps it."""
_PLAIN = {"BasicGuider", "CFGGuider"}
"""Core's guiders that guide plainly."""
_DEPTH = 24
TODO = "use 'DPM-Solver-v3 Scheduler'"


@dataclass(frozen=True)
class Place:
    """The node that is executed and the prompt that it belongs to."""

    prompt: Prompt
    node: str

    def inputs(self, node: str) -> Inputs:
        """Of a node; {} if it is not there."""
        return (self.prompt.get(node) or {}).get("inputs") or {}

    def kind(self, node: str) -> str:
        """Class of a node."""
        return str((self.prompt.get(node) or {}).get("class_type", ""))


def executing(node: str | None = None) -> Place:
    """Where the host stands in its graph, or the place of `node` in it; empty if it does not say."""
    server = getattr(getattr(loaded("server"), "PromptServer", None), "instance", None)
    if node is None:
        context = getattr(loaded("comfy_execution.utils"), "get_executing_context", lambda: None)()
        node = getattr(context, "node_id", None) or getattr(server, "last_node_id", None)
    running_now = getattr(getattr(server, "prompt_queue", None), "currently_running", None) or {}
    for item in list(running_now.values()):
        if len(item) > 2 and isinstance(item[2], dict) and (node is None or str(node) in item[2]):
            return Place(item[2], str(node or ""))
    return Place({}, str(node or ""))


def link_of(value: object) -> tuple[str, int] | None:
    """(node, output) of an input that is a link."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[1], int):
        return str(value[0]), value[1]
    return None


def _kind_of_output(place: Place, node: str, output: int) -> str:
    """As "MODEL"; "*" if it is not known."""
    classes = getattr(loaded("nodes"), "NODE_CLASS_MAPPINGS", {})
    returned = getattr(classes.get(place.kind(node)), "RETURN_TYPES", ())
    return str(returned[output]) if output < len(returned) else "*"


def all_links(place: Place) -> Iterator[Inputs]:
    """Inputs of the nodes that the MODEL or GUIDER of `place`'s node comes from, nearest first, each once."""
    queue, seen = [place.node], {place.node}
    while queue:
        inputs = place.inputs(queue.pop(0))
        yield inputs
        for link in map(link_of, inputs.values()):
            if link is not None and link[0] not in seen and _kind_of_output(place, *link) in ("MODEL", "GUIDER", "*"):
                seen.add(link[0])
                queue.append(link[0])


@dataclass(frozen=True)
class Receiver:
    """A node that samples with some steps, as far as the graph says.

    Args:
        scale: the guidance scale that it samples with; None if another node makes it.
        guider: what it guides with: "" for plain guidance, None if the graph alone does not say.
        sampler: the sampler's name, None if it is not known.
        link: where the guidance scale comes from, if from another node.
        title: of the node or guider, for messages.
    """

    scale: float | None
    guider: str | None
    sampler: str | None
    title: str
    link: tuple[str, int] | None = None


def receivers(place: Place) -> list[Receiver]:
    """The nodes that the SIGMAS of `place`'s node reach, also through nodes that change them (split, flip)."""
    found: list[Receiver] = []
    queue, seen = [place.node], {place.node}
    while queue:
        source = queue.pop(0)
        for node in place.prompt:
            links = [link_of(value) for value in place.inputs(node).values()]
            if node in seen or not any(k is not None and k[0] == source and _is_sigmas(place, *k) for k in links):
                continue
            seen.add(node)
            receiver = _receiver(place, node)
            if receiver is None:
                queue.append(node)
            else:
                found.append(receiver)
    return found


def _is_sigmas(place: Place, node: str, output: int) -> bool:
    return _kind_of_output(place, node, output) in ("SIGMAS", "*")


def _receiver(place: Place, node: str) -> Receiver | None:
    """What this node samples with, None for one that only passes steps on."""
    inputs = place.inputs(node)
    sampler = _sampler_of(place, inputs)
    if "cfg" in inputs:
        scale, link = _number(place, inputs["cfg"])
        return Receiver(scale, "", sampler, place.kind(node), link)
    guider = link_of(inputs.get("guider"))
    if guider is None:
        return None
    kind, given = place.kind(guider[0]), place.inputs(guider[0])
    if kind == "BasicGuider":
        return Receiver(1.0, "", sampler, kind)
    scale, link = _number(place, given.get("cfg"))
    return Receiver(scale, "" if kind in _PLAIN else None, sampler, kind, link)


def _sampler_of(place: Place, inputs: Inputs) -> str | None:
    name = inputs.get("sampler_name")
    if isinstance(name, str):
        return name
    link = link_of(inputs.get("sampler"))
    if link is None:
        return None
    if place.kind(link[0]) == "DPMSolverV3_Sampler":
        return "dpm_solver_v3"
    name = place.inputs(link[0]).get("sampler_name")
    return name if isinstance(name, str) else None


def _number(place: Place, value: object) -> tuple[float | None, tuple[str, int] | None]:
    """A number that stands in the graph, also in one of core's primitive nodes; else None. And its link, if it has one."""
    link = link_of(value)
    if link is not None and place.kind(link[0]).startswith("Primitive"):
        value = place.inputs(link[0]).get("value")
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None, link


@dataclass(frozen=True)
class Asked:
    """What a scheduler function was called for. None: not known.

    Args:
        patcher: the MODEL.
        scale: the guidance scale.
        guider: "" for plain guidance.
        sampler: the sampler's name.
        unknown: what is not known and why, for the message.
    """

    patcher: Patcher | None = None
    scale: float | None = None
    guider: str | None = None
    sampler: str | None = None
    unknown: str = ""


def asked() -> Asked:
    """From the functions on the way from the node that runs: variables of theirs, for lack of any other way."""
    frame = sys._getframe(1)
    patcher, scale, sampler = None, None, None
    for _ in range(_DEPTH):
        for name, value in frame.f_locals.items():
            owner = getattr(value, "model", None) if name == "self" else value
            if patcher is None and name in ("self", "model") and hasattr(owner, "model_options"):
                patcher = owner
            if scale is None and name == "cfg" and isinstance(value, (int, float)):
                scale = float(value)
            if sampler is None and name == "sampler_name" and isinstance(value, str):
                sampler = value
        if frame.f_back is None:
            break
        frame = frame.f_back
    if scale is not None:  # a KSampler: it guides plainly
        return Asked(patcher, scale, "", sampler)
    # The nodes that get the steps may say the scale, but the host keeps a scheduler's steps as long as its *own* inputs stay.
    return Asked(patcher, None, None, sampler, f"this scheduler is not told the cfg: for fitted steps {TODO}")


def agreed(found: list[Receiver]) -> Asked:
    """What all receivers have in common."""
    if not found:
        return Asked(unknown="no node says with which cfg these steps are sampled: give the scheduler its cfg")
    scales, guiders, samplers = ({getattr(r, what) for r in found} for what in ("scale", "guider", "sampler"))
    if len(scales) > 1 or len(guiders) > 1:
        return Asked(unknown="the nodes that sample with these steps have different cfg: give each its own scheduler")
    scale, guider, sampler = scales.pop(), guiders.pop(), samplers.pop() if len(samplers) == 1 else None
    what = "the cfg" if guider is not None else f"the guider '{found[0].title}'"
    unknown = (
        ""
        if scale is not None and guider is not None
        else f"{what} of this run comes from another node: connect it to the scheduler too"
    )
    return Asked(None, scale, guider, sampler, unknown)


def input_path(name: object, kinds: tuple[str, ...] = ("checkpoints", "diffusion_models", "unet", "unet_gguf")) -> str | None:
    """The model file of this name, None if the name is no model file's."""
    import folder_paths

    if not isinstance(name, str) or not name:
        return None
    for kind in kinds:
        try:
            found = folder_paths.get_full_path(kind, name)
        except Exception:
            continue
        if found:
            return str(found)
    return None
