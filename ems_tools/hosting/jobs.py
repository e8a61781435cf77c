"""What every host's "compute" does alike: scales and prompts, what an effort costs, the file to write, progress in words."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ...sampler import VPDiscrete
from ..compute import EFFORTS, evaluations, is_result_of, job_for, plan_for
from ..estimate.job import EstimateError, Job, Progress, evaluations_of
from ..estimate.source import Source
from ..file.contents import EMSFile
from ..file.layout import SUFFIX
from ..file.reader import EMSFileError, load_ems_file
from ..judge.calibrate import CalibrationPlan
from ..share.library import safe_name

__all__ = [
    "PROMPTS",
    "Watch",
    "effort_in_words",
    "evaluations_of_effort",
    "in_words",
    "place_for",
    "request_facts",
    "scales_of",
]

_WINDOW, _SETTLED = 60.0, 2.0
"""Seconds over which the speed is measured, and those that must pass before a time is told."""
PROMPTS = (
    "a photograph of an old fisherman mending a net in a harbour at dawn",
    "a watercolour painting of a fox in a snowy birch forest",
    "a bowl of ramen with a soft egg on a wooden table, top view",
    "an isometric drawing of a small workshop full of tools",
    "a red sports car on a wet street at night, neon lights",
    "portrait of a young woman with freckles, soft window light",
    "a mountain lake with reflections, autumn, wide angle",
    "a simple logo of a blue whale, flat colours, white background",
    "macro photograph of a bee on a sunflower",
    "an astronaut riding a horse on a beach, oil on canvas",
    "the interior of a gothic cathedral, light through stained glass",
    "anime girl with a yellow umbrella in the rain",
    "a black and white photograph of a busy street market",
    "a crystal chess set, studio lighting, shallow depth of field",
    "a cosy cottage kitchen, children's book illustration",
)
"""Used beside the user's own prompt: statistics of one prompt do not carry over to others."""


def scales_of(text: str) -> tuple[float, ...]:
    """Guidance scales of a line such as "1, 4, 7.5". Raises EstimateError."""
    try:
        scales = tuple(sorted({float(part) for part in text.replace(";", ",").split(",") if part.strip()}))
    except ValueError:
        scales = ()
    if not scales or not all(0 < g <= 1000 for g in scales):
        raise EstimateError(f"guidance scales must be numbers above 0, such as '1, 4, 7.5', not {text!r}")
    return scales


def evaluations_of_effort(
    effort: str,
    scales: Sequence[float] = (1.0,),
    steps: tuple[int, ...] = (),
    passes: bool = False,
    image_to_image: bool = False,
) -> int:
    """Denoiser evaluations of an effort at these guidance scales, as `compute_ems` would make them.

    `steps` are the step counts to fit, those of the effort if empty; `passes` and `image_to_image` as in `plan_for`. Raises
    EstimateError for step counts that cannot be.
    """
    source = Source(dict.fromkeys(scales, _no_model), shape=(1, 1, 1), schedule=VPDiscrete.linear(), identity={})
    plan = plan_for(source, EFFORTS[effort], steps, passes, image_to_image)
    return evaluations(job_for(source, EFFORTS[effort], steps=steps), plan)


def _no_model(x: Tensor, level: Tensor) -> Tensor:
    """Counting needs no model."""
    raise NotImplementedError


def effort_in_words() -> str:
    """What each effort costs."""
    lines = [f"{name}: {evaluations_of_effort(name):,} model evaluations for each guidance scale" for name in EFFORTS]
    return "; ".join(lines) + ". The time that is left is shown while it runs."


def request_facts(prompts: str, schedules: Sequence[str] = ()) -> dict[str, str]:
    """What tells one request from another beside the model and the job, for a file's identity: as a digest.

    Args:
        prompts: all that the prompts say (texts, or a host's encodings of them as text).
        schedules: names of the host's step schedules that are judged on.
    """
    text = "\0".join([prompts, *schedules])
    return {"request": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]}


def place_for(
    folder: Path,
    name: str,
    source: Source,
    job: Job,
    plan: CalibrationPlan,
    log: Callable[[str], None],
    *,
    keep_moments: bool = False,
) -> tuple[Path, EMSFile | None]:
    """The file to write, and the finished file if this very job was done before. Other files are never written over.

    Args:
        folder: where files lie.
        name: as the user typed it, or the checkpoint's.
        source: the model; its identity holds `request_facts`.
        job: the estimate.
        plan: its calibration and fit.
        log: told of files that cannot be read, and of one that is used again.
        keep_moments: whether a file without moments will not do.

    Raises:
        EstimateError: 999 files of that name.
    """
    stem = safe_name(name).removesuffix(SUFFIX)
    for k in range(1, 1000):
        path = folder / f"{stem if k == 1 else f'{stem}_{k}'}{SUFFIX}"
        if not path.exists():
            return path, None
        try:
            file = load_ems_file(path)
        except EMSFileError as error:
            log(str(error))
            continue
        if is_result_of(file, source, job, plan) and (file.moments or not keep_moments):
            log(f"{path} was computed before with the same settings: used as it is")
            return path, file
    raise EstimateError(f"{folder} holds 999 files called {stem}: choose another name")


@dataclass
class Watch:
    """Progress of a whole computation, over its stages, and the time that is left."""

    job: Job
    plan: CalibrationPlan
    done: int = 0
    _stages: dict[str, int] = field(default_factory=dict)
    _earlier: dict[str, int] = field(default_factory=dict)
    _marks: list[tuple[float, int]] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Denoiser evaluations of everything."""
        return evaluations(self.job, self.plan)

    def update(self, p: Progress) -> str:
        """Count on to `p`; the state in words."""
        before = 0
        self._earlier[p.note if p.stage != "estimate" else ""] = p.earlier
        if p.stage != "estimate":
            self._stages[p.note] = p.total
            before = evaluations_of(self.job) + sum(total for note, total in self._stages.items() if note != p.note)
        self.done = min(before + p.done, self.total)
        self._mark(time.monotonic())
        each = self.seconds_each
        left = "" if each is None else f", {in_words(each * (self.total - self.done))} left"
        return f"{100 * self.done // self.total} % of {self.total:,} evaluations{left}: {p.note}"

    def _mark(self, now: float) -> None:
        """Keep when how many were done in this run, over the last `_WINDOW` seconds."""
        self._marks.append((now, self.done - sum(self._earlier.values())))
        while len(self._marks) > 2 and self._marks[1][0] < now - _WINDOW:
            del self._marks[0]

    @property
    def seconds_each(self) -> float | None:
        """Seconds for an evaluation of late, None until that can be told.

        The first evaluations load and warm up the model, so the first batch does not count, and then some seconds must pass.
        """
        (began, first), (now, last) = (self._marks[0], self._marks[-1]) if self._marks else ((0.0, 0), (0.0, 0))
        return (now - began) / (last - first) if now - began >= _SETTLED and last > first else None


def in_words(seconds: float) -> str:
    """A duration, as "40 s", "12 min" or "1.5 h"."""
    minutes = max(seconds, 0) / 60
    return f"{60 * minutes:.0f} s" if minutes < 1.5 else f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
