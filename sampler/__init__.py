"""DPM-Solver-v3 for any k-diffusion denoiser. Needs torch only.

from dpm_solver_v3.sampler import sample_dpm_solver_v3
x0 = sample_dpm_solver_v3(denoiser, noise * sigmas[0], sigmas)
"""

from .choice import plan_for, settings_for, takes_typical_steps
from .ems import EMS, EMSError
from .fitted import FittedSteps
from .plan import Plan
from .schedules import (
    EDM,
    Flow,
    LevelTable,
    NoiseSchedule,
    VPContinuous,
    VPDiscrete,
    cosine_time,
    half_corrector_sigma,
    karras,
    quadratic_time,
    unfitted_from,
    unfitted_steps,
    uniform_lambda,
    uniform_time,
)
from .settings import AUTO, DEFAULTS, DEFAULTS_STRONG_GUIDANCE, Recommendation, RecommendationEntry, Settings, SolverOptions
from .solver import Answers, Run, SamplingError, StepInfo, sample_dpm_solver_v3
from .space import Space
from .wrapper import LambdaDenoiser

__all__ = [
    "AUTO",
    "DEFAULTS",
    "DEFAULTS_STRONG_GUIDANCE",
    "EDM",
    "EMS",
    "Answers",
    "EMSError",
    "FittedSteps",
    "Flow",
    "LambdaDenoiser",
    "LevelTable",
    "NoiseSchedule",
    "Plan",
    "Recommendation",
    "RecommendationEntry",
    "Run",
    "SamplingError",
    "Settings",
    "SolverOptions",
    "Space",
    "StepInfo",
    "VPContinuous",
    "VPDiscrete",
    "cosine_time",
    "half_corrector_sigma",
    "karras",
    "plan_for",
    "quadratic_time",
    "sample_dpm_solver_v3",
    "settings_for",
    "takes_typical_steps",
    "unfitted_from",
    "unfitted_steps",
    "uniform_lambda",
    "uniform_time",
]
