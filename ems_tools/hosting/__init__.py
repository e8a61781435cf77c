"""Every decision that ComfyUI and the WebUIs share, so that a rule is written and tested once.

`runs`: which statistics and which steps a run uses, and what the user is told. `jobs`: the scales, prompts, file and progress
of a computation. `trust`: sampling with files that others made. Nothing here knows a host: hosts hand over plain facts and show
the answers.
"""

from .jobs import (
    PROMPTS,
    Watch,
    effort_in_words,
    evaluations_of_effort,
    in_words,
    place_for,
    request_facts,
    scales_of,
)
from .runs import GUIDER, Run, Statistics, Steps, choose_statistics, choose_steps, one_line, printable, unfitted_steps
from .trust import Origin, TrustBook, sample_on_trial

__all__ = [
    "GUIDER",
    "PROMPTS",
    "Origin",
    "Run",
    "Statistics",
    "Steps",
    "TrustBook",
    "Watch",
    "choose_statistics",
    "choose_steps",
    "effort_in_words",
    "evaluations_of_effort",
    "in_words",
    "one_line",
    "place_for",
    "printable",
    "request_facts",
    "sample_on_trial",
    "scales_of",
    "unfitted_steps",
]
