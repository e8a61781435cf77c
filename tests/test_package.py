"""The checkout as a package: harmless to import, one direction of dependency, under any folder name."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENEATH = {
    "sampler": {"sampler"},
    "ems_tools": {"ems_tools", "sampler"},
    "nodes": {"nodes", "ems_tools", "sampler"},
    "webui": {"webui", "ems_tools", "sampler"},
    "pipelines": {"pipelines", "ems_tools", "sampler"},
}


def run_python(code: str, *arguments: str, cwd: Path) -> str:
    """What `code` prints in a fresh interpreter."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_root_imports_nothing_and_registers_nothing_without_comfyui(tmp_path: Path) -> None:
    code = """
        import sys
        before = set(sys.modules)
        import dpm_solver_v3
        new = {m.partition(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)
        print(sorted(m for m in new if not m.startswith("__editable__")))
        print(dict(getattr(dpm_solver_v3, "NODE_CLASS_MAPPINGS", {})))
    """
    assert run_python(code, cwd=tmp_path).splitlines() == ["['dpm_solver_v3']", "{}"]


def test_sampler_imports_torch_only(tmp_path: Path) -> None:
    """What torch itself brings along (numpy, where there is one) does not count."""
    code = """
        import sys
        import torch
        before = set(sys.modules)
        import dpm_solver_v3.sampler
        new = {m.partition(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)
        print(sorted(m for m in new if not m.startswith("__editable__")))
        print([m for m in sys.modules if m.startswith("dpm_solver_v3.ems_tools")])
    """
    assert run_python(code, cwd=tmp_path).splitlines() == ["['dpm_solver_v3']", "[]"]


def test_sampler_imports_without_numpy_safetensors_tqdm(tmp_path: Path) -> None:
    code = """
        import sys
        for name in ("numpy", "safetensors", "tqdm", "scipy"):
            sys.modules[name] = None
        import dpm_solver_v3.sampler
        print("dpm_solver_v3.ems_tools" in sys.modules)
    """
    assert run_python(code, cwd=tmp_path) == "False"


def imported_parts(file: Path) -> Iterator[str]:
    """The top-level parts of this package that `file` imports: "sampler" for `from ..sampler.ems import EMS`."""
    depth = len(file.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" if node.module else a.name for a in node.names]
            if node.level == depth:
                yield from (name.partition(".")[0] for name in names)
            elif node.level:
                yield file.relative_to(ROOT).parts[0]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        for name in names:
            assert not name.startswith("dpm_solver_v3"), f"{file}: imports inside the package are relative ({name})"


@pytest.mark.parametrize("part", [part for part in BENEATH if (ROOT / part).is_dir()])
def test_dependencies_point_one_way(part: str) -> None:
    files = sorted((ROOT / part).rglob("*.py"))
    assert files
    for file in files:
        upward = set(imported_parts(file)) & (set(BENEATH) - BENEATH[part])
        assert not upward, f"{file} imports {upward}"


def test_direction_check_sees_an_upward_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "sampler" / "deep" / "bad.py"
    file.parent.mkdir(parents=True)
    file.write_text("from ... import nodes\nfrom ...ems_tools.estimate.moments import x\nfrom ..ems import EMS\n")
    assert list(imported_parts(file)) == ["nodes", "ems_tools", "sampler"]
    file.write_text("import dpm_solver_v3.nodes\n")
    with pytest.raises(AssertionError, match="relative"):
        list(imported_parts(file))


def test_loads_by_path_under_an_odd_folder_name(tmp_path: Path) -> None:
    """As ComfyUI loads `custom_nodes/<any name>`: by path, under a module name with dots replaced, not installed."""
    folder = tmp_path / "custom nodes" / "dpm solver.v3-main"
    for part in ["__init__.py", *(name for name in BENEATH if (ROOT / name).is_dir())]:
        source, target = ROOT / part, folder / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "emoji.safetensors"))
        else:
            target.parent.mkdir(parents=True)
            shutil.copy(source, target)
    code = """
        import importlib, importlib.util, sys
        from pathlib import Path
        folder = Path(sys.argv[1])
        sys.modules["dpm_solver_v3"] = None  # an installed copy must not be what answers
        name = str(folder).replace(".", "_x_")
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        sampler = importlib.import_module(name + ".sampler")
        importlib.import_module(name + ".ems_tools.embedded")
        import torch
        sigmas = torch.tensor([1.0, 0.5])
        x = sampler.sample_dpm_solver_v3(lambda x, sigma: 0 * x, torch.ones(1, 1), sigmas, disable=True)
        print(Path(sampler.__file__).is_relative_to(folder), x.item())
    """
    inside, x = run_python(code, str(folder), cwd=tmp_path).split()
    assert inside == "True"
    assert float(x) == pytest.approx(0.5, rel=1e-6)  # D = 0: x falls with sigma


def run_tests_in(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:cov"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_pytest_collects_below_an_odd_folder_name(tmp_path: Path) -> None:
    """The root's __init__.py makes the checkout a package to pytest, whose name may not be an identifier."""
    folder = tmp_path / "odd name.v2"
    (folder / "tests").mkdir(parents=True)
    for name in ("__init__.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "tests" / "conftest.py").write_text("import pytest\n@pytest.fixture\ndef one(): return 1\n")
    (folder / "tests" / "test_it.py").write_text("def test_it(one): assert one == 1\n")
    result = run_tests_in(folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed" in result.stdout


def test_console_script_and_metadata() -> None:
    distribution = importlib.metadata.distribution("comfyui-dpm-solver-v3")
    scripts = {e.name: e.value for e in distribution.entry_points if e.group == "console_scripts"}
    assert scripts == {"ems": "dpm_solver_v3.ems_tools.cli:main"}
    assert f'__version__ = "{distribution.version}"' in (ROOT / "__init__.py").read_text(encoding="utf-8")
    needed = {r for r in distribution.requires or [] if "extra ==" not in r}
    assert needed == {"torch", "numpy", "safetensors", "tqdm"}


def test_console_script_starts() -> None:
    code = "import sys; sys.argv = ['ems', '--help']; from dpm_solver_v3.ems_tools.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage: ems" in result.stdout


def test_every_folder_of_the_package_is_packaged() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = set(re.findall(r'^ +"(dpm_solver_v3[\w.]*)",$', text, re.MULTILINE))
    files = [file for part in BENEATH for file in (ROOT / part).rglob("__init__.py")]
    folders = {".".join(("dpm_solver_v3", *file.parent.relative_to(ROOT).parts)) for file in files}
    assert listed == folders | {"dpm_solver_v3"}
