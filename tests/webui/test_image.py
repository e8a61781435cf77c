"""Steps for image to image in real WebUIs: img2img on the fitted schedule type evaluates where the file says."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from webui_server import NAME, TREES, WebUI, serving

from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.rows import EMSMeta, FittedRow
from dpm_solver_v3.sampler import FittedSteps, VPDiscrete, karras

CFG, TOTAL, MADE = 3.0, 8, 5
"""Of 8 steps at a denoising strength of 0.5 hosts make 4 and one more."""


def lambdas() -> tuple[float, ...]:
    """From where hosts begin then, to another end than theirs."""
    first = -float(karras(VPDiscrete.linear(), TOTAL, to_zero=True)[-MADE - 1].log())
    return tuple(round(first + 0.6 * i, 6) for i in range(MADE))


def file_of(name: str) -> EMSFile:
    """First-order steps for image to image."""
    where = lambdas()
    decay = (*(math.exp(a - b) for a, b in pairwise(where)), 0.0)
    steps = FittedSteps(where, decay, tuple((*(0.0,) * i, 1 - d) for i, d in enumerate(decay)))
    row = FittedRow(CFG, MADE, where, steps, (1.0,) * 3, (2.0,) * 3, "Karras", (0.5, 0.4, 0.6), 8)
    meta = EMSMeta("sigma", 0.0292, 14.61, model={"name": name}, date="2026-01-01", partial=(row,))
    grid = torch.linspace(-2.8, 3.5, 12, dtype=torch.float64)
    ones, zeros = torch.ones(1, 12, 4), torch.zeros(1, 12, 4)
    return EMSFile(grid, torch.tensor([CFG], dtype=torch.float64), ones, zeros, zeros, meta)


@pytest.fixture(scope="module", params=TREES, ids=[tree.name for tree in TREES])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    with serving(request.param, tmp_path_factory.mktemp("web ui") / "data", file_of("tiny")) as made:
        yield made


def test_img2img_evaluates_where_the_file_says(server: WebUI) -> None:
    """On the host's own Karras type it does not."""
    start: dict[str, Any] = {"init_images": [base64.b64encode(server.picture().png).decode()], "denoising_strength": 0.5}
    for scheduler, ours in ((f"{NAME} fitted", True), ("Karras", False)):
        made = server.picture(kind="img2img", scheduler=scheduler, steps=TOTAL, cfg_scale=CFG, **start)
        found = [-float(sigma[0].log()) for _, sigma, _ in made.calls]
        assert len(found) == MADE and found[0] == pytest.approx(lambdas()[0], abs=0.01)
        assert (found == pytest.approx(lambdas(), abs=0.01)) == ours
    assert server.log().count(f"image to image: {MADE} steps fitted for it") == 1
