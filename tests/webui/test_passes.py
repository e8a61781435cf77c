"""Steps in fewer passes in a real Forge: passes are counted at the network, the picture is the library's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from webui_server import NAME, TREES, WebUI, serving

from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.rows import EMSMeta, FittedRow
from dpm_solver_v3.sampler import FittedSteps, sample_dpm_solver_v3

FORGES = [tree for tree in TREES if (tree / "backend").is_dir()]
CFG, STEPS = 3.0, 6
LAMBDAS = (-2.6, -1.9, -1.1, -0.3, 0.6, 1.7, 3.0)
GUIDED = (False, True, True, True, True, True, False)


def file_of(name: str) -> EMSFile:
    """A file with first-order steps on the newest answer, the conditional one alone at both ends."""
    decay = [*(math.exp(a - b) for a, b in pairwise(LAMBDAS)), 0.0]
    known = [sum(1 + both for both in GUIDED[: i + 1]) for i in range(len(GUIDED))]
    weights = tuple((*(0.0,) * (n - 1), 1 - d) for n, d in zip(known, decay, strict=True))
    steps = FittedSteps(LAMBDAS, tuple(decay), weights, guided=GUIDED)
    row = FittedRow(CFG, len(LAMBDAS), LAMBDAS, steps, (1.0,) * 3, (2.0,) * 3, "6 guided steps", (0.5, 0.4, 0.6), 8)
    six = (*decay[:5], 0.0)
    plain = FittedSteps(LAMBDAS[:-1], six, tuple((*(0.0,) * i, 1 - d) for i, d in enumerate(six)))
    guided = replace(row, steps=STEPS, lambdas=LAMBDAS[:-1], coefficients=plain, fixed_schedule="karras")
    meta = EMSMeta("sigma", 0.0292, 14.61, model={"name": name}, date="2026-01-01", fitted=(guided,), passes=(row,))
    grid = torch.linspace(-2.8, 3.5, 12, dtype=torch.float64)
    ones, zeros = torch.ones(1, 12, 4), torch.zeros(1, 12, 4)
    return EMSFile(grid, torch.tensor([CFG], dtype=torch.float64), ones, zeros, zeros, meta)


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    if not FORGES:
        pytest.skip("no Forge given: WEBUI_PATH names none")
    with serving(FORGES[0], tmp_path_factory.mktemp("web ui") / "data", file_of("tiny")) as server:
        yield server


def test_as_many_passes_as_guided_steps_and_one_more_step(forge: WebUI) -> None:
    guided = forge.picture(scheduler=f"{NAME} fitted", steps=STEPS, cfg_scale=CFG)
    assert len(guided.calls) == STEPS and guided.rows == 2 * STEPS
    made = forge.picture(scheduler=f"{NAME} fewer passes", steps=STEPS, cfg_scale=CFG)
    assert len(made.calls) == STEPS + 1 and made.rows == 2 * STEPS
    assert f"7 steps in the passes of {STEPS}, 5 of them guided, fitted at cfg {CFG:g}" in forge.log()
    assert f"{2 * STEPS} passes of the network in 7 steps" in forge.log()
    answers = iter(made.calls)

    def passes(x: Tensor, sigma: Tensor, both: bool) -> tuple[Tensor, ...]:
        its, _, denoised = next(answers)
        assert (x - its).abs().max() < 1e-4 * its.abs().max()
        return (torch.zeros_like(denoised), denoised) if both else (denoised,)  # no step uses c where D is known

    sigmas = torch.stack([sigma[0] for _, sigma, _ in made.calls] + [torch.zeros(())])
    ems = file_of("tiny").at(CFG)
    result = sample_dpm_solver_v3(lambda x, s: x, made.calls[0][0], sigmas, disable=True, ems=ems, passes=passes)
    assert (result - made.latents).abs().max() < 1e-4 * made.latents.abs().max()


def test_prompts_joined_by_and_are_guided_at_every_step(forge: WebUI) -> None:
    made = forge.picture(prompt="a fox AND a boat :0.5", scheduler=f"{NAME} fewer passes", steps=STEPS, cfg_scale=CFG)
    assert len(made.calls) == STEPS + 1 and made.rows == 3 * (STEPS + 1)
    assert "no pass was left out (several prompts joined by AND)" in forge.log()
