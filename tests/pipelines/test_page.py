"""The program on the page about diffusers runs, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def test_the_ten_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    code = code.replace('"stats/', f'"{(ROOT / "stats").as_posix()}/')  # so that the pictures are written elsewhere
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "diffusers.md", "exec"), {})
    pictures = [Image.open(tmp_path / f"emoji-{k}.png") for k in (0, 1)]
    assert [p.size for p in pictures] == [(256, 256)] * 2
    assert all(len(p.convert("L").resize((32, 32)).getcolors() or ()) > 50 for p in pictures)  # no single grey
