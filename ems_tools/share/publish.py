"""Prepare a statistics file for others: leave out what is private, say what it is for, draw it, and put it on the Hub."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ...sampler import EMSError
from ..file.contents import EMSFile
from ..file.layout import MAX_FILE_BYTES, SUFFIX
from ..file.reader import decode_ems_file, read_bytes
from ..file.rows import Fact
from ..file.storage import write_atomic
from ..judge.consistency import consistency_problems
from ..show.describe import lines_of
from ..show.draw import plot_ems
from .hub import Hub, NotThere
from .identity import ModelIdentity
from .index import INDEX, MAX_INDEX_BYTES, Hashes, IndexEntry, decode_index, encode_index, entry_of
from .library import safe_name
from .private import public_facts

__all__ = ["Contribution", "Labels", "contribution", "files_for_hub", "push", "shareable"]

_PREDICTIONS = {"eps": "epsilon", "v_prediction": "v", "flux": "flow"}
"""modelspec's names of the hosts' names of predictions; others stay."""


@dataclass(frozen=True)
class Labels:
    """What a contributor says of a file. `licence` as the Hub spells it ("mit", "cc0-1.0", ...)."""

    author: str = ""
    licence: str = "cc0-1.0"
    title: str = ""


@dataclass(frozen=True)
class Contribution:
    """A file ready to be shared.

    Args:
        name: of the file.
        file: the cleaned statistics; `data` its bytes.
        left_out: facts that were taken out, in words.
        parts: everything to publish by name: the file, its plot, its card.
        entry: for the index.
    """

    name: str
    file: EMSFile
    data: bytes
    left_out: tuple[str, ...]
    parts: Mapping[str, bytes]
    entry: IndexEntry

    def save(self, folder: Path) -> list[Path]:
        """Write the parts into a folder (made if need be), the entry into its index. Raises EMSError for a bad index."""
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        index = folder / INDEX
        others = decode_index(read_bytes(index)) if index.exists() else []
        entries = [e for e in others if e.file.casefold() != self.name.casefold()]
        for name, data in {**self.parts, INDEX: encode_index([*entries, self.entry])}.items():
            write_atomic(folder / name, data)
            written.append(folder / name)
        return written


def shareable(
    file: EMSFile, labels: Labels, checkpoint: Path | None = None, keep_prompts: bool = False
) -> tuple[EMSFile, tuple[str, ...]]:
    """The file without what is private, without moments, with modelspec and kohya keys; and what was left out.

    Args:
        checkpoint: the model's file: its full SHA-256 and content fingerprint are added. Must be the one that was measured.
        keep_prompts: keep the facts about prompts.

    Raises:
        EMSError: a checkpoint that is another one; OSError.
    """
    left: list[str] = []
    model, grid, estimate = public_facts(file, left, keep_prompts)
    if checkpoint is not None:
        found, known = Hashes.of_checkpoint(checkpoint), Hashes.of(ModelIdentity.from_facts(model))
        both = any(getattr(known, n) for n in ("sha256", "content"))
        if both and not found.match(known):
            raise EMSError(f"{checkpoint} is not the checkpoint that these statistics were measured on: its hashes differ")
        model.update({"sha256": found.sha256, "content": found.content})
    if not model.get("name"):
        model["name"] = labels.title or "model"
    meta = replace(
        file.meta,
        model=model,
        grid=grid,
        estimate=estimate,
        foreign={},
    )
    dropped = sorted(set(file.meta.foreign) - set(_foreign(file, model, labels, file.meta.date)))
    left += [f"{key} (another tool's)" for key in dropped]
    clean = replace(file, meta=meta).compacted()
    return replace(clean, meta=replace(meta, foreign=_foreign(clean, model, labels, meta.date))), tuple(left)


def _foreign(file: EMSFile, model: Mapping[str, Fact], labels: Labels, date: str) -> dict[str, str]:
    """Modelspec 1.0.1 about this file, kohya's keys about the checkpoint that it belongs to."""
    sha256, name = str(model.get("sha256", "")), str(model.get("name", ""))
    prediction = str(model.get("prediction", "")).casefold()
    keys = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{model.get('architecture') or 'unknown'}/ems",
        "modelspec.implementation": "dpm-solver-v3",
        "modelspec.title": labels.title or f"EMS of {name}",
        "modelspec.date": date or datetime.date.today().isoformat(),
        "modelspec.author": labels.author,
        "modelspec.license": labels.licence,
        "modelspec.prediction_type": _PREDICTIONS.get(prediction, prediction),
        "modelspec.hash_sha256": f"0x{_tensor_hash(file)}",
        "ss_sd_model_name": name,
        "ss_new_sd_model_hash": sha256 if len(sha256) == 64 else "",
    }
    return {key: value for key, value in keys.items() if value}


def _tensor_hash(file: EMSFile) -> str:
    """SHA-256 of the tensors alone (everything after the header), which does not depend on the metadata."""
    data = replace(file, meta=replace(file.meta, foreign={})).encode()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def contribution(
    file: EMSFile, labels: Labels, name: str = "", checkpoint: Path | None = None, keep_prompts: bool = False
) -> Contribution:
    """All that is published of a file. Raises EMSError if it contradicts itself, or as `shareable` does."""
    problems = consistency_problems(file)
    if problems:
        raise EMSError(f"this file should not be shared: {problems[0]}")
    clean, left = shareable(file, labels, checkpoint, keep_prompts)
    data = clean.encode()
    file_name = safe_name(name or str(clean.meta.model["name"]))
    stem = file_name.removesuffix(SUFFIX)
    entry = entry_of(data, file_name)
    parts = {file_name: data, f"{stem}.svg": _plot(clean), f"{stem}.md": _card(clean, entry, stem).encode()}
    return Contribution(file_name, clean, data, left, parts, entry)


def _plot(file: EMSFile) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plot.svg"
        plot_ems(file, path)
        return path.read_bytes()


def _card(file: EMSFile, entry: IndexEntry, stem: str) -> str:
    model = entry.name or "an unnamed model"
    checked = "not tried" if entry.ratio is None else f"{entry.better} of {entry.cases} cases better than without EMS"
    average = "" if entry.ratio is None else f"; the error is {entry.ratio:g} times that without, on average"
    rows = {
        "checkpoint": _cell(model),
        "architecture": _cell(entry.architecture or "unknown"),
        "prediction": _cell(entry.prediction or "unknown"),
        "SHA-256 of the checkpoint": entry.checkpoint.sha256 or "unknown",
        "AutoV2": entry.autov2 or "unknown",
        "content fingerprint": entry.checkpoint.content or "unknown",
        "guidance scales": ", ".join(f"{g:g}" for g in entry.guidance),
        "channels": str(entry.channels),
        "evidence": checked + average,
        "licence": _cell(entry.licence),
        "author": _cell(entry.author or "not named"),
        "SHA-256 of this file": entry.sha256,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    details = "\n".join("    " + line for line in lines_of(file))
    return (
        f"# Statistics (EMS) of {_cell(model)} for DPM-Solver-v3\n\n![l, s, b and the evidence](<{stem}.svg>)\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"Put `{stem}{SUFFIX}` into `models/ems` (ComfyUI) or let `ems pull` fetch it. `ems verify` checks it.\n\n{details}\n"
    )


def _cell(text: str) -> str:
    """Text of a file in a Markdown table: nothing in it may act."""
    return re.sub(r"([\\`*_{}\[\]<>|!#&])", r"\\\1", text)


def repository_card(labels: Labels) -> bytes:
    """The README.md of a new repository."""
    head = f"---\nlicense: {json.dumps(labels.licence)}\ntags:\n- dpm-solver-v3\n- ems\n---\n\n"
    text = (
        "# Statistics (EMS) for DPM-Solver-v3\n\nOne `*.ems.safetensors` a checkpoint, each with a card and a plot. "
        "`index.json` lists them by the checkpoints'\nhashes; `ems pull` and the ComfyUI node Find EMS read it. "
        "Files are added with `ems share`.\n"
    )
    return (head + text).encode()


def files_for_hub(hub: Hub, item: Contribution, labels: Labels) -> dict[str, bytes]:
    """What one commit adds: the parts, the index with the new entry, and a README where there is none.

    Raises EMSError if the repository has another file of that name.
    """
    try:
        entries = decode_index(hub.fetch(INDEX, MAX_INDEX_BYTES))
        new = False
    except NotThere:
        entries, new = [], True
    for other in entries:
        if other.file.casefold() == item.name.casefold() and other.sha256 != item.entry.sha256:
            raise EMSError(f"{hub.repo} has another file called {item.name}: share this one under another --name")
    try:  # the index may lag behind the files
        if not any(e.file == item.name for e in entries) and hub.fetch(item.name, MAX_FILE_BYTES) != item.data:
            raise EMSError(f"{hub.repo} has another file called {item.name}: share this one under another --name")
    except NotThere:
        pass
    kept = [e for e in entries if e.file != item.name]
    files = {**item.parts, INDEX: encode_index([*kept, item.entry])}
    return {**files, "README.md": repository_card(labels)} if new else files


def push(hub: Hub, item: Contribution, labels: Labels) -> str:
    """Put a contribution into the repository (made if need be) in one commit; its address. Raises EMSError."""
    parent = hub.head(create=True)
    files = files_for_hub(hub, item, labels)
    decode_ems_file(files[item.name], item.name)
    return hub.put(files, f"Add {item.name}", parent)
