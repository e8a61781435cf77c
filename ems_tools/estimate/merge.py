"""Add up statistics files that keep their moments: the same model and grid, computed with different seeds."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike

import torch
from torch import Tensor

from ...sampler import EMSError
from ..file.contents import EMSFile
from ..file.reader import EMSFileError
from ..file.rows import Scalar
from .job import EstimateError
from .moments import MOMENTS, Moments

__all__ = ["merge_files", "moments_problem"]

MAX_GROUPS = 4096


def merge_files(files: list[tuple[str | PathLike[str], EMSFile]]) -> EMSFile:
    """The file of all samples together. Raises EMSFileError that names the file which does not fit."""
    if len(files) < 2:
        raise EstimateError("merging needs at least two files")
    first_path, first = files[0]
    totals = _moments(first_path, first)
    seeds = _seeds(first)
    for path, file in files[1:]:
        for what, mine, theirs in (
            ("model", dict(first.meta.model), dict(file.meta.model)),
            ("guidance scales", first.guidance.tolist(), file.guidance.tolist()),
            ("source of points", first.meta.estimate.get("points"), file.meta.estimate.get("points")),
        ):
            if mine != theirs:
                raise EMSFileError(path, f"its {what} ({theirs}) differs from {first_path}'s ({mine}): these cannot be merged")
        repeated = set(seeds) & set(_seeds(file))
        if repeated:
            raise EMSFileError(
                path, f"holds samples of seed {sorted(map(str, repeated))[0]}, counted already: compute it with another --seed"
            )
        seeds += _seeds(file)
        theirs = _moments(path, file)
        try:
            totals = [a.merged(b) for a, b in zip(totals, theirs, strict=True)]
        except EMSError as error:
            raise EMSFileError(path, str(error)) from error
    return _with_moments(first, totals, tuple(seeds))


def _moments(path: str | PathLike[str], file: EMSFile) -> list[Moments]:
    names = [(f"sums.{g}", f"count.{g}") for g in range(len(file.guidance))]
    if not all(name in file.moments for pair in names for name in pair):
        raise EMSFileError(path, "has no moments: compute it with --keep-moments to merge or extend it")
    for sums, count in names:
        problem = moments_problem(file, file.moments[sums], file.moments[count])
        if problem:
            raise EMSFileError(path, problem)
    return [Moments(file.lambdas, file.moments[count], file.moments[sums]) for sums, count in names]


def moments_problem(file: EMSFile, sums: Tensor, count: Tensor) -> str:
    """What keeps these from being moments of the file's statistics; "" if nothing does."""
    fits = count.ndim == 1 and tuple(sums.shape) == (len(MOMENTS), len(count), *file.l.shape[1:])
    if not fits or len(count) > MAX_GROUPS or not (count >= 0).all() or not 1 <= float(count.sum()) < 1e12:
        return "the moments have not the shape of these statistics"
    return "" if float(sums.abs().max()) < 1e30 else "the moments are larger than moments can be"


def _seeds(file: EMSFile) -> list[Scalar]:
    found = file.meta.estimate.get("seeds", ())
    return list(found) if isinstance(found, tuple) else [found]


def _with_moments(file: EMSFile, moments: list[Moments], seeds: tuple[Scalar, ...]) -> EMSFile:
    statistics = [m.statistics() for m in moments]
    l, s, b = (torch.stack([getattr(st, name) for st in statistics]) for name in "lsb")
    errors = {name: torch.stack([getattr(st, f"{name}_se") for st in statistics]) for name in "lsb"}
    kept = {}
    for g, m in enumerate(moments):
        kept[f"sums.{g}"], kept[f"count.{g}"] = m.sums, m.count
    estimate = {**file.meta.estimate, "samples": tuple(m.samples for m in moments), "seeds": seeds}
    meta = replace(file.meta, estimate=estimate, evidence=(), recommendation=(), fitted=(), passes=(), partial=())
    merged = replace(file, l=l, s=s, b=b, meta=meta, errors=errors, moments={})
    return replace(merged.compacted(), moments=kept)
