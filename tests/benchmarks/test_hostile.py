"""A slice of `benchmarks/hostile.py`: files that are valid in form and hostile in meaning do no harm unannounced."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def hostile() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "hostile.py"
    spec = importlib.util.spec_from_file_location("benchmarks_hostile", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its data classes look their module up
    spec.loader.exec_module(module)
    return module


def test_hostile_files(hostile: ModuleType) -> None:
    counts, failures, results = hostile.run(40, 3)
    assert failures == []
    assert counts["failed"] == 0 and min(counts[name] for name in ("left out", "refused", "used")) >= 3
    assert len(results) == 40
