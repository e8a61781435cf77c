"""What tests of several folders load by path. pytest has this folder on the path (`pythonpath` in pyproject.toml)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def benchmark(name: str) -> ModuleType:
    """`benchmarks/<name>.py` as a module, loaded once. Benchmarks import each other as they do when they are run."""
    known = f"benchmarks_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, ROOT / "benchmarks" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = sys.modules[known] = importlib.util.module_from_spec(spec)  # data classes look their module up
        sys.path.insert(0, str(ROOT / "benchmarks"))
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[known]
            raise
        finally:
            sys.path.remove(str(ROOT / "benchmarks"))
    return sys.modules[known]
