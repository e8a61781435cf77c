"""What the plan bounds, against what the solver's own schedules need."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch

from dpm_solver_v3.sampler import (
    EMS,
    Settings,
    Space,
    VPDiscrete,
    karras,
    quadratic_time,
    uniform_lambda,
    uniform_time,
)
from dpm_solver_v3.sampler.plan import MAX_DECAY, MAX_WEIGHTS, make_plan
from dpm_solver_v3.sampler.settings import Corrector

DATA = EMS.degenerate()
NOISE_PREDICTION = EMS(torch.tensor([-5.0, 5.0]), torch.zeros(2, 1), -torch.ones(2, 1), torch.zeros(2, 1))


@pytest.mark.parametrize("kind", [uniform_lambda, uniform_time, quadratic_time, karras])
def test_sane_steps_stay_far_below_the_bounds(kind) -> None:
    for steps, zero, ems in itertools.product((3, 5, 8, 20), (False, True), (DATA, NOISE_PREDICTION)):
        levels = tuple(kind(VPDiscrete.linear(), steps, to_zero=zero).tolist())
        for order, corrector in itertools.product((1, 2, 3), get_args(Corrector)):
            plan = make_plan(levels, Space.SIGMA, ems, Settings(order=order, corrector=corrector))
            updates = [u for step in plan.steps for u in (step.corrector, step.predictor) if u is not None]
            assert max(float(u.decay.max()) for u in updates) < MAX_DECAY / 3
            assert max(sum(float(w.abs().max()) for w in u.weights) for u in updates) < MAX_WEIGHTS / 5
            assert plan.is_sane(Space.SIGMA)


def test_large_statistics_are_integrated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same integrals whether elements are taken together or a few at a time."""
    from dpm_solver_v3.sampler import coefficients

    draw = torch.Generator().manual_seed(0)
    l, s, b = (torch.rand(9, 2, 3, 5, generator=draw, dtype=torch.float64) for _ in range(3))
    ems = EMS(torch.linspace(-2, 2, 9, dtype=torch.float64), l, s, b)
    whole = coefficients.integrate_step(ems, -1.0, 0.7, 3)
    monkeypatch.setattr(coefficients, "_VALUES", 300)  # a few of the thirty elements at a time
    parts = coefficients.integrate_step(ems, -1.0, 0.7, 3)
    for name in ("L", "S", "B", "offset"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=1e-13, atol=1e-14)
    for a, c in zip(whole.moments, parts.moments):
        torch.testing.assert_close(a, c, rtol=1e-13, atol=1e-14)
        assert a.shape == (2, 3, 5)
