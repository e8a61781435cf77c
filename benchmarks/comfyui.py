"""What the pack costs inside a real ComfyUI: processor time at its start, and time per step over dpmpp_2m.

    python benchmarks/comfyui.py                        (the newest of .venv/comfyui)
    python benchmarks/comfyui.py --against CHECKOUT     (another version of this repository beside this one, in turns)
    python benchmarks/comfyui.py --comfyui FOLDER

The start is timed with its bytecode at hand, as every start but the first has it. Both samplers run in one process on the
embedded model, in turns; the ratio is of medians. The model's own time is in both.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    newest = max((ROOT / ".venv" / "comfyui").glob("0*"), default=Path())
    parser.add_argument("--comfyui", type=Path, default=newest, help="the ComfyUI to start")
    parser.add_argument("--against", type=Path, help="a checkout of another version")
    parser.add_argument("--starts", type=int, default=9, help="of ComfyUI, for each version")
    parser.add_argument("--steps", type=Path, help=argparse.SUPPRESS)  # this program in a process of its own: the pack
    args = parser.parse_args()
    if args.steps:
        steps(args.comfyui, args.steps)
        return
    startup = load("startup", ROOT / "tests" / "comfyui" / "test_startup.py").startup
    packs = [pack.resolve() for pack in (args.against, ROOT) if pack]
    seconds: dict[Path, list[float]] = {pack: [] for pack in packs}
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PYTHONPYCACHEPREFIX"] = folder
        for start in range(args.starts + 1):
            for pack in packs:
                found = 1000 * startup(args.comfyui, pack)["seconds"]
                seconds[pack] += [found] if start else []
    del os.environ["PYTHONPYCACHEPREFIX"]
    for pack, times in seconds.items():
        words = f"median {statistics.median(times):.0f}, {min(times):.0f} to {max(times):.0f} ms"
        print(f"{pack.name}: import of the pack in {args.starts} starts: {words}", flush=True)
    for pack in [*packs, *packs]:
        command = [sys.executable, __file__, "--comfyui", str(args.comfyui), "--steps", str(pack)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"{pack.name}:\n{done.stdout}", end="", flush=True)


def steps(tree: Path, checkout: Path) -> None:
    """Print the time per step of the pack in `checkout`."""
    os.chdir(tree)
    sys.path[:0] = [str(tree), str(tree / "site")]
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
    load("dpm_v3_in_comfyui", checkout / "__init__.py")
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
            print(f"  latent {json.dumps(shape)}, 20 steps, per step: {words}, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
