"""Trajectories of diffusion models in a few numbers, on which `typical` chooses the coefficients of steps.

D* along trajectories, less D at their ends, projected on main directions; y* follows from it. Those of several small networks
come with the package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["FILE", "Trajectories", "load_trajectories"]

FILE = Path(__file__).with_name("typical.safetensors")


@dataclass(frozen=True, eq=False)
class Trajectories:
    """D* along trajectories of several models on one grid, projected on their main directions, less D at their ends.

    y* follows from D* by dy/dlambda = D - y; less sigma times the start noise it begins as D* does.

    Args:
        lambdas: [K] increasing, evenly spaced.
        denoised: [K, F]; F numbers are the coordinates of all trajectories side by side.
        response: [K, F] of D to an error of y.
        owner: [F] which model and guidance scale a coordinate belongs to, 0 .. M - 1.

    Raises:
        ValueError: shapes that do not go together, values that are not finite, lambdas that are not evenly spaced.
    """

    lambdas: Tensor
    denoised: Tensor
    response: Tensor
    owner: Tensor

    def __post_init__(self) -> None:
        points, coordinates = len(self.lambdas), self.denoised.shape[-1]
        values = self.denoised, self.response
        if points < 4 or self.owner.shape != (coordinates,) or any(v.shape != (points, coordinates) for v in values):
            raise ValueError("trajectories need at least 4 points, and D, the response and the owner of every coordinate")
        if not all(bool(v.isfinite().all()) for v in (self.lambdas, *values)):
            raise ValueError("trajectories hold values that are not finite")
        gaps = self.lambdas.diff()
        if not gaps[0] > 0 or not torch.allclose(gaps, gaps.mean().expand(points - 1), rtol=1e-3, atol=0):
            raise ValueError("the lambdas of trajectories must increase in even steps")

    @property
    def models(self) -> int:
        """M."""
        return int(self.owner.max().item()) + 1

    @cached_property
    def state(self) -> Tensor:
        """[K, F] y* on the grid."""
        state = [self.denoised[0]]
        for i in range(len(self.lambdas) - 1):
            state.append(self._advanced(state[-1], i, 1.0))
        return torch.stack(state)

    @property
    def _spacing(self) -> float:
        return (self.lambdas[-1] - self.lambdas[0]).item() / (len(self.lambdas) - 1)

    def at(self, lam: float) -> tuple[Tensor, Tensor, Tensor]:
        """D*, y* and the response [F] at any lambda: D* and the response constant below the grid, D* and y* fading above it."""
        low, high = self.lambdas[0].item(), self.lambdas[-1].item()
        place = (min(max(lam, low), high) - low) / self._spacing
        i = min(int(place), len(self.lambdas) - 2)
        fade = math.exp(high - lam) if lam > high else 1.0
        state = self._advanced(self.state[i], i, place - i)
        return self._cubic(self.denoised, i, place - i) * fade, state * fade, self._cubic(self.response, i, place - i)

    def _cubic(self, values: Tensor, i: int, u: float) -> Tensor:
        """The value at u of a spacing beyond grid point i, on the cubic through four grid points around it."""
        first = min(max(i - 1, 0), len(values) - 4)
        weights = torch.tensor(_lagrange(u + i - first - 1), dtype=torch.float64)
        return weights @ values[first : first + 4]

    def _advanced(self, state: Tensor, i: int, u: float) -> Tensor:
        """Y* at u of a spacing beyond grid point i, from y* there: e^-h y + integral of e^(r - h) D*(r) over r from 0 to h."""
        h = u * self._spacing
        state = state * math.exp(-h)
        for node, weight in _GAUSS:
            state = state + h * weight * math.exp(node * h - h) * self._cubic(self.denoised, i, node * u)
        return state

    def shifted(self, shifts: Sequence[float]) -> Trajectories:
        """The same trajectories at other scales of the data: moved by each of `shifts` in lambda, side by side."""
        found = [[self.at(lam - s) for lam in self.lambdas.tolist()] for s in shifts]
        denoised, response = (torch.cat([torch.stack([row[k] for row in rows]) for rows in found], 1) for k in (0, 2))
        owner = torch.cat([self.owner + k * self.models for k in range(len(shifts))])
        return Trajectories(self.lambdas, denoised, response, owner)


_GAUSS = ((0.5 - math.sqrt(0.15), 5 / 18), (0.5, 4 / 9), (0.5 + math.sqrt(0.15), 5 / 18))
"""Nodes and weights on [0, 1]."""


def _lagrange(u: float) -> list[float]:
    """Weights of the values at -1, 0, 1, 2 in the cubic through them, at u."""
    return [
        -u * (u - 1) * (u - 2) / 6,
        (u + 1) * (u - 1) * (u - 2) / 2,
        -(u + 1) * u * (u - 2) / 2,
        (u + 1) * u * (u - 1) / 6,
    ]


_SCALES = (-0.8, 0.0, 0.8)
"""Data of another scale or model space is seen at another lambda: every trajectory also counts moved by so much."""


@lru_cache(maxsize=1)
def load_trajectories(path: Path = FILE) -> Trajectories:
    """The trajectories of the package, at three scales. The file is a safetensors one; reading it needs torch only."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    values = {}
    for name, entry in json.loads(content[8:start]).items():
        low, high = entry["data_offsets"]
        dtype = {"F32": torch.float32, "I32": torch.int32}[entry["dtype"]]
        flat = torch.frombuffer(bytearray(content[start + low : start + high]), dtype=dtype)
        values[name] = flat.reshape(entry["shape"]).to(torch.float64)
    lambdas, denoised, response = (values[name] for name in ("lambdas", "denoised", "response"))
    owner = values["owner"].long()
    return Trajectories(lambdas, denoised, response[:, owner], owner).shifted(_SCALES)
