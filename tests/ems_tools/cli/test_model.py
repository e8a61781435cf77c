"""Mistakes in naming a model end in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpm_solver_v3.ems_tools import cli

RANGE = "--shape 2,4,4 --sigma-min 0.05 --sigma-max 20 --no-evidence --effort quick --dry-run --out a.ems.safetensors"


@pytest.mark.parametrize(
    ("options", "said"), [("--batch 0", "whole number above 0"), ("--device nonsense", "cannot be used here")]
)
def test_options_are_checked(options: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compute", *options.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise RuntimeError('no weights')", "no weights"),
        ("def make(g):\n    import nothing_here", "nothing_here"),
    ],
)
def test_a_module_that_fails(
    body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"failing_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.main(["compute", "--model", f"{name}:make", *RANGE.split()]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
