"""The model's own trajectories in a statistics file: three tensors, and what they may hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...sampler import EMSError
from ...sampler.trajectories import Trajectories

__all__ = ["check_paths", "paths_from_tensors", "tensors_of_paths"]

MAX_POINTS, MAX_SAMPLES, MAX_DIRECTIONS, MAX_VALUE, MAX_LAMBDA = 256, 64, 16, 4.0, 30.0
"""Trajectories have the size 1 at the noisy end, and D answers to an error with at most the error itself, or a little more."""
_PARTS = ("lambdas", "denoised", "response")


def tensors_of_paths(paths: Sequence[Trajectories]) -> dict[str, Tensor]:
    """As a file holds them, by the tensors' names."""
    if not paths:
        return {}
    denoised, response = torch.stack([p.by_sample for p in paths]), torch.stack([p.response[:, 0] for p in paths])
    return {"paths.lambdas": paths[0].lambdas, "paths.denoised": denoised.float(), "paths.response": response.float()}


def paths_from_tensors(values: dict[str, Tensor]) -> tuple[Trajectories, ...]:
    """The inverse; takes what it reads out of `values`. Raises EMSError."""
    found = {part: values.pop(f"paths.{part}") for part in _PARTS if f"paths.{part}" in values}
    if not found:
        return ()
    missing = [part for part in _PARTS if part not in found]
    if missing:
        raise EMSError(f"tensor 'paths.{missing[0]}' is missing")
    lambdas, denoised, response = (found[part] for part in _PARTS)
    sizes = denoised.shape
    if lambdas.ndim != 1 or denoised.ndim != 4 or response.shape != sizes[:2] or sizes[1] != len(lambdas) or 0 in sizes:
        raise EMSError("the tensors 'paths.*' have shapes that do not go together")
    if sizes[1] > MAX_POINTS or sizes[2] > MAX_SAMPLES or sizes[3] > MAX_DIRECTIONS:
        most = f"{MAX_POINTS} points, {MAX_SAMPLES} samples and {MAX_DIRECTIONS} directions at most"
        raise EMSError(f"the model's trajectories may have {most}")
    try:
        return tuple(Trajectories.of_model(lambdas, D, r) for D, r in zip(denoised, response, strict=True))
    except ValueError as error:
        raise EMSError(f"the model's trajectories cannot be used: {error}") from error


def check_paths(paths: Sequence[Trajectories], scales: int) -> None:
    """Raise EMSError unless there is one for each guidance scale, on one grid, with values that trajectories can have."""
    if not paths:
        return
    if len(paths) != scales:
        raise EMSError(f"there must be trajectories for each of the {scales} guidance scales, not for {len(paths)}")
    for path in paths:
        if path.denoised.shape != paths[0].denoised.shape or not torch.equal(path.lambdas, paths[0].lambdas):
            raise EMSError("the trajectories of all guidance scales must lie on one grid")
        largest = max(path.denoised.abs().max().item(), path.response.abs().max().item())
        if largest > MAX_VALUE or path.lambdas.abs().max().item() > MAX_LAMBDA:
            raise EMSError(f"the model's trajectories hold values up to {largest:g}, more than any model's can")
