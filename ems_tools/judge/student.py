"""Student's t: how probable a mean is by chance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["p_value", "student_tail"]


def p_value(values: Tensor, own: float, one_sided: bool = False) -> float:
    """Of the mean of `values` [K] being 0 (or not above it), known to within the spread of `own` more of them."""
    n = len(values)
    spread = values.std(correction=1).item() * math.sqrt(1 / n + 1 / own)
    mean = values.mean().item()
    if spread < 1e-12 * (1 + abs(mean)):
        return 1.0 if abs(mean) < 1e-9 else 0.0
    t, freedom = mean / spread, max((n - 1) // 2, 1)
    if one_sided:
        return student_tail(t, freedom) if t > 0 else 1.0
    return min(2 * student_tail(abs(t), freedom), 1.0)


def student_tail(t: float, freedom: int) -> float:
    """P(T > t), t >= 0, of Student's t: the integral of cos^(nu - 1) from atan(t / sqrt(nu)) to pi / 2."""
    angles = torch.linspace(math.atan(t / math.sqrt(freedom)), math.pi / 2, 4001, dtype=torch.float64)
    area = torch.trapezoid(angles.cos().clamp(min=0) ** (freedom - 1), angles).item()
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return area * scale
