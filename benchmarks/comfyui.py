"""What the pack costs inside a real ComfyUI: at its start, and per step over dpmpp_2m on the embedded model.

    python benchmarks/comfyui.py [COMFYUI_FOLDER]      (default: the newest of .venv/comfyui)

Both samplers run in one process on the same model, in turns; the ratio is of medians. The model's own time is in both.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def load(name: str, path: Path) -> Any:
    folder = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folder)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    trees = sorted((ROOT / ".venv" / "comfyui").glob("0*"))
    tree = Path(sys.argv[1]) if len(sys.argv) > 1 else trees[-1]
    startup = load("startup", ROOT / "tests" / "comfyui" / "test_startup.py").startup
    seconds = [startup(tree)["seconds"] for _ in range(9)]
    words = f"median {1000 * statistics.median(seconds):.0f}, {1000 * min(seconds):.0f} to {1000 * max(seconds):.0f} ms"
    print(f"import of the pack in 9 starts: {words}")
    print(subprocess.run([sys.executable, __file__, "--steps", str(tree)], capture_output=True, text=True).stdout, end="")


def steps(tree: Path) -> None:
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sample
    import comfy.samplers
    import folder_paths
    import torch

    import nodes

    torch.set_num_threads(1)
    folder_paths.set_output_directory("/nonexistent")
    load("dpm_v3_in_comfyui", ROOT / "__init__.py")
    pack = load("test_pack", ROOT / "tests" / "comfyui" / "pack" / "__init__.py")
    model = pack.build(pack.Emoji(), "EPS")
    cond = [[[torch.full((1, 1, 1), float(k)), {}]] for k in (3, 9)]
    with torch.inference_mode():
        for shape in ((1, 3, 32, 32), (8, 3, 32, 32)):
            times: dict[str, list[float]] = {"dpmpp_2m": [], "dpm_solver_v3": []}
            for _ in range(16):
                for name, found in times.items():
                    start = time.perf_counter()
                    latent = {"samples": torch.zeros(shape)}
                    nodes.common_ksampler(model, 1, 20, 4.0, name, "karras", *cond, latent)
                    found.append((time.perf_counter() - start) / 20)
            median = {name: statistics.median(found[1:]) for name, found in times.items()}
            ratio = median["dpm_solver_v3"] / median["dpmpp_2m"]
            words = ", ".join(f"{name} {1000 * value:.2f} ms" for name, value in median.items())
            print(f"latent {json.dumps(shape)}, 20 steps, per step: {words}, ratio {ratio:.3f}")


if __name__ == "__main__":
    if "--steps" in sys.argv:
        steps(Path(sys.argv[2]))
    else:
        main()
