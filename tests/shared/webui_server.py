"""A real WebUI on the CPU as a server, with models of random weights, driven through its API and its page.

WEBUI_PATH=/a/checkout python install.py --test -- tests/webui (several as in PATH). The checkout has what it needs installed in
its own `venv`; WEBUI_PYTHON names another Python. Its folder is only read: data lie in a folder of the test's own.
AUTOMATIC1111 also wants the tokenizer openai/clip-vit-large-patch14 in the cache of huggingface_hub.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import end
from torch import Tensor

from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.reader import load_ems_file
from dpm_solver_v3.ems_tools.hosting import TrustBook
from dpm_solver_v3.sampler import sample_dpm_solver_v3

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "webui"
TREES = [Path(p) for p in os.environ.get("WEBUI_PATH", "").split(os.pathsep) if p]
NAME = "DPM-Solver-v3"
START_SECONDS, RUN_SECONDS = 900, 900
A1111_ON_CPU = ["--use-cpu", "all", "--no-half", "--precision", "full", "--do-not-download-clip"]
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"


class WebUI:
    """One server; its data, and what it printed, below `base`. It starts with the first of its checkpoints, of one `kind`.

    `pack` is the folder of the extension that stands beside ours.
    """

    def __init__(
        self, tree: Path, base: Path, checkpoints: tuple[str, ...] = ("tiny", "other"), kind: str = "sd15", pack: str = "pack"
    ) -> None:
        self.tree, self.base = tree, base
        self.folder = base / "models" / "ems"
        self.process: subprocess.Popen[bytes] | None = None
        self.forge = (tree / "modules_forge").is_dir()
        (base / "extensions").mkdir(parents=True)
        for name, target in (("dpm v3 (odd).name", ROOT), (pack, FOLDER / pack)):
            (base / "extensions" / name).symlink_to(target, target_is_directory=True)
        # Their picture of the steps needs a network that they would download. What one picture overrides is put back after it
        # only if it stands here.
        own = {"live_previews_enable": False, "show_progress_type": "Approx cheap", "sd_noise_schedule": "Default"}
        (base / "config.json").write_text(json.dumps(own))
        models = base / "models" / "Stable-diffusion"
        self.checkpoint = models / f"{checkpoints[0]}.safetensors"
        for seed, name in enumerate(checkpoints):
            make = [sys.executable, str(FOLDER / "make_checkpoint.py"), str(models / f"{name}.safetensors")]
            subprocess.run([*make, str(seed), kind], check=True)
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
        command += ["--data-dir", str(self.base), "--ckpt", str(self.checkpoint)]
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
        end(self.process)

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


@contextlib.contextmanager
def serving(tree: Path, base: Path, file: EMSFile) -> Iterator[WebUI]:
    """A running server that has this file for its first checkpoint, computed on this computer."""
    server = WebUI(tree, base)
    server.folder.mkdir(parents=True)
    file.save(server.folder / f"{server.checkpoint.stem}.ems.safetensors")
    TrustBook(base / "cache" / "dpm-solver-v3-trust.json").computed(file)
    try:
        server.start()
        yield server
    finally:
        server.stop()


class Run:
    """A picture, its parameters, and what the recorder kept of it."""

    def __init__(self, infotext: str, png: str, record: dict[str, Any]) -> None:
        self.infotext, self.png = infotext, base64.b64decode(png)
        self.calls: list[list[Tensor]] = record["calls"]
        self.latents: Tensor = record["latents"]
        self.rows: int = record["rows"]
        self.pixels: Tensor = record["images"]  # float32 in [0, 1], before they are rounded


@contextlib.contextmanager
def browser_page(webui: WebUI) -> Iterator[Any]:
    """The tab "EMS" in a browser."""
    api = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on PATH")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS.split())
        opened = browser.new_page(viewport={"width": 1500, "height": 1300})
        opened.set_default_timeout(240_000)
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


def compute(page: Any, until: str, name: str = "", effort: str = "tiny", pixels: int = 64, scales: str = "1, 3") -> str:
    """Fill the tab in and press Compute; the status once it holds `until`."""
    page.locator("#dpm_solver_v3_prompt textarea").fill("a fox")
    for side in ("width", "height"):
        field = page.locator(f"#dpm_solver_v3_{side} input[type=number]")
        field.fill(str(pixels))
        field.press("Tab")
    page.locator("#dpm_solver_v3_scales").locator("textarea, input").first.fill(scales)
    page.locator("#dpm_solver_v3_name").locator("textarea, input").first.fill(name)
    page.locator("#dpm_solver_v3_effort label", has_text=effort).click()
    page.locator("#dpm_solver_v3_compute").click()
    return wait_for(page, until)


def wait_for(page: Any, text: str) -> str:
    status = page.locator("#dpm_solver_v3_status").first  # gradio 3 gives an id twice
    deadline = time.monotonic() + RUN_SECONDS
    while text not in status.inner_text():
        assert time.monotonic() < deadline, status.inner_text()
        time.sleep(0.5)
    return str(status.inner_text())


def replay(webui: WebUI, run: Run, start: float = 1.0, space: str = "sigma") -> float:
    """The largest difference of a state or of the result, over the size of the latents; the run began with `start` times x.

    By the library here, on what the host's denoiser said.
    """
    calls = iter(run.calls)
    worst = 0.0

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal worst
        its, _, denoised = next(calls)
        its = its[: len(denoised)]  # AUTOMATIC1111 tells of the conditioned and the unconditioned half
        worst = max(worst, ((x - its).abs().max() / its.abs().max()).item())
        return denoised

    sigmas = torch.stack([sigma[0] for _, sigma, _ in run.calls] + [torch.zeros(())])
    ems = load_ems_file(webui.folder / f"{webui.checkpoint.stem}.ems.safetensors").at(3.0)
    noise = run.calls[0][0][: len(run.calls[0][2])]
    result = sample_dpm_solver_v3(denoiser, noise * start, sigmas, disable=True, ems=ems, space=space, guidance=3.0)
    return max(worst, ((result - run.latents).abs().max() / run.latents.abs().max()).item())
