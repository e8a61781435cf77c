"""The command line `ems`: what it prints, its exit status, and one line for every bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from dpm_solver_v3.ems_tools import cli
from dpm_solver_v3.ems_tools import compute as compute_module
from dpm_solver_v3.ems_tools.file.reader import load_ems_file


@pytest.fixture
def path(tmp_path, make_ems_file):
    make_ems_file().save(tmp_path / "a.ems.safetensors")
    return tmp_path / "a.ems.safetensors"


def run(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(capsys, *arguments):
    status, _, error = run(capsys, *arguments)
    assert status == 1 and error.count("\n") == 1 and error.startswith(f"ems {arguments[0]}: ")
    return error


@pytest.mark.parametrize("command", ["inspect", "verify", "convert", "plot"])
def test_help_has_an_example(capsys, command):
    status, text, _ = run(capsys, command, "--help")
    assert status == 0 and f"    ems {command} " in text


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["inspect"], ["convert", "l", "sb", "--out", "x"], ["plot", "a", "--colour", "red"]]
)
def test_wrong_usage_is_2(capsys, arguments):
    status, _, error = run(capsys, *arguments)
    assert status == 2 and "usage: ems" in error


def test_inspect_shows_what_is_in_the_file(capsys, path):
    status, text, _ = run(capsys, "inspect", path)
    assert status == 0
    assert "a <b> & $c$" in text and "1, 7.5" in text
    line = next(line for line in text.splitlines() if "report" in line and " 10 " in line)
    assert "0.750" in line and "order 3, corrector none" in line


def test_inspect_for_programs(capsys, path):
    status, text, _ = run(capsys, "inspect", path, "--json")
    facts = json.loads(text)
    assert status == 0 and facts["bytes"] == path.stat().st_size
    assert facts["statistics"]["guidance"] == [1.0, 7.5]
    assert facts["recommendation"][0]["settings"]["corrector_below"] is None
    assert len(facts["evidence"]) == 8


POINTS = """
import torch
CENTRES = torch.randn(4, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
def denoiser(guidance):
    def D(x, sigma):
        s2, rows = sigma.double().reshape(-1, 1) ** 2, x.double().flatten(1)
        mean = torch.softmax(-torch.cdist(rows, CENTRES).square() / (2 * (s2 + 0.09)), 1) @ CENTRES
        return (mean + 0.09 / (0.09 + s2) * (rows - mean)).reshape(x.shape).to(x.dtype)
    return D
"""
IMAGE = "--image-to-image"


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Options that name the exact denoiser of four spread points."""
    (tmp_path / "image_toy.py").write_text(POINTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "image_toy", raising=False)
    options = "--model image_toy:denoiser --shape 2,4,4 --sigma-min 0.05 --sigma-max 20 --effort quick --steps 4 --device cpu"
    return [*options.split(), "--samples", "6"]


def planned(text):
    return int(re.findall(r"Plan: (\d+) denoiser evaluations", text)[0])


def test_compute_fits_steps_for_image_to_image_where_asked(capsys, model, tmp_path):
    """The plan counts them, the table says what they are worth, the file holds them, and inspect shows them."""
    out = ["--out", "a.ems.safetensors"]
    costs = [planned(run(capsys, "compute", *model, *more, *out, "--dry-run")[1]) for more in ([], [IMAGE])]
    assert costs[1] > 2 * costs[0]
    status, text, _ = run(capsys, "compute", *model, IMAGE, *out)
    rows = load_ems_file("a.ems.safetensors").meta.partial
    assert status == 0 and rows and {row.steps for row in rows} == {4}
    for row in rows:
        said = f"image to image from sigma {math.exp(-row.lambdas[0]):.3g}, 4 steps: error {row.ratio[0]:.2f} ["
        assert said in text
    assert text.count("image to image from sigma") == len(rows)
    _, shown, _ = run(capsys, "inspect", "a.ems.safetensors")
    table = shown[shown.index("image to image: error from a picture") :].splitlines()
    assert len(table) == 3 + len(rows) and f" {rows[0].ratio[0]:6.3f}  " in table[3]
    facts = json.loads(run(capsys, "inspect", "a.ems.safetensors", "--json")[1])
    assert [row["sigma"] for row in facts["partial"]] == [math.exp(-row.lambdas[0]) for row in rows]
    status, text, error = run(capsys, "compute", *model, *out)  # another request: what is there is not replaced
    assert status == 1 and "holds another result" in error


def test_fit_adds_steps_for_image_to_image_and_takes_them_away(capsys, model, tmp_path):
    compute, fit = [a for a in model if a not in ("--steps", "4")], [a for a in model if a not in ("--samples", "6")]
    run(capsys, "compute", *compute, "--no-fit", "--intervals", "12", "--out", "b.ems.safetensors")
    costs = [planned(run(capsys, "fit", "b.ems.safetensors", *fit, *more, "--dry-run")[1]) for more in ([], [IMAGE])]
    assert costs[1] > 2 * costs[0]
    with pytest.MonkeyPatch.context() as patch:  # stopped after the guided steps
        patch.setattr(compute_module, "fit_partial", interrupted)
        assert run(capsys, "fit", "b.ems.safetensors", *fit, IMAGE)[0] == 130
    assert "image to image" in refused(capsys, "fit", "b.ems.safetensors", *fit)  # begun with them: finish it so
    status, text, _ = run(capsys, "fit", "b.ems.safetensors", *fit, IMAGE)
    meta = load_ems_file("b.ems.safetensors").meta
    assert status == 0 and meta.partial and meta.fitted and meta.estimate["fit_partial"] is True
    assert text.count("image to image from sigma") == len(meta.partial)
    assert run(capsys, "fit", "b.ems.safetensors", *fit)[0] == 0
    meta = load_ems_file("b.ems.safetensors").meta
    assert meta.fitted and not meta.partial and "fit_partial" not in meta.estimate


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_merged_statistics_hold_no_steps_of_one_of_them(capsys, model, tmp_path):
    for seed in "01":
        steps = [IMAGE] if seed == "0" else ["--no-fit"]
        run(capsys, "compute", *model, *steps, "--keep-moments", "--seed", seed, "--out", f"{seed}.ems.safetensors")
    assert load_ems_file("0.ems.safetensors").meta.partial
    assert run(capsys, "merge", "0.ems.safetensors", "1.ems.safetensors", "--out", "m.ems.safetensors")[0] == 0
    assert load_ems_file("m.ems.safetensors").meta.partial == ()


def test_verify_accepts_good_files_and_notes_the_rest(capsys, path, tmp_path, make_ems_file):
    make_ems_file(evidence=False).save(tmp_path / "b.ems.safetensors")
    status, text, error = run(capsys, "verify", path, tmp_path / "b.ems.safetensors")
    assert status == 0 and not error
    assert "no worse than data prediction in 4 of 4" in text and "have not been tried" in text


def test_verify_names_every_bad_file(capsys, path, tmp_path, make_ems_file):
    file = make_ems_file()
    rows = tuple(dataclasses.replace(r, ems=0.5) for r in file.meta.evidence)
    dataclasses.replace(file, meta=dataclasses.replace(file.meta, evidence=rows)).save(tmp_path / "worse")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-3])
    status, text, error = run(capsys, "verify", tmp_path / "worse", path, tmp_path / "cut", tmp_path / "none")
    assert status == 1 and text.count("ok") == 1
    assert error.count("loses to data prediction") == 4
    assert "is cut off" in error and "no such file" in error


def test_bad_files_are_refused_in_one_line(capsys, tmp_path):
    (tmp_path / "x").write_bytes(b"not a file of ours" * 9)
    for command in ("inspect", "plot"):
        assert "x: " in refused(capsys, command, tmp_path / "x")
        assert "no such file" in refused(capsys, command, tmp_path / "none")


def npz_files(folder):
    table = np.random.default_rng(0).normal(size=(5, 4, 8, 8)).astype(np.float32)
    np.savez(folder / "l.npz", l=table)
    np.savez(folder / "sb.npz", s=table, b=table)
    return folder / "l.npz", folder / "sb.npz"


def test_convert_by_preset_and_by_range(capsys, tmp_path):
    out = tmp_path / "sd.ems.safetensors"
    status, text, _ = run(capsys, "convert", *npz_files(tmp_path), "--preset", "sd-v1", "--guidance", 7.5, "--out", out)
    assert status == 0 and "no evidence" in text
    file = load_ems_file(out)
    assert file.guidance.tolist() == [7.5] and file.lambdas[0].item() == pytest.approx(-2.682, abs=1e-3)
    assert file.channels == 4 and not file.per_element
    status, *_ = run(
        capsys, "convert", *npz_files(tmp_path), "--range", "-2", "3", "--per-element", "--name", "n", "--out", out
    )
    assert status == 0 and load_ems_file(out).l.shape == (1, 5, 4, 8, 8) and load_ems_file(out).meta.model["name"] == "n"


def test_convert_refuses_in_one_line(capsys, tmp_path):
    l, sb = npz_files(tmp_path)
    out = tmp_path / "o.ems.safetensors"
    assert "has no array 's'" in refused(capsys, "convert", l, l, "--preset", "edm", "--out", out)
    assert "must increase" in refused(capsys, "convert", l, sb, "--range", 3, -2, "--out", out)
    assert "ends in .ems.safetensors" in refused(capsys, "convert", l, sb, "--preset", "edm", "--out", l)
    nowhere = tmp_path / "no folder" / out.name
    assert "No such file" in refused(capsys, "convert", l, sb, "--preset", "edm", "--out", nowhere)
    assert not out.exists()


def test_plot_draws_every_panel_as_svg(capsys, path):
    status, text, _ = run(capsys, "plot", path)
    picture = path.with_name("a.svg")
    assert status == 0 and str(picture) in text
    root = ET.fromstring(picture.read_bytes())
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"l, guidance 1", "b, guidance 7.5", "channel 2", "karras_zero"} <= set(texts)
    assert sum(t == "error with EMS / without, guidance 1" for t in texts) == 1
    lines = root.iter("{http://www.w3.org/2000/svg}polyline")
    curves = [line for line in lines if line.get("stroke-width") == "1.8"]
    assert len(curves) == 2 * (3 * 3 + 2)  # per scale: three channels of l, s, b; the two curves of one schedule


def test_plot_says_what_it_needs(capsys, path, monkeypatch):
    assert ".svg or a .png" in refused(capsys, "plot", path, "--out", path.with_suffix(".jpg"))
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "needs Pillow" in refused(capsys, "plot", path, "--out", path.with_suffix(".png"))


def test_it_runs_as_a_program_and_survives_a_closed_pipe(path):
    command = [sys.executable, "-m", "dpm_solver_v3.ems_tools.cli", "inspect", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1
