"""Estimate a model's statistics: from a denoiser to moments, batch by batch, resumable, and from moments to l, s, b."""

from .job import EstimateError, Job, JobState, Model, Progress, evaluations_of
from .moments import Moments
from .run import estimate_moments
from .source import Source

__all__ = [
    "EstimateError",
    "Job",
    "JobState",
    "Model",
    "Moments",
    "Progress",
    "Source",
    "estimate_moments",
    "evaluations_of",
]
