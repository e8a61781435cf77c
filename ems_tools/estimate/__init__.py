"""Estimate a model's statistics: from a denoiser to moments, batch by batch, resumable, and from moments to l, s, b."""

from .moments import Moments
from .run import EstimateError, Job, JobState, Model, Progress, estimate_moments, evaluations_of
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
