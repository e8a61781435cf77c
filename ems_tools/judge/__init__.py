"""Judge statistics: against held-out noise, against what the file says of itself, and against the model itself."""

from .calibrate import CalibrationPlan, calibrate
from .spot_check import ALPHA, SAMPLES, consistency_problems, spot_check

__all__ = ["ALPHA", "SAMPLES", "CalibrationPlan", "calibrate", "consistency_problems", "spot_check"]
