"""The tab "EMS": computing inside the host's own pass, interrupt, resume, and the files that are there."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpm_solver_v3.ems_tools.compute import EFFORTS
from dpm_solver_v3.ems_tools.file import FittedRow, load_ems_file
from dpm_solver_v3.sampler import FittedSteps, Settings
from dpm_solver_v3.webui import host as window
from dpm_solver_v3.webui import page, passes, session, tab

FORM = {
    "prompt": "a fox",
    "more": True,
    "negative": "blurry",
    "width": 64,
    "height": 64,
    "scales": "1, 4",
    "effort": "tiny",
    "steps": "",
    "name": "",
    "batch": 3,
    "seed": 0,
}
State = dict[str, Any]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    few: dict[str, Any] = {
        "samples": 6,
        "intervals": 8,
        "noises": 2,
        "steps": (5,),
        "schedules": 1,
        "probe_every": 1,
        "strengths": (0.5,),
        "reference_steps": 8,
    }
    fit = replace(EFFORTS["quick"].fit, steps=(5,), noises=2, held_out=2, search=0)
    effort = replace(EFFORTS["quick"], combinations=(Settings(order=2, corrector="pseudo"),), fit=fit, **few)
    monkeypatch.setitem(EFFORTS, "tiny", effort)
    monkeypatch.setattr(tab, "_SECONDS", 0.02)
    monkeypatch.setattr(session, "_CURRENT", [])
    monkeypatch.setattr(session, "_SPEED", [])


def named(update: tuple[Any, ...]) -> State:
    return dict(zip(("status", "start", "stop", "files", "names", "shown", "beat"), update, strict=True))


def follow(**changes: Any) -> list[State]:
    """Every state of the page from a press of Compute to the end."""
    return list(watched(tab._start(*{**FORM, **changes}.values())))


def watched(update: tuple[Any, ...]) -> Iterator[State]:
    """What a page shows from this answer on: it asks again as long as the hidden text changes."""
    while True:
        state = named(update)
        yield state
        if not isinstance(state["beat"], str):
            return
        update = tab._next(state["beat"])


def last(**changes: Any) -> State:
    return follow(**changes)[-1]


def enabled(state: State) -> tuple[bool, bool]:
    """Of Compute and Interrupt."""
    return state["start"]["interactive"], state["stop"]["interactive"]


def text_of(html: str) -> str:
    return re.sub(r"<[^>]*>", " ", html)


class Paused:
    """The next evaluations wait until `go`; `reached` tells that one does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.go, self.reached, self.count, self.after = threading.Event(), threading.Event(), 0, after
        evaluate = passes.evaluate

        def watched(*arguments: Any) -> Any:
            self.count += 1
            if self.count >= self.after:
                self.reached.set()
                assert self.go.wait(60)
            return evaluate(*arguments)

        monkeypatch.setattr(passes, "evaluate", watched)


def test_computes_for_the_loaded_checkpoint(host: Any) -> None:
    host.start()
    states = follow()
    end = states[-1]
    path = host.data / "models" / "ems" / "pretty.ems.safetensors"
    assert f"Done: {path.relative_to(host.data)}" in end["status"] and "dpmv3-done" in end["status"]
    assert "choose the sampler DPM-Solver-v3 and the schedule type" in end["status"] and "with 5 steps" in end["status"]
    assert any(" % of " in state["status"] and "<progress" in state["status"] for state in states[:-1])
    assert [enabled(state) for state in states if state["status"].count("<progress")] == [(False, True)] * (len(states) - 1)
    assert enabled(end) == (True, False)
    file = load_ems_file(path)
    assert file.guidance.tolist() == [1.0, 4.0] and file.channels == 4
    assert file.meta.model["sha256"] == host.checkpoint.sha256 and file.meta.model["prompts"].startswith("16, the first: a fox")
    assert file.meta.grid["kind"] == ("the host's own levels" if host.kind != "A1111" else "uniform in lambda")
    assert end["names"]["choices"] == ["pretty.ems.safetensors", "embedded-emoji.ems.safetensors"] or path.name in str(
        end["names"]
    )
    assert end["names"]["value"] == path.name and path.name in end["files"] and path.name in end["shown"]
    state = host.modules["modules.shared"].state
    assert state.jobs == ["EMS", "end"] and not state.interrupted and state.sampling_steps > 0
    p = host.make()  # the sampler finds it
    assert p.extra_generation_params["DPM-Solver-v3 EMS"].startswith("pretty [")
    before = path.stat().st_mtime_ns
    assert "Done" in last()["status"] and path.stat().st_mtime_ns == before  # the same job is not done twice
    assert "pretty_2.ems" in last(seed=7)["status"]  # another seed never writes over it


def test_what_a_file_gives_is_said_with_its_name_in_plain_numbers(host: Any) -> None:
    host.start()
    shown = last()["shown"]
    text = text_of(shown)
    assert "pretty.ems.safetensors" in text and "made for pretty" in text and "CFG scales 1, 4" in text
    assert "Error without" in text and "ratio below 1 means that the file helps" in text
    assert "DPM-Solver-v3 fitted" in text and "Error ratio" in text
    assert shown.count("<svg") >= 5 and "CFG 4" in text  # what it gains, and l, s, b
    tables = " ".join(re.findall(r"<table>.*?</table>", shown))
    assert not re.search(r"\de[-+]\d", tables)  # no 1.61e+00
    for split in ("calibration", "report"):
        assert f">{split}<" not in tables


def test_statistics_are_those_of_the_model(host: Any) -> None:
    """For x0 ~ N(m, v) without guidance: l = 1 - v / (v + sigma^2), in closed form."""
    host.start()
    follow(more=False, scales="1")
    file = load_ems_file(host.data / "models" / "ems" / "pretty.ems.safetensors")
    sigma = (-file.lambdas).exp()
    true = 1 - 0.25 / (0.25 + sigma**2)
    assert (file.l[0].double().mean(1) - true).abs().max() < 2e-3


def test_every_sample_has_its_own_prompt(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], float]] = []
    evaluate = passes.evaluate

    def watched(denoiser: Any, *arguments: Any) -> Any:
        result = evaluate(denoiser, *arguments)
        seen.append(denoiser.seen[-1])
        return result

    monkeypatch.setattr(passes, "evaluate", watched)
    host.start()
    follow()
    prompts = ("a fox", *tab.PROMPTS)
    assert set(prompts[:6]) <= {p for used, _ in seen for p in used} <= set(prompts)
    assert {scale for _, scale in seen} == {1.0, 4.0}
    assert list(prompts[:3]) in [used for used, _ in seen]


def test_step_counts_to_fit(host: Any) -> None:
    host.start()
    assert "with 3 to 5 steps" in last(steps=" 5, 3;4", scales="1")["status"]
    file = load_ems_file(host.data / "models" / "ems" / "pretty.ems.safetensors")
    assert sorted({row.steps for row in file.meta.fitted}) == [3, 4, 5]
    for wrong, why in (("4, many", "whole numbers"), ("-3", "whole numbers"), ("1, 4", "between 2 and 64")):
        refused = last(steps=wrong)
        assert why in refused["status"] and "dpmv3-error" in refused["status"]


def test_steps_for_image_to_image_are_fitted_where_the_box_is_ticked(host: Any) -> None:
    """The file holds them, the details show them; without the tick it is another request."""
    host.start()
    shown = last(image=True, scales="1", steps="4")["shown"]
    folder = host.data / "models" / "ems"
    rows = load_ems_file(folder / "pretty.ems.safetensors").meta.partial
    assert rows and {row.steps for row in rows} == {4}
    assert "image to image: error from a picture" in text_of(shown)
    assert "pretty_2.ems" in last(image=False, scales="1", steps="4")["status"]
    assert load_ems_file(folder / "pretty_2.ems.safetensors").meta.partial == ()


@pytest.mark.parametrize(
    "text", ["a fox\nin two lines", "\U0001f468\u200d\U0001f469\u200d\U0001f467 at home", "a\u3000fox\u00a0here"]
)
def test_a_prompt_of_any_text_reaches_the_file(host: Any, text: str) -> None:
    """What metadata cannot hold would have been refused at the very end, after all evaluations."""
    host.start()
    host.load(host.make_checkpoint("odd\u3000name", 3))
    assert "Done" in last(prompt=text, scales="1", more=False)["status"]
    (path,) = (host.data / "models" / "ems").glob("*.safetensors")
    facts = load_ems_file(path).meta.model
    assert facts["name"] == "odd name" and facts["prompts"].isprintable()
    assert host.make().extra_generation_params["DPM-Solver-v3 EMS"] != "none"


def test_another_request_is_another_file(host: Any) -> None:
    """A changed prompt beyond the first, a changed negative prompt: not the file of before."""
    host.start()
    last(scales="1")
    assert "pretty_2.ems" in last(scales="1", negative="ugly")["status"]
    assert "pretty_3.ems" in last(scales="1", negative="ugly", more=False)["status"]
    assert "pretty_2.ems" in last(scales="1", negative="ugly")["status"]


def test_page_opened_during_a_computation(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows what the first page shows: status, bar, the unfinished job, and in the end the finished file."""
    host.start()
    paused = Paused(monkeypatch, after=60)
    first = watched(tab._start(*FORM.values()))
    next(first)
    assert paused.reached.wait(60)
    opened = watched(tab._now())
    seen = next(opened)
    assert "<progress" in seen["status"] and " % of " in seen["status"] and enabled(seen) == (False, True)
    assert "pretty.ems.safetensors.partial" in seen["files"] and "being computed" in seen["files"]
    paused.go.set()
    end = list(opened)[-1]
    assert "Done" in end["status"] and end["names"]["value"] == "pretty.ems.safetensors" and "Error ratio" in end["shown"]
    assert "pretty.ems.safetensors" in end["files"] and "partial" not in end["files"] and enabled(end) == (True, False)
    assert "Done" in list(first)[-1]["status"]
    assert "Done" in named(tab._now())["status"]  # opened after it


def test_page_watches_from_its_opening(host: Any) -> None:
    """The host's page calls it when it is opened, not when it is built."""
    host.start()
    blocks = host.tabs[0][0]
    assert "_now" in [function.__name__ for function, _, _ in blocks.loads]


def test_compute_during_a_computation_says_that_the_form_is_not_used(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    host.start()
    paused = Paused(monkeypatch, after=20)
    first = watched(tab._start(*FORM.values()))
    next(first)
    work = session.current()
    joined = watched(tab._start(*{**FORM, "seed": 5}.values()))
    for _ in range(2):
        seen = next(joined)
        assert session.current() is work
        assert "this form was not used" in seen["status"] and "<progress" in seen["status"]
    paused.go.set()
    assert "Done" in list(joined)[-1]["status"] and "Done" in list(first)[-1]["status"]
    assert len(list((host.data / "models" / "ems").glob("*.safetensors"))) == 1


def test_interrupt_keeps_what_was_measured_and_resumes(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    host.start()
    assert "Done" in last(name="whole")["status"]
    stop_after, calls = 40, []
    evaluate = passes.evaluate

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == stop_after:
            status, button = tab._interrupt()
            assert isinstance(button, dict)
            assert "Stopping" in status and not button["interactive"]
        return evaluate(*arguments)

    monkeypatch.setattr(passes, "evaluate", interrupted)
    partial = host.data / "models" / "ems" / "parts.ems.safetensors.partial"
    stopped = last(name="parts")
    assert (
        "Stopped." in stopped["status"]
        and str(partial.relative_to(host.data)) in stopped["status"]
        and "dpmv3-stopped" in stopped["status"]
    )
    assert partial.exists() and len(calls) == stop_after and enabled(stopped) == (True, False)
    assert "unfinished: compute with the same settings to go on" in stopped["files"]
    state = host.modules["modules.shared"].state
    assert not state.interrupted and state.jobs[-1] == "end"
    assert host.make().latents.isfinite().all()  # the host goes on
    assert "Done" in last(name="parts")["status"] and not partial.exists()
    parts, once = (load_ems_file(partial.with_name(f"{n}.ems.safetensors")) for n in ("parts", "whole"))
    for name in "lsb":
        assert torch.allclose(getattr(parts, name), getattr(once, name), atol=1e-6)


def test_interrupt_is_not_lost_when_another_call_of_the_page_ends(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its wrapper clears the host's mark (modules/call_queue.py: wrap_gradio_call); the tab then said "Stopping" to the end."""
    host.start()
    calls, evaluate = [], passes.evaluate

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 40:
            tab._interrupt()
            host.modules["modules.shared"].state.interrupted = False
        return evaluate(*arguments)

    monkeypatch.setattr(passes, "evaluate", interrupted)
    assert "Stopped. What was measured is kept" in last()["status"] and len(calls) == 40


def test_interrupt_while_another_job_has_its_turn(host: Any) -> None:
    """It is not that job which ends."""
    host.start()
    state = host.modules["modules.shared"].state
    with host.modules["modules.call_queue"].queue_lock:
        states = watched(tab._start(*FORM.values()))
        next(states)
        tab._interrupt()
        assert not state.interrupted
    assert "Stopped. Nothing was measured yet" in list(states)[-1]["status"]
    assert not list((host.data / "models").rglob("*.ems.*"))


def test_errors_look_like_errors(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    host.start()

    def error(**changes: Any) -> str:
        state = last(**changes)
        assert "dpmv3-error" in state["status"] and enabled(state) == (True, False)
        return text_of(state["status"])

    assert "Guidance scales must be numbers above 0" in error(scales="1, many")
    assert "&#x27;Samples at once&#x27; must lie between 1 and 1024, not 0" in error(batch=0)

    def fails(*_: Any) -> None:
        raise RuntimeError("the checkpoint is damaged")

    with monkeypatch.context() as patch:
        patch.setattr(host.modules["modules.processing"], "process_images", fails)
        assert "RuntimeError: the checkpoint is damaged" in error()
    with monkeypatch.context() as patch:
        patch.setattr(host.modules["modules.processing"], "process_images", lambda p: None)
        assert "ended the pass before anything was measured" in error()
    with monkeypatch.context() as patch:
        patch.setattr(window, "output_folder", lambda: Path("/proc/nowhere"))
        assert "cannot be written" in error()
    assert "Done" in last(batch=None, seed=None)["status"]  # empty boxes mean the usual values


def test_cost_is_that_of_all_scales_and_has_a_time_once_it_is_known(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluations(*form: Any) -> int:
        found = re.search(r"About ([\d,]+) evaluations", tab._cost(*form))
        assert found is not None
        return int(found[1].replace(",", ""))

    host.start()
    assert evaluations("1, 4", "quick", "") == 2 * evaluations("4", "quick", "")
    assert evaluations("4", "quick", "6") < evaluations("4", "quick", "") < evaluations("4", "standard", "")
    more = evaluations("1, 4", "quick", "", False, True) - evaluations("1, 4", "quick", "")
    assert more > evaluations("4", "quick", "") // 2
    assert evaluations("1", "quick", "", False, True) == evaluations("1", "quick", "")  # no pass to leave out
    for fewer in (False, True):  # image to image costs the same at every scale
        dear, plain = (evaluations("1, 4", "quick", "6", image, fewer) for image in (True, False))
        assert dear - plain == 2 * (evaluations("4", "quick", "6", True) - evaluations("4", "quick", "6")) > plain
    assert "time that is left is shown" in tab._cost("1", "quick", "")
    monkeypatch.setattr(session, "_SPEED", [0.5])
    assert "about 50 min" not in tab._cost("1", "tiny", "") and re.search(r"about \d+ (s|min)", tab._cost("1", "tiny", ""))
    assert "dpmv3-error" in tab._cost("none", "quick", "") and "dpmv3-error" in tab._cost("1", "quick", "one")


def test_no_handler_outlives_its_answer(host: Any) -> None:
    """With --no-gradio-queue one may not; and a page closed under one keeps AUTOMATIC1111 from reloading its page."""
    host.start()
    handlers = [tab._start, tab._next, tab._now, tab._interrupt, tab._inspect, tab._verify, tab._cost]
    assert not [f.__name__ for f in handlers if inspect.isgeneratorfunction(f)]


def test_inspect_and_verify(host: Any) -> None:
    host.start()
    status = last()["status"]
    folder = host.data / "models" / "ems"
    data = bytearray((folder / "pretty.ems.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "bad <b>.ems.safetensors").write_bytes(data)
    shown = tab._inspect("pretty.ems.safetensors")
    assert "pretty.ems.safetensors" in shown and "trajectory" in shown and "Done" not in shown
    assert "Done" in status  # and what was computed stays said above
    report = tab._verify()
    assert "pretty.ems.safetensors: ok" in report and "<b>" not in report
    (bad,) = [line for line in report.splitlines() if "bad &lt;b&gt;" in line]
    assert not bad.endswith("ok")
    assert "&lt;b&gt;" in tab._inspect("bad <b>.ems.safetensors")
    assert "Choose a file first" in tab._inspect(None)
    assert "no such statistics file" in tab._inspect("gone")
    table = named(tab._now())["files"]
    assert "cannot be used" in table and "bad &lt;b&gt;" in table and "<b>.ems" not in table


def test_page_binds_every_button(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[Callable[..., Any]] = []
    gradio = host.modules["gradio"]
    monkeypatch.setattr(gradio.Button, "click", lambda self, f, inputs, outputs, **k: bound.append(f))
    host.start()
    assert {f.__name__ for f in bound} == {"_start", "_interrupt", "_now", "_inspect", "_verify"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.61, "1.61"), (0.0123456, "0.0123"), (24.0, "24.0"), (5740.4, "5740"), (0.0, "0"), (2e-7, "0.000000200")],
)
def test_plain_numbers(value: float, shown: str) -> None:
    assert page.plain(value) == shown


def test_steps_for_image_to_image_are_shown(host: Any) -> None:
    """A table of their own, and what to do with them; neither where a file has none."""
    host.start()
    last(scales="1")
    path = host.data / "models" / "ems" / "pretty.ems.safetensors"
    file = load_ems_file(path)
    row = file.meta.fitted[0]
    assert "Image to image" not in page.details("a", path, file) and "image to image" not in page.next_step(file)
    errors, ratio = (0.1, 0.1, 0.1), (0.3, 0.25, 0.4)
    rows = []
    for first, n in ((1.0, 2), (-2.0, 3)):
        lambdas = tuple(first + k for k in range(n))
        steps = FittedSteps(lambdas, (0.4,) * n, tuple((0.0,) * k + (0.6,) for k in range(n)))
        rows.append(FittedRow(row.guidance, n, lambdas, steps, errors, errors, "UniPC 2 on Karras", ratio, 4))
    file = replace(file, meta=replace(file.meta, partial=tuple(rows)))
    table = page.details("a", path, file).split("Image to image", 1)[1]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", table)
    assert cells[:10] == ["1", "7.39", "3", "0.30 (0.25 to 0.40)", "UniPC 2 on Karras", "1", "0.368", "2", *cells[3:5]]
    assert "So too in image to image and the hires pass, where 2, 3 steps are made." in page.next_step(file)


def test_runs_of_numbers() -> None:
    assert page.runs_of([4, 5, 6, 8, 10, 11]) == "4 to 6, 8, 10, 11" and page.runs_of([]) == ""
