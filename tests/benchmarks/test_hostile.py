"""A slice of `benchmarks/hostile.py`: files that are valid in form and hostile in meaning do no harm unannounced."""

from __future__ import annotations

from types import ModuleType

import pytest

from loading import benchmark


@pytest.fixture(scope="module")
def hostile() -> ModuleType:
    return benchmark("hostile")


def test_hostile_files(hostile: ModuleType) -> None:
    counts, failures, results = hostile.run(range(40), 3)
    assert failures == []
    assert counts["failed"] == 0 and min(counts[name] for name in ("left out", "refused", "used")) >= 3
    assert len(results) == 40
