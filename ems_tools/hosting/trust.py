"""Sampling with statistics that somebody else may have made: tried on first use, remembered, dropped if they are wrong.

Hosts call `sample_on_trial` in place of the sampler. A file that was computed on this machine is believed. Any other is watched
in the first run of each kind (`judge.trial`). If that shows that it does not suit the model, the picture is made anew with data
prediction, and the file is not used again; where steps in fewer passes or for image to image fail theirs, only these are not.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...sampler import (
    AUTO,
    EDM,
    EMS,
    Answers,
    FittedSteps,
    SamplingError,
    Settings,
    SolverOptions,
    Space,
    StepInfo,
    karras,
    plan_for,
    sample_dpm_solver_v3,
    settings_for,
)
from ...sampler.choice import fitted_for

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..file.contents import EMSFile
    from ..judge.trial import Trial, Verdict

__all__ = ["Origin", "TrustBook", "sample_on_trial"]

_FORMAT, _ENTRIES, _CASES, _MAX_BYTES = "dpm-solver-v3-trust-1", 2000, 64, 2**24
_OPTIONS = tuple(f.name for f in fields(Settings))
_KEYS: WeakKeyDictionary[EMSFile, str] = WeakKeyDictionary()


@dataclass(frozen=True)
class Origin:
    """Where a run's statistics come from: the file, and its name for messages."""

    file: EMSFile
    name: str

    @property
    def key(self) -> str:
        """Digest of all that sampling uses of the file."""
        if self.file not in _KEYS:
            from ..file.layout import fitted_values

            digest = hashlib.sha256()
            for name in ("lambdas", "guidance", "l", "s", "b"):
                digest.update(getattr(self.file, name).contiguous().numpy().data)
            rows = (*self.file.meta.fitted, *self.file.meta.passes, *self.file.meta.partial)
            digest.update(json.dumps([fitted_values(row) for row in rows]).encode())
            digest.update(repr(self.file.meta.recommendation).encode())
            _KEYS[self.file] = digest.hexdigest()[:32]
        return _KEYS[self.file]


class TrustBook:
    """What was found out about statistics files, in one small JSON file in the host's user folder (None: not kept).

    A book that cannot be read or written costs evaluations, never a picture.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._files: dict[str, dict[str, object]] | None = None
        self._lock = threading.Lock()

    def computed(self, file: EMSFile) -> None:
        """Note that this machine computed the file: it is believed from now on."""
        self._note(Origin(file, "").key, {"computed": True})

    def is_trusted(self, origin: Origin, case: str) -> bool:
        """Whether the file was computed here, or has passed in a run of this kind."""
        return self.is_ours(origin) or case in _texts(self._load().get(origin.key, {}).get("passed"))

    def is_ours(self, origin: Origin) -> bool:
        """Whether the file was computed here."""
        return self._load().get(origin.key, {}).get("computed") is True

    def refusal(self, origin: Origin) -> str:
        """Why the file is not used any more, "" if it may be."""
        return self._why(origin, "failed")

    def guided_only(self, origin: Origin) -> str:
        """Why the file's steps in fewer passes are not taken any more, "" if they may be."""
        return self.refusal(origin) or self._why(origin, "guided")

    def no_images(self, origin: Origin) -> str:
        """Why the file's steps for image to image are not taken any more, "" if they may be."""
        return self.refusal(origin) or self._why(origin, "image")

    def note(self, origin: Origin, case: str, failure: str = "", part: str = "failed") -> None:
        """Keep the outcome of a trial; `part` "guided" or "image": of such steps alone, without which the file may still do."""
        passed = _texts(self._load().get(origin.key, {}).get("passed"))
        facts: dict[str, object] = {"passed": [*passed, case][-_CASES:]}
        self._note(origin.key, {part: failure} if failure else facts)

    def _why(self, origin: Origin, part: str) -> str:
        why = self._load().get(origin.key, {}).get(part, "")
        return why if isinstance(why, str) and why.isprintable() else ""

    def _note(self, key: str, facts: dict[str, object]) -> None:
        with self._lock:
            files = self._load()
            files[key] = {**files.pop(key, {}), **facts}
            while len(files) > _ENTRIES:
                del files[next(iter(files))]
            if self.path is None:
                return
            from ..file.storage import write_atomic

            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self.path, json.dumps({"format": _FORMAT, "files": files}, indent=0).encode())
            except OSError:
                pass

    def _load(self) -> dict[str, dict[str, object]]:
        if self._files is None:
            self._files = {}
            try:
                if self.path is not None and self.path.stat().st_size < _MAX_BYTES:
                    stored = json.loads(self.path.read_text(encoding="utf-8"))
                    if stored["format"] == _FORMAT:
                        self._files = {k: v for k, v in stored["files"].items() if isinstance(v, dict)}
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                pass
        return self._files


def _texts(value: object) -> list[str]:
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


def sample_on_trial(  # noqa: PLR0913 - nine are the sampler's
    book: TrustBook,
    origin: Origin | None,
    tell: Callable[[str], None],
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, object] | None = None,
    callback: Callable[[StepInfo], None] | None = None,
    disable: bool | None = None,
    *,
    ems: EMS | None = None,
    space: Space | str = Space.SIGMA,
    guidance: float | None = None,
    passes: Answers | None = None,
    image_to_image: bool = False,
    **options: Unpack[SolverOptions],
) -> Tensor:
    """`sample_dpm_solver_v3`, with statistics that are not known to be right watched on their first use.

    Args:
        book: what is known of files.
        origin: the file that `ems` is from; None for none, or for one that needs no trial.
        tell: shown to the user.
        model, x, sigmas, extra_args, callback, disable, ems, space, guidance, options: the sampler's.
        passes: the sampler's too; the trial of steps in fewer passes makes both at every evaluation.
        image_to_image: the sampler's too.

    Returns:
        x at sigmas[-1]; of a file that fails, the picture that sampling without it gives.

    Raises:
        ValueError, EMSError, SamplingError: as the sampler does.
    """
    given = (x, sigmas, extra_args, callback, disable)
    run = partial(sample_dpm_solver_v3, space=space, guidance=guidance, image_to_image=image_to_image, **options)
    if ems is None or origin is None:
        return run(model, *given, ems=ems)
    if refusal := book.refusal(origin):
        tell(refusal)
        return run(model, *given, ems=None)
    space, levels = Space.of(space), sigmas.detach().to("cpu", torch.float64)
    chosen = {name: options.get(name, AUTO) for name in _OPTIONS}
    passes = None if book.guided_only(origin) else passes
    image_to_image = image_to_image and not book.no_images(origin)
    run = partial(run, image_to_image=image_to_image)
    fitted = fitted_for(levels, space, ems, chosen, passes is not None, image_to_image)
    case = _case_of(levels, fitted, space, guidance)
    plain = fitted is None and settings_for(levels, space, ems, chosen, guidance).strength == 0  # whatever the file says
    if plain or len(levels) < 3 or book.is_trusted(origin, case.name):
        return run(model, *given, ems=ems, passes=passes)
    from ..judge.trial import Trial  # here, because a host that starts needs no judge

    trial = Trial(model, space, x, passes if case.part == "guided" else None)
    plan_of = partial(plan_for, space=space, guidance=guidance, **options)
    judge = partial(trial.verdict, plan_of=plan_of, extra_args=extra_args or {}, **_facts_of(case, space, origin.file))
    end, verdict = _tried(trial, partial(run, trial, *given, ems=ems), judge)
    if verdict.passed:
        if verdict.ratio is not None:
            book.note(origin, case.name)
        return end
    tell(failure := _failure(origin, case, verdict))
    end = run(model, *given, ems=None)  # raises where it is the model that fails: then nothing is held against the file
    book.note(origin, case.name, failure, case.part)
    return end


@dataclass(frozen=True)
class _Case:
    """What a run takes of a file: its levels, fitted steps if any, what is refused where they fail, and its kind."""

    levels: Tensor
    steps: FittedSteps | None
    part: str
    name: str


def _case_of(
    levels: Tensor, fitted: tuple[tuple[float, ...], FittedSteps] | None, space: Space, guidance: float | None
) -> _Case:
    name = f"guidance {guidance}, {len(levels) - 1} steps"
    if fitted is None:
        return _Case(levels, None, "failed", name)
    on, steps = fitted
    if on != tuple(levels.tolist()):
        first = round(2 * float(space.lambda_of(levels[:1]))) / 2
        return _Case(torch.tensor(on, dtype=torch.float64), steps, "image", f"{name}, image to image from lambda {first}")
    return _Case(levels, steps, *(("guided", f"{name}, fewer passes") if steps.guided else ("failed", f"{name}, fitted")))


def _facts_of(case: _Case, space: Space, file: EMSFile) -> dict[str, Any]:
    """What a trial is judged by, as `Trial.verdict` has it."""
    low, high, steps = file.meta.sigma_min, file.meta.sigma_max, case.steps
    if case.part == "image":  # such a run does not begin late
        high = min(high, float((-space.lambda_of(case.levels[:1])).exp()))
    others = partial(_usual, case.levels, space, low, steps.passes // 2) if steps else None
    stated = _stated(file, steps) if steps and case.part == "guided" else math.inf
    return {"levels": case.levels, "others": others, "sigmas": (low, high), "stated": stated}


def _tried(trial: Trial, run: Callable[..., Tensor], judge: Callable[[Tensor], Verdict]) -> tuple[Tensor, Verdict]:
    """The run with the statistics, or with fitted steps of the file, and what it showed."""
    from ..judge.trial import Verdict

    try:
        end = run(passes=trial.answers if trial.passes is not None else None)
        return end, judge(end)
    except SamplingError:
        return trial.start, Verdict(math.inf)


def _stated(file: EMSFile, steps: FittedSteps) -> float:
    """The mean squared error of these steps in fewer passes, as the file has it."""
    return min(row.fitted[2] for row in file.meta.passes if row.coefficients == steps)


def _usual(levels: Tensor, space: Space, low: float, steps: int, begin: float | None = None) -> Tensor:
    """The steps down to sigma `low` that a user without fitted ones takes; from sigma `begin`, or the same level."""
    high = begin or float((-space.lambda_of(levels[:1])).exp())
    usual = karras(EDM(min(low, high / 2), high), steps, to_zero=True)
    usual = usual / (1 + usual) if space is Space.FLOW else usual
    return usual if begin else torch.cat([levels[:1], usual[1:]])


def _failure(origin: Origin, case: _Case, verdict: Verdict) -> str:
    """What the user is told of a file that failed."""
    off = f"(they lead {verdict.ratio:.3g} times as far off as right ones)"
    shown = f"the first run with them ({case.name}) shows that they do not suit this model {off}"
    if case.part == "failed":
        advice = "Sampling with data prediction; to have statistics that fit, compute them for this model"
        return f"EMS {origin.name} were not used: {shown}. {advice}"
    what, then = (
        ("in fewer passes", "Every step is guided") if case.part == "guided" else ("for image to image", "Sampling without")
    )
    advice = f"{then}; to have such steps that fit, compute them for this model"
    return f"the steps {what} of {origin.name} are not taken: {shown}. {advice}"
