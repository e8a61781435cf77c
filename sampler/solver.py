"""DPM-Solver-v3 as a k-diffusion sampler function.

The loop is algorithm 2 of the paper (arXiv 2310.13268) in sigma space; the coefficients come from `plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .ems import EMS
from .fitted import FittedSteps
from .plan import DataStep, LinearStep, Plan, check_levels, fitted_plan, make_plan
from .settings import AUTO, Corrector, Predictor, Settings, defaults_for, resolve_settings
from .space import Space

__all__ = ["SamplingError", "sample_dpm_solver_v3", "settings_for"]

_NO_EMS = EMS.degenerate()
GROWTH_LIMIT = 2.0
"""Of `EMS.growth` on unmeasured schedules. The embedded model's stay below 1 from 4 steps on (tests/test_file.py)."""


class SamplingError(RuntimeError):
    """Sampling cannot go on; the message says at which step and what to do."""


@torch.no_grad()
def sample_dpm_solver_v3(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
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
        ems: the model's statistics; None is data prediction (multistep DPM-Solver++ with a corrector at option).
        space: "sigma" for x = x0 + sigma n; "flow" for x = (1 - t) x0 + t n with sigmas = t.
        order, predictor, corrector, corrector_below, lower_order_final, strength: see `Settings`. At "auto" they
            follow the recommendation stored with the statistics, else measured defaults. With all of them at "auto", and
            `sigmas` a schedule fitted to the model, its fitted coefficients are used (see `fitted`).
        guidance: the guidance scale that `model` applies, if known: the defaults depend on it.

    Returns:
        x [B, C, ...] at sigmas[-1], in x's dtype.

    Raises:
        ValueError: sigmas or an option that cannot be used.
        EMSError: statistics that do not fit x.
        SamplingError: the model returned values that are not finite.
    """
    space = Space.of(space)
    levels = _levels(sigmas, space)
    chosen = {
        "order": order,
        "predictor": predictor,
        "corrector": corrector,
        "corrector_below": corrector_below,
        "lower_order_final": lower_order_final,
        "strength": strength,
    }
    settings = settings_for(levels, space, ems, chosen, guidance)
    if ems is not None:
        ems.check_fits(x.shape)
    if len(levels) < 2:
        return x
    fitted = _fitted_for(levels, space, ems, chosen)
    if fitted is not None:
        plan = fitted_plan(tuple(levels.tolist()), space, fitted)
    else:
        plan = make_plan(tuple(levels.tolist()), space, _NO_EMS if ems is None else ems, settings)
    return _run(plan, levels, model, x, extra_args or {}, callback, disable)


def settings_for(
    levels: Tensor, space: Space, ems: EMS | None, chosen: dict[str, Any], guidance: float | None = None
) -> Settings:
    """The settings that sampling would use: user's choices, else the recommendation, else the defaults.

    Where `EMS.growth` is above GROWTH_LIMIT on a schedule that no recommendation was measured on, strength "auto" is 0.
    """
    if ems is None:
        return resolve_settings(defaults_for(guidance), None, chosen)
    lambdas = space.lambda_of(levels)
    lambdas = lambdas[lambdas.isfinite()]
    advice = ems.recommendation
    recommended = None if advice is None else advice.best_for(lambdas.tolist())
    settings = resolve_settings(defaults_for(guidance), recommended, chosen)
    measured = advice is not None and advice.covers(lambdas.tolist())
    if chosen.get("strength") == AUTO and not measured and ems.growth(lambdas) * settings.strength > GROWTH_LIMIT:
        return replace(settings, strength=0.0)
    return settings


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


def _run(
    plan: Plan,
    levels: Tensor,
    model: Callable[..., Tensor],
    x: Tensor,
    extra_args: dict[str, Any],
    callback: Callable[[dict[str, Any]], None] | None,
    disable: bool | None,
) -> Tensor:
    host_dtype = x.dtype
    dtype = torch.float32 if host_dtype in (torch.float16, torch.bfloat16) else host_dtype
    levels = levels.to(x.device, dtype)
    ones = x.new_ones(x.shape[0])
    history: dict[int, Tensor] = {}  # node -> -f
    x = x.to(dtype) if plan.start == 1 else x.to(dtype) * plan.start
    x_before = x
    steps = _ready_steps(plan, x.device, dtype, x.ndim)
    for i in _progress(len(steps), disable):
        step = steps[i]
        x_host = x.to(host_dtype)
        denoised = model(x_host, levels[i] * ones, **extra_args)
        if not denoised.sum(dtype=torch.float32).isfinite():
            _check_finite(x, denoised, i, plan)
        if callback is not None:
            callback({"x": x_host, "i": i, "sigma": levels[i], "sigma_hat": levels[i], "denoised": denoised})
        denoised = denoised.to(dtype)
        if isinstance(step.predictor, DataStep):
            x_before, x = x, _data_step(step.predictor, x, denoised)
            history.clear()
            continue
        history[i] = _minus_nonlinear_term(step.x_slope, x, denoised)
        del x_host, denoised  # for the peak of memory, as are the assignments one by one
        if step.corrector is not None:
            x = x_before
            x = _combine(step.corrector, x, history)
        x_before = x
        x = _combine(step.predictor, x, history)
        for j in [j for j in history if j <= i - plan.keep]:
            del history[j]
    return x.to(host_dtype)


@dataclass(frozen=True)
class _ReadyUpdate:
    """x_t = decay x_s + offset + sum_j weights[j] f_{nodes[j]}."""

    decay: Tensor | float
    offset: Tensor | float
    weights: tuple[Tensor | float, ...]
    nodes: tuple[int, ...]


@dataclass(frozen=True)
class _ReadyStep:
    x_slope: Tensor | float
    corrector: _ReadyUpdate | None
    predictor: _ReadyUpdate | DataStep


@lru_cache(maxsize=8)
def _ready_steps(plan: Plan, device: torch.device, dtype: torch.dtype, ndim: int) -> tuple[_ReadyStep, ...]:
    """The plan's coefficients as plain numbers, or as tensors that multiply [B, C, ...] on its device; cached.

    Per-element ones stay where they are until their step, or they would hold the memory of many latents.
    """

    def coefficient(value: Tensor) -> Tensor | float:
        if value.numel() == 1:
            return value.item()
        if value.ndim > 1:
            return value
        return value.reshape(-1, *(1,) * (ndim - 2)).to(device, dtype)

    def update(step: LinearStep) -> _ReadyUpdate:
        u = step.update
        weights = tuple(coefficient(w) for w in u.weights)
        return _ReadyUpdate(coefficient(u.decay), coefficient(u.offset), weights, step.nodes)

    return tuple(
        _ReadyStep(
            coefficient(step.x_slope),
            None if step.corrector is None else update(step.corrector),
            step.predictor if isinstance(step.predictor, DataStep) else update(step.predictor),
        )
        for step in plan.steps
    )


def _minus_nonlinear_term(slope: Tensor | float, x: Tensor, denoised: Tensor) -> Tensor:
    """-f = D - (1 - l) y, with slope (1 - l) / alpha for the host's x = alpha y (paper, eq. 7).

    The sign saves a pass over the latent, and without statistics -f is D itself.
    """
    if isinstance(slope, float):
        return denoised if slope == 0 else torch.sub(denoised, x, alpha=slope)
    return torch.addcmul(denoised, x, slope.to(x), value=-1)


def _combine(update: _ReadyUpdate, x: Tensor, minus_f: dict[int, Tensor]) -> Tensor:
    """Decay x + offset + sum_j weight_j f_j."""
    out = x * (update.decay.to(x) if isinstance(update.decay, Tensor) else update.decay)
    if isinstance(update.offset, Tensor):
        out += update.offset.to(x)  # addcmul with two broadcast factors would be four times slower on a CPU
    elif update.offset != 0:
        out += update.offset
    for node, weight in zip(update.nodes, update.weights, strict=True):
        if isinstance(weight, Tensor):
            out.addcmul_(minus_f[node], weight.to(x), value=-1)
        else:
            out.sub_(minus_f[node], alpha=weight)
    return out


def _data_step(step: DataStep, x: Tensor, denoised: Tensor) -> Tensor:
    if step.x_factor == 0 and step.denoised_factor == 1:
        return denoised
    return step.x_factor * x + step.denoised_factor * denoised


def _check_finite(x: Tensor, denoised: Tensor, i: int, plan: Plan) -> None:
    bad = int((~torch.isfinite(denoised)).sum().item())
    if not bad:
        return
    place = f"step {i + 1} of {len(plan.steps)}, sigma = {plan.levels[i]:.4g}"
    if not torch.isfinite(x).all():
        raise SamplingError(
            f"the latent grew beyond all bounds before {place}: the statistics (EMS) do not suit this model or this schedule. "
            f"Sample with strength 0, or compute EMS for this model; if it happens at strength 0 too, lower the guidance scale"
        )
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
