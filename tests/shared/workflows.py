"""Parts of ComfyUI workflows that several tests put together: toy models, Compute EMS, a KSampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Part = tuple[str, str, dict[str, Any]]


def toy(prediction: str = "EPS", shape: str = "2,4,8,8") -> list[Part]:
    channels, axes = int(shape.split(",")[1]), shape.count(",") - 1
    return [
        ("model", "Test_ToyModel", {"prediction": prediction, "channels": channels, "axes": axes}),
        ("positive", "Test_Label", {"label": 3}),
        ("negative", "Test_Label", {"label": 9}),
        ("latent", "Test_Latent", {"shape": shape, "value": 0.0}),
    ]


def compute(name: str, scales: str = "1", seed: int = 0, **changed: Any) -> Part:
    inputs: dict[str, Any] = {
        "model": ["model", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent_size": ["latent", 0],
        "guidance_scales": scales,
        "effort": "quick",
        "name": name,
        "batch_size": 8,
        "start_seed": seed,
        "keep_moments": False,
    }
    return ("compute", "DPMSolverV3_ComputeEMS", {**inputs, **changed})


def slow(seconds: float = 0.02, shape: str = "2,4,8,8") -> list[Part]:
    """The toy, slowed down: there is time to press cancel."""
    parts = toy("EPS", shape)
    parts[0] = ("fast", *parts[0][1:])
    return [*parts, ("model", "Test_Slow", {"model": ["fast", 0], "seconds": seconds})]


def sampled(**changed: Any) -> list[Part]:
    inputs = {
        "model": ["model", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent_image": ["latent", 0],
        "seed": 1,
        "steps": 6,
        "cfg": 1.0,
        "sampler_name": "dpm_solver_v3",
        "scheduler": "karras",
        "denoise": 1.0,
    }
    save = ("save", "SaveLatent", {"samples": ["sample", 0], "filename_prefix": "latents/test"})
    return [("sample", "KSampler", {**inputs, **changed}), save]


def ems_file(server: Any, name: str) -> Path:
    return Path(server.base) / "output" / "ems" / f"{name}.ems.safetensors"
