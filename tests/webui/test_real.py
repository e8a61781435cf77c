"""Inside a real WebUI on the CPU, with a model of random weights; `tests/shared/webui_server.py` says how to give one."""

from __future__ import annotations

import base64
import contextlib
import io
import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from webui_server import NAME, TREES, Run, WebUI, browser_page, compute, open_tab, replay, show, wait_for

from dpm_solver_v3.ems_tools.file.reader import load_ems_file
from dpm_solver_v3.sampler import FittedSteps

STEPS = 5
"""What the effort "tiny" fits."""


OPACITY = """() => {
  let opacity = 1
  for (let e = document.querySelector('#dpm_solver_v3_status .dpmv3-box'); e; e = e.parentElement)
    opacity *= getComputedStyle(e).opacity
  return opacity
}"""


@pytest.fixture(scope="module", params=TREES or [cast("Path", None)], ids=lambda tree: tree.name if tree else "no host")
def webui(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    if request.param is None:
        pytest.skip("no WebUI given: WEBUI_PATH names none")
    server = WebUI(request.param, tmp_path_factory.mktemp("web ui") / "data")
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def page(webui: WebUI) -> Iterator[Any]:
    with browser_page(webui) as opened:
        yield opened


def test_without_statistics(webui: WebUI) -> None:
    assert [s["name"] for s in webui.get("/sdapi/v1/samplers")].count(NAME) == 1
    made = webui.picture()
    assert f"Sampler: {NAME}" in made.infotext and f"{NAME} EMS: none" in made.infotext
    assert "no EMS for tiny (SD15, 4 channels): sampling without statistics" in webui.log()
    assert f"[{NAME}] the" not in webui.log()  # no part is left out


@pytest.mark.parametrize("kind", ["image", "fewer"])
def test_cost_counts_more_kinds_of_steps(webui: WebUI, page: Any, kind: str) -> None:
    if kind == "fewer" and not webui.forge:
        pytest.skip("only Forge can leave out passes")
    cost, box = page.locator("#dpm_solver_v3_cost").first, page.locator(f"#dpm_solver_v3_{kind} input")
    page.wait_for_function("() => document.querySelector('#dpm_solver_v3_cost').innerText.includes('About')")
    before = cost.inner_text()
    for act, same in ((box.check, False), (box.uncheck, True)):
        act()
        page.wait_for_timeout(500)
        deadline = time.monotonic() + 60
        while (cost.inner_text() == before) != same:
            assert time.monotonic() < deadline, cost.inner_text()
            time.sleep(0.2)


def test_tab_computes_for_the_checkpoint(webui: WebUI, page: Any) -> None:
    assert "tiny.ems.safetensors" in compute(page, "Done:")
    file = load_ems_file(webui.folder / "tiny.ems.safetensors")
    assert file.guidance.tolist() == [1.0, 3.0] and len(file.meta.evidence) == 4
    assert file.meta.model["name"] == "tiny" and len(str(file.meta.model["sha256"])) == 64
    page.locator("#dpm_solver_v3_shown svg").first.wait_for()
    page.locator("#dpm_solver_v3_verify").click()
    page.locator("#dpm_solver_v3_shown", has_text="tiny.ems.safetensors: ok").first.wait_for()


def test_interrupt_and_resume(webui: WebUI, page: Any) -> None:
    compute(page, "evidence at", name="again")
    page.locator("#dpm_solver_v3_interrupt").first.click()
    assert "again.ems.safetensors.partial" in wait_for(page, "Stopped.")
    page.locator("#dpm_solver_v3_compute:enabled").first.wait_for()
    assert (webui.folder / "again.ems.safetensors.partial").is_file()
    assert NAME in webui.picture().infotext
    assert "again.ems.safetensors" in compute(page, "Done:", name="again")
    once, resumed = (load_ems_file(webui.folder / f"{name}.ems.safetensors") for name in ("tiny", "again"))
    assert torch.allclose(once.l, resumed.l, atol=1e-4)
    (webui.folder / "again.ems.safetensors").unlink()


def test_page_opened_during_a_computation(webui: WebUI, page: Any) -> None:
    """It shows the status, the unfinished job, and which buttons act; Interrupt there ends the computation."""
    compute(page, " % of ", name="opened", effort="quick")
    opened = page.context.browser.new_page()
    opened.set_default_timeout(240_000)
    show(opened, webui)
    wait_for(opened, " % of ")
    for _ in range(30):  # gradio makes pale what waits for an answer, which here is everything all the time
        assert opened.evaluate(OPACITY) == 1
        opened.wait_for_timeout(100)
    opened.locator("#dpm_solver_v3_files", has_text="being computed").first.wait_for()
    assert not opened.locator("#dpm_solver_v3_compute").first.is_enabled()
    opened.locator("#dpm_solver_v3_interrupt").first.click()
    wait_for(opened, "Stopped.")
    opened.close()
    wait_for(page, "Stopped.")
    page.locator("#dpm_solver_v3_compute:enabled").first.wait_for()
    (webui.folder / "opened.ems.safetensors.partial").unlink()


def test_page_goes_on_after_a_lost_answer(webui: WebUI, page: Any) -> None:
    """A broken connection ends the page's asking: `javascript/dpm_solver_v3.js` begins it anew."""
    before = compute(page, " % of ", name="lost", effort="quick")
    page.context.set_offline(True)
    page.wait_for_timeout(3000)
    page.context.set_offline(False)
    page.locator("#dpm_solver_v3_interrupt").first.click()
    assert "lost.ems.safetensors.partial" in wait_for(page, "Stopped."), before
    page.locator("#dpm_solver_v3_compute:enabled").first.wait_for()
    (webui.folder / "lost.ems.safetensors.partial").unlink()


def test_picture_equals_the_library(webui: WebUI) -> None:
    """By the library's plain function as a sampler of that host, and by the library here on what the host's denoiser said."""
    mine, plain = webui.picture(), webui.picture("Library")
    assert f"{NAME} EMS: tiny [" in mine.infotext
    difference = (mine.pixels - plain.pixels).abs().max().item()
    replayed = replay(webui, mine)
    print(f"pixels {difference:.1e}, latents replayed {replayed:.1e}")
    assert mine.pixels.std() > 0.01 and difference < 1e-4 and replayed < 1e-4
    without = webui.picture(alwayson_scripts={NAME: {"args": ["none", "2", "none", "auto"]}})
    assert (without.pixels - mine.pixels).abs().max() > 1e-3  # the statistics matter, so the agreement means something


@contextlib.contextmanager
def fitted(webui: WebUI, **changed: Any) -> Iterator[FittedSteps]:
    """While the checkpoint's file has other entries of its metadata. Yields its steps for CFG 3, which the tab fitted."""
    path = webui.folder / "tiny.ems.safetensors"
    kept = path.read_bytes()
    file = load_ems_file(path)
    (steps,) = [row.coefficients for row in file.meta.fitted if row.guidance == 3]
    assert steps is not None and len(steps.lambdas) == STEPS
    try:
        replace(file, meta=replace(file.meta, **changed)).save(path)
        yield steps
    finally:
        path.write_bytes(kept)


def sigmas_of(made: Run) -> list[float]:
    return [sigma[0].item() for _, sigma, _ in made.calls]


def test_fitted_schedule(webui: WebUI) -> None:
    """The schedule type gives the file's own steps, and the sampler their coefficients: as the library does here."""
    with fitted(webui) as steps:
        made = webui.picture(scheduler=f"{NAME} fitted", steps=STEPS)
        assert sigmas_of(made) == pytest.approx([math.exp(-v) for v in steps.lambdas], rel=1e-4)
        assert f"Schedule type: {NAME} fitted" in made.infotext and f"{NAME} order: auto" in made.infotext
        replayed = replay(webui, made, start=1 / steps.start)
        print(f"latents replayed {replayed:.1e}")
        assert replayed < 1e-4
    webui.picture(scheduler=f"{NAME} fitted")
    assert "has no schedule fitted for 6 steps at cfg 3" in webui.log()


def test_fitted_steps_are_only_for_what_they_were_fitted_to(webui: WebUI) -> None:
    """Another sampler, another CFG scale, and another noise range, the host's or the file's: unfitted steps, and why."""
    nothing = {NAME: {"args": ["none", "auto", "auto", "auto"]}}

    def refused(words: str, **values: Any) -> None:
        before = len(webui.log())
        made = webui.picture(scheduler=f"{NAME} fitted", steps=STEPS, **values)
        assert f"Schedule type: {NAME} fitted" in made.infotext and made.pixels.isfinite().all()
        assert words in webui.log()[before:] and "steps instead" in webui.log()[before:]
        without = webui.picture(scheduler=f"{NAME} fitted", steps=STEPS, alwayson_scripts=nothing, **values)
        assert sigmas_of(made) == pytest.approx(sigmas_of(without), rel=1e-6)

    with fitted(webui):
        refused("suit the sampler dpm_solver_v3 only, not Euler", sampler="Euler")
        refused(f"has no schedule fitted for {STEPS} steps at cfg 5", cfg_scale=5)
        refused("this model's begins at", override_settings={"sd_noise_schedule": "Zero Terminal SNR"})
    with fitted(webui, space="flow"):
        refused("it was made for a rectified flow, this is a model of the EPS or v kind")


def test_options_of_one_picture_are_recorded(webui: WebUI) -> None:
    made = webui.picture(alwayson_scripts={NAME: {"args": ["tiny", "3", "raised", "0.25"]}})
    for part in ("EMS: tiny [", "order: 3", "corrector: raised", "strength: 0.25"):
        assert f"{NAME} {part}" in made.infotext


def test_paste_restores_the_options(webui: WebUI, page: Any) -> None:
    made = webui.picture(alwayson_scripts={NAME: {"args": ["tiny", "3", "raised", "0.3"]}})
    open_tab(page, "Txt2img" if page.get_by_role("tab", name="Txt2img").count() else "txt2img")
    page.locator("#txt2img_prompt textarea").first.fill(made.infotext)
    page.locator("#paste").first.click()
    title = re.search(rf"{NAME} EMS: (\S+ \[\w+\])", made.infotext)
    assert title is not None
    for name, value in {"ems": title[1], "order": "3", "corrector": "raised", "strength": "0.3"}.items():
        field = page.locator(f"#dpm_solver_v3_txt2img_{name} input").first
        deadline = time.monotonic() + 60
        while field.input_value() != value:
            assert time.monotonic() < deadline, (name, field.input_value())
            time.sleep(0.2)
    open_tab(page, "EMS")


def test_hires_and_img2img(webui: WebUI) -> None:
    more: dict[str, Any] = {"hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.6, "hr_second_pass_steps": 4}
    made = webui.picture(enable_hr=True, hr_additional_modules=[], **more)
    assert made.pixels.shape[-2:] == (96, 96) and NAME in made.infotext
    assert len(made.calls) == 10
    start = base64.b64encode(webui.picture().png).decode()
    again = webui.picture(kind="img2img", init_images=[start], denoising_strength=0.5)
    assert f"Sampler: {NAME}" in again.infotext and 3 <= len(again.calls) <= 4


def test_refiner(webui: WebUI) -> None:
    made = webui.picture(refiner_checkpoint="other", refiner_switch_at=0.5)
    assert f"{NAME} EMS: tiny [" in made.infotext and f"{NAME} refiner EMS: none" in made.infotext
    assert len(made.calls) == 6
    assert f"{NAME} EMS: tiny [" in webui.picture().infotext  # the first checkpoint is back


def test_plot_over_the_strength(webui: WebUI) -> None:
    (grid,) = [s for s in webui.get("/sdapi/v1/script-info") if s["name"] == "x/y/z plot" and not s["is_img2img"]]
    labels, axes = [a["label"] for a in grid["args"]], grid["args"][0]["choices"]
    assert f"[{NAME}] EMS" in axes
    values = [a["value"] for a in grid["args"]]
    chosen = {"X type": axes.index(f"[{NAME}] Strength"), "Y type": 0, "Z type": 0, "Draw legend": False}
    for label, value in chosen.items():
        values[labels.index(label)] = value
    values[1] = "0, 1"
    made = webui.picture(script_name=grid["name"], script_args=values, alwayson_scripts={NAME: {"args": ["tiny", "2"]}})
    assert f"[{NAME}] Strength" in made.infotext and f"{NAME} strength: 1" in webui.infotexts[-1]
    first, second = (text for text in webui.infotexts if "X Values" not in text)
    assert f"{NAME} strength: 0" in first and f"{NAME} strength: 1" in second


def test_reload_ui(webui: WebUI, page: Any) -> None:
    before = webui.picture()
    assert webui.log().count("Startup time") == 1
    open_tab(page, "Settings")
    page.locator("#settings_restart_gradio").click()
    webui.wait(starts=2)
    assert [s["name"] for s in webui.get("/sdapi/v1/samplers")].count(NAME) == 1
    assert torch.equal(webui.picture().pixels, before.pixels)
    show(page, webui)


def test_pictures_can_be_opened(webui: WebUI) -> None:
    from PIL import Image

    with Image.open(io.BytesIO(webui.picture().png)) as image:
        assert image.size == (64, 64) and f"{NAME} EMS: tiny" in image.info["parameters"]
