"""Steps in fewer passes in a real ComfyUI: passes are counted at the network, and left out where nothing else wants them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from workflows import Part, compute, ems_file, sampled, slow, toy

from dpm_solver_v3.ems_tools.file.reader import load_ems_file

SCHEDULER = "dpm_solver_v3_fewer_passes"
CFG, SHAPE = 3.0, "2,10,8,8"  # no other test has a file for ten channels


def counted(server: Any, workflow: dict[str, Any]) -> tuple[dict[str, Any], int, str]:
    """Outputs, passes for each of the two pictures as the network counts them, and what the log says of it."""
    before = len(server.log())
    outputs = server.run(workflow)
    said = server.log()[before:]
    return outputs, sum(map(int, re.findall(r"evaluated (\d+) rows", said))) // 2, said


@pytest.fixture
def passes_server(any_server: Any, nodes: Any) -> Any:
    """With a file that holds steps in fewer passes, computed there."""
    if not any_server.lists_schedulers:
        pytest.skip("this ComfyUI is older than its list of scheduler functions")
    if not ems_file(any_server, "passes").exists():
        any_server.run(nodes(*slow(0.0, SHAPE), compute("passes", f"{CFG:g}", steps="4, 5, 6, 8, 10", fewer_passes=True)))
    return any_server


@pytest.fixture
def steps(passes_server: Any) -> int:
    """How many guided steps cost as many passes as some in the file that win."""
    rows = load_ems_file(ems_file(passes_server, "passes")).meta.passes
    assert rows, "none of the toy's steps in fewer passes wins"
    return rows[0].passes // 2


def run(server: Any, nodes: Any, *more: Part, **changed: Any) -> tuple[dict[str, Any], int, str]:
    given = {"cfg": CFG, "scheduler": SCHEDULER, **changed}
    return counted(server, nodes(*slow(0.0, SHAPE), *sampled(**given), *more))


def test_as_many_passes_as_guided_steps_and_one_more_step(passes_server: Any, nodes: Any, steps: int) -> None:
    guided, passes, _ = run(passes_server, nodes, steps=steps, scheduler="dpm_solver_v3_fitted")
    assert passes == 2 * steps
    fewer, passes, said = run(passes_server, nodes, steps=steps)
    assert passes == 2 * steps
    found = re.search(rf"(\d+) steps in the passes of {steps}, (\d+) of them guided, fitted at cfg {CFG:g}", said)
    assert found is not None and int(found[1]) > steps and int(found[1]) + int(found[2]) == 2 * steps
    assert f"{2 * steps} passes of the network in {found[1]} steps" in said
    exact, _, _ = run(passes_server, nodes, scheduler="karras", steps=100)
    errors = [(passes_server.latent(v) - passes_server.latent(exact)).square().mean().log() for v in (guided, fewer)]
    assert errors[1] < errors[0] + 1.0  # one noise of two pictures: the file's own ratio is a mean over more


def test_steps_of_somebody_else_are_tried_once(passes_server: Any, nodes: Any, steps: int) -> None:
    """The same file, as far as sampling goes, under another digest: this machine did not compute it.

    On this toy the trial is at its limit; right rows of trained networks pass (`benchmarks/first_passes.py`).
    """
    own, _, _ = run(passes_server, nodes, steps=steps)
    file, path = (
        load_ems_file(ems_file(passes_server, "passes")),
        passes_server.base / "models" / "ems" / "theirs.ems.safetensors",
    )
    replace(file, b=file.b + 1e-7).save(path)
    theirs = ("theirs", "DPMSolverV3_LoadEMS", {"ems_name": path.name})
    parts = (theirs, ("with", "DPMSolverV3_ApplyEMS", {"model": ["model", 0], "strength": "auto", "ems": ["theirs", 0]}))
    tried, passes, said = run(passes_server, nodes, *parts, steps=steps, model=["with", 0])
    told = re.search(r"(\d+) passes of the network in \d+ steps and those of a trial", said)
    assert told is not None and passes >= int(told[1]) > 2 * (steps + 1)
    same = torch.allclose(passes_server.latent(tried), passes_server.latent(own), atol=1e-4)
    assert same != ("are not taken" in said and "Every step is guided" in said)
    if not same:  # then guided steps are taken from now on, which somebody else fitted as well
        run(passes_server, nodes, *parts, steps=steps, model=["with", 0], seed=2)
    _, passes, said = run(passes_server, nodes, *parts, steps=steps, model=["with", 0], seed=3)
    assert passes == 2 * steps and "trial" not in said
    path.unlink()  # else the other tests' runs would find it


def test_the_custom_sampler_gives_the_same(passes_server: Any, nodes: Any, steps: int) -> None:
    listed, _, _ = run(passes_server, nodes, steps=steps)
    chosen = {"model": ["model", 0], "schedule": "fitted, fewer passes", "steps": steps, "denoise": 1.0, "end": "zero"}
    wires = {"model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    noise = {"add_noise": True, "noise_seed": 1, "cfg": CFG}
    custom = [
        ("sampler", "KSamplerSelect", {"sampler_name": "dpm_solver_v3"}),
        ("sigmas", "DPMSolverV3_Scheduler", chosen),
        ("sample", "SamplerCustom", {**wires, **noise, "sampler": ["sampler", 0], "sigmas": ["sigmas", 0]}),
        sampled()[1],
    ]
    own, passes, _ = counted(passes_server, nodes(*slow(0.0, SHAPE), *custom))
    assert passes == 2 * steps
    assert torch.allclose(passes_server.latent(listed), passes_server.latent(own), atol=1e-5)


def test_every_step_is_guided_where_something_else_wants_the_pass(passes_server: Any, nodes: Any, steps: int) -> None:
    """Inpainting, and another node's function on the guided answer: the run goes on with full guidance and says why."""
    mask = ("mask", "SolidMask", {"value": 1.0, "width": 64, "height": 64})
    parts = sampled(cfg=CFG, steps=steps, scheduler=SCHEDULER, latent_image=["masked", 0])
    masked = ("masked", "SetLatentNoiseMask", {"samples": ["latent", 0], "mask": ["mask", 0]})
    _, passes, said = counted(passes_server, nodes(*slow(0.0, SHAPE), mask, masked, *parts))
    assert passes > 2 * steps and "no pass was left out (inpainting)" in said
    rescaled = ("rescaled", "RescaleCFG", {"model": ["model", 0], "multiplier": 0.7})
    _, passes, said = run(passes_server, nodes, rescaled, steps=steps, model=["rescaled", 0])
    assert passes == 2 * steps and "computed under" in said


def test_one_pass_at_cfg_1_and_none_for_step_counts_that_have_no_row(passes_server: Any, nodes: Any, steps: int) -> None:
    _, passes, _ = run(passes_server, nodes, steps=steps, cfg=1.0)
    assert passes == steps
    _, passes, said = run(passes_server, nodes, steps=7)
    assert passes == 2 * 7 and "no schedule fitted for 7 steps" in said


def test_a_model_without_a_file_gets_its_usual_steps(passes_server: Any, nodes: Any, steps: int) -> None:
    _, _, said = counted(passes_server, nodes(*toy("EPS", "2,11,8,8"), *sampled(scheduler=SCHEDULER, cfg=2.0)))
    assert "no EMS for this model: run Compute EMS once for fitted steps: " in said
