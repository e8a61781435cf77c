"""What may leave this computer: the one place that decides it, for `ems share` and for workflows.

What is kept is listed, not what is left out: a fact that this module does not know stays at home.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Mapping
from dataclasses import replace

from ..file.contents import EMSFile
from ..file.rows import Fact

__all__ = ["cleaned", "public_facts"]

_MODEL = ("name", "architecture", "prediction", "sha256", "content", "weights", "classes", "guider")
_ESTIMATE = (
    "samples", "probes", "probe_method", "points", "denoiser", "resolution", "per_element", "groups", "seed", "seeds",
    "evaluations", "calibration_noises", "report_noises", "reference_steps", "fit_noises", "fit_held_out",
    "fit_evaluations", "source", "pooled",
)  # fmt: skip
_GRID = ("points", "kind", "intervals")
_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\|(^|[\s\"'(=])~?/[^\s/]|[\\/][^\\/]+[\\/]")


def cleaned(file: EMSFile) -> EMSFile:
    """The file without what is private, without moments and without other tools' keys."""
    model, grid, estimate = public_facts(file, [])
    kept = {k: v for k, v in file.meta.foreign.items() if k in ("modelspec.license", "modelspec.author", "modelspec.title")}
    return replace(file, meta=replace(file.meta, model=model, grid=grid, estimate=estimate, foreign=kept)).compacted()


def public_facts(
    file: EMSFile, left: list[str], keep_prompts: bool = False
) -> tuple[dict[str, Fact], dict[str, Fact], dict[str, Fact]]:
    """What may leave of the facts about model, grid and estimate; what may not is added to `left`, in words."""
    model = _kept("model", file.meta.model, (*_MODEL, *(("prompts",) if keep_prompts else ())), left)
    patched = re.search(r"\d+ patched weights$", str(file.meta.model.get("patches", "")))
    model.update({"patches": patched[0]} if patched else {})
    if not keep_prompts and isinstance(file.meta.model.get("prompts"), str):
        count = re.match(r"\d+", str(file.meta.model["prompts"]))
        model.update({"prompts": count[0]} if count else {})
    return model, _kept("grid", file.meta.grid, _GRID, left), _kept("estimate", file.meta.estimate, _ESTIMATE, left)


def _kept(group: str, facts: Mapping[str, Fact], names: tuple[str, ...], left: list[str]) -> dict[str, Fact]:
    kept: dict[str, Fact] = {}
    for name, value in facts.items():
        if name not in names:
            left.append(f"{group}.{name}")
        elif group == "model" and name == "name" and isinstance(value, str):
            kept[name] = re.split(r"[\\/]", value)[-1]
            if kept[name] != value:
                left.append("folders in the model's name")
        elif any(_is_private(part) for part in (value if isinstance(value, tuple) else (value,))):
            left.append(f"{group}.{name} (a path or your user name)")
        else:
            kept[name] = value
    return kept


def _is_private(value: object) -> bool:
    return isinstance(value, str) and (bool(_PATH.search(value)) or _names_the_user(value))


def _names_the_user(text: str) -> bool:
    """Whether the text holds this computer's user name as a word; names that everybody has do not count."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        return False
    common = {"root", "user", "admin", "model", "test", "home", "runner"}
    return len(user) > 2 and user.casefold() not in common and bool(re.search(rf"\b{re.escape(user)}\b", text, re.IGNORECASE))
