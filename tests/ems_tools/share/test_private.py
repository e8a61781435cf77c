"""What a workflow carries of a file: nothing that `ems share` would leave out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dpm_solver_v3.ems_tools.file.reader import load_ems_file
from dpm_solver_v3.ems_tools.share.private import cleaned
from dpm_solver_v3.ems_tools.share.workflow import pack, unpack

SHIPPED = load_ems_file(Path(__file__).resolve().parents[3] / "stats" / "embedded-emoji.ems.safetensors")
PRIVATE = {"prompts": "3, the first: my ex-wife", "source": "/home/jane/m.py", "patches": "jane_face 0.8, 40 patched weights"}


def test_an_embedded_file_is_the_cleaned_one() -> None:
    model = {**SHIPPED.meta.model, **PRIVATE, "guider": "PerpNeg"}
    foreign = {"ss_output_name": "secret", "modelspec.license": "mit"}
    file = dataclasses.replace(SHIPPED, meta=dataclasses.replace(SHIPPED.meta, model=model, foreign=foreign))
    _, back = unpack(pack("a", file))
    text = back.encode().decode("latin-1")
    assert not any(word in text for word in ("ex-wife", "jane", "secret"))
    assert back.meta.model["patches"] == "40 patched weights" and back.meta.model["guider"] == "PerpNeg"
    assert back.meta.model["sha256"] == SHIPPED.meta.model["sha256"] and back.meta.foreign == {"modelspec.license": "mit"}
    assert cleaned(back).encode() == back.encode()
