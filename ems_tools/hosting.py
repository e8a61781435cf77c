"""What every host's "compute" does alike: scales and prompts, the file to write, progress in words."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from .compute import EFFORTS, evaluations
from .estimate.run import EstimateError, Job, Progress, evaluations_of
from .estimate.source import Source
from .file.contents import SUFFIX, EMSFile, EMSFileError, load_ems_file
from .judge.calibrate import CalibrationPlan
from .share.library import safe_name

__all__ = ["PROMPTS", "Watch", "effort_in_words", "place_for", "scales_of"]

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
"""Beside the user's own: statistics of one prompt are that prompt's."""


def scales_of(text: str) -> tuple[float, ...]:
    """Guidance scales of a line such as "1, 4, 7.5". Raises EstimateError."""
    try:
        scales = tuple(sorted({float(part) for part in text.replace(";", ",").split(",") if part.strip()}))
    except ValueError:
        scales = ()
    if not scales or not all(0 < g <= 1000 for g in scales):
        raise EstimateError(f"guidance scales must be numbers above 0, such as '1, 4, 7.5', not {text!r}")
    return scales


def effort_in_words() -> str:
    """What each effort costs."""
    lines = []
    for name, e in EFFORTS.items():
        job = Job((1, 1, 1), tuple(float(k) for k in range(e.intervals + 1)), samples=e.samples, probes=e.probes)
        plan = CalibrationPlan({str(k): torch.zeros for k in range(e.schedules)}, e.steps, e.noises, e.noises)
        if e.combinations is not None:
            plan = CalibrationPlan(plan.schedules, e.steps, e.noises, e.noises, e.combinations, e.strengths, e.reference_steps)
        plan = replace(plan, fit=replace(e.fit, fixed=plan.schedules))
        total = evaluations(job, plan)
        lines.append(f"{name}: about {total} model evaluations for each guidance scale")
    return "; ".join(lines) + ". The time is shown once it runs."


def place_for(
    folder: Path, name: str, source: Source, job: Job, plan: CalibrationPlan, log: Callable[[str], None]
) -> tuple[Path, EMSFile | None]:
    """The file to write, and the finished file if this very job was done before. Other files are never written over."""
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
        if _same(file, source, job, plan):
            log(f"{path} was computed before with the same settings: used as it is")
            return path, file
    raise EstimateError(f"{folder} holds 999 files called {stem}: choose another name")


def _same(file: EMSFile, source: Source, job: Job, plan: CalibrationPlan) -> bool:
    facts = file.meta.estimate
    mine = {
        "samples": tuple(job.samples for _ in job.guidance),
        "seed": job.seed,
        "resolution": job.shape,
        "calibration_noises": plan.calibration,
        "fit_noises": plan.fit.noises if plan.fit else None,
    }
    same = all(facts.get(key) == value for key, value in mine.items())
    return same and dict(file.meta.model) == dict(source.identity) and tuple(file.guidance.tolist()) == job.guidance


@dataclass
class Watch:
    """Progress of a whole computation, over its stages, and the time that is left."""

    job: Job
    plan: CalibrationPlan
    done: int = 0
    _stages: dict[str, int] = field(default_factory=dict)
    _start: int = -1
    _began: float = 0.0

    @property
    def total(self) -> int:
        """Denoiser evaluations of everything."""
        return evaluations(self.job, self.plan)

    def update(self, p: Progress) -> str:
        """Count on to `p`; the state in words."""
        before = 0
        if p.stage != "estimate":
            self._stages[p.note] = p.total
            before = evaluations_of(self.job) + sum(total for note, total in self._stages.items() if note != p.note)
        self.done, now = min(before + p.done, self.total), time.monotonic()
        if self._start < 0:
            self._start, self._began = self.done, now
        new = self.done - self._start
        left = f", {_duration((now - self._began) / new * (self.total - self.done))} left" if new > 0 else ""
        return f"{100 * self.done // self.total} % of {self.total} evaluations{left}: {p.note}"


def _duration(seconds: float) -> str:
    minutes = max(seconds, 0) / 60
    return f"{60 * minutes:.0f} s" if minutes < 1.5 else f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
