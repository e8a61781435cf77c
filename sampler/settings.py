"""The solver's options, what "auto" means, and the recommendation that a statistics file can carry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, TypedDict, get_args

from .fitted import FittedSteps, between

__all__ = [
    "AUTO",
    "DEFAULTS",
    "DEFAULTS_STRONG_GUIDANCE",
    "OPTIONS",
    "Corrector",
    "Predictor",
    "Recommendation",
    "RecommendationEntry",
    "Settings",
    "SolverOptions",
    "defaults_for",
    "resolve_settings",
]

AUTO = "auto"
Corrector = Literal["none", "true", "pseudo", "raised"]
Predictor = Literal["true", "pseudo"]


@dataclass(frozen=True)
class Settings:
    """How to step. Paper's names in brackets.

    Args:
        order: 1, 2 or 3, of the predictor [order].
        predictor: derivatives from the full linear solve ("true") or by plain divided differences
            ("pseudo" [p_pseudo]); they differ only at order 3.
        corrector: "none"; "true" is of the predictor's order p; "pseudo" of order p + 1 with pseudo
            derivatives [c_pseudo]; "raised" of order p + 1 with the full solve (ours; UniC's construction).
        corrector_below: correct only nodes with sigma at most this. The paper's half corrector is the sigma of
            time 0.5 ("t <= 0.5", README of the authors; their code tests the opposite).
        lower_order_final: predictor order at most the number of steps left, a last one from a tiny sigma to 0 not counted
            (`plan.TRIVIAL_SIGMA`).
        strength: the factor of `EMS.scaled`.
    """

    order: int = 2
    predictor: Predictor = "true"
    corrector: Corrector = "none"
    corrector_below: float = float("inf")
    lower_order_final: bool = True
    strength: float = 1.0

    def __post_init__(self) -> None:
        if type(self.order) is not int or self.order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3 (or 'auto'), not {self.order!r}")
        _check_choice("predictor", self.predictor, get_args(Predictor))
        _check_choice("corrector", self.corrector, get_args(Corrector))
        if not isinstance(self.corrector_below, (int, float)) or not self.corrector_below >= 0:
            raise ValueError(f"corrector_below must be a sigma >= 0 (or 'auto'), not {self.corrector_below!r}")
        if not isinstance(self.strength, (int, float)) or not 0 <= self.strength <= 2:
            raise ValueError(f"strength must lie in [0, 2] (or 'auto'), not {self.strength!r}")
        if not isinstance(self.lower_order_final, bool):
            raise ValueError(f"lower_order_final must be True or False (or 'auto'), not {self.lower_order_final!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)} (or auto), not {value!r}")


class SolverOptions(TypedDict, total=False):
    """What a user sets: fields of `Settings`, each of which may be "auto"."""

    order: int | str
    predictor: Predictor | str
    corrector: Corrector | str
    corrector_below: float | str
    lower_order_final: bool | str
    strength: float | str


OPTIONS = tuple(field.name for field in fields(Settings))
"""The names of the options, each of which may be "auto"."""

DEFAULTS = Settings(order=2, corrector="pseudo")
DEFAULTS_STRONG_GUIDANCE = Settings(order=2, corrector="none")
STRONG_GUIDANCE = 5.0
"""What options left at "auto" are beside one that is set, and with statistics that recommend nothing. Without statistics and
with all options at "auto" no formula is used: `typical`.

Why these: on the embedded model, error over that of order 2 without corrector, geometric mean over 8 schedules at 5, 6, 8
and 10 steps, as version 0.1.0's `benchmarks/defaults.py` printed it; the present one judges the steps without a file.

| guidance          | order 2, pseudo | order 2, raised | order 3, none | order 3, pseudo |
| ----------------- | --------------- | --------------- | ------------- | --------------- |
| 1, without EMS    | 0.748           | 0.773           | 1.626         | 1.336           |
| 1, with EMS       | 0.658           | 0.728           | 1.499         | 1.170           |
| 4, without EMS    | 0.876           | 0.923           | 1.521         | 1.579           |
| 4, with EMS       | 0.872           | 0.866           | 1.674         | 1.674           |
| 5.5, without EMS  | 1.045           | 1.074           | 1.497         | 1.888           |
| 5.5, with EMS     | 1.033           | 1.015           | 1.678         | 1.997           |
| 7.5, without EMS  | 1.372           | 1.352           | 1.653         | 2.391           |
| 7.5, with EMS     | 1.261           | 1.143           | 1.804         | 2.479           |

So order 2 always, and the paper's corrector up to a guidance scale of about 5. Full strength, because statistics that come
without a recommendation were not measured against data prediction.
"""


def defaults_for(guidance: float | None) -> Settings:
    """What "auto" means without a recommendation, at this guidance scale (None: not known)."""
    return DEFAULTS_STRONG_GUIDANCE if guidance is not None and guidance > STRONG_GUIDANCE else DEFAULTS


@dataclass(frozen=True)
class RecommendationEntry:
    """Settings that were best on a calibration set for one schedule, given by its lambdas (finite ones)."""

    lambdas: tuple[float, ...]
    settings: Settings
    schedule: str = ""


@dataclass(frozen=True)
class Recommendation:
    """Measured settings for several schedules and step counts; `fitted` are steps with coefficients of their own.

    `partial` are such steps for runs that begin inside the noise range, image to image.
    """

    entries: tuple[RecommendationEntry, ...] = field(default_factory=tuple)
    fitted: tuple[FittedSteps, ...] = ()
    partial: tuple[FittedSteps, ...] = ()

    def fitted_for(self, lambdas: list[float], passes: bool = False) -> FittedSteps | None:
        """The coefficients fitted on the very schedule with these lambdas, if any; those in fewer passes only if `passes`."""
        usable = (steps for steps in self.fitted if passes or not steps.guided)
        return next((steps for steps in usable if steps.matches(lambdas)), None)

    def partial_for(self, lambdas: list[float]) -> FittedSteps | None:
        """Steps of as many evaluations, from the same beginning to sigma = 0 (an infinite last lambda); None without such."""
        if len(lambdas) < 3 or lambdas[-1] != math.inf or not math.isfinite(lambdas[0]):
            return None
        return between(self.partial, lambdas[0], len(lambdas) - 1)

    def best_for(self, lambdas: list[float]) -> Settings | None:
        """The settings of the entry whose schedule is nearest to `lambdas`, None without entries.

        Nearest in the number of steps first (in ratio), then in the mean distance of lambda along the schedule.
        """
        if not self.entries or len(lambdas) < 2:
            return None
        return min(self.entries, key=lambda e: _distance(list(e.lambdas), lambdas)).settings

    def covers(self, lambdas: list[float]) -> bool:
        """Whether settings were measured on this very schedule, to within 0.05 in lambda."""
        return any(
            len(e.lambdas) == len(lambdas) and max(abs(a - b) for a, b in zip(e.lambdas, lambdas)) < 0.05 for e in self.entries
        )


def _distance(a: list[float], b: list[float]) -> tuple[float, float]:
    ratio = max(len(a), len(b)) / min(len(a), len(b))
    samples = [i / 16 for i in range(17)]
    gap = sum(abs(_along(a, u) - _along(b, u)) for u in samples) / len(samples)
    return ratio, gap


def _along(values: list[float], u: float) -> float:
    position = u * (len(values) - 1)
    i = min(int(position), len(values) - 2) if len(values) > 1 else 0
    j = min(i + 1, len(values) - 1)
    return values[i] + (values[j] - values[i]) * (position - i)


def resolve_settings(defaults: Settings, recommended: Settings | None, chosen: Mapping[str, object]) -> Settings:
    """Settings from the user's choices; those left at "auto" follow the recommendation, else the defaults."""
    base = recommended or defaults
    values = {name: getattr(base, name) if value == AUTO else value for name, value in chosen.items()}
    return Settings(**{**base.__dict__, **values})
