"""What importing the pack costs a ComfyUI that starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import importlib.util, json, os, sys, time
tree, pack = sys.argv[1:3]
os.chdir(tree); sys.path.insert(0, tree); sys.argv = ["main.py", "--cpu"]
import comfy.options; comfy.options.enable_args_parsing()
import utils.extra_config, server, execution, nodes, folder_paths, comfy.samplers
import comfy_extras.nodes_custom_sampler
before, start = set(sys.modules), time.process_time()
spec = importlib.util.spec_from_file_location("odd_x_name", pack + "/__init__.py", submodule_search_locations=[pack])
module = importlib.util.module_from_spec(spec); sys.modules["odd_x_name"] = module
spec.loader.exec_module(module)
seconds = time.process_time() - start
new = sorted({name.split(".")[0] for name in set(sys.modules) - before} - {"odd_x_name"})
own = [name[len("odd_x_name."):] for name in sys.modules if name.startswith("odd_x_name.")]
print(json.dumps({"seconds": seconds, "new": new, "own": own, "nodes": len(module.NODE_CLASS_MAPPINGS)}))
"""


def startup(tree: Path, pack: Path = ROOT) -> dict[str, Any]:
    """What a ComfyUI sees of the pack's import; `tree/site` holds the packages that this very ComfyUI asks for."""
    command = [sys.executable, "-c", SCRIPT, str(tree), str(pack)]
    environment = {**os.environ, "PYTHONPATH": str(tree / "site")}
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_nothing_is_imported_that_comfyui_has_not(any_server: Any) -> None:
    """Of modules that are no part of Python. How long it takes is printed by benchmarks/comfyui.py."""
    seen = startup(any_server.tree)
    assert [name for name in seen["new"] if name not in sys.stdlib_module_names] == []
    assert seen["nodes"] >= 9
    late = ("file", "compute", "estimate", "fit", "judge", "show", "cli", "embedded", "trajectory", "hosting.jobs")
    assert [name for name in seen["own"] if name.startswith(tuple(f"ems_tools.{part}" for part in late))] == []
