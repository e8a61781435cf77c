"""The solver's options, what "auto" means, and the recommendation that a statistics file can carry."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

__all__ = [
    "AUTO",
    "DEFAULTS",
    "DEFAULTS_WITH_EMS",
    "Corrector",
    "Predictor",
    "Recommendation",
    "RecommendationEntry",
    "Settings",
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
        lower_order_final: predictor order at most the number of steps left.
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


DEFAULTS = Settings(order=2, corrector="pseudo")
DEFAULTS_WITH_EMS = Settings(order=2, corrector="pseudo")


@dataclass(frozen=True)
class RecommendationEntry:
    """Settings that were best on a calibration set for one schedule, given by its lambdas (finite ones)."""

    lambdas: tuple[float, ...]
    settings: Settings
    schedule: str = ""


@dataclass(frozen=True)
class Recommendation:
    """Measured settings for several schedules and step counts."""

    entries: tuple[RecommendationEntry, ...] = field(default_factory=tuple)

    def best_for(self, lambdas: list[float]) -> Settings | None:
        """The settings of the entry whose schedule is nearest to `lambdas`, None without entries.

        Nearest in the number of steps first (in ratio), then in the mean distance of lambda along the schedule.
        """
        if not self.entries or len(lambdas) < 2:
            return None
        return min(self.entries, key=lambda e: _distance(list(e.lambdas), lambdas)).settings


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


def resolve_settings(defaults: Settings, recommended: Settings | None, chosen: dict[str, Any]) -> Settings:
    """Settings from the user's choices; those left at "auto" follow the recommendation, else the defaults."""
    base = recommended or defaults
    values = {name: getattr(base, name) if value == AUTO else value for name, value in chosen.items()}
    return Settings(**{**base.__dict__, **values})
