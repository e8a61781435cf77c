"""`python -m dpm_solver_v3.ems_tools.cli` is `ems`."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
