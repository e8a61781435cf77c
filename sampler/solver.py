"""DPM-Solver-v3 as a k-diffusion sampler function.

The loop is algorithm 2 of the paper (arXiv 2310.13268) in sigma space. The update and its formula are in `coefficients`; which
nodes each one uses is worked out in `plan`, which of the plans a run takes in `choice`; what the host's x and sigma mean is in
`space`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from typing import TypedDict

import torch
from torch import Tensor

from .choice import plan_for
from .ems import EMS
from .plan import Plan
from .settings import AUTO, Corrector, Predictor, SolverOptions
from .space import Space

__all__ = ["Answers", "Run", "SamplingError", "StepInfo", "sample_dpm_solver_v3"]

_GREW = (
    "the latent grew beyond all bounds before {place}: the statistics (EMS) do not suit this model or this schedule. Sample "
    "with strength 0, or compute EMS for this model; if it happens at strength 0 too, lower the guidance scale."
)


Answers = Callable[..., Sequence[Tensor]]
"""What makes the passes of steps in fewer of them, see `sample_dpm_solver_v3`."""


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
def sample_dpm_solver_v3(  # noqa: PLR0913 - the first six are k-diffusion's, the others are options by name
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, object] | None = None,
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
    passes: Answers | None = None,
    image_to_image: bool = False,
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
        passes: for a schedule fitted in fewer passes (see `fitted`): passes(x, sigma, guided, **extra_args) returns (c,), the
            conditional answer from one pass of the network, or where `guided` (c, D) from two. `model` is not called then.
            None: such schedules are followed like any other.
        image_to_image: for a run that begins inside the noise range, from a picture with noise on it. Where the statistics hold
            steps fitted for that, evaluations lie where these say, from the first sigma on and as many as `sigmas` has steps;
            the sigmas between are not followed.

    Returns:
        x [B, C, ...] at sigmas[-1], in x's dtype.

    Raises:
        ValueError: sigmas or an option that cannot be used.
        EMSError: statistics that do not fit x.
        SamplingError: the model returned values that are not finite.
    """
    chosen: SolverOptions = {
        "order": order,
        "predictor": predictor,
        "corrector": corrector,
        "corrector_below": corrector_below,
        "lower_order_final": lower_order_final,
        "strength": strength,
    }
    if ems is not None:
        ems.check_fits(x.shape)
    plan_of = partial(plan_for, sigmas, space=space, guidance=guidance)
    plan = plan_of(ems=ems, passes=passes is not None, image_to_image=image_to_image, **chosen)
    if not plan.steps:
        return x
    arguments = (model, x, extra_args or {}, callback, disable)
    try:
        return _solve(plan, *arguments, passes)
    except DivergedError as error:
        if ems is None:
            raise
        warnings.warn(f"{error} Sampling again without them.", RuntimeWarning, stacklevel=2)
        chosen["strength"] = AUTO
        return _solve(plan_of(**chosen), *arguments)


def _solve(
    plan: Plan,
    model: Callable[..., Tensor],
    x: Tensor,
    extra_args: Mapping[str, object],
    callback: Callable[[StepInfo], None] | None,
    disable: bool | None,
    passes: Answers | None = None,
) -> Tensor:
    """The loop: x at the plan's last level."""
    run, ones = Run(plan, x), x.new_ones(len(x))
    del x
    for i in _progress(len(plan.steps), disable):
        x, level = run.x, run.level
        if plan.guided and passes is not None:
            denoised = run.observe(*passes(x, level * ones, plan.guided[i], **extra_args))
        else:
            denoised = run.observe(model(x, level * ones, **extra_args))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": level, "sigma_hat": level, "denoised": denoised})
        del x, denoised  # so that the step itself has their memory
        run.advance()
    return run.x


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
        self.plan, self.i, self._known = plan, 0, 0
        self._host_dtype = x.dtype
        dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        self._x = x.to(dtype) if plan.start == 1 else x.to(dtype) * plan.start
        self._levels = torch.tensor(plan.levels, dtype=torch.float64).to(x.device, dtype).unbind()
        self._steps, self._answers = _ready(plan, x.device, dtype, x.ndim), plan.answers
        self._history: dict[int, Tensor] = {}  # node (an answer: mostly, one an evaluation) -> m
        self._lent: Tensor | None = None  # a copy of x for a model that may write into it, as the first call shows
        self._free: list[Tensor] = []  # memory of nodes that no later step looks back to: new pages would cost as much as a sum

    @property
    def done(self) -> bool:
        """Whether the last level is reached."""
        return self.i == len(self._steps)

    @property
    def x(self) -> Tensor:
        """The state [B, C, ...] in the host's dtype: what the model is to be called with, and the result when done.

        At the first step, and later if the model wrote into that one, it is a copy.
        """
        x = self._x.to(self._host_dtype)
        if x is self._x and (self.i == 0 or self._lent is not None) and not self.done:
            x = self._lent = x.clone()
        return x

    @property
    def level(self) -> Tensor:
        """The host's noise level now, a scalar tensor on x's device."""
        return self._levels[self.i]

    def move(self, change: Tensor) -> None:
        """Add `change` [B, C, ...] to the state: what a host did to `x` since the last step, as inpainting does."""
        self._x = self._x + change

    def observe(self, *answers: Tensor) -> Tensor:
        """Take in D [B, C, ...] of `x` at `level`: m = D - (1 - l) y; in a plan of fewer passes c, or c and D.

        Returns the last answer.
        """
        if len(answers) != self._answers[self.i]:
            raise SamplingError(f"{len(answers)} answers came at step {self.i + 1}, where {self._answers[self.i]} are needed")
        for answer in answers:
            self._observe(answer)
        return answers[-1]

    def _observe(self, denoised: Tensor) -> None:
        if denoised.shape != self._x.shape:
            raise SamplingError(
                f"the model returned a tensor of shape {tuple(denoised.shape)} for a latent of shape {tuple(self._x.shape)}: "
                f"it must return the denoised latent, in the latent's own shape"
            )
        if self.i == 0 and self._lent is not None and torch.equal(self._lent, self._x):
            self._lent = None
        if not _sum_is_finite(denoised):
            _check_finite(self._x, denoised, self.i, self.plan)
        # A copy: a model may write its next output over this one, from whichever call on (CUDA graphs do so once recorded).
        m = self._free.pop() if self._free else torch.empty_like(self._x)
        self._steps[self.i].write_m(m, self._x, denoised)
        self._history[self._known] = m
        self._known += 1

    def advance(self) -> None:
        """Correct the step that led here and go on to the next level, in one update."""
        step = self._steps[self.i]
        self._x = step(self._x, self._history)
        self.i += 1
        for node in step.forgotten:
            self._free.append(self._history.pop(node))
        if self.done and not _sum_is_finite(self._x) and not self._x.isfinite().all():
            raise DivergedError(_GREW.format(place="the end"))


_Factor = Tensor | float
"""A number, or a tensor that multiplies [B, C, ...]."""


@dataclass(frozen=True)
class _Step:
    """A step ready for latents: m_i = D_i - slope x_i, then x_t = decay x + offset + sum_j weights[j] m[nodes[j]].

    `forgotten` names the nodes that no later step looks back to.
    """

    slope: _Factor
    decay: _Factor
    offset: _Factor
    weights: tuple[tuple[int, _Factor], ...]
    forgotten: tuple[int, ...]

    def write_m(self, m: Tensor, x: Tensor, denoised: Tensor) -> None:
        """M = D - slope x = D - (1 - l) y (paper, eq. 7)."""
        if isinstance(self.slope, Tensor):
            torch.addcmul(denoised.to(x.dtype), x, self.slope.to(x), value=-1, out=m)
        elif self.slope == 0:
            m.copy_(denoised)
        else:
            torch.sub(denoised.to(x.dtype), x, alpha=self.slope, out=m)

    def __call__(self, x: Tensor, m: Mapping[int, Tensor]) -> Tensor:
        """The x of the next level."""
        if isinstance(self.decay, float) and self.decay == 0 and [w for _, w in self.weights] == [1.0]:
            return m[self.weights[0][0]].clone()  # the step to sigma = 0
        out = x * (self.decay.to(x) if isinstance(self.decay, Tensor) else self.decay)
        if isinstance(self.offset, Tensor):
            out += self.offset.to(x)  # addcmul with two broadcast factors would be four times slower on a CPU
        elif self.offset != 0:
            out += self.offset
        for node, weight in self.weights:
            if isinstance(weight, Tensor):
                out.addcmul_(m[node], weight.to(x))
            else:
                out.add_(m[node], alpha=weight)
        return out


@lru_cache(maxsize=8)
def _ready(plan: Plan, device: torch.device, dtype: torch.dtype, ndim: int) -> tuple[_Step, ...]:
    """The plan's coefficients as plain numbers, or as tensors that multiply [B, C, ...] on its device; cached.

    Per-element ones stay where they are until their step, or they would hold the memory of many latents.
    """

    def coefficient(value: Tensor) -> _Factor:
        if value.numel() == 1:
            return value.item()
        if value.ndim > 1:
            return value
        return value.reshape(-1, *(1,) * (ndim - 2)).to(device, dtype)

    updates = list(plan.updates())
    known = list(accumulate(plan.answers, initial=0))
    new = [range(a, b) for a, b in pairwise(known)]
    last = {node: i for i, update in enumerate(updates) for node in (*new[i], *update.nodes)}  # step that uses a node last
    return tuple(
        _Step(
            coefficient(step.slope),
            coefficient(update.decay),
            coefficient(update.offset),
            tuple(zip(update.nodes, map(coefficient, update.weights), strict=True)),
            tuple(node for node, at in last.items() if at == i),
        )
        for i, (step, update) in enumerate(zip(plan.steps, updates, strict=True))
    )


def _sum_is_finite(values: Tensor) -> bool:
    """False if one of the values is not finite; may also be False of finite ones whose sum is too large."""
    return math.isfinite(values.sum(dtype=torch.float32).item())


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
