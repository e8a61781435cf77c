"""Writes example_workflows/*.json with ComfyUI's own front end: make_examples.py URL (of a running ComfyUI with this pack).

The front end, not we, decides what a saved workflow looks like; this script only says which nodes stand where.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
NEGATIVE = "blurry, low quality, watermark"
POSITIVE = "a photograph of an old fisherman mending a net in a harbour at dawn"

MODEL = {
    "name": "v1-5-pruned-emaonly-fp16.safetensors",
    "url": "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/"
    "v1-5-pruned-emaonly-fp16.safetensors?download=true",
    "directory": "checkpoints",
}
"""The checkpoint of ComfyUI's own first template: the front end offers its download where it is missing."""

Node = tuple[str, dict[str, Any], tuple[int, int], tuple[int, int]]


def loaders(width: int, height: int, batch: int) -> dict[str, Node]:
    return {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": MODEL["name"]}, (0, 120), (320, 100)),
        "2": ("CLIPTextEncode", {"text": POSITIVE, "clip": ["1", 1]}, (380, 0), (360, 140)),
        "3": ("CLIPTextEncode", {"text": NEGATIVE, "clip": ["1", 1]}, (380, 200), (360, 120)),
        "4": ("EmptyLatentImage", {"width": width, "height": height, "batch_size": batch}, (380, 380), (360, 110)),
    }


def shared(latent: str) -> dict[str, list[Any]]:
    return {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], latent: ["4", 0]}


def text_to_image() -> tuple[dict[str, Node], str]:
    sampler = {"seed": 1, "steps": 8, "cfg": 5.0, "sampler_name": "dpm_solver_v3", "denoise": 1.0}
    sampler["scheduler"] = "dpm_solver_v3_fitted"
    nodes = {
        **loaders(512, 512, 1),
        "5": ("KSampler", {**shared("latent_image"), **sampler}, (800, 0), (300, 560)),
        "6": ("VAEDecode", {"samples": ["5", 0], "vae": ["1", 2]}, (1160, 0), (420, 50)),
        "7": ("SaveImage", {"images": ["6", 0], "filename_prefix": "dpm_solver_v3"}, (1160, 110), (420, 440)),
    }
    note = (
        "Choose your checkpoint, then queue.\n\ndpm_solver_v3 is in the sampler list of every KSampler. It uses the statistics "
        "(EMS) of this checkpoint if there is a file for it in models/ems or output/ems, else it samples without. The "
        "scheduler dpm_solver_v3_fitted takes its steps from the same file; without one, the best steps that need none.\n\n"
        "To compute them once: the workflow 'Compute EMS'."
    )
    return nodes, note


def compute_ems() -> tuple[dict[str, Node], str]:
    settings = {"guidance_scales": "1, 4, 7.5", "effort": "quick", "name": "", "batch_size": 4, "start_seed": 0}
    wires = {
        **shared("latent_size"),
        "clip": ["1", 1],
        **settings,
        "keep_moments": False,
        "schedulers": "auto",
        "steps": "auto",
    }
    nodes = {
        **loaders(512, 512, 1),
        "5": ("DPMSolverV3_ComputeEMS", wires, (800, 0), (340, 360)),
        "6": ("PreviewImage", {"images": ["5", 2]}, (1200, 0), (620, 460)),
        "7": ("PreviewAny", {"source": ["5", 3]}, (800, 420), (340, 260)),
    }
    note = (
        "Choose your checkpoint, then queue. Cancel whenever you like: queueing the same again goes on where it stopped.\n\n"
        "The file goes to output/ems. From then on dpm_solver_v3 finds it for this checkpoint, at every resolution.\n\n"
        "Guidance scales: those that you use; what lies between is interpolated. A smaller latent is faster."
    )
    return nodes, note


def compare_samplers() -> tuple[dict[str, Node], str]:
    settings = {"seed": 1, "cfg": 5.0, "scheduler": "karras"}
    settings["samplers"] = "dpm_solver_v3/dpm_solver_v3_fitted, dpm_solver_v3, dpmpp_2m, deis, uni_pc_bh2"
    wires = {**shared("latent_image"), **settings, "steps": "5, 6, 8, 10", "reference_steps": 60, "vae": ["1", 2]}
    nodes = {
        **loaders(512, 512, 2),
        "5": ("DPMSolverV3_CompareSamplers", wires, (800, 0), (340, 300)),
        "6": ("PreviewImage", {"images": ["5", 0]}, (1200, 0), (480, 330)),
        "7": ("PreviewImage", {"images": ["5", 1]}, (1200, 390), (480, 420)),
        "8": ("PreviewAny", {"source": ["5", 2]}, (800, 360), (340, 260)),
    }
    note = (
        "Choose your checkpoint, then queue. Every sampler starts from the same noise; the error is the mean squared "
        "difference of the latent to a converged solution.\n\nname/scheduler gives a sampler a scheduler of its own: "
        "dpmpp_2m/normal."
    )
    return nodes, note


MAKERS = {"Text to image": text_to_image, "Compute EMS": compute_ems, "Compare samplers": compare_samplers}
PLACE = """async ({prompt, places, note, title, model}) => {
  await app.loadApiJson(prompt, title)
  for (const node of app.graph.nodes) {
    const [pos, size] = places[node.id]
    node.pos = pos; node.setSize(size)
    if (node.type == 'CheckpointLoaderSimple') {
      node.properties.models = [model]
      node.widgets[0].value = model.name
    }
  }
  const text = LiteGraph.createNode('Note')
  app.graph.add(text)
  text.pos = [0, 280]; text.setSize([320, 250]); text.widgets[0].value = note
  app.graph.setDirtyCanvas(true, true)
  return JSON.stringify(app.graph.serialize())
}"""


def saved(page: Page, title: str, nodes: dict[str, Node], note: str) -> dict[str, Any]:
    prompt = {k: {"class_type": kind, "inputs": inputs, "_meta": {}} for k, (kind, inputs, _, _) in nodes.items()}
    places = {k: [pos, size] for k, (_, _, pos, size) in nodes.items()}
    return json.loads(page.evaluate(PLACE, {"prompt": prompt, "places": places, "note": note, "title": title, "model": MODEL}))


def main() -> None:
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tempfile.mkdtemp(), executable_path="/usr/bin/chromium", headless=True, args=FLAGS.split()
        )
        page = context.pages[0]
        page.goto(sys.argv[1])
        page.wait_for_function("window.app && window.app.graph && window.app.extensionManager", timeout=90_000)
        page.wait_for_timeout(3000)
        for title, make in MAKERS.items():
            graph = saved(page, title, *make())
            path = ROOT / "example_workflows" / f"{title}.json"
            path.write_text(json.dumps(graph, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(path, len(graph["nodes"]), "nodes")
        context.close()


if __name__ == "__main__":
    main()
