"""Which plan a run takes: fitted steps, the statistics' own, typical ones, or a formula; and what options at "auto" mean.

Everything here follows from the schedule, the statistics and the user's options. Hosts ask here to say what
sampling will do.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .ems import EMS
from .fitted import FittedSteps
from .plan import Plan, check_levels, fitted_plan, make_plan, typical_plan
from .settings import AUTO, OPTIONS, Settings, SolverOptions, defaults_for, resolve_settings
from .space import Space
from .typical import MOST_STEPS

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["GROWTH_LIMIT", "fitted_for", "plan_for", "settings_for", "takes_typical_steps"]

_NO_EMS = EMS.degenerate()
_NOT_SANE = (
    "would multiply the latent beyond what any step needs on this schedule, so they are another model's or damaged: sampling "
    "without them. Compute EMS for this model, or remove the file"
)
GROWTH_LIMIT = 2.0
"""Of `EMS.growth` on unmeasured schedules. For the embedded statistics it is below 1 from 4 steps on
(tests/ems_tools/file/test_contents.py)."""


def plan_for(
    sigmas: Tensor,
    *,
    ems: EMS | None = None,
    space: Space | str = Space.SIGMA,
    guidance: float | None = None,
    passes: bool = False,
    image_to_image: bool = False,
    **options: Unpack[SolverOptions],
) -> Plan:
    """What `sample_dpm_solver_v3` does with these arguments; a plan without steps for fewer than two sigmas.

    Args:
        sigmas, ems, space, guidance: as there.
        passes: whether steps in fewer passes can be made.
        image_to_image: as there.
        options: those of `Settings`; what is left out is "auto".

    Raises:
        ValueError: sigmas or an option that cannot be used.
    """
    space = Space.of(space)
    levels = _levels(sigmas, space)
    chosen = {**dict.fromkeys(OPTIONS, AUTO), **options}
    unused = ems is not None and _is_unused(levels, space, ems)
    settings = _settings(levels, space, ems, chosen, guidance, unused)
    if len(levels) < 2:
        return Plan(tuple(levels.tolist()), ())
    host = tuple(levels.tolist())
    fitted = fitted_for(levels, space, ems, chosen, passes, image_to_image)
    if fitted is not None:
        plan = fitted_plan(*fitted, space)
        if plan.is_sane(space):
            return plan
        warnings.warn(f"the fitted coefficients {_NOT_SANE}", RuntimeWarning, stacklevel=2)
    if _takes_typical_steps(levels, ems is None or not settings.strength, chosen):
        return typical_plan(host, space, guidance)
    if ems is not None and settings.strength:
        plan = make_plan(host, space, ems, settings)
        if plan.is_sane(space):
            return plan
        warnings.warn(f"the statistics (EMS) {_NOT_SANE}", RuntimeWarning, stacklevel=2)
    return make_plan(host, space, _NO_EMS, settings)


def settings_for(
    levels: Tensor, space: Space, ems: EMS | None, chosen: Mapping[str, object], guidance: float | None = None
) -> Settings:
    """The settings that sampling would use: user's choices, else the recommendation, else the defaults.

    A recommendation holds on the very schedule that it was measured on. On any other one, statistics that were measured
    somewhere have strength 0 at "auto" and are as good as absent, so that a file never makes a picture worse: used unmeasured,
    they gained up to four times on some schedules and lost up to three times on others. Statistics without any recommendation
    are used at full strength unless `EMS.growth` is above GROWTH_LIMIT.
    """
    return _settings(levels, space, ems, chosen, guidance, ems is not None and _is_unused(levels, space, ems))


def _settings(
    levels: Tensor, space: Space, ems: EMS | None, chosen: Mapping[str, object], guidance: float | None, unused: bool
) -> Settings:
    if _rises(levels) and chosen.get("corrector") == AUTO:
        chosen = {**chosen, "corrector": "none"}  # a corrector's feedback grows as the noise does: it diverges
    defaults = defaults_for(guidance)
    if ems is None:
        return resolve_settings(defaults, None, chosen)
    lambdas = space.lambda_of(levels)
    if ems.recommendation is not None and not unused:
        return resolve_settings(defaults, ems.recommendation.best_for(lambdas[lambdas.isfinite()].tolist()), chosen)
    return resolve_settings(replace(defaults, strength=0.0) if unused else defaults, None, chosen)


def takes_typical_steps(levels: Tensor, space: Space, ems: EMS | None, chosen: Mapping[str, object]) -> bool:
    """Whether sampling takes the steps of `typical`: options at "auto", falling levels, few steps, no statistics that are used.

    Statistics of which strength 0 is recommended are not used. `settings_for` then only says what options would start from of
    which the user sets one.
    """
    return _takes_typical_steps(levels, ems is None or not settings_for(levels, space, ems, chosen).strength, chosen)


def _takes_typical_steps(levels: Tensor, without: bool, chosen: Mapping[str, object]) -> bool:
    """See `takes_typical_steps`; `without`: whether no statistics are used."""
    falls = len(levels) > 1 and not _rises(levels)
    return without and falls and len(levels) <= MOST_STEPS + 1 and all(chosen.get(name, AUTO) == AUTO for name in OPTIONS)


def _rises(levels: Tensor) -> bool:
    return len(levels) > 1 and bool(levels[-1] > levels[0])


def _is_unused(levels: Tensor, space: Space, ems: EMS) -> bool:
    """Whether statistics stay unused at "auto" on this schedule: it rises, or they were measured elsewhere or are too large."""
    if _rises(levels):
        return True
    lambdas, advice = space.lambda_of(levels), ems.recommendation
    finite = lambdas[lambdas.isfinite()]
    if advice is not None:
        return not advice.covers(finite.tolist())
    return ems.growth(finite) > GROWTH_LIMIT


def fitted_for(
    levels: Tensor,
    space: Space,
    ems: EMS | None,
    chosen: Mapping[str, object],
    passes: bool = False,
    image_to_image: bool = False,
) -> tuple[tuple[float, ...], FittedSteps] | None:
    """Fitted steps for host `levels` [n + 1], and the levels that they are for; None where the user chose an option.

    They are those fitted on this very schedule; with `image_to_image`, where there are none, those for its beginning.
    """
    if ems is None or ems.recommendation is None or any(value != AUTO for value in chosen.values()):
        return None
    lambdas = space.lambda_of(levels).tolist()
    found = ems.recommendation.fitted_for(lambdas, passes)
    if found is not None:
        return tuple(levels.tolist()), found
    found = ems.recommendation.partial_for(lambdas) if image_to_image else None
    if found is None:
        return None
    inner = space.level_of(torch.tensor([*found.lambdas[1:], math.inf], dtype=torch.float64))
    return (float(levels[0]), *inner.tolist()), found


def _levels(sigmas: Tensor, space: Space) -> Tensor:
    """The schedule [n + 1] in float64 on the CPU, repeated values merged. Raises ValueError."""
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1:
        raise ValueError(f"sigmas must be a tensor [n + 1], not {getattr(sigmas, 'shape', type(sigmas).__name__)}")
    levels = torch.unique_consecutive(sigmas.detach().to("cpu", torch.float64))
    if len(levels) > 1:
        check_levels(levels, space)
    return levels
