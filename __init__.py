"""DPM-Solver-v3 for ComfyUI, the WebUIs and k-diffusion. ComfyUI imports this file; so does `import dpm_solver_v3`.

Inside ComfyUI, told by its modules that are loaded already, the nodes register themselves; elsewhere nothing happens.
"""

import importlib
import sys
import types

__version__ = "0.2.0"

NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}

if "comfy.samplers" in sys.modules and "folder_paths" in sys.modules:
    from . import nodes as _nodes

    _nodes.register()
    NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = _nodes.NODE_CLASS_MAPPINGS, _nodes.NODE_DISPLAY_NAME_MAPPINGS
    WEB_DIRECTORY = "./web"


class _Diffusers(types.ModuleType):
    """`dpm_solver_v3.diffusers`, another name for the package `pipelines`, which is imported when something of it is asked for.

    A folder called diffusers would be what `import diffusers` finds wherever the checkout itself lies on sys.path.
    """

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # asked of every loaded module by inspect, unittest, ...
            raise AttributeError(name)
        return getattr(importlib.import_module(f"{__name__}.pipelines"), name)


diffusers = sys.modules[f"{__name__}.diffusers"] = _Diffusers(f"{__name__}.diffusers", _Diffusers.__doc__)
