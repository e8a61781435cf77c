"""Compute EMS in a real ComfyUI: found afterwards, cancelled, killed, short of memory; and the nodes around its file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from workflows import Part, compute, ems_file, sampled, slow, toy

from dpm_solver_v3.ems_tools.file.reader import load_ems_file


@pytest.mark.parametrize(
    ("prediction", "shape"), [("EPS", "2,4,8,8"), ("FLOW", "1,3,2,6,6"), ("V_PREDICTION_EDM", "1,5,40"), ("EDM", "1,4,8,8")]
)
def test_computed_then_found_by_the_sampler_of_the_list(any_server: Any, nodes: Any, prediction: str, shape: str) -> None:
    name = f"found {prediction}"
    outputs = any_server.run(nodes(*toy(prediction, shape), compute(name, "1, 3")))
    path = ems_file(any_server, name)
    assert str(path) in outputs["compute"]["text"][0]
    file = load_ems_file(path)
    assert file.guidance.tolist() == [1.0, 3.0] and file.meta.fitted
    scheduler = "simple" if prediction == "FLOW" else "karras"
    any_server.run(nodes(*toy(prediction, shape), *sampled(scheduler=scheduler, cfg=2.0)))
    assert f"EMS {name}.ems.safetensors, made for this checkpoint, guidance 2" in any_server.log()


def test_the_fitted_schedule(any_server: Any, nodes: Any) -> None:
    """In the scheduler list and as SIGMAS; the same picture by both ways; Karras steps, said so, for a model without EMS."""
    shape = "2,6,8,8"
    any_server.run(nodes(*toy("EPS", shape), compute("fitted", "1, 3")))
    if not any_server.lists_schedulers:
        pytest.skip("this ComfyUI is older than its list of scheduler functions")
    for cfg in (1.0, 3.0):
        listed = any_server.run(nodes(*toy("EPS", shape), *sampled(scheduler="dpm_solver_v3_fitted", cfg=cfg)))
        assert f"schedule fitted for 6 steps at cfg {cfg:g}, from fitted.ems.safetensors" in any_server.log()
        chosen = {"model": ["model", 0], "schedule": "fitted", "steps": 6, "denoise": 1.0, "end": "zero", "cfg": cfg}
        wires = {"model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
        custom = [
            ("sampler", "KSamplerSelect", {"sampler_name": "dpm_solver_v3"}),
            ("sigmas", "DPMSolverV3_Scheduler", chosen),
            (
                "sample",
                "SamplerCustom",
                {**wires, "add_noise": True, "noise_seed": 1, "cfg": cfg, "sampler": ["sampler", 0], "sigmas": ["sigmas", 0]},
            ),
            sampled()[1],
        ]
        own = any_server.run(nodes(*toy("EPS", shape), *custom))
        assert torch.allclose(any_server.latent(listed), any_server.latent(own), atol=1e-5)
    any_server.run(nodes(*toy("EPS", shape), *sampled(sampler_name="euler", scheduler="dpm_solver_v3_fitted", cfg=3.0)))
    assert "suit the sampler dpm_solver_v3 only, not euler: half-cosine steps instead" in any_server.log()
    other = toy("EPS", "2,7,8,8")
    partial = any_server.run(nodes(*other, *sampled(scheduler="dpm_solver_v3_fitted", denoise=0.5)))
    assert torch.isfinite(any_server.latent(partial)).all()
    assert "no EMS for this model: run Compute EMS once for fitted steps: Karras steps instead" in any_server.log()


def test_steps_for_image_to_image_are_fitted_where_asked(any_server: Any, nodes: Any) -> None:
    """The file holds them, the report shows them, progress counts them; without the input it is another request."""
    asked = compute("begun", "1, 3", steps="4", image_to_image=True)
    most = []
    for part, name in ((asked, "begun"), (compute("begun", "1, 3", steps="4"), "begun_2")):
        any_server.events.clear()
        outputs = any_server.run(nodes(*slow(0.0), part))
        (progress, *_) = [p for p in reversed(any_server.progress()) if p["node"] == "compute"]
        assert 0.97 * progress["max"] < progress["value"] <= progress["max"]  # a spacing may come to the same levels
        most.append(progress["max"])
        rows = load_ems_file(ems_file(any_server, name)).meta.partial
        assert bool(rows) == (name == "begun") and {row.steps for row in rows} <= {4}
        assert ("image to image: error from a picture" in outputs["compute"]["text"][0]) == bool(rows)
    assert most[0] > 2 * most[1]


def test_two_scales_two_prompts_and_previews(server: Any, nodes: Any) -> None:
    """With a CLIP the built-in prompts are used too; progress reaches its end; the time left is said on the node."""
    parts = [*slow(0.001), ("clip", "Test_TextLabel", {})]
    server.events.clear()
    server.run(nodes(*parts, compute("prompts", "2", clip=["clip", 0])))
    progress = [p for p in server.progress() if p["node"] == "compute"]
    assert progress[-1]["value"] == progress[-1]["max"] > 1000
    assert re.search(r"% of [\d,]+ evaluations, [\d.]+ \w+ left: \w", server.texts())  # time left and stage stay apart
    assert "use scheduler dpm_solver_v3_fitted: error " in server.texts()
    assert load_ems_file(ems_file(server, "prompts")).meta.model["prompts"].startswith("16: ")


def test_cancelled_and_resumed(any_server: Any, nodes: Any) -> None:
    workflow = nodes(*slow(), compute("cancelled"))
    partial = ems_file(any_server, "cancelled").with_name("cancelled.ems.safetensors.partial")
    prompt = any_server.queue(workflow)
    any_server.wait_for(partial.is_file, "a first checkpoint of the job")
    any_server.interrupt()
    entry = any_server.wait(prompt)
    assert any(m[0] == "execution_interrupted" for m in entry["status"]["messages"])
    assert partial.is_file() and not ems_file(any_server, "cancelled").exists()
    assert "queue the same again to go on" in any_server.log()

    any_server.run(workflow)
    any_server.run(nodes(*toy(), compute("whole")))
    assert not partial.exists()
    same(ems_file(any_server, "cancelled"), ems_file(any_server, "whole"))


def test_what_was_done_before_a_cancel_is_not_done_again(server: Any, nodes: Any) -> None:
    """Issue 15, row 9: cancelled at 2,024 of 5,740 evaluations, a job went on at 1,448. Now in the midst of the fit, twice."""
    workflow, before = nodes(*slow(), compute("row nine")), len(server.log())
    for share in (0.5, 0.8):
        server.events.clear()
        prompt = server.queue(workflow)
        server.wait_for(lambda share=share: any(p["value"] > share * p["max"] for p in server.progress()), "progress")
        server.interrupt()
        server.wait(prompt)
        stopped = server.progress()[-1]
    server.events.clear()
    server.run(workflow)
    mine = [p for p in server.progress() if p["node"] == "compute"]
    most = 10 * 10 + 2 * 6 * 10  # a cancel costs what is under way: at most a fit for 10 steps and its judgement
    assert mine[0]["value"] > stopped["value"] - most and mine[-1]["value"] == mine[-1]["max"] == stopped["max"]
    made = sum(int(n) for n in re.findall(r"evaluated (\d+) rows", server.log()[before:]))
    assert stopped["max"] <= made <= stopped["max"] + 2 * most


def same(a: Path, b: Path) -> None:
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    for key in first:
        assert torch.allclose(first[key], second[key], rtol=1e-6, atol=1e-9), key


def test_killed_restarted_and_resumed(server: Any, nodes: Any) -> None:
    workflow = nodes(*slow(), compute("killed"))
    partial = ems_file(server, "killed").with_name("killed.ems.safetensors.partial")
    server.queue(workflow)
    server.wait_for(partial.is_file, "a first checkpoint of the job")
    server.kill()
    assert partial.is_file()
    server.start()
    server.events.clear()
    server.run(workflow)
    first = next(p for p in server.progress() if p["node"] == "compute")
    assert first["value"] > 1  # it did not begin again
    server.run(nodes(*toy(), compute("not killed")))
    same(ems_file(server, "killed"), ems_file(server, "not killed"))


def test_two_prompts_in_the_queue(server: Any, nodes: Any) -> None:
    """The second one of the same name and job uses the first one's file; another job gets a name of its own."""
    jobs = [nodes(*slow(0.001), compute("twice")), nodes(*toy(), *sampled(seed=9))]
    jobs += [nodes(*slow(0.001), compute("twice", batch_size=4)), nodes(*slow(0.001), compute("twice", seed=1))]
    entries = [server.wait(prompt) for prompt in [server.queue(job) for job in jobs]]
    assert [e["status"]["status_str"] for e in entries] == ["success"] * 4
    texts = [e["outputs"]["compute"]["text"][0] for e in (entries[0], entries[2], entries[3])]
    assert [text.splitlines()[0].split("/")[-1].split("\\")[-1] for text in texts] == [
        "twice.ems.safetensors",
        "twice.ems.safetensors",
        "twice_2.ems.safetensors",
    ]


def test_out_of_memory_is_survived(server: Any, nodes: Any) -> None:
    parts = toy()
    parts[0] = ("large", *parts[0][1:])
    small = [*parts, ("model", "Test_Memory", {"model": ["large", 0], "rows": 3})]
    server.run(nodes(*small, compute("memory", batch_size=16)))
    server.run(nodes(*toy(), compute("no memory", batch_size=16)))
    same(ems_file(server, "memory"), ems_file(server, "no memory"))


def test_a_corrupted_file_is_listed_and_refused_and_others_work(server: Any, nodes: Any) -> None:
    server.run(nodes(*toy(), compute("good")))
    good = ems_file(server, "good").read_bytes()
    folder = Path(server.base) / "models" / "ems"
    (folder / "cut.ems.safetensors").write_bytes(good[: len(good) // 2])
    (folder / "text.ems.safetensors").write_bytes(b"not safetensors at all" * 100)
    (folder / "copy.ems.safetensors").write_bytes(good)
    names = server.get("/object_info/DPMSolverV3_LoadEMS")["DPMSolverV3_LoadEMS"]["input"]["required"]["ems_name"][0]
    assert {"cut.ems.safetensors", "text.ems.safetensors", "copy.ems.safetensors", "good.ems.safetensors"} <= set(names)
    inspect = ("inspect", "DPMSolverV3_InspectEMS", {"ems": ["load", 0]})
    for bad in ("cut.ems.safetensors", "text.ems.safetensors"):
        message = server.run_refused(nodes(("load", "DPMSolverV3_LoadEMS", {"ems_name": bad}), inspect))
        assert bad in message and "Traceback" not in message
    server.events.clear()
    fine = server.run(nodes(("load", "DPMSolverV3_LoadEMS", {"ems_name": "copy.ems.safetensors"}), inspect))
    assert "refused: cut.ems.safetensors" in fine["inspect"]["text"][0]
    assert "connect plot to Preview Image; error " in server.texts()  # by itself the node shows nothing
    missing = server.run_refused(nodes(("load", "DPMSolverV3_LoadEMS", {"ems_name": "../../../etc/passwd"}), inspect))
    assert "etc/passwd" in missing and "There is no EMS file" in missing
    assert torch.isfinite(server.latent(server.run(nodes(*toy(), *sampled(seed=3))))).all()
    for bad_file in ("cut", "text", "copy"):
        (folder / f"{bad_file}.ems.safetensors").unlink()


def test_every_node_around_the_file_in_one_workflow(any_server: Any, nodes: Any) -> None:
    """Compute with moments twice, merge, save, load by name, apply, sample, inspect, compare."""
    vae: Part = ("vae", "Test_PixelVAE", {})
    parts = toy(shape="2,3,8,8")
    for k in (1, 2):
        inputs = compute(f"part {k}", "1, 3", seed=k, keep_moments=True)[2]
        parts.append((f"part {k}", "DPMSolverV3_ComputeEMS", inputs))
    parts += [
        ("merge", "DPMSolverV3_MergeEMS", {"ems_1": ["part 1", 0], "ems_2": ["part 2", 0]}),
        ("saved", "DPMSolverV3_SaveEMS", {"ems": ["merge", 0], "name": "merged", "keep_moments": False}),
        ("inspect", "DPMSolverV3_InspectEMS", {"ems": ["merge", 0]}),
        ("plot", "SaveImage", {"images": ["inspect", 0], "filename_prefix": "plot"}),
        ("with", "DPMSolverV3_ApplyEMS", {"model": ["model", 0], "strength": "0.5", "ems": ["merge", 0]}),
        *sampled(model=["with", 0], cfg=3.0),
    ]
    outputs = any_server.run(nodes(*parts))
    assert Path(outputs["saved"]["text"][0]).is_file() and any_server.image(outputs, "plot").stat().st_size > 5000
    merged = load_ems_file(Path(outputs["saved"]["text"][0]))
    one = load_ems_file(ems_file(any_server, "part 1"))
    assert merged.meta.estimate["samples"] == tuple(2 * n for n in cast("tuple[int, ...]", one.meta.estimate["samples"]))

    compare = {
        "model": ["with", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent_image": ["latent", 0],
        "seed": 1,
        "cfg": 3.0,
        "samplers": "dpm_solver_v3, dpmpp_2m/normal, euler",
        "scheduler": "karras",
        "steps": "5, 8",
        "reference_steps": 60,
        "vae": ["vae", 0],
    }
    second = any_server.run(
        nodes(
            *toy(shape="2,3,8,8"),
            vae,
            ("load", "DPMSolverV3_LoadEMS", {"ems_name": "part 1.ems.safetensors"}),
            ("with", "DPMSolverV3_ApplyEMS", {"model": ["model", 0], "strength": "auto", "ems": ["load", 0]}),
            ("compare", "DPMSolverV3_CompareSamplers", compare),
            ("plot", "SaveImage", {"images": ["compare", 0], "filename_prefix": "errors"}),
            ("grid", "SaveImage", {"images": ["compare", 1], "filename_prefix": "grid"}),
        )
    )
    blocks = second["compare"]["text"][0].split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == ["5 steps", "8 steps"]
    for block in blocks:
        lines = [line.removeprefix("\u2605 ") for line in block.splitlines()[1:]]
        assert {line.split(":")[0] for line in lines} == {"dpm_solver_v3, karras", "dpmpp_2m, normal", "euler, karras"}
        errors = [float(line.split(": ")[1].split()[0]) for line in lines]
        assert block.splitlines()[1].startswith("\u2605 ") and errors == sorted(errors)
    assert all(any_server.image(second, node).stat().st_size > 5000 for node in ("plot", "grid"))


def test_settings_that_cannot_be_are_refused_in_words(server: Any, nodes: Any) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"guidance_scales": "one, two"}, "guidance scales must be numbers above 0"),
        ({"schedulers": "karras, no such"}, "unknown schedulers: no such"),
    )
    for changed, words in cases:
        message = server.run_refused(nodes(*toy(), compute("refused", **changed)))
        assert words in message
    other = {"model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    bad = {"seed": 1, "cfg": 1.0, "samplers": "no_such", "scheduler": "karras", "steps": "5", "reference_steps": 60}
    message = server.run_refused(nodes(*toy(), ("compare", "DPMSolverV3_CompareSamplers", {**other, **bad})))
    assert "unknown sampler 'no_such'" in message
