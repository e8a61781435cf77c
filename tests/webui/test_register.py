"""What the extension adds to a host, and what it leaves alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAME = "DPM-Solver-v3"


def test_sampler_is_in_the_dropdown_once(host: Any) -> None:
    samplers = host.modules["modules.sd_samplers"]
    assert samplers.get_sampler_and_scheduler(NAME, "Karras")[0] == "Euler"  # the host remembers this answer
    foreign = samplers.all_samplers[0]
    host.start()
    assert [s.name for s in samplers.all_samplers] == ["Euler", NAME]
    assert samplers.all_samplers[0] is foreign
    assert [s.name for s in samplers.samplers] == ["Euler", NAME]
    assert samplers.all_samplers_map[NAME] is samplers.all_samplers[1]
    assert samplers.samplers_map["k_dpm_solver_v3"] == samplers.samplers_map["dpm-solver-v3"] == NAME
    assert samplers.get_sampler_and_scheduler(NAME, "Karras") == (NAME, "Karras")
    assert samplers.get_sampler_and_scheduler(f"{NAME} Karras", None)[0] == NAME


def test_reload_ui_replaces_only_our_own(host: Any) -> None:
    host.start()
    samplers = host.modules["modules.sd_samplers"]
    later = samplers.all_samplers[0]._replace(name="Later")
    samplers.all_samplers.append(later)
    before, axes = samplers.all_samplers[1], [o.label for o in host.grid.axis_options]
    host.start()
    assert [s.name for s in samplers.all_samplers] == ["Euler", NAME, "Later"]
    assert samplers.all_samplers[2] is later
    assert samplers.all_samplers[1] is not before and samplers.all_samplers_map[NAME] is samplers.all_samplers[1]
    assert [o.label for o in host.grid.axis_options] == axes
    assert len(host.tabs) == 1 and len(host.scripts) == 1
    assert host.make().latents.isfinite().all()


def test_foreign_sampler_of_that_name_stays(host: Any, capsys: pytest.CaptureFixture[str]) -> None:
    samplers = host.modules["modules.sd_samplers"]
    foreign = samplers.all_samplers[0]._replace(name=NAME)
    samplers.all_samplers.append(foreign)
    samplers.all_samplers_map[NAME] = foreign
    host.start()
    assert samplers.all_samplers_map[NAME] is foreign and len(samplers.all_samplers) == 2
    assert "another extension has a sampler called DPM-Solver-v3" in capsys.readouterr().out
    assert len(host.tabs) == 1  # the rest is there


def test_schedule_type_is_listed_once_and_replaces_only_our_own(host: Any, capsys: pytest.CaptureFixture[str]) -> None:
    schedules = host.modules["modules.sd_schedulers"]
    foreign = list(schedules.schedulers)
    for _ in range(2):  # Reload UI
        host.start()
        own = [f"{NAME} fitted", f"{NAME} fewer passes"][: 2 if host.kind == "Forge" else 1]
        assert [s.label for s in schedules.schedulers] == ["Automatic", "Karras", *own]
        assert schedules.schedulers[:2] == foreign
        assert (
            schedules.schedulers_map["dpm_solver_v3_fitted"]
            is schedules.schedulers_map[f"{NAME} fitted"]
            is schedules.schedulers[2]
        )
    theirs = schedules.Scheduler("theirs", f"{NAME} fitted", None)
    schedules.schedulers[2] = schedules.schedulers_map[theirs.label] = theirs
    host.start()
    assert schedules.schedulers[2] is theirs and len(schedules.schedulers) == 2 + len(own)
    assert "another extension has a schedule type called" in capsys.readouterr().out


def test_name_does_not_end_in_a_scheduler(host: Any) -> None:
    """Hosts cut " Karras" and the like off a sampler's name; a name of one word has no such end."""
    host.start()
    assert [s.name for s in host.modules["modules.sd_samplers"].all_samplers if " " in s.name] == []


def test_settings_page(host: Any) -> None:
    host.start()
    entries = host.modules["modules.shared"].opts.data_labels
    assert {key: entry.default for key, entry in entries.items()} == {
        "dpm_solver_v3_order": "auto",
        "dpm_solver_v3_corrector": "auto",
        "dpm_solver_v3_strength": "auto",
        "dpm_solver_v3_same_architecture": False,
    }
    assert {entry.section[1] for entry in entries.values()} == {NAME}
    assert entries["dpm_solver_v3_order"].component_args()["choices"] == ["auto", "1", "2", "3"]
    assert all(entry.text for entry in entries.values())


@pytest.mark.parametrize(
    "broken", ["modules.sd_samplers", "modules.sd_schedulers", "modules.scripts", "modules.script_callbacks", "gradio"]
)
def test_one_failing_part_leaves_the_others(
    host: Any, broken: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that moved a module: the start goes on, the log names what is missing."""
    monkeypatch.setitem(sys.modules, broken, None)
    if broken == "modules.scripts":
        monkeypatch.setattr(host, "modules", {**host.modules, broken: type("M", (), {"Script": int})})
    host.start()
    assert "is left out" in capsys.readouterr().out
    assert (NAME in host.modules["modules.sd_samplers"].all_samplers_map) == (broken != "modules.sd_samplers")


def test_loads_under_one_name_whatever_the_folder(tmp_path: Path) -> None:
    """No host: everything is left out, nothing is raised, and no top-level `nodes` or `sampler` is made."""
    copy = tmp_path / "odd name.v2 (1)"
    for part in ("sampler", "ems_tools", "webui", "scripts"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    shutil.copy(ROOT / "__init__.py", copy)
    code = f"""
        import runpy, sys
        sys.path.insert(0, {str(copy)!r})  # as hosts do
        for _ in range(2):
            names = runpy.run_path({str(copy / "scripts" / "dpm_solver_v3.py")!r})
        print(sys.modules["dpm_solver_v3"].__file__, names["Accordion"])
        print(sorted({{"nodes", "sampler", "webui", "ems_tools"}} & set(sys.modules)))
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    *said, package, shadows = result.stdout.splitlines()
    assert package == f"{copy / '__init__.py'} None" and shadows == "[]"
    assert sum("the sampler is left out" in line for line in said) == 2
