"""Indices of folders with traps in them, and what an index may claim."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from dpm_solver_v3.ems_tools.file.layout import SUFFIX
from dpm_solver_v3.ems_tools.file.reader import EMSFileError, load_ems_file
from dpm_solver_v3.ems_tools.file.rows import EvidenceRow
from dpm_solver_v3.ems_tools.share.index import INDEX, decode_index, encode_index, entry_of, index_of, mean_ratio
from dpm_solver_v3.ems_tools.share.publish import Labels, contribution

SHIPPED = load_ems_file(Path(__file__).resolve().parents[3] / "stats" / "embedded-emoji.ems.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_the_folder_does_not_hang_the_index(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"trap{SUFFIX}")
    with pytest.raises(EMSFileError, match="is not a file"):
        index_of(tmp_path)


def test_two_contributions_to_one_folder_are_both_in_its_index(tmp_path: Path) -> None:
    for name in ("one", "two"):
        contribution(SHIPPED, Labels(), name).save(tmp_path)
    contribution(SHIPPED, Labels(), "two").save(tmp_path)
    assert [e.file for e in decode_index((tmp_path / INDEX).read_bytes())] == [f"one{SUFFIX}", f"two{SUFFIX}"]


def test_evidence_at_the_bounds_gives_a_finite_ratio() -> None:
    rows = (EvidenceRow(1.0, "k", 5, "report", 1e31, 0.0, 1.0), EvidenceRow(1.0, "k", 6, "report", 1e-300, 1e31, 1.0))
    file = dataclasses.replace(SHIPPED, meta=dataclasses.replace(SHIPPED.meta, evidence=rows, recommendation=()))
    ratio = mean_ratio(file)
    assert ratio is not None and 0 < ratio < 1e30
    assert decode_index(encode_index([entry_of(file.encode(), f"a{SUFFIX}")]))
