"""Judge statistics: against held-out noise, against what the file says of itself, and against the model itself."""

from .calibrate import CalibrationPlan, calibrate
from .consistency import consistency_problems, evidence_problems
from .measure import SAMPLES
from .spot_check import ALPHA, spot_check

__all__ = ["ALPHA", "SAMPLES", "CalibrationPlan", "calibrate", "consistency_problems", "evidence_problems", "spot_check"]
