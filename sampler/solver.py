"""DPM-Solver-v3 as a k-diffusion sampler function.

The loop is algorithm 2 of the paper (arXiv 2310.13268) in sigma space. The update and its formula are in `coefficients`; which
nodes each one uses is worked out in `plan`; what the host's x and sigma mean is in `space`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypedDict

import torch
from torch import Tensor

from .coefficients import Update
from .ems import EMS
from .fitted import FittedSteps
from .plan import Plan, check_levels, fitted_plan, make_plan, typical_plan
from .settings import AUTO, OPTIONS, Corrector, Predictor, Settings, defaults_for, resolve_settings
from .space import Space
from .trajectories import Trajectories
from .typical import MOST_STEPS

__all__ = ["Run", "SamplingError", "StepInfo", "plan_for", "sample_dpm_solver_v3", "settings_for", "takes_typical_steps"]

_NO_EMS = EMS.degenerate()
_GREW = (
    "the latent grew beyond all bounds before {place}: the statistics (EMS) do not suit this model or this schedule. Sample "
    "with strength 0, or compute EMS for this model; if it happens at strength 0 too, lower the guidance scale."
)
_NOT_SANE = (
    "would multiply the latent beyond what any step needs on this schedule, so they are another model's or damaged: sampling "
    "without them. Compute EMS for this model, or remove the file"
)
GROWTH_LIMIT = 2.0
"""Of `EMS.growth` on unmeasured schedules. The embedded model's stay below 1 from 4 steps on (tests/test_file.py)."""


class SamplingError(RuntimeError):
    """Sampling cannot go on; the message says at which step and what to do."""


class DivergedError(SamplingError):
    """The latent grew beyond all bounds: the statistics or fitted coefficients do not suit the model."""


class StepInfo(TypedDict):
    """What a callback is told once a step, under k-diffusion's names."""

    x: Tensor
    i: int
    sigma: Tensor
    sigma_hat: Tensor
    denoised: Tensor


@torch.no_grad()
def sample_dpm_solver_v3(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[StepInfo], None] | None = None,
    disable: bool | None = None,
    *,
    ems: EMS | None = None,
    space: Space | str = Space.SIGMA,
    order: int | str = AUTO,
    predictor: Predictor | str = AUTO,
    corrector: Corrector | str = AUTO,
    corrector_below: float | str = AUTO,
    lower_order_final: bool | str = AUTO,
    strength: float | str = AUTO,
    guidance: float | None = None,
) -> Tensor:
    """Solve the probability-flow ODE from sigmas[0] to sigmas[-1] with one call of `model` per step.

    Args:
        model: denoiser D(x, sigma, **extra_args): x [B, C, ...] and sigma [B] to the predicted clean x0 [B, C, ...],
            guidance included. Any k-diffusion denoiser, a ComfyUI or WebUI model, or a plain function.
        x: [B, C, ...] start; noise times sigmas[0] for text to image. CPU or GPU, any float dtype; half-precision
            states are summed in float32 and handed to the model in their own dtype.
        sigmas: [n + 1] noise levels as the host counts them, followed exactly as given (a repeated value is one
            node). They fall, to 0 or to any level above; fewer than two return x as it came. A rising schedule
            between finite lambdas solves the ODE backwards.
        extra_args: keyword arguments for `model`.
        callback: called once a step with `x`, `i`, `sigma`, `sigma_hat`, `denoised`.
        disable: hide the progress bar (as in k-diffusion).
        ems: the model's statistics. None with all options at "auto" takes steps that are good on many models (`typical`); None
            with any option set is data prediction (multistep DPM-Solver++ with a corrector at option).
        space: "sigma" for x = x0 + sigma n; "flow" for x = (1 - t) x0 + t n with sigmas = t.
        order, predictor, corrector, corrector_below, lower_order_final, strength: see `Settings`. At "auto" they
            follow the recommendation stored with the statistics, else `settings.DEFAULTS`. With all of them at "auto", and
            `sigmas` a schedule fitted to the model, its fitted coefficients are used (see `fitted`).
        guidance: the guidance scale that `model` applies, if known: what "auto" means beside options that are set, or with
            statistics, depends on it.

    Returns:
        x [B, C, ...] at sigmas[-1], in x's dtype.

    Raises:
        ValueError: sigmas or an option that cannot be used.
        EMSError: statistics that do not fit x.
        SamplingError: the model returned values that are not finite.
    """
    chosen: dict[str, Any] = {
        "order": order,
        "predictor": predictor,
        "corrector": corrector,
        "corrector_below": corrector_below,
        "lower_order_final": lower_order_final,
        "strength": strength,
    }
    if ems is not None:
        ems.check_fits(x.shape)
    plan = plan_for(sigmas, ems=ems, space=space, guidance=guidance, **chosen)
    if not plan.steps:
        return x
    arguments = (model, x, extra_args or {}, callback, disable)
    try:
        return _solve(plan, *arguments)
    except DivergedError as error:
        if ems is None:
            raise
        warnings.warn(f"{error} Sampling again without them.", RuntimeWarning, stacklevel=2)
        return _solve(plan_for(sigmas, space=space, guidance=guidance, **{**chosen, "strength": AUTO}), *arguments)


def _solve(
    plan: Plan,
    model: Callable[..., Tensor],
    x: Tensor,
    extra_args: Mapping[str, Any],
    callback: Callable[[StepInfo], None] | None,
    disable: bool | None,
) -> Tensor:
    """The loop: x at the plan's last level."""
    run = Run(plan, x)
    del x
    for i in _progress(len(plan.steps), disable):
        x, level = run.x, run.level
        denoised = model(x, level * x.new_ones(len(x)), **extra_args)
        run.observe(denoised)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": level, "sigma_hat": level, "denoised": denoised})
        del x, denoised  # so that the step itself has their memory
        run.advance()
    return run.x


def plan_for(
    sigmas: Tensor,
    *,
    ems: EMS | None = None,
    space: Space | str = Space.SIGMA,
    guidance: float | None = None,
    **options: Any,
) -> Plan:
    """What `sample_dpm_solver_v3` does with these arguments; a plan without steps for fewer than two sigmas.

    Args:
        sigmas, ems, space, guidance: as there.
        options: those of `Settings`; what is left out is "auto".

    Raises:
        ValueError: sigmas or an option that cannot be used.
    """
    space = Space.of(space)
    levels = _levels(sigmas, space)
    chosen = {**dict.fromkeys(OPTIONS, AUTO), **options}
    settings = settings_for(levels, space, ems, chosen, guidance)
    if len(levels) < 2:
        return Plan(tuple(levels.tolist()), ())
    host = tuple(levels.tolist())
    fitted = _fitted_for(levels, space, ems, chosen)
    if fitted is not None:
        plan = fitted_plan(host, space, fitted)
        if plan.is_sane(space):
            return plan
        warnings.warn(f"the fitted coefficients {_NOT_SANE}", RuntimeWarning, stacklevel=2)
    if takes_typical_steps(levels, space, ems, chosen):
        own = _own_trajectories(ems)
        plan = typical_plan(host, space, guidance, own)
        if own is None or plan.is_sane(space):
            return plan
        warnings.warn(f"the steps that follow from the file's trajectories {_NOT_SANE}", RuntimeWarning, stacklevel=2)
        return typical_plan(host, space, guidance)
    if ems is not None and settings.strength:
        plan = make_plan(host, space, ems, settings)
        if plan.is_sane(space):
            return plan
        warnings.warn(f"the statistics (EMS) {_NOT_SANE}", RuntimeWarning, stacklevel=2)
    return make_plan(host, space, _NO_EMS, settings)


def settings_for(
    levels: Tensor, space: Space, ems: EMS | None, chosen: dict[str, Any], guidance: float | None = None
) -> Settings:
    """The settings that sampling would use: user's choices, else the recommendation, else the defaults.

    A recommendation holds on the very schedule that it was measured on. On any other one, statistics that were measured
    somewhere have strength 0 at "auto" and are as good as absent, so that a file never makes a picture worse: used unmeasured,
    they gained up to four times on some schedules and lost up to three times on others. Statistics without any recommendation
    are used at full strength unless `EMS.growth` is above GROWTH_LIMIT.
    """
    rises = len(levels) > 1 and bool(levels[-1] > levels[0])
    if rises and chosen.get("corrector") == AUTO:
        chosen = {**chosen, "corrector": "none"}  # a corrector's feedback grows as the noise does: it diverges
    defaults = defaults_for(guidance)
    if ems is None:
        return resolve_settings(defaults, None, chosen)
    lambdas = space.lambda_of(levels)
    unused = rises or _left_out(ems, lambdas)
    if ems.recommendation is not None and not unused:
        return resolve_settings(defaults, ems.recommendation.best_for(lambdas[lambdas.isfinite()].tolist()), chosen)
    return resolve_settings(replace(defaults, strength=0.0) if unused else defaults, None, chosen)


def takes_typical_steps(levels: Tensor, space: Space, ems: EMS | None, chosen: Mapping[str, Any]) -> bool:
    """Whether sampling takes the steps of `typical`, chosen on the model's own trajectories where the file holds them.

    It does with all options at "auto", on falling levels, with at most `MOST_STEPS` steps, where no statistics are used.
    `settings_for` then only says what options would start from of which the user sets one.
    """
    falls = len(levels) > 1 and bool(levels[0] > levels[-1])
    if not falls or len(levels) > MOST_STEPS + 1 or any(chosen.get(name, AUTO) != AUTO for name in OPTIONS):
        return False
    return ems is None or _own_trajectories(ems) is not None or _left_out(ems, space.lambda_of(levels))


def _own_trajectories(ems: EMS | None) -> Trajectories | None:
    """Those of the model itself, where the file holds them."""
    return None if ems is None or ems.recommendation is None else ems.recommendation.trajectories


def _left_out(ems: EMS, lambdas: Tensor) -> bool:
    """Whether statistics stay unused at "auto" on this schedule: measured elsewhere only, or unmeasured and too large."""
    finite, advice = lambdas[lambdas.isfinite()], ems.recommendation
    if advice is not None:
        return not advice.covers(finite.tolist())
    return ems.growth(finite) > GROWTH_LIMIT


def _fitted_for(levels: Tensor, space: Space, ems: EMS | None, chosen: dict[str, Any]) -> FittedSteps | None:
    """Coefficients fitted on this very schedule, unless the user chose an option."""
    if ems is None or ems.recommendation is None or any(value != AUTO for value in chosen.values()):
        return None
    return ems.recommendation.fitted_for(space.lambda_of(levels).tolist())


def _levels(sigmas: Tensor, space: Space) -> Tensor:
    """The schedule [n + 1] in float64 on the CPU, repeated values merged. Raises ValueError."""
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1:
        raise ValueError(f"sigmas must be a tensor [n + 1], not {getattr(sigmas, 'shape', type(sigmas).__name__)}")
    levels = torch.unique_consecutive(sigmas.detach().to("cpu", torch.float64))
    if len(levels) > 1:
        check_levels(levels, space)
    return levels


class Run:
    """One run of a plan, a step at a time, for those who own the loop: observe, advance, until `done`.

        run = Run(plan_for(sigmas), x)
        while not run.done:
            run.observe(model(run.x, run.level))
            run.advance()

    Args:
        plan: of the schedule.
        x: [B, C, ...] at its first level, as hosts begin. Half-precision states are summed in float32.

    Raises:
        SamplingError: from `observe`, for values that are not finite.
    """

    def __init__(self, plan: Plan, x: Tensor) -> None:
        self.plan, self.i = plan, 0
        self._host_dtype = x.dtype
        dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        self._x = x.to(dtype) if plan.start == 1 else x.to(dtype) * plan.start
        self._before = self._x
        self._levels = torch.tensor(plan.levels, dtype=torch.float64).to(x.device, dtype)
        self._steps = _ready(plan, x.device, dtype, x.ndim)
        self._history: dict[int, Tensor] = {}  # node -> m

    @property
    def done(self) -> bool:
        """Whether the last level is reached."""
        return self.i == len(self._steps)

    @property
    def x(self) -> Tensor:
        """The state [B, C, ...] in the host's dtype: what the model is to be called with, and the result when done."""
        return self._x.to(self._host_dtype)

    @property
    def level(self) -> Tensor:
        """The host's noise level now, a scalar tensor on x's device."""
        return self._levels[self.i]

    def move(self, change: Tensor) -> None:
        """Add `change` [B, C, ...] to the state: what a host did to `x` since the last step, as inpainting does."""
        self._x = self._x + change

    def observe(self, denoised: Tensor) -> None:
        """Take in D [B, C, ...] of `x` at `level`: m = D - (1 - l) y."""
        if denoised.shape != self._x.shape:
            raise SamplingError(
                f"the model returned a tensor of shape {tuple(denoised.shape)} for a latent of shape {tuple(self._x.shape)}: "
                f"it must return the denoised latent, in the latent's own shape"
            )
        if not denoised.sum(dtype=torch.float32).isfinite():
            _check_finite(self._x, denoised, self.i, self.plan)
        m = self._steps[self.i].m(self._x, denoised.to(self._x.dtype))
        # A model may write its next output over this one, from whichever call on (CUDA graphs do so once they are recorded).
        self._history[self.i] = m.clone() if m.data_ptr() == denoised.data_ptr() else m

    def advance(self) -> None:
        """Correct the step that led here, then go on to the next level."""
        step = self._steps[self.i]
        if step.corrector is not None:
            self._x = self._before
            self._x = step.corrector(self._x, self._history)
        self._before = self._x
        self._x = step.predictor(self._x, self._history)
        self.i += 1
        for node in [node for node in self._history if node < self.i - self.plan.keep]:
            del self._history[node]
        if self.done and not self._x.sum(dtype=torch.float32).isfinite() and not self._x.isfinite().all():
            raise DivergedError(_GREW.format(place="the end"))


@dataclass(frozen=True)
class _Combination:
    """An `Update` ready for latents: coefficients as numbers, or as tensors that multiply [B, C, ...]."""

    decay: Tensor | float
    offset: Tensor | float
    weights: tuple[Tensor | float, ...]
    nodes: tuple[int, ...]

    def __call__(self, x: Tensor, m: Mapping[int, Tensor]) -> Tensor:
        """Decay x + offset + sum_j weights[j] m[nodes[j]]."""
        if isinstance(self.decay, float) and self.decay == 0 and self.weights == (1.0,):
            return m[self.nodes[0]]  # the step to sigma = 0
        out = x * (self.decay.to(x) if isinstance(self.decay, Tensor) else self.decay)
        if isinstance(self.offset, Tensor):
            out += self.offset.to(x)  # addcmul with two broadcast factors would be four times slower on a CPU
        elif self.offset != 0:
            out += self.offset
        for node, weight in zip(self.nodes, self.weights, strict=True):
            if isinstance(weight, Tensor):
                out.addcmul_(m[node], weight.to(x))
            else:
                out.add_(m[node], alpha=weight)
        return out


@dataclass(frozen=True)
class _Step:
    slope: Tensor | float
    corrector: _Combination | None
    predictor: _Combination

    def m(self, x: Tensor, denoised: Tensor) -> Tensor:
        """D - slope x = D - (1 - l) y (paper, eq. 7)."""
        if isinstance(self.slope, Tensor):
            return torch.addcmul(denoised, x, self.slope.to(x), value=-1)
        return denoised if self.slope == 0 else torch.sub(denoised, x, alpha=self.slope)


@lru_cache(maxsize=8)
def _ready(plan: Plan, device: torch.device, dtype: torch.dtype, ndim: int) -> tuple[_Step, ...]:
    """The plan's coefficients as plain numbers, or as tensors that multiply [B, C, ...] on its device; cached.

    Per-element ones stay where they are until their step, or they would hold the memory of many latents.
    """

    def coefficient(value: Tensor) -> Tensor | float:
        if value.numel() == 1:
            return value.item()
        if value.ndim > 1:
            return value
        return value.reshape(-1, *(1,) * (ndim - 2)).to(device, dtype)

    def ready(update: Update) -> _Combination:
        weights = tuple(map(coefficient, update.weights))
        return _Combination(coefficient(update.decay), coefficient(update.offset), weights, update.nodes)

    return tuple(
        _Step(coefficient(s.slope), None if s.corrector is None else ready(s.corrector), ready(s.predictor)) for s in plan.steps
    )


def _check_finite(x: Tensor, denoised: Tensor, i: int, plan: Plan) -> None:
    bad = int((~torch.isfinite(denoised)).sum().item())
    if not bad:
        return
    place = f"step {i + 1} of {len(plan.steps)}, sigma = {plan.levels[i]:.4g}"
    if not torch.isfinite(x).all():
        raise DivergedError(_GREW.format(place=place))
    raise SamplingError(
        f"the model returned {bad} of {denoised.numel()} values that are not finite (NaN or infinity) at {place}. The sampler "
        f"did not cause this: try the model in float32 or bfloat16, a lower guidance scale, or without the LoRA or attention "
        f"patch in use"
    )


def _progress(n: int, disable: bool | None) -> Iterable[int]:
    """k-diffusion's progress bar where tqdm is installed (every host has it), else a plain range."""
    try:
        from tqdm.auto import trange
    except ImportError:
        return range(n)
    return trange(n, disable=disable)
