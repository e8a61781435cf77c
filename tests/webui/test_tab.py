"""The tab "EMS": computing inside the host's own pass, interrupt, resume, and the files that are there."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpm_solver_v3.ems_tools.compute import EFFORTS
from dpm_solver_v3.ems_tools.file.reader import load_ems_file
from dpm_solver_v3.sampler import Settings
from dpm_solver_v3.webui import host as window
from dpm_solver_v3.webui import session, tab

ARGUMENTS = ["a fox", True, "blurry", 64, 64, "1, 4", "tiny", "", 3, 0]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"samples": 6, "intervals": 8, "noises": 2, "steps": (5,), "schedules": 1, "strengths": (0.5,), "reference_steps": 8}
    fit = replace(EFFORTS["quick"].fit, steps=(5,), noises=2, held_out=2, search=0)
    effort = replace(EFFORTS["quick"], combinations=(Settings(order=2, corrector="pseudo"),), fit=fit, **few)
    monkeypatch.setitem(EFFORTS, "tiny", effort)
    monkeypatch.setattr(tab, "_SECONDS", 0.02)
    monkeypatch.setattr(session, "_CURRENT", [])


def follow(*changes: tuple[int, Any]) -> list[tuple[Any, ...]]:
    values = list(ARGUMENTS)
    for place, value in changes:
        values[place] = value
    return list(tab._follow(*values))


def message(state: tuple[Any, ...]) -> str:
    return str(state[0])


def drawn(picture: str) -> bytes:
    """The SVG in the page's image."""
    return base64.b64decode(picture.partition("base64,")[2].partition('"')[0])


def test_computes_for_the_loaded_checkpoint(host: Any) -> None:
    host.start()
    states = follow()
    status, picture, evidence, files, names = states[-1]
    path = host.data / "models" / "ems" / "pretty.ems.safetensors"
    assert f"Done: {path}" in status
    assert any(" % of " in message(s) for s in states[:-1])
    file = load_ems_file(path)
    assert file.guidance.tolist() == [1.0, 4.0] and file.channels == 4
    assert file.meta.model["sha256"] == host.checkpoint.sha256 and file.meta.model["prompts"].startswith("16, the first: a fox")
    assert file.meta.grid["kind"] == ("the host's own levels" if host.kind != "A1111" else "uniform in lambda")
    assert b"guidance 4" in drawn(picture)
    assert [row[:4] for row in evidence] == [[g, "Automatic", 5, s] for g in ("1", "4") for s in ("calibration", "report")]
    assert path.name in [row[0] for row in files] and path.name in names["choices"]
    state = host.modules["modules.shared"].state
    assert state.jobs == ["EMS", "end"] and not state.interrupted and state.sampling_steps > 0
    p = host.make()  # the sampler finds it
    assert p.extra_generation_params["DPM-Solver-v3 EMS"].startswith("pretty [")
    before = path.stat().st_mtime_ns
    assert "Done" in message(follow()[-1]) and path.stat().st_mtime_ns == before  # the same job is not done twice
    assert "pretty_2.ems" in message(follow((9, 7))[-1])  # another seed never writes over it


def test_statistics_are_those_of_the_model(host: Any) -> None:
    """For x0 ~ N(m, v) without guidance: l = 1 - v / (v + sigma^2), in closed form."""
    host.start()
    follow((1, False), (5, "1"))
    file = load_ems_file(host.data / "models" / "ems" / "pretty.ems.safetensors")
    sigma = (-file.lambdas).exp()
    true = 1 - 0.25 / (0.25 + sigma**2)
    assert (file.l[0].double().mean(1) - true).abs().max() < 2e-3


def test_every_sample_has_its_own_prompt(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], float]] = []
    evaluate = window.evaluate

    def watched(denoiser: Any, *arguments: Any) -> Any:
        result = evaluate(denoiser, *arguments)
        seen.append(denoiser.seen[-1])
        return result

    monkeypatch.setattr(window, "evaluate", watched)
    host.start()
    follow((5, "1, 4"))
    prompts = ("a fox", *tab.PROMPTS)
    assert set(prompts[:6]) <= {p for used, _ in seen for p in used} <= set(prompts)
    assert {scale for _, scale in seen} == {1.0, 4.0}
    assert list(prompts[:3]) in [used for used, _ in seen]


def test_interrupt_keeps_what_was_measured_and_resumes(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    host.start()
    whole = follow((7, "whole"))
    assert "Done" in message(whole[-1])
    stop_after, calls = 40, []
    evaluate = window.evaluate

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == stop_after:
            tab._interrupt()
        return evaluate(*arguments)

    monkeypatch.setattr(window, "evaluate", interrupted)
    partial = host.data / "models" / "ems" / "parts.ems.safetensors.partial"
    stopped = message(follow((7, "parts"))[-1])
    assert "Stopped." in stopped and str(partial) in stopped and partial.exists() and len(calls) == stop_after
    assert [row[-1] for row in tab._file_rows() if row[0] == partial.name] == [
        "unfinished: compute with the same settings to go on"
    ]
    state = host.modules["modules.shared"].state
    assert not state.interrupted and state.jobs[-1] == "end"
    assert host.make().latents.isfinite().all()  # the host goes on
    done = message(follow((7, "parts"))[-1])
    assert "Done" in done and not partial.exists()
    parts, once = (load_ems_file(partial.with_name(f"{n}.ems.safetensors")) for n in ("parts", "whole"))
    for name in "lsb":
        assert torch.allclose(getattr(parts, name), getattr(once, name), atol=1e-6)


def test_interrupt_while_another_job_has_its_turn(host: Any) -> None:
    """It is not that job which ends."""
    host.start()
    state = host.modules["modules.shared"].state
    with host.modules["modules.call_queue"].queue_lock:
        states = tab._follow(*ARGUMENTS)
        next(states)
        tab._interrupt()
        assert not state.interrupted
    assert "Stopped. Nothing was measured yet" in message(list(states)[-1])
    assert not list((host.data / "models").rglob("*.ems.*"))


def test_one_at_a_time_and_come_back(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second click, or another page, joins the computation that is under way."""
    host.start()
    first = tab._follow(*ARGUMENTS)
    next(first)
    work = session.current()
    joined = tab._follow(*[*ARGUMENTS[:-1], 5])
    next(joined)
    assert session.current() is work
    assert "Done" in message(list(joined)[-1]) and "Done" in message(list(first)[-1])
    assert "Done" in tab._status(work)


def test_errors_are_told_on_the_page(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    host.start()
    assert "guidance scales must be numbers above 0" in message(follow((5, "1, many"))[-1])

    def fails(*_: Any) -> None:
        raise RuntimeError("the checkpoint is damaged")

    with monkeypatch.context() as patch:
        patch.setattr(host.modules["modules.processing"], "process_images", fails)
        assert "RuntimeError: the checkpoint is damaged" in message(follow()[-1])
    with monkeypatch.context() as patch:
        patch.setattr(host.modules["modules.processing"], "process_images", lambda p: None)
        assert "ended the pass before anything was measured" in message(follow()[-1])
    with monkeypatch.context() as patch:
        patch.setattr(window, "output_folder", lambda: Path("/proc/nowhere"))
        assert "cannot be written" in message(follow()[-1])
    assert "Done" in message(follow()[-1])


def test_page_without_a_queue(host: Any) -> None:
    """With --no-gradio-queue a handler may not yield."""
    host.modules["modules.shared"].cmd_opts.no_gradio_queue = True
    host.start()
    assert not window.streams()
    assert "Done" in message(tab._finish(*ARGUMENTS))


def test_inspect_and_verify(host: Any, tmp_path: Path) -> None:
    host.start()
    follow()
    folder = host.data / "models" / "ems"
    data = bytearray((folder / "pretty.ems.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "bad <b>.ems.safetensors").write_bytes(data)
    picture, evidence, text = tab._inspect("pretty.ems.safetensors")
    assert b"guidance 1" in drawn(picture) and len(evidence) == 4 and "trajectory" in text
    report = tab._verify()
    assert "pretty.ems.safetensors: ok" in report and "<b>" not in report
    (bad,) = [line for line in report.splitlines() if "bad &lt;b&gt;" in line]
    assert not bad.endswith("ok")
    _, _, refused = tab._inspect("bad <b>.ems.safetensors")
    assert "&lt;b&gt;" in refused
    assert "Choose a file first" in tab._inspect(None)[2]
    assert "no such statistics file" in tab._inspect("gone")[2]
    rows = {row[0]: row for row in tab._file_rows()}
    assert rows["pretty.ems.safetensors"][2:5] == ["pretty", "1, 4", "4"] and rows["bad <b>.ems.safetensors"][-1]


def test_page_binds_every_button(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[Callable[..., Any]] = []
    gradio = host.modules["gradio"]
    monkeypatch.setattr(gradio.Button, "click", lambda self, f, inputs, outputs, **k: bound.append(f))
    host.start()
    assert {f.__name__ for f in bound} == {"_follow", "_interrupt", "listed", "_inspect", "_verify"}
