"""Fit few steps to a model: where to evaluate it, and how to combine what it returns."""

from .plan import FitPlan, evaluations_of_fit
from .run import fit_steps

__all__ = ["FitPlan", "evaluations_of_fit", "fit_steps"]
