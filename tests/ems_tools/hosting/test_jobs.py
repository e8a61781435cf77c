"""What the hosts' "compute" share: what an effort costs, and when a finished file answers a request."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from dpm_solver_v3.ems_tools.compute import EFFORTS, compute_ems, evaluations, job_for, plan_for
from dpm_solver_v3.ems_tools.estimate.job import EstimateError, Progress
from dpm_solver_v3.ems_tools.estimate.source import Source
from dpm_solver_v3.ems_tools.file import SUFFIX
from dpm_solver_v3.ems_tools.hosting.jobs import (
    Watch,
    effort_in_words,
    evaluations_of_effort,
    in_words,
    place_for,
    request_facts,
    scales_of,
)
from dpm_solver_v3.sampler import VPDiscrete, karras

TINY = replace(
    EFFORTS["quick"],
    samples=2,
    intervals=4,
    noises=2,
    steps=(5,),
    reference_steps=10,
    fit=replace(EFFORTS["quick"].fit, steps=(4,), noises=2, held_out=2),
)


def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Of data that are normal with variance 1 / 4."""
    s2 = sigma.reshape(-1, 1, 1, 1) ** 2
    return x * 0.25 / (0.25 + s2)


def source(prompt: str = "a cat", **changed: object) -> Source:
    schedules = {"karras": lambda n: karras(VPDiscrete.linear(), n, to_zero=True)}
    identity = {"name": "toy", **request_facts(prompt, tuple(schedules))}
    parts = {"models": {1.0: denoiser}, "shape": (2, 4, 4), "schedule": VPDiscrete.linear(), "identity": identity}
    return Source(**{**parts, "host_schedules": schedules, **changed})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("ems")
    mine = source()
    compute_ems(mine, job_for(mine, TINY), plan_for(mine, TINY), found / f"toy{SUFFIX}")
    return found


def test_the_same_request_gets_the_same_file(folder: Path) -> None:
    mine = source()
    said: list[str] = []
    path, file = place_for(folder, "toy", mine, job_for(mine, TINY), plan_for(mine, TINY), said.append)
    assert path == folder / f"toy{SUFFIX}" and file is not None
    assert "computed before" in said[0]


@pytest.mark.parametrize("what", ["prompt", "moments", "steps", "held out", "reference", "seed", "probes", "another name"])
def test_a_changed_request_gets_a_file_of_its_own(folder: Path, what: str) -> None:
    """At 0f04534 another prompt, keep_moments, fitted steps, held-out noises or reference returned the old file."""
    mine = source("a dog") if what == "prompt" else source()
    effort = TINY
    if what == "steps":
        effort = replace(TINY, fit=replace(TINY.fit, steps=(4, 5)))
    if what == "held out":
        effort = replace(TINY, fit=replace(TINY.fit, held_out=3))
    if what == "reference":
        effort = replace(TINY, reference_steps=12)
    job = job_for(mine, effort, 1 if what == "seed" else 0)
    job = replace(job, probes=2) if what == "probes" else job
    name = "other" if what == "another name" else "toy"
    path, file = place_for(folder, name, mine, job, plan_for(mine, effort), print, keep_moments=what == "moments")
    assert file is None and path == folder / f"{'other' if what == 'another name' else 'toy_2'}{SUFFIX}"


def test_efforts_cost_what_their_description_says() -> None:
    """At 0f04534 the description of "quick" said 2,320 evaluations and a computation made 2,908."""
    for name, effort in EFFORTS.items():
        mine = source()
        total = evaluations(job_for(mine, effort), plan_for(mine, effort))
        assert evaluations_of_effort(name) == total
        assert f"{name}: {total:,} model evaluations" in effort_in_words()
    assert evaluations_of_effort("quick", (1.0, 4.0, 7.5)) == 3 * evaluations_of_effort("quick")


def test_fewer_passes_cost_more_at_every_guided_scale() -> None:
    once = evaluations_of_effort("quick", (4.0,), passes=True)
    assert once > 1.5 * evaluations_of_effort("quick")
    assert evaluations_of_effort("quick", (1.0,), passes=True) == evaluations_of_effort("quick")
    mine = source(models=dict.fromkeys((1.0, 4.0), denoiser))
    effort = EFFORTS["quick"]
    total = evaluations(job_for(mine, effort), plan_for(mine, effort, passes=True))
    assert evaluations_of_effort("quick", (1.0, 4.0), passes=True) == total == once + evaluations_of_effort("quick")


def test_scales_and_durations() -> None:
    assert scales_of("4, 1; 7.5,") == (1.0, 4.0, 7.5)
    for bad in ("", "one", "0", "-1"):
        with pytest.raises(EstimateError, match="above 0"):
            scales_of(bad)
    assert [in_words(s) for s in (-1, 40, 720, 5400)] == ["0 s", "40 s", "12 min", "1.5 h"]


class Cancelled(BaseException):
    """As ComfyUI's interrupt: no Exception."""


@pytest.mark.parametrize("stages", ["fit", "evidence and fit"])
def test_a_cancelled_job_loses_no_finished_run(tmp_path: Path, stages: str) -> None:
    """Cancelled again and again, each time after some new evaluations: nothing that was finished is done again, and the
    progress goes on where it was."""
    made, stops = [0], 40
    effort = replace(TINY, schedules=0 if stages == "fit" else 1, steps=(3, 5), strengths=(0.5,))

    def counted(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        made[0] += len(x)
        return denoiser(x, sigma)

    mine = source(models={1.0: counted, 2.0: counted})
    job, plan, path = job_for(mine, effort), plan_for(mine, effort), tmp_path / f"cut{SUFFIX}"
    undisturbed = Watch(job, plan)
    whole = compute_ems(mine, job, plan, tmp_path / f"whole{SUFFIX}", progress=cast("Any", undisturbed.update))
    needed, made[0], seen = made[0], 0, [0]
    for _ in range(stops):
        watch, begun = Watch(job, plan), made[0]

        def cancel(p: Progress, watch: Watch = watch, begun: int = begun) -> None:
            watch.update(p)
            if made[0] - begun > 40:
                raise Cancelled

        try:
            assert compute_ems(mine, job, plan, path, batch=2, progress=cancel).meta.fitted == whole.meta.fitted
            break
        except Cancelled:
            assert watch.done > seen[-1]
            seen.append(watch.done)
    assert path.exists() and watch.done == undisturbed.done and len(seen) > 3
    assert made[0] <= needed + 25 * len(seen)  # a cancel costs the run or the batch that it falls into
