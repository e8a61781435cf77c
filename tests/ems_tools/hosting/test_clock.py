"""How long computing statistics would take, as a run without a file measured it (`ems_tools.hosting.Clock`)."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dpm_solver_v3.ems_tools.hosting import Clock
from dpm_solver_v3.ems_tools.hosting.jobs import evaluations_of_effort, in_words


def test_seconds_of_an_evaluation_leave_out_the_first_and_the_callback_hears_all(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    heard: list[Any] = []
    clock, states = Clock(heard.append), [object() for _ in range(3)]
    assert clock.cost(1) == ""
    clock(states[0])  # type: ignore[arg-type]
    assert clock.cost(1) == ""
    for state in states[1:]:
        clock(state)  # type: ignore[arg-type]
    assert heard == states
    assert clock.cost(4) == in_words(2.0 / 4 * evaluations_of_effort("quick"))
