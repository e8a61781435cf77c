"""What a user would otherwise pick: formulas of known samplers (see `formulas`) on schedules of many kinds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...sampler import FittedSteps
from .formulas import FORMULAS, formula_steps
from .spacing import Range, Spacing

__all__ = ["LIKELIEST", "Entrant", "entrants"]

LIKELIEST = (
    ("vp 2", "UniPC 2"),
    ("vp 1.5", "UniPC 2"),
    ("flow 2", "UniPC 2"),
    ("karras to sigma_min", "UniPC 2"),
    ("model 1", "UniPC 2"),
    ("vp 2", "DEIS 2"),
    ("model 2", "DPM-Solver++ 2M"),
    ("lambda", "iPNDM"),
    ("flow 2", "UniPC 3"),
    ("lambda to 0", "iPNDM"),
    ("karras to sigma_min", "DEIS 2"),
    ("flow 1", "UniPC 3"),
    ("vp 2", "DPM-Solver++ 3M"),
    ("model 2", "UniPC 2"),
    ("beta", "UniPC 2"),
    ("vp 2", "UniPC 3"),
    ("vp 2 to 0", "DEIS 3"),
    ("lambda", "DEIS 3"),
    ("lambda to 0", "DEIS 3"),
    ("vp 2", "DEIS 3"),
    ("model 2", "DEIS 3"),
    ("lambda", "UniPC 2"),
    ("vp 1", "UniPC 3"),
    ("vp 1.5", "UniPC 3"),
    ("karras", "UniPC 2"),
)
"""The likeliest entrants first: `benchmarks/panel.py` chose the first 13 on the zoo; those after them are by hand."""
_SCHEDULES = {
    "vp 1.5": Spacing("vp", 1.5, 1.0),
    "vp 2": Spacing("vp", 2.0, 1.0),
    "model 1": Spacing("model", 1.0, 1.0),
    "beta": Spacing("beta", 1.0, 0.0),
    "karras": Spacing("sigma", 7.0, 0.0),
    "lambda": Spacing("lambda", 1.0, 1.0),
    "vp 1": Spacing("vp", 1.0, 1.0),
    "flow 2": Spacing("flow", 2.0, 1.0),
    "flow 1": Spacing("flow", 1.0, 1.0),
    "model 2": Spacing("model", 2.0, 1.0),
    "model 1.5": Spacing("model", 1.5, 1.0),
    "karras to sigma_min": Spacing("sigma", 7.0, 1.0),
    "lambda to 0": Spacing("lambda", 1.0, 0.0),
    "model 2 to 0": Spacing("model", 2.0, 0.0),
    "vp 2 to 0": Spacing("vp", 2.0, 0.0),
    "flow 2 to 0": Spacing("flow", 2.0, 0.0),
}


@dataclass(frozen=True)
class Entrant:
    """A formula on a schedule: `levels_at` gives the lambdas of n evaluations and the lambda where it ends (inf: sigma = 0)."""

    schedule: str
    formula: str
    levels_at: Callable[[int], tuple[list[float], float]]
    guidance: float = 1.0

    @property
    def spacing(self) -> Spacing | None:
        """Its schedule as a spacing; None for a host's own."""
        return _SCHEDULES.get(self.schedule)

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.formula} on {self.schedule}"

    def steps(self, n: int, snap: Callable[[Sequence[float]], list[float]]) -> FittedSteps:
        """Its coefficients at n evaluations, moved by `snap`. Raises ValueError where the schedule cannot be followed."""
        lambdas, end = self.levels_at(n)
        return formula_steps(tuple(snap([round(v, 6) for v in lambdas])), end, self.formula, self.guidance)


def entrants(count: int, span: Range, hosts: Mapping[str, Callable[[int], tuple[list[float], float]]]) -> list[Entrant]:
    """The `count` likeliest entrants: the known good ones, every formula on the host's schedules, then all others."""
    schedules = {name: _levels_of(spacing, span) for name, spacing in _SCHEDULES.items()}
    pairs = [(schedule, formula) for schedule, formula in LIKELIEST]
    pairs += [(name, formula) for formula in list(FORMULAS)[:3] for name in hosts]
    pairs += [(name, formula) for formula in FORMULAS for name in (*_SCHEDULES, *hosts)]
    known = {**hosts, **schedules}
    return [Entrant(name, formula, known[name]) for name, formula in dict.fromkeys(pairs)][:count]


def _levels_of(spacing: Spacing, span: Range) -> Callable[[int], tuple[list[float], float]]:
    return lambda n: (spacing.lambdas(n, span), span.high if spacing.last else math.inf)
