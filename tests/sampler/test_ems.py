"""EMS: what it accepts, what it promises."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpm_solver_v3.sampler import EMS, EMSError, coefficients


def grid(n=4):
    return torch.linspace(-1, 2, n, dtype=torch.float64)


def table(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def example(shape=(3,), n=4, dtype=torch.float64):
    return EMS(grid(n).to(dtype), *(table(n, *shape, seed=i).to(dtype) for i in range(3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l": [[1.0]] * 4}, "'l' must be a float32 or float64 tensor, not list"),
        ({"s": table(4, 3).half()}, "'s' must be a float32 or float64 tensor, not torch.float16"),
        ({"b": table(4, 3).long()}, "'b' must be a float32 or float64 tensor, not torch.int64"),
        ({"b": table(4, 3).index_fill(0, torch.tensor([1]), math.nan)}, "'b' holds values that are not finite"),
        ({"lambdas": torch.tensor([0.0, 1.0, 2.0, math.inf])}, "'lambdas' holds values that are not finite"),
        ({"lambdas": grid()[None]}, r"'lambdas' must have shape \[N\+1\] with N >= 1, not \(1, 4\)"),
        ({"lambdas": grid()[:1]}, r"'lambdas' must have shape \[N\+1\] with N >= 1, not \(1,\)"),
        ({"lambdas": grid().flip(0)}, "'lambdas' must increase strictly"),
        ({"lambdas": torch.tensor([0.0, 1.0, 1.0, 2.0])}, "'lambdas' must increase strictly"),
        ({"l": table(5, 3)}, r"'l' must have shape \[4, C, ...\], not \(5, 3\)"),
        ({"l": table(4)}, r"'l' must have shape \[4, C, ...\], not \(4,\)"),
        ({"l": table(4, 0)}, r"'l' must have shape \[4, C, ...\], not \(4, 0\)"),
        ({"s": table(4, 2)}, r"'s' has shape \(4, 2\), 'l' has \(4, 3\): they must agree"),
        ({"b": table(4, 3, 2)}, r"'b' has shape \(4, 3, 2\), 'l' has \(4, 3\): they must agree"),
    ],
)
def test_bad_tables_are_named(change, message):
    good = {"lambdas": grid(), "l": table(4, 3), "s": table(4, 3), "b": table(4, 3)}
    with pytest.raises(EMSError, match=message):
        EMS(**{**good, **change})


def test_fields_cannot_be_replaced():
    with pytest.raises(dataclasses.FrozenInstanceError):
        example().l = table(4, 3)
    with pytest.raises(TypeError):
        example().metadata["model"] = "another"


def test_later_changes_of_the_source_do_not_reach_it():
    l, metadata = table(4, 3), {"model": "one"}
    ems = EMS(grid(), l, table(4, 3), table(4, 3), metadata)
    l.zero_()
    metadata["model"] = "two"
    assert torch.equal(ems.l, table(4, 3))
    assert ems.metadata["model"] == "one"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_kept_and_interpolation_is_in_float64(dtype):
    ems = example(dtype=dtype)
    assert {ems.lambdas.dtype, ems.l.dtype, ems.s.dtype, ems.b.dtype} == {dtype}
    assert {v.dtype for v in ems.at(torch.tensor([0.3]))} == {torch.float64}
    assert ems.scaled(0.5).l.dtype == dtype


def test_gradients_are_left_behind():
    l = table(4, 3).requires_grad_()
    assert not EMS(grid(), l, table(4, 3), table(4, 3)).l.requires_grad


@given(factor=st.floats(0, 2), shape=st.sampled_from([(1,), (3,), (2, 2, 2)]))
@settings(max_examples=30, deadline=None)
def test_scaled_shrinks_towards_data_prediction(factor, shape):
    ems = example(shape)
    scaled = ems.scaled(factor)
    torch.testing.assert_close(scaled.l - 1, (ems.l - 1) * factor)
    torch.testing.assert_close(scaled.s, ems.s * factor)
    torch.testing.assert_close(scaled.b, ems.b * factor)
    assert torch.equal(scaled.lambdas, ems.lambdas)


def is_data_prediction(ems):
    return bool((ems.l == 1).all() and (ems.s == 0).all() and (ems.b == 0).all())


def test_scaled_by_0_is_degenerate_and_by_1_the_same():
    ems = EMS(grid(), table(4, 3), table(4, 3), table(4, 3), {"model": "one"})
    assert is_data_prediction(ems.scaled(0))
    assert ems.scaled(0.5).metadata == ems.metadata
    assert ems.scaled(1) is ems
    assert not is_data_prediction(ems)


@pytest.mark.parametrize("factor", [-0.1, 2.1, math.nan])
def test_scaled_refuses_other_factors(factor):
    with pytest.raises(EMSError, match=r"must lie in \[0, 2\]"):
        example().scaled(factor)


@pytest.mark.parametrize("channels", [1, 4])
def test_degenerate_is_1_0_0_everywhere(channels):
    ems = EMS.degenerate(channels)
    assert is_data_prediction(ems)
    assert ems.channels == channels
    l, s, b = ems.at(torch.tensor([-50.0, -1.0, 0.0, 3.0]))
    assert torch.equal(l, torch.ones(4, channels, dtype=torch.float64))
    assert not s.any()
    assert not b.any()


@given(lam=st.floats(-1, 2), n=st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_inside_the_grid_it_interpolates_linearly(lam, n):
    """Exactly for functions that are linear in lambda."""
    x = grid(n)[:, None]
    ems = EMS(grid(n), 2 * x + 1, 0.5 - x, 3 * x)
    found = [v.item() for v in ems.at(torch.tensor([lam], dtype=torch.float64))]
    assert found == pytest.approx([2 * lam + 1, 0.5 - lam, 3 * lam], abs=1e-12)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_on_the_knots_it_returns_the_table(shape):
    ems = example(shape)
    for found, given_values in zip(ems.at(ems.lambdas), (ems.l, ems.s, ems.b)):
        torch.testing.assert_close(found, given_values)


@given(distance=st.floats(1e-9, 1e6), side=st.sampled_from([-1, 1]))
@settings(max_examples=40, deadline=None)
def test_outside_the_grid_l_stays_and_s_and_b_vanish(distance, side):
    ems = example()
    end = 0 if side < 0 else -1
    l, s, b = ems.at(ems.lambdas[end] + side * torch.tensor([distance], dtype=torch.float64))
    assert torch.equal(l[0], ems.l[end])
    assert not s.any()
    assert not b.any()


@pytest.mark.parametrize(
    ("shape", "latent"),
    [((3,), (2, 3, 8, 8)), ((3,), (1, 3, 5, 8, 8)), ((3,), (2, 3)), ((1,), (2, 7, 4)), ((3, 4, 4), (5, 3, 4, 4))],
)
def test_it_fits(shape, latent):
    example(shape).check_fits(latent)
    example(shape).check_fits(torch.Size(latent))


@pytest.mark.parametrize(
    ("shape", "latent", "message"),
    [
        ((3,), (2, 4, 8, 8), "3 channels and the latent has 4: they are another model's"),
        ((3,), (7,), r"apply to latents \[batch, channels, ...\], not to shape \(7,\)"),
        (
            (3, 4, 4),
            (2, 3, 4, 8),
            r"per element of a latent of shape \(3, 4, 4\) and do not fit \(3, 4, 8\): .* per-channel",
        ),
        ((1, 4, 4), (2, 3, 4, 4), "do not fit"),
    ],
)
def test_it_does_not_fit(shape, latent, message):
    with pytest.raises(EMSError, match=message):
        example(shape).check_fits(latent)


def test_it_tells_its_kind():
    assert not example((3,)).per_element
    assert example((3, 4, 4)).per_element
    assert example((3, 4, 4)).channels == 3


def test_statistics_per_element_are_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 28 MiB made two steps take 900 MiB: every element at every quadrature point at once."""
    sizes: list[int] = []
    integrals = coefficients._integrals

    def watched(ems: EMS, edges: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        sizes.append(6 * len(edges) * ems.channels)
        return integrals(ems, edges, *rest)

    monkeypatch.setattr(coefficients, "_integrals", watched)
    monkeypatch.setattr(coefficients, "_VALUES", 1500)
    whole = example((3, 8, 8), n=40)
    found = coefficients.integrate_step(whole, -0.8, 1.9, 2)
    assert max(sizes) <= 1500 and len(sizes) > 20
    one = coefficients.integrate_step(whole.columns(torch.tensor([77])), -0.8, 1.9, 2)
    assert found.offset.flatten()[77].item() == pytest.approx(one.offset.item(), rel=1e-12)
    assert found.moments[1].flatten()[77].item() == pytest.approx(one.moments[1].item(), rel=1e-12)


def test_growth_of_statistics_per_element() -> None:
    """It is looked at in pieces too, and is the largest of all elements'."""
    whole, lambdas = example((3, 32, 32), n=9), torch.linspace(-1, 2, 4)
    apart = [whole.columns(part).growth(lambdas) for part in torch.arange(3072).split(500)]
    assert whole.growth(lambdas) == max(apart) > 0
