"""The pack in ComfyUI's real front end, in headless Chromium. Screenshots go to out/screenshots; docs/comfyui.md shows some."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "out" / "screenshots"
# The background services of Chromium look for the network, and there may be none.
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
TITLES = [
    "DPM-Solver-v3",
    "DPM-Solver-v3 Scheduler",
    "Compute EMS",
    "Load EMS",
    "Apply EMS",
    "Save EMS",
    "Inspect EMS",
    "Merge EMS",
    "Compare samplers",
]
LINES = """e => {
  const range = document.createRange(); range.selectNodeContents(e)
  return [...new Set([...range.getClientRects()].map(r => Math.round(r.top)))].length
}"""
PLACE = """async ({prompt, places}) => {
  await app.loadApiJson(prompt, 'test')
  for (const node of app.graph.nodes) {
    const [pos, size] = places[node.id]
    node.pos = pos; node.setSize(size)
  }
  app.graph.setDirtyCanvas(true, true)
}"""


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def page(plain_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if importlib.util.find_spec("playwright") is None or chromium() is None:
        pytest.skip("no playwright or no Chromium on PATH")
    from playwright.sync_api import sync_playwright

    for name, value in {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Locale": "en"}.items():
        plain_server.post(f"/settings/{name}", value)
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")),
            executable_path=chromium(),
            headless=True,
            args=FLAGS.split(),
            viewport={"width": 1500, "height": 900},
        )
        found = context.pages[0]
        found.set_default_timeout(240_000)
        found.goto(plain_server.url)
        found.wait_for_function("window.app && window.app.graph && window.app.extensionManager", timeout=120_000)
        found.wait_for_timeout(2000)
        banner = found.locator("div.bg-gradient-to-r button").last  # an announcement
        if banner.is_visible():
            banner.click()
        yield found
        context.close()


def shot(page: Any, name: str) -> None:
    page.screenshot(path=str(SHOTS / f"{name}.png"))


def dismiss(page: Any) -> None:
    """Close the dialog that offers to download the checkpoint which a template names."""
    page.wait_for_timeout(1500)
    mask = page.locator(".p-dialog-mask")
    for _ in range(3):
        if mask.count():
            page.keyboard.press("Escape")
            page.wait_for_timeout(700)
    assert not mask.count()


def fit_view(page: Any) -> None:
    page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(800)


def run_and_wait(page: Any, server: Any, while_running: Any = None) -> dict[str, Any]:
    """Press Run; the history entry of what ran."""
    known = set(server.get("/history"))
    page.get_by_test_id("queue-button").or_(page.get_by_role("button", name="Run", exact=True)).first.click()
    if while_running is not None:
        while_running()
    server.wait_for(lambda: set(server.get("/history")) - known, "the end of the prompt", 900)
    entry = server.get("/history")[(set(server.get("/history")) - known).pop()]
    assert entry["status"]["status_str"] == "success", entry["status"]
    page.wait_for_timeout(1500)
    return dict(entry)


def load(page: Any, parts: dict[str, tuple[str, dict[str, Any], tuple[int, int], tuple[int, int]]]) -> None:
    prompt = {k: {"class_type": kind, "inputs": inputs, "_meta": {}} for k, (kind, inputs, _, _) in parts.items()}
    places = {k: [pos, size] for k, (_, _, pos, size) in parts.items()}
    page.evaluate(PLACE, {"prompt": prompt, "places": places})
    fit_view(page)


def emoji(label: int, batch: int) -> dict[str, Any]:
    return {
        "1": ("Test_EmojiModel", {"prediction": "EPS"}, (0, 0), (280, 60)),
        "2": ("Test_Label", {"label": label}, (0, 110), (280, 60)),
        "3": ("Test_Label", {"label": 9}, (0, 220), (280, 60)),
        "4": ("Test_Latent", {"shape": f"{batch},3,32,32", "value": 0.0}, (0, 330), (280, 90)),
    }


def test_the_help_pages_are_served(page: Any, plain_server: Any) -> None:
    for folder in sorted((ROOT / "web" / "docs").iterdir()):
        for language in ("en", "zh"):
            answer = page.request.get(f"{plain_server.url}/extensions/comfyui-dpm-solver-v3/docs/{folder.name}/{language}.md")
            assert answer.ok and answer.text().startswith("# ")


def test_a_help_page_is_shown_in_chinese(page: Any, plain_server: Any) -> None:
    """By the button "i" of a selected node, with the inputs' names as they stand on the node."""
    plain_server.post("/settings/Comfy.Locale", "zh")
    opened = page.context.new_page()
    opened.set_default_timeout(240_000)
    try:
        opened.goto(plain_server.url)
        opened.wait_for_function("window.app && window.app.graph && window.app.extensionManager", timeout=120_000)
        opened.wait_for_timeout(2000)
        opened.evaluate(
            """() => {
              app.graph.clear()
              const node = LiteGraph.createNode('DPMSolverV3_Sampler')
              node.pos = [300, 150]; app.graph.add(node); app.canvas.selectNode(node); app.graph.setDirtyCanvas(true, true)
            }"""
        )
        opened.get_by_test_id("info-button").click()
        opened.get_by_text("\u5e94\u7528 EMS", exact=True).wait_for()  # Apply EMS, bold in the text
        opened.wait_for_timeout(700)
        shot(opened, "help-zh")
        words = opened.locator("body").inner_text()
        named = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))["DPMSolverV3_Sampler"]
        assert all(entry["name"] + "\uff1a" in words for entry in named["inputs"].values()) and "**" not in words
    finally:
        opened.close()
        plain_server.post("/settings/Comfy.Locale", "en")


def search(page: Any, words: str) -> list[str]:
    """What the front end's node search offers for these words, best first; by roles, which old and new front ends share."""
    page.evaluate("window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.wait_for_function("document.activeElement.tagName == 'INPUT'")
    page.keyboard.type(words)
    page.get_by_role("option").first.wait_for()
    page.wait_for_timeout(700)
    found = [" ".join(text.split()) for text in page.get_by_role("option").all_inner_texts() if text.strip()]
    shot(page, f"search-{words.replace(' ', '-')}")
    while page.get_by_role("option").first.is_visible():
        page.keyboard.press("Escape")
        page.wait_for_timeout(300)
    return found


def test_every_node_is_found_by_search(page: Any) -> None:
    for title in TITLES:
        assert any(title in offered for offered in search(page, title)), title
    offered = search(page, "dpm")
    assert offered[0].startswith("DPM-Solver-v3") and "comfyui-dpm-solver-v3" in offered[0]
    # Nodes whose id begins with what was typed come by the length of that id: LoadEMS before the Scheduler.
    place = next(k for k, text in enumerate(offered) if text.startswith("DPM-Solver-v3 Scheduler"))
    assert all(not text.startswith("SamplerDPM") for text in offered[:place])


@pytest.mark.parametrize("vue", [False, True])
def test_the_samplers_message_is_on_the_node(page: Any, plain_server: Any, vue: bool) -> None:
    """In the classic canvas and in the one of Vue nodes: which steps a KSampler has taken, and what to do for better ones."""
    version = page.evaluate("window.__COMFYUI_FRONTEND_VERSION__ || '0.0'").split(".")
    if vue and (int(version[0]), int(version[1])) < (1, 48):
        pytest.skip("the Vue nodes of 1.32 show the status text of no node; those of 1.48 do, between was not tried")
    wires = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    chosen = {"sampler_name": "dpm_solver_v3", "scheduler": "dpm_solver_v3_fitted", "denoise": 1.0}
    parts = emoji(5, 1) | {
        "20": ("KSampler", {**wires, "seed": int(vue), "steps": 6, "cfg": 4.0, **chosen}, (340, 0), (270, 320))  # as a new one
    }
    parts["21"] = ("Test_PixelVAE", {}, (0, 470), (280, 40))
    parts["22"] = ("VAEDecode", {"samples": ["20", 0], "vae": ["21", 0]}, (740, 0), (200, 60))
    parts["23"] = ("PreviewImage", {"images": ["22", 0]}, (740, 120), (300, 300))
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", vue)
    page.wait_for_timeout(1000)
    try:
        load(page, parts)
        run_and_wait(page, plain_server)
        shown = page.get_by_text("run Compute EMS once")
        shot(page, f"message-{'vue' if vue else 'classic'}")
        assert shown.count() == 1 and shown.is_visible()
        lines = shown.inner_text().split("\n")
        assert re.match(r"run Compute EMS once \(about .* a cfg\): no EMS for this model; ", " ".join(lines))
        # The classic canvas breaks lines that are too long within words, and only two are seen.
        assert vue or shown.evaluate(LINES) == len(lines)
    finally:
        page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
        page.wait_for_timeout(1000)


def test_an_example_from_the_template_browser_makes_an_image(page: Any, plain_server: Any) -> None:
    server = plain_server
    page.evaluate("window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text("comfyui-dpm-solver-v3").click()
    page.wait_for_timeout(1000)
    shot(page, "templates")
    page.get_by_test_id("template-workflow-Text to image").click()
    page.wait_for_function("window.app.graph.nodes.some(n => n.type == 'SaveImage') && window.app.graph.nodes.length == 8")
    dismiss(page)
    sampler = page.evaluate("app.graph.nodes.find(n => n.type == 'KSampler').widgets.map(w => w.value)")
    assert "dpm_solver_v3" in sampler and 8 in sampler
    page.evaluate(
        """() => {
          const set = (type, name, value) => {
            app.graph.nodes.find(n => n.type == type).widgets.find(w => w.name == name).value = value }
          set('CheckpointLoaderSimple', 'ckpt_name', 'tiny_sd15.safetensors')
          set('EmptyLatentImage', 'width', 64); set('EmptyLatentImage', 'height', 64)
        }"""
    )
    fit_view(page)
    entry = run_and_wait(page, server)
    assert any(server.image({"7": out}, "7").is_file() for node, out in entry["outputs"].items() if node == "7")
    shot(page, "text-to-image")


def test_compute_ems_shows_progress_and_then_the_plot(page: Any, plain_server: Any) -> None:
    server = plain_server
    settings = {"guidance_scales": "1, 4", "effort": "quick", "name": "emoji in the browser", "batch_size": 8, "start_seed": 0}
    wires = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_size": ["4", 0]}
    compute = {**wires, **settings, "keep_moments": False, "schedulers": "auto"}
    load(
        page,
        {
            **emoji(3, 1),
            "5": ("DPMSolverV3_ComputeEMS", compute, (340, 0), (340, 480)),
            "6": ("PreviewImage", {"images": ["5", 2]}, (740, 0), (480, 470)),
        },
    )

    def progress() -> None:
        page.wait_for_function("document.body.innerText.includes(' left') || document.title.match(/\\\\d+%/)", timeout=120_000)
        page.wait_for_timeout(4000)
        shot(page, "compute-progress")

    entry = run_and_wait(page, server, progress)
    assert "emoji in the browser" in entry["outputs"]["5"]["text"][0] and "steps" in entry["outputs"]["5"]["text"][0]
    shot(page, "compute-plot")


def test_inspect_shows_what_a_file_gains(page: Any, plain_server: Any) -> None:
    load(
        page,
        {
            "31": ("DPMSolverV3_LoadEMS", {"ems_name": "embedded-emoji.ems.safetensors"}, (0, 0), (320, 60)),
            "32": ("DPMSolverV3_InspectEMS", {"ems": ["31", 0], "statistics": False}, (0, 120), (320, 100)),
            "33": ("PreviewImage", {"images": ["32", 0]}, (380, 0), (480, 470)),
        },
    )
    entry = run_and_wait(page, plain_server)
    assert "embedded-emoji" in entry["outputs"]["32"]["text"][0]
    shot(page, "inspect")


def test_compare_samplers_shows_plot_and_pictures(page: Any, plain_server: Any) -> None:
    server = plain_server
    wires = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "vae": ["15", 0]}
    settings = {"seed": 3, "cfg": 4.0, "scheduler": "karras"}
    settings["samplers"] = "dpm_solver_v3/dpm_solver_v3_fitted, dpm_solver_v3, dpmpp_2m, deis, uni_pc_bh2"
    load(
        page,
        {
            **emoji(3, 8),
            "15": ("Test_PixelVAE", {}, (0, 470), (280, 40)),
            "16": (
                "DPMSolverV3_CompareSamplers",
                {**wires, **settings, "steps": "5, 6, 8, 10", "reference_steps": 60},
                (340, 0),
                (340, 320),
            ),
            "17": ("PreviewImage", {"images": ["16", 0]}, (740, 0), (520, 380)),
            "18": ("PreviewImage", {"images": ["16", 1]}, (740, 440), (520, 420)),
            "19": ("PreviewAny", {"source": ["16", 2]}, (340, 440), (340, 260)),
        },
    )
    entry = run_and_wait(page, server)
    assert entry["outputs"]["16"]["text"][0].splitlines()[1].startswith("\u2605 ")
    shot(page, "compare")
