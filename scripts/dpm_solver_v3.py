"""What AUTOMATIC1111, Forge and reForge load at start and at Reload UI: loads the package, which adds everything to the host.

Hosts put the extension's folder on sys.path, where its `nodes` or `sampler` could meet another extension's. So the package is
loaded by path, under the one name `dpm_solver_v3`, whatever the folder is called.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

NAME = "dpm_solver_v3"
ROOT = Path(__file__).resolve().parents[1]


def _load() -> None:
    if NAME in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    package = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules[NAME]
        raise


_load()
# The host looks for its Script classes among this module's names.
Accordion = importlib.import_module(f"{NAME}.webui").register()
