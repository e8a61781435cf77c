"""DPM-Solver-v3 for ComfyUI, the WebUIs and k-diffusion. ComfyUI imports this file; so does `import dpm_solver_v3`.

Inside ComfyUI, told by its modules that are loaded already, the nodes register themselves; elsewhere nothing happens.
"""

import sys

__version__ = "0.1.0"

NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}

if "comfy.samplers" in sys.modules and "folder_paths" in sys.modules:
    from . import nodes as _nodes

    _nodes.register()
    NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = _nodes.NODE_CLASS_MAPPINGS, _nodes.NODE_DISPLAY_NAME_MAPPINGS
    WEB_DIRECTORY = "./web"
