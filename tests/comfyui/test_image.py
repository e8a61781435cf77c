"""Steps for image to image in a real ComfyUI: with the fitted scheduler below denoise 1, with no other."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from workflows import Part, compute, ems_file, sampled, slow

from dpm_solver_v3.ems_tools.file.reader import load_ems_file
from dpm_solver_v3.sampler import VPDiscrete, karras
from dpm_solver_v3.sampler.fitted import REACH

STEPS, SHAPE = 5, "2,9,8,8"  # no other test has a file for nine channels
SAID = f"image to image: {STEPS} steps fitted for it"


@pytest.fixture
def image_server(any_server: Any, nodes: Any) -> Any:
    """With a file that holds steps for image to image, computed there."""
    if not any_server.lists_schedulers:
        pytest.skip("this ComfyUI is older than its list of scheduler functions")
    if not ems_file(any_server, "image").exists():
        any_server.run(nodes(*slow(0.0, SHAPE), compute("image", steps=str(STEPS), image_to_image=True)))
    return any_server


def from_a_picture(server: Any, nodes: Any, **changed: Any) -> tuple[torch.Tensor, int, str]:
    """A picture in 12 steps, and what a second run makes of it: latent, its evaluations for each picture, log."""
    parts: list[Part] = [*slow(0.0, SHAPE), ("first", *sampled(steps=12)[0][1:])]
    server.run(nodes(*parts, ("kept", "SaveLatent", {"samples": ["first", 0], "filename_prefix": "latents/first"})))
    before = len(server.log())
    outputs = server.run(nodes(*parts, *sampled(latent_image=["first", 0], steps=STEPS, seed=2, **changed)))
    said = server.log()[before:]
    return server.latent(outputs), sum(map(int, re.findall(r"evaluated (\d+) rows", said))) // 2, said


def test_the_file_holds_some(image_server: Any) -> None:
    rows = load_ems_file(ems_file(image_server, "image")).meta.partial
    assert rows and {row.steps for row in rows} == {STEPS}


def denoise_with_steps(server: Any) -> float:
    """One at which a run begins where the file holds steps: the scheduler gives Karras steps for these counts."""
    begins = [row.lambdas[0] for row in load_ems_file(ems_file(server, "image")).meta.partial]
    for total in range(8, 17):
        first = -float(karras(VPDiscrete.linear(), total, to_zero=True)[-STEPS - 1].log())
        if min(abs(first - begin) for begin in begins) < REACH:
            return STEPS / (total + 0.5)
    raise AssertionError(f"no run begins near {begins}")


def test_they_are_taken_with_the_fitted_scheduler(image_server: Any, nodes: Any) -> None:
    """As many evaluations as steps, and another picture than on the same number of Karras steps, which are followed."""
    denoise = denoise_with_steps(image_server)
    fitted, made, said = from_a_picture(image_server, nodes, scheduler="dpm_solver_v3_fitted", denoise=denoise)
    assert made == STEPS and SAID in said
    karras_steps, made, said = from_a_picture(image_server, nodes, scheduler="karras", denoise=denoise)
    assert made == STEPS and SAID not in said and not torch.allclose(karras_steps, fitted, atol=1e-4)


def test_a_run_from_noise_is_none(image_server: Any, nodes: Any) -> None:
    _, made, said = from_a_picture(image_server, nodes, scheduler="dpm_solver_v3_fitted", denoise=1.0)
    assert made == STEPS and SAID not in said
