"""Writes locales/en/nodeDefs.json from the nodes themselves: make_locales.py COMFYUI_TREE. Other languages are written by hand.

Texts that hold measured numbers (the cost of an effort) are left out: the front end then shows the node's own.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = {("DPMSolverV3_ComputeEMS", "effort")}


def texts_of(name: str, node: Any, title: str) -> dict[str, object]:
    kinds = node.INPUT_TYPES()
    inputs = {}
    for key, given in {**kinds.get("required", {}), **kinds.get("optional", {})}.items():
        tooltip = given[1].get("tooltip") if len(given) > 1 and (name, key) not in LEFT_OUT else None
        inputs[key] = {"name": key, **({"tooltip": tooltip} if tooltip else {})}
    outputs = getattr(node, "RETURN_NAMES", node.RETURN_TYPES)
    return {
        "display_name": title,
        "description": node.DESCRIPTION,
        "inputs": inputs,
        "outputs": {str(k): {"name": output} for k, output in enumerate(outputs)},
    }


def main() -> None:
    tree = sys.argv[1]
    sys.argv = ["main.py", "--cpu"]
    os.chdir(tree)
    sys.path[:0] = [tree, str(Path(tree) / "site")]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.samplers
    import folder_paths

    import nodes

    assert comfy.samplers and folder_paths and nodes
    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    titles = pack.NODE_DISPLAY_NAME_MAPPINGS
    found = {name: texts_of(name, node, titles[name]) for name, node in pack.NODE_CLASS_MAPPINGS.items()}
    path = ROOT / "locales" / "en" / "nodeDefs.json"
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path, len(found), "nodes")


if __name__ == "__main__":
    main()
