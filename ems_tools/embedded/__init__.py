"""The embedded model: a class-conditional denoiser of 32x32 emoji, small enough to ship and real enough to measure on.

    from dpm_solver_v3.ems_tools.embedded import load_denoiser
    D = load_denoiser(labels=torch.arange(9), guidance=2.0)      # D(x, sigma), guided

It was trained as an EDM denoiser; `hosts` re-expresses it exactly as EPS, v-prediction and rectified flow.
"""

from .denoiser import CLASSES, NULL_CLASS, SHAPE, SIGMA_MAX, SIGMA_MIN, GuidedDenoiser, load_denoiser, load_network
from .hosts import FlowHost, VPHost

__all__ = [
    "CLASSES",
    "NULL_CLASS",
    "SHAPE",
    "SIGMA_MAX",
    "SIGMA_MIN",
    "FlowHost",
    "GuidedDenoiser",
    "VPHost",
    "load_denoiser",
    "load_network",
]
