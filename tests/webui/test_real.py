"""Inside a real WebUI on the CPU, with a model of random weights, driven through its API and its page.

WEBUI_PATH=/a/checkout python install.py --test -- tests/webui (several as in PATH). The checkout has what it needs installed in
its own `venv`; WEBUI_PYTHON names another Python. Its folder is only read: data lie in a folder of the test's own.
AUTOMATIC1111 also wants the tokenizer openai/clip-vit-large-patch14 in the cache of huggingface_hub.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dpm_solver_v3.ems_tools.file.reader import load_ems_file
from dpm_solver_v3.ems_tools.file.rows import FittedRow
from dpm_solver_v3.ems_tools.fit.steps import formula_step
from dpm_solver_v3.sampler import FittedSteps, sample_dpm_solver_v3

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TREES = [Path(p) for p in os.environ.get("WEBUI_PATH", "").split(os.pathsep) if p]
NAME = "DPM-Solver-v3"
START_SECONDS, RUN_SECONDS = 300, 300
A1111_ON_CPU = ["--use-cpu", "all", "--no-half", "--precision", "full", "--do-not-download-clip"]
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"


class WebUI:
    """One server; its data, and what it printed, below `base`."""

    def __init__(self, tree: Path, base: Path) -> None:
        self.tree, self.base = tree, base
        self.folder = base / "models" / "ems"
        self.process: subprocess.Popen[bytes] | None = None
        self.forge = (tree / "modules_forge").is_dir()
        (base / "extensions").mkdir(parents=True)
        for name, target in (("dpm v3 (odd).name", ROOT), ("recorder", HERE / "pack")):
            (base / "extensions" / name).symlink_to(target, target_is_directory=True)
        # Their picture of the steps needs a network that they would download.
        quiet = {"live_previews_enable": False, "show_progress_type": "Approx cheap"}
        (base / "config.json").write_text(json.dumps(quiet))
        models = base / "models" / "Stable-diffusion"
        for seed, name in enumerate(("tiny", "other")):
            make = [sys.executable, str(HERE / "make_checkpoint.py"), str(models / f"{name}.safetensors")]
            subprocess.run([*make, str(seed)], check=True)
            if not self.forge:  # AUTOMATIC1111 does not read the network's shape off its weights
                (models / f"{name}.yaml").write_text(self._small_config())

    def _small_config(self) -> str:
        text = (self.tree / "configs" / "v1-inference.yaml").read_text()
        for key, value in (("attention_resolutions", "[ 1 ]"), ("num_res_blocks", "1"), ("channel_mult", "[ 1 ]")):
            text = re.sub(rf"(\b{key}:) .*", rf"\1 {value}", text, count=1)
        return text

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        own = self.tree / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        python = os.environ.get("WEBUI_PYTHON") or (str(own) if own.exists() else sys.executable)
        command = [python, "launch.py", "--skip-prepare-environment", "--skip-torch-cuda-test", "--api"]
        command += ["--port", str(self.port), "--gradio-allowed-path", str(self.tree)]  # else Forge denies its own scripts
        command += ["--data-dir", str(self.base), "--ckpt", str(self.base / "models" / "Stable-diffusion" / "tiny.safetensors")]
        command += ["--always-cpu", "--all-in-fp32"] if self.forge else A1111_ON_CPU
        offline = {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        with (self.base / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.tree, env={**os.environ, **offline}, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self.wait()

    def wait(self, starts: int = 1) -> None:
        """Until it has started, or reloaded its page, so often; its API answers before, when it is not ready."""
        deadline = time.monotonic() + START_SECONDS
        while self.log().count("Startup time") < starts:
            assert self.process is not None and self.process.poll() is None, self.log()[-4000:]
            assert time.monotonic() < deadline, self.log()[-4000:]
            time.sleep(0.5)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def log(self) -> str:
        return (self.base / "server.log").read_text(encoding="utf-8", errors="replace")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.loads(answer.read())

    def post(self, path: str, data: Any) -> Any:
        request = urllib.request.Request(self.url + path, json.dumps(data).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=RUN_SECONDS) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.read().decode()[:2000]}\n{self.log()[-3000:]}") from error

    def picture(self, sampler: str = NAME, kind: str = "txt2img", **values: Any) -> Run:
        """One picture of 64 x 64."""
        plain = {
            "prompt": "a fox",
            "negative_prompt": "blurry",
            "steps": 6,
            "width": 64,
            "height": 64,
            "cfg_scale": 3,
            "seed": 1,
        }
        answer = self.post(f"/sdapi/v1/{kind}", {**plain, "sampler_name": sampler, **values})
        record = torch.load(self.base / "record.pt")
        self.infotexts: list[str] = json.loads(answer["info"])["infotexts"]
        return Run(self.infotexts[0], answer["images"][0], record)


class Run:
    """A picture, its parameters, and what the recorder kept of it."""

    def __init__(self, infotext: str, png: str, record: dict[str, Any]) -> None:
        self.infotext, self.png = infotext, base64.b64decode(png)
        self.calls: list[list[Tensor]] = record["calls"]
        self.latents: Tensor = record["latents"]
        self.pixels: Tensor = record["images"]  # float32 in [0, 1], before they are rounded


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
    """The tab "EMS" in a browser."""
    api = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on PATH")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS.split())
        opened = browser.new_page(viewport={"width": 1500, "height": 1300})
        opened.set_default_timeout(60_000)
        show(opened, webui)
        yield opened
        browser.close()


def show(page: Any, webui: WebUI) -> None:
    page.goto(webui.url, wait_until="domcontentloaded")
    open_tab(page, "EMS")
    page.locator("#dpm_solver_v3_compute").wait_for()


def open_tab(page: Any, name: str) -> None:
    """Tabs are buttons in gradio 3."""
    page.get_by_role("tab", name=name, exact=True).or_(page.get_by_role("button", name=name, exact=True)).first.click()


def compute(page: Any, until: str, name: str = "", effort: str = "tiny") -> str:
    """Fill the tab in and press Compute; the status once it holds `until`."""
    page.locator("#dpm_solver_v3_prompt textarea").fill("a fox")
    for side in ("width", "height"):
        field = page.locator(f"#dpm_solver_v3_{side} input[type=number]")
        field.fill("64")
        field.press("Tab")
    page.locator("#dpm_solver_v3_scales").locator("textarea, input").first.fill("1, 3")
    page.locator("#dpm_solver_v3_name").locator("textarea, input").first.fill(name)
    page.locator("#dpm_solver_v3_effort label", has_text=effort).click()
    page.locator("#dpm_solver_v3_compute").click()
    return wait_for(page, until)


def wait_for(page: Any, text: str) -> str:
    status = page.locator("#dpm_solver_v3_status").first  # gradio 3 gives an id twice
    deadline = time.monotonic() + RUN_SECONDS
    while text not in status.inner_text():
        assert time.monotonic() < deadline, status.inner_text()
        time.sleep(0.2)
    return str(status.inner_text())


def test_without_statistics(webui: WebUI) -> None:
    assert [s["name"] for s in webui.get("/sdapi/v1/samplers")].count(NAME) == 1
    made = webui.picture()
    assert f"Sampler: {NAME}" in made.infotext and f"{NAME} EMS: none" in made.infotext
    assert "no EMS for tiny (SD15, 4 channels): sampling without statistics" in webui.log()
    assert f"[{NAME}] the" not in webui.log()  # no part is left out


def test_tab_computes_for_the_checkpoint(webui: WebUI, page: Any) -> None:
    assert "tiny.ems.safetensors" in compute(page, "Done:")
    file = load_ems_file(webui.folder / "tiny.ems.safetensors")
    assert file.guidance.tolist() == [1.0, 3.0] and len(file.meta.evidence) == 4
    assert file.meta.model["name"] == "tiny" and len(str(file.meta.model["sha256"])) == 64
    page.locator("#dpm_solver_v3_shown svg").first.wait_for()
    wanted = os.environ.get("WEBUI_SCREENSHOT")
    page.screenshot(path=wanted or str(webui.base / "tab.png"), full_page=True)
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
    show(opened, webui)
    wait_for(opened, " % of ")
    opened.locator("#dpm_solver_v3_files", has_text="being computed").first.wait_for()
    assert not opened.locator("#dpm_solver_v3_compute").first.is_enabled()
    opened.locator("#dpm_solver_v3_interrupt").first.click()
    wait_for(opened, "Stopped.")
    opened.close()
    wait_for(page, "Stopped.")
    page.locator("#dpm_solver_v3_compute:enabled").first.wait_for()
    (webui.folder / "opened.ems.safetensors.partial").unlink()


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


def replay(webui: WebUI, run: Run, start: float = 1.0) -> float:
    """The largest difference of a state or of the result, over the size of the latents; the run began with `start` times x."""
    calls = iter(run.calls)
    worst = 0.0

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal worst
        its, _, denoised = next(calls)
        its = its[: len(denoised)]  # AUTOMATIC1111 tells of the conditioned and the unconditioned half
        worst = max(worst, ((x - its).abs().max() / its.abs().max()).item())
        return denoised

    sigmas = torch.stack([sigma[0] for _, sigma, _ in run.calls] + [torch.zeros(())])
    ems = load_ems_file(webui.folder / "tiny.ems.safetensors").at(3.0)
    noise = run.calls[0][0][: len(run.calls[0][2])]
    result = sample_dpm_solver_v3(denoiser, noise * start, sigmas, disable=True, ems=ems, guidance=3.0)
    return max(worst, ((result - run.latents).abs().max() / run.latents.abs().max()).item())


def test_fitted_schedule(webui: WebUI) -> None:
    """The schedule type gives the file's own steps, and the sampler their coefficients: as the library does here."""
    path = webui.folder / "tiny.ems.safetensors"
    kept = path.read_bytes()
    file = load_ems_file(path)
    lambdas = (-2.4, -1.5, -0.6, 0.3, 1.4, 2.6)
    formula = [formula_step(lambdas, i, then) for i, then in enumerate([*lambdas[1:], math.inf])]
    steps = FittedSteps(lambdas, tuple(decay for decay, _ in formula), tuple(tuple(row) for _, row in formula), 1.02)
    row = FittedRow(3.0, 6, lambdas, steps, (1.0,) * 3, (2.0,) * 3, "karras", (0.5, 0.4, 0.6), 8)
    try:
        replace(file, meta=replace(file.meta, fitted=(row,))).save(path)
        tried = webui.picture(scheduler=f"{NAME} fitted")
        assert len(tried.calls) > 6 and "were not used" not in webui.log()  # not this machine's file: tried on its first use
        made = webui.picture(scheduler=f"{NAME} fitted")
        sigmas = [sigma[0].item() for _, sigma, _ in made.calls]
        assert sigmas == pytest.approx([math.exp(-v) for v in lambdas], rel=1e-4)
        assert f"Schedule type: {NAME} fitted" in made.infotext and f"{NAME} order: auto" in made.infotext
        replayed = replay(webui, made, start=1 / 1.02)
        print(f"latents replayed {replayed:.1e}")
        assert replayed < 1e-4
        other = webui.picture(sampler="Euler", scheduler=f"{NAME} fitted")
        assert f"Schedule type: {NAME} fitted" in other.infotext
        assert "suit the sampler dpm_solver_v3 only, not Euler" in webui.log()
    finally:
        path.write_bytes(kept)
    webui.picture(scheduler=f"{NAME} fitted")
    assert "has no schedule fitted for 6 steps at cfg 3" in webui.log()


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
