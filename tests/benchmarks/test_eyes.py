"""The kernel distance of `benchmarks/eyes.py` and `kernel.py` against its definition, and against one known in closed form."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from loading import benchmark

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def eyes() -> ModuleType:
    return benchmark("eyes")


def test_kernel_distance_is_its_definition(eyes: ModuleType) -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 3, generator=draw, dtype=torch.float64) for n in (5, 7))

    def k(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    aa = sum(k(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / 20
    bb = sum(k(b[i], b[j]) for i in range(7) for j in range(7) if i != j) / 42
    ab = sum(k(x, y) for x in a for y in b) / 35
    assert eyes.kernel_distance(a, b) == pytest.approx(aa + bb - 2 * ab, rel=1e-12)


def test_kernel_distance_of_shifted_normals(eyes: ModuleType) -> None:
    """In one dimension MMD^2 of N(0, 1) and N(m, 1) is the sum over k of binom(3, k) (difference of k-th moments)^2."""
    draw = torch.Generator().manual_seed(1)
    m = 0.5
    a = torch.randn(6000, 1, generator=draw, dtype=torch.float64)
    b = torch.randn(6000, 1, generator=draw, dtype=torch.float64) + m
    exact = 3 * m**2 + 3 * (m**2) ** 2 + (m**3 + 3 * m) ** 2
    assert eyes.kernel_distance(a, b) == pytest.approx(exact, rel=0.15)
    assert abs(eyes.kernel_distance(a[:3000], a[3000:])) < 0.1 * exact


def test_paired_kernel_distance_leaves_out_pairs_of_the_same_noise(eyes: ModuleType) -> None:
    draw = torch.Generator().manual_seed(2)
    b = torch.randn(60, 3, generator=draw, dtype=torch.float64)
    a = b + 0.5 + 0.1 * torch.randn(60, 3, generator=draw, dtype=torch.float64)
    kernel = lambda x, y: ((x @ y) / 3 + 1).item() ** 3  # noqa: E731
    pairs = [(i, j) for i in range(60) for j in range(60) if i != j]
    mean = sum(kernel(a[i], a[j]) + kernel(b[i], b[j]) - kernel(a[i], b[j]) - kernel(a[j], b[i]) for i, j in pairs) / len(pairs)
    value, low, high = eyes.paired_kernel_interval(a, b)
    assert value == pytest.approx(mean, rel=1e-9)
    assert 0 < low < value < high
    assert eyes.paired_kernel_interval(b, b) == pytest.approx((0, 0, 0), abs=1e-12)


def test_ours_is_compared_with_the_nearest_rival() -> None:
    """On features moved by known amounts: the rival that moved least is taken, and the sign of the difference is sure."""
    kernel, draw = benchmark("kernel"), torch.Generator().manual_seed(3)
    exact = torch.randn(80, 3, generator=draw, dtype=torch.float64)
    rivals = {"near": exact + 0.5, "far": exact + 0.8}
    cell = kernel.compared(exact + 0.3, rivals, exact)
    assert cell.name == "near" and cell.ratio == pytest.approx(cell.ours / cell.best) and 0 < cell.ratio < 1
    assert cell.less < cell.ours - cell.best < cell.more < 0
    assert kernel.compared(exact + 0.7, rivals, exact).less > 0
    assert kernel.compared(exact + 0.3, {"exact": exact}, exact).ratio is None
