"""A checkpoint is known by its tensors: under another name, with another header, with a LoRA on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def sd3(name: str, lora: str = "") -> list[tuple[str, str, dict[str, Any]]]:
    parts: list[tuple[str, str, dict[str, Any]]] = [
        ("loaded", "UNETLoader", {"unet_name": name, "weight_dtype": "default"}),
        ("positive", "Test_SD3Text", {"seed": 1}),
        ("negative", "Test_SD3Text", {"seed": 2}),
        ("latent", "EmptySD3LatentImage", {"width": 64, "height": 64, "batch_size": 1}),
    ]
    if not lora:
        return [("model", *parts[0][1:]), *parts[1:]]
    return [*parts, ("model", "LoraLoaderModelOnly", {"model": ["loaded", 0], "lora_name": lora, "strength_model": 0.5})]


WIRES = {"model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0]}


def sample(seed: int) -> list[tuple[str, str, dict[str, Any]]]:
    settings = {"seed": seed, "steps": 4, "cfg": 1.0, "sampler_name": "dpm_solver_v3", "scheduler": "simple", "denoise": 1.0}
    return [
        ("sample", "KSampler", {**WIRES, "latent_image": ["latent", 0], **settings}),
        ("save", "SaveLatent", {"samples": ["sample", 0], "filename_prefix": "latents/test"}),
    ]


def compute(name: str) -> tuple[str, str, dict[str, Any]]:
    settings = {"guidance_scales": "1", "effort": "quick", "name": name, "batch_size": 8, "start_seed": 0}
    return ("compute", "DPMSolverV3_ComputeEMS", {**WIRES, "latent_size": ["latent", 0], **settings, "keep_moments": False})


def test_renamed_and_relabelled_and_with_a_lora(server: Any, nodes: Any) -> None:
    folder = Path(server.base) / "models" / "diffusion_models"
    weights = load_file(folder / "tiny_sd3.safetensors")
    save_file(weights, folder / "own.safetensors", metadata={"a": "first"})
    text = server.run(nodes(*sd3("own.safetensors"), compute("")))["compute"]["text"][0]
    assert text.splitlines()[0].endswith("own.ems.safetensors")  # no name given: the checkpoint's

    shutil.move(folder / "own.safetensors", folder / "another name.safetensors")
    save_file(weights, folder / "edited.safetensors", metadata={"b": "second", "modelspec.title": "edited"})
    key = next(k for k in weights if k.endswith("attn.qkv.weight"))
    rows, columns = weights[key].shape
    name = key.removeprefix("model.").removesuffix(".weight")
    lora = {f"{name}.lora_up.weight": torch.ones(rows, 2) * 0.01, f"{name}.lora_down.weight": torch.ones(2, columns) * 0.01}
    loras = Path(server.base) / "models" / "loras"
    loras.mkdir(exist_ok=True)
    save_file(lora, loras / "small.safetensors")

    for k, (model, with_lora) in enumerate((("another name", ""), ("edited", ""), ("edited", "small.safetensors"))):
        before = len(server.log())
        server.texts()
        server.events.clear()
        server.run(nodes(*sd3(f"{model}.safetensors", with_lora), *sample(k)))
        assert "EMS own.ems.safetensors, made for this checkpoint" in server.texts() + server.log()[before:]
    known = json.loads((Path(server.base) / "user" / "dpm_solver_v3" / "fingerprints.json").read_text(encoding="utf-8"))
    assert any("edited.safetensors" in path for path in json.dumps(known).split('"'))
    assert {p.name for p in folder.iterdir()} == {"tiny_sd3.safetensors", "another name.safetensors", "edited.safetensors"}

    text = server.run(nodes(*sd3("edited.safetensors", "small.safetensors"), compute("with lora")))["compute"]["text"][0]
    assert "small 0.5" in text
