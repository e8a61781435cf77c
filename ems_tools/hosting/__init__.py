"""Every decision that ComfyUI and the WebUIs share, so that a rule is written and tested once.

`runs`: which statistics and which steps a run uses, and what the user is told. `jobs`: the scales, prompts, file and progress
of a computation. `clock`: how long one would take. `trust`: sampling with files that others made. `handed`: the schedules that
our scheduler gave out. Nothing here knows a host: hosts hand over plain facts and show the answers.

`jobs` is not imported here: it brings all of the estimator with it, which a host that starts does not need.
"""

from .clock import Clock
from .handed import Handed
from .runs import (
    GUIDER,
    Run,
    Statistics,
    Steps,
    choose_statistics,
    choose_steps,
    one_line,
    printable,
    told_of_image,
    told_of_passes,
    unfitted_steps,
)
from .trust import Origin, TrustBook, sample_on_trial

__all__ = [
    "GUIDER",
    "Clock",
    "Handed",
    "Origin",
    "Run",
    "Statistics",
    "Steps",
    "TrustBook",
    "choose_statistics",
    "choose_steps",
    "one_line",
    "printable",
    "sample_on_trial",
    "told_of_image",
    "told_of_passes",
    "unfitted_steps",
]
