"""EMS that travel in an image, and Find EMS, in a real ComfyUI."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpm_solver_v3.ems_tools.file.reader import load_ems_file
from dpm_solver_v3.ems_tools.share.workflow import KEY, unpack

ROOT = Path(__file__).resolve().parents[2]
NAME = "travels.ems.safetensors"


def run(server: Any, prompt: dict[str, Any], workflow: dict[str, Any]) -> dict[str, Any]:
    """As the front end queues: the workflow goes along, and into the images."""
    extra = {"extra_pnginfo": {"workflow": workflow}}
    answer = server.post("/prompt", {"prompt": prompt, "client_id": server.client, "extra_data": extra})
    assert "prompt_id" in answer, answer
    return dict(server.wait(answer["prompt_id"]))


def parts(seed: int, *more: tuple[str, str, dict[str, Any]]) -> list[tuple[str, str, dict[str, Any]]]:
    sampler = {
        "model": ["with", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent_image": ["latent", 0],
        "seed": seed,
        "steps": 4,
        "cfg": 1.0,
        "sampler_name": "dpm_solver_v3",
        "scheduler": "karras",
        "denoise": 1.0,
    }
    return [
        ("model", "Test_EmojiModel", {"prediction": "EPS"}),
        ("positive", "Test_Label", {"label": 3}),
        ("negative", "Test_Label", {"label": 9}),
        ("latent", "Test_Latent", {"shape": "1,3,32,32", "value": 0.0}),
        ("load", "DPMSolverV3_LoadEMS", {"ems_name": NAME}),
        ("with", "DPMSolverV3_ApplyEMS", {"model": ["model", 0], "strength": "1", "ems": ["load", 0]}),
        ("sample", "KSampler", sampler),
        ("vae", "Test_PixelVAE", {}),
        ("decode", "VAEDecode", {"samples": ["sample", 0], "vae": ["vae", 0]}),
        ("image", "SaveImage", {"images": ["decode", 0], "filename_prefix": "travel"}),
        *more,
    ]


def test_a_file_travels_in_an_image(server: Any, nodes: Any) -> None:
    from PIL import Image

    place = Path(server.base) / "models" / "ems" / NAME
    shipped = load_ems_file(ROOT / "stats" / "embedded-emoji.ems.safetensors")
    private = {**shipped.meta.model, "prompts": "2: a portrait of my aunt", "file": "/home/somebody/models/secret.safetensors"}
    replace(shipped, meta=replace(shipped.meta, model=private)).save(place)
    inputs = {"ems": ["load", 0], "name": "kept", "keep_moments": False, "embed_in_workflow": True}
    save = ("save", "DPMSolverV3_SaveEMS", inputs)
    pictures = []
    for seed in (1, 2):  # the second time only the sampling is new: Save EMS must run all the same
        entry = run(server, nodes(*parts(seed, save)), {"nodes": [], "extra": {"ds": {"scale": 1}}})
        assert entry["status"]["status_str"] == "success", entry["status"]
        pictures.append(Image.open(server.image(entry["outputs"], "image")))
        carried = json.loads(pictures[-1].info["workflow"])
        assert [v["name"] for v in carried["extra"][KEY]] == [NAME] and carried["extra"]["ds"] == {"scale": 1}
        facts = unpack(carried["extra"][KEY][0])[1].meta.model  # as `ems share` publishes it
        assert facts["prompts"] == "2" and "file" not in facts and "somebody" not in repr(facts)
    place.unlink()
    elsewhere = run(server, nodes(*parts(1)), carried)
    assert elsewhere["status"]["status_str"] == "success", elsewhere["status"]
    again = Image.open(server.image(elsewhere["outputs"], "image"))
    assert again.tobytes() == pictures[0].tobytes()
    assert "the EMS travels" in server.log()
    for folder in ("models", "output"):
        for kept in (Path(server.base) / folder / "ems").glob("kept*"):
            kept.unlink()
    other = [(n, k, {"ems_name": "another.ems.safetensors"} if n == "load" else i) for n, k, i in parts(3)]
    status = run(server, nodes(*other), {"nodes": []})["status"]
    said = " ".join(m[1].get("exception_message", "") for m in status["messages"])
    assert status["status_str"] == "error" and "There is no EMS file" in said and "carries none" in said


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "or turn on 'online'"),
        ({"online": True}, "Name the repository"),
        ({"online": True, "repository": "../x"}, "not the name of a Hub repository"),
    ],
)
def test_find_ems_says_what_to_do(server: Any, nodes: Any, inputs: dict[str, Any], message: str) -> None:
    toy = ("model", "Test_ToyModel", {"prediction": "EPS", "channels": 13, "axes": 2})
    assert message in server.run_refused(nodes(toy, ("find", "DPMSolverV3_FindEMS", {"model": ["model", 0], **inputs})))
