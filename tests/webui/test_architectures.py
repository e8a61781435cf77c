"""SDXL's and Flux's layout in a real Forge, in small (`make_checkpoint.py`, `pack/scripts/small.py`), with random weights."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from webui_server import NAME, TREES, WebUI, browser_page, compute, replay

from dpm_solver_v3.ems_tools.file.reader import load_ems_file

FORGES = [tree for tree in TREES if (tree / "backend").is_dir()]
CHANNELS, SPACES = {"sdxl": 4, "flux": 16}, {"sdxl": "sigma", "flux": "flow"}
SCHEDULES = {"sdxl": "Automatic", "flux": "Simple"}
LORA = {"sdxl": ("lora_unet_middle_block_1_proj_out", 320), "flux": ("lora_unet_double_blocks_0_img_attn_proj", 256)}


@pytest.fixture(scope="module", params=["sdxl", "flux"])
def webui(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    if not FORGES:
        pytest.skip("no Forge given: WEBUI_PATH names none")
    server = WebUI(FORGES[0], tmp_path_factory.mktemp("web ui") / "data", (request.param,), request.param)
    name, width = LORA[request.param]
    draw = torch.Generator().manual_seed(1)
    parts = {f"{name}.lora_up.weight": (width, 4), f"{name}.lora_down.weight": (4, width)}
    (server.base / "models" / "Lora").mkdir()
    save_file(
        {k: torch.randn(v, generator=draw) / 4 for k, v in parts.items()},
        server.base / "models" / "Lora" / "strong.safetensors",
    )
    try:
        server.start()
        yield server
    finally:
        server.stop()


def test_computed_and_used(webui: WebUI) -> None:
    """Without a file, then with the one that the tab computes: the picture is the library's, with a LoRA too."""
    kind = webui.checkpoint.stem
    steps = SCHEDULES[kind]
    without = webui.picture(width=128, height=128, scheduler=steps)
    assert f"{NAME} EMS: none" in without.infotext and without.pixels.isfinite().all()
    assert f"{CHANNELS[kind]} channels): sampling without statistics" in webui.log()
    with browser_page(webui) as page:
        assert f"{kind}.ems.safetensors" in compute(page, "Done:")
    file = load_ems_file(webui.folder / f"{kind}.ems.safetensors")
    assert file.channels == CHANNELS[kind] and file.meta.space == SPACES[kind] and file.l.isfinite().all()
    made = webui.picture(scheduler=steps)
    assert f"{NAME} EMS: {kind} [" in made.infotext and "not used" not in webui.log()
    assert replay(webui, made, space=SPACES[kind]) < 1e-4
    with_lora = webui.picture(prompt="a fox <lora:strong:1>", scheduler=steps)
    assert f"{NAME} EMS: {kind} [" in with_lora.infotext and replay(webui, with_lora, space=SPACES[kind]) < 1e-4
    assert (with_lora.latents - made.latents).abs().max() > 1e-3


def test_fitted_schedule_gives_steps_of_the_model(webui: WebUI) -> None:
    made = webui.picture(scheduler=f"{NAME} fitted")
    assert f"Schedule type: {NAME} fitted" in made.infotext and made.pixels.isfinite().all()
    sigmas = torch.tensor([sigma[0].item() for _, sigma, _ in made.calls])
    assert (sigmas.diff() < 0).all() and (SPACES[webui.checkpoint.stem] == "sigma" or sigmas.max() <= 1)


def test_a_schedule_type_without_noise_levels(webui: WebUI) -> None:
    """Forge's "Automatic" gives time steps up to 9999 for Flux."""
    if SPACES[webui.checkpoint.stem] == "flow":
        with pytest.raises(AssertionError, match="choose Simple, Beta or DPM-Solver-v3 fitted"):
            webui.picture(scheduler="Automatic")


def test_hires_and_inpainting(webui: WebUI) -> None:
    plain: dict[str, Any] = {"scheduler": SCHEDULES[webui.checkpoint.stem]}
    hires: dict[str, Any] = {"hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.6, "hr_second_pass_steps": 4}
    large = webui.picture(enable_hr=True, hr_additional_modules=[], **hires, **plain)
    assert large.pixels.shape[-2:] == (96, 96) and large.pixels.isfinite().all() and NAME in large.infotext
    start = base64.b64encode(webui.picture(**plain).png).decode()
    masked: dict[str, Any] = {
        "init_images": [start],
        "mask": _half(Path(webui.base)),
        "denoising_strength": 0.7,
        "inpainting_fill": 1,
    }
    made = webui.picture(kind="img2img", **masked, **plain)
    assert NAME in made.infotext and made.latents.isfinite().all()


def _half(folder: Path) -> str:
    """A mask over the right half of 64 x 64, as base64."""
    from PIL import Image

    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    mask.save(folder / "mask.png")
    return base64.b64encode((folder / "mask.png").read_bytes()).decode()
