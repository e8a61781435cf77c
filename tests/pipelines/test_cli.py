"""`ems compute --diffusers` and `ems compare`, as a user calls them."""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpm_solver_v3.diffusers import DPMSolverV3Scheduler
from dpm_solver_v3.ems_tools.cli import main
from dpm_solver_v3.ems_tools.file.reader import load_ems_file
from dpm_solver_v3.ems_tools.share.identity import ModelIdentity, content_fingerprint
from dpm_solver_v3.ems_tools.share.library import Library
from dpm_solver_v3.pipelines.compare import compare, entrants
from dpm_solver_v3.pipelines.replay import Replay
from dpm_solver_v3.pipelines.source import PipelineRequest, load_pipeline, own_schedule, source_for

STATS = Path(__file__).resolve().parents[2] / "stats" / "embedded-emoji.ems.safetensors"
SMALL = ["--samples", "3", "--intervals", "6", "--no-evidence", "--guidance", "3", "--batch", "2"]


@pytest.fixture
def saved(tmp_path: Path, make_pipeline: Callable[..., Any]) -> Callable[[str], Path]:
    """A random pipeline in a folder."""

    def save(name: str) -> Path:
        pipe = make_pipeline(name, torch.float32)
        with torch.no_grad():
            model = getattr(pipe, "transformer", None) or pipe.unet
            for weight in model.parameters():  # a small output: random networks are no denoisers, and their ODE runs away
                weight.mul_(0.3)
        pipe.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("name", ["SDXL", "SD3"])
def test_compute_names_a_file_that_all_hosts_find(
    name: str,
    saved: Callable[[str], Path],
    make_pipeline: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A folder, and a function that makes a pipeline: the file bears the checkpoint's hash, and the scheduler uses it."""
    if name == "SDXL":
        place = str(saved(name))
    else:
        monkeypatch.setitem(sys.modules, "maker", types.SimpleNamespace(make=lambda: make_pipeline("SD3", torch.float32)))
        place = "maker:make"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a b\n\nc\n")
    checkpoint = tmp_path / "tiny.safetensors"
    checkpoint.write_bytes(b"what the other hosts load")
    monkeypatch.chdir(tmp_path)
    command = [
        "compute",
        "--diffusers",
        place,
        "--prompts",
        str(prompts),
        "--checkpoint",
        str(checkpoint),
        "--size",
        "16",
    ]
    assert main([*command, *SMALL, "--name", "tiny"]) == 0, capsys.readouterr().err
    digest = hashlib.sha256(b"what the other hosts load").hexdigest()
    path = tmp_path / f"tiny-{digest[:10]}.ems.safetensors"
    file = load_ems_file(path)
    assert (file.channels, file.meta.space) == (4, "flow" if name == "SD3" else "sigma")
    for identity in (ModelIdentity(content=content_fingerprint(checkpoint)), ModelIdentity(sha256=digest)):
        match = Library([tmp_path]).find(identity, channels=4)
        assert match is not None and (match.how, match.entry.path) == ("exact", path)
    pipe = load_pipeline(PipelineRequest(place, ("a",)))
    pipe.set_progress_bar_config(disable=True)
    ends = []
    for ems in (str(path), None):
        pipe.scheduler = DPMSolverV3Scheduler.from_config(pipe.scheduler.config, ems=ems)
        given = {"num_inference_steps": 4, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(0)}
        ends.append(pipe(prompt="a", output_type="latent", **given).images)
    assert torch.isfinite(ends[0]).all() and not torch.equal(*ends)  # the file was used


def test_compute_resumes_and_halves_the_batch(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory runs out with two samples at once; the run is interrupted after the first one, and continues."""
    from diffusers import UNet2DConditionModel

    folder, out = str(saved("SD")), tmp_path / "x.ems.safetensors"
    forward, calls = UNet2DConditionModel.forward, []

    def limited(self: Any, sample: torch.Tensor, *args: Any, **options: Any) -> Any:
        if len(sample) > 2:  # two samples, with and without the prompt
            raise torch.OutOfMemoryError("out of memory")
        calls.append(len(sample))
        if len(calls) == 20:
            raise KeyboardInterrupt
        return forward(self, sample, *args, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", limited)
    command = ["compute", "--diffusers", folder, "--out", str(out), *SMALL]
    assert main(command) == 130 and "give the same command to continue" in capsys.readouterr().err
    first = len(calls)
    assert main(command) == 0 and "Continues the job" in capsys.readouterr().out
    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    whole = tmp_path / "whole.ems.safetensors"
    assert main([*command[:3], "--out", str(whole), *SMALL]) == 0
    assert first == 20 and torch.allclose(load_ems_file(out).l, load_ems_file(whole).l, atol=1e-4)


def test_the_embedded_models_pipeline_gives_the_embedded_models_statistics(tmp_path: Path) -> None:
    """By way of a pipeline of diffusers, or directly: the same file but for rounding."""
    files = []
    for k, more in enumerate((["--diffusers", "embedded"], [])):
        path = tmp_path / f"{k}.ems.safetensors"
        small = ["--samples", "2", "--intervals", "5", "--no-evidence", "--guidance", "2"]
        assert main(["compute", *more, *small, "--out", str(path)]) == 0
        files.append(load_ems_file(path))
    assert files[0].meta.model["sha256"] == files[1].meta.model["sha256"]
    assert torch.allclose(files[0].l, files[1].l, atol=2e-3) and torch.allclose(files[0].s, files[1].s, atol=2e-2)


def test_compare_prints_a_table_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "--diffusers", "embedded", "--ems", str(STATS), "--guidance", "2", "--samples", "1"]
    card, picture = tmp_path / "card.md", tmp_path / "card.svg"
    more = ["--steps", "5,8", "--reference", "30", "--out", str(card), "--plot", str(picture)]
    assert main([*command, *more]) == 0
    printed = capsys.readouterr().out
    assert card.read_text().strip() == printed.strip()
    rows = [[cell.strip("* ") for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert rows[0] == ["scheduler", "5 steps", "8 steps"]
    errors = {name: [float(cell) for cell in cells] for name, *cells in rows[2:]}
    assert len(errors) == 5 and all(len(v) == 2 for v in errors.values())
    best = min(errors, key=lambda name: errors[name][1])
    assert best == "DPMSolverV3Scheduler + EMS" and errors[best][1] < 0.5 * errors["UniPCMultistepScheduler"][1]
    assert picture.read_bytes().startswith(b"<svg") or b"<svg" in picture.read_bytes()


def test_schedulers_converge_to_the_converged_latents(make_pipeline: Callable[..., Any]) -> None:
    """All of them solve one ODE from one start: with many steps on a flow they meet."""
    pipe = make_pipeline("SD3")
    request = PipelineRequest("SD3", ("a",), size=16)
    replay = Replay(pipe, lambda samples: {"prompt": ["a"] * len(samples), "height": 16, "width": 16})
    found = compare(replay, entrants(replay, None, 2.0), 2.0, model="SD3", samples=1, steps=(5, 80), reference_steps=120)
    assert len(found.errors) == 4
    for errors in found.errors.values():
        assert errors[1] < 0.3 * errors[0]
    source = source_for(pipe, request, [2.0])
    levels = own_schedule(replay)(4)
    assert source.shape == (4, 8, 8) and levels.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["compute", "--diffusers", "/no/such/folder"], "cannot be loaded"),
        (["compute", "--diffusers", "no_such_module:f"], "cannot be loaded"),
        (["compute", "--diffusers", "pathlib:Path"], "no pipeline with a scheduler"),
        (["compute", "--diffusers", "embedded", "--size", "4"], "at least 8 pixels"),
        (["compute", "--diffusers", "embedded", "--call", '{"num_frames": 3}'], "no argument num_frames"),
        (["compute", "--diffusers", "embedded", "--checkpoint", "/no/such/file"], "cannot be read"),
        (["compare"], "--diffusers PLACE"),
        (["compare", "--diffusers", "embedded", "--plot", "x.jpg"], "as .svg or .png"),
        (["compare", "--diffusers", "embedded", "--samples", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    arguments: list[str], match: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert match in error and error.startswith(f"ems {arguments[0]}: ") and error.count("\n") == 1
