"""Rival samplers from published libraries behind one interface: rival(denoiser, x, sigmas) -> x at sigmas[-1].

`denoiser` is D(x, sigma) in sigma space, x = x0 + sigma n [B, C, ...], sigma [B]; `sigmas` [n + 1] falls, to 0 or to
any level above. Every rival calls the denoiser n times and follows `sigmas` exactly, without snapping to a time grid.

k-diffusion's samplers take this as it is. diffusers' schedulers work on the VP state alpha x, alpha = 1 / sqrt(1 +
sigma^2), and derive alpha and lambda of a node from `scheduler.sigmas` alone; so they get our nodes there, D as
prediction_type "sample", and their own arithmetic does the rest. All keep their libraries' default options, except
for the order and the variant in their name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["RIVALS", "Denoiser", "Rival"]

Denoiser = Callable[[Tensor, Tensor], Tensor]
Rival = Callable[[Denoiser, Tensor, Tensor], Tensor]


def _k_diffusion(name: str, denoiser: Denoiser, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    """k_diffusion.sampling.sample_<name>."""
    from k_diffusion import sampling

    return getattr(sampling, f"sample_{name}")(denoiser, x, sigmas.to(x.device, x.dtype), disable=True, **options)


def _start(scheduler: Any, sigmas: Tensor) -> None:
    """Make a diffusers scheduler follow `sigmas`. It reads the timesteps only for their number."""
    n = len(sigmas) - 1
    scheduler.set_timesteps(n)  # resets its history
    scheduler.sigmas = sigmas
    scheduler.timesteps = torch.arange(n, 0, -1)
    scheduler.num_inference_steps = n
    scheduler.set_begin_index(0)


@torch.no_grad()
def _diffusers(name: str, options: dict[str, Any], denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """A multistep scheduler of diffusers, on the VP state.

    The last step to sigma = 0 is of first order in all of them, and then returns D. Only DPM-Solver++ and UniPC bh2
    evaluate that without dividing infinities (the others' defaults stop above 0), so the limit is written out here.
    """
    import diffusers

    sigmas = sigmas.detach().to("cpu", torch.float64)
    if name == "DPMSolverMultistepScheduler":
        options = {**options, "final_sigmas_type": "zero" if sigmas[-1] == 0 else "sigma_min"}
    scheduler = getattr(diffusers, name)(prediction_type="sample", **options)
    _start(scheduler, sigmas)
    alphas = (1 + sigmas**2).rsqrt()
    generator = torch.Generator(x.device).manual_seed(0)  # for SA-Solver, whose noise is multiplied by tau = 0
    extra = {"generator": generator} if name == "SASolverScheduler" else {}
    ones = x.new_ones(len(x))
    x = x * alphas[0]
    for i, timestep in enumerate(scheduler.timesteps):
        denoised = denoiser((x / alphas[i]).to(x.dtype), sigmas[i].to(x) * ones)
        if sigmas[i + 1] == 0:
            return denoised
        x = scheduler.step(denoised, timestep, x, **extra).prev_sample
    return x / alphas[-1]


@torch.no_grad()
def _ipndm(denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """diffusers' IPNDMScheduler: it names the noise amplitude `betas` and expects v-prediction."""
    from diffusers import IPNDMScheduler

    sigmas = sigmas.detach().to("cpu", torch.float64)
    scheduler: Any = IPNDMScheduler()
    _start(scheduler, sigmas)
    scheduler.alphas = alphas = (1 + sigmas**2).rsqrt()
    scheduler.betas = sigmas * alphas
    ones = x.new_ones(len(x))
    x = x * alphas[0]
    for i, timestep in enumerate(scheduler.timesteps):
        y = x / alphas[i]
        denoised = denoiser(y, sigmas[i].to(x) * ones)
        velocity = alphas[i] * (y - denoised) / sigmas[i] - scheduler.betas[i] * denoised
        x = scheduler.step(velocity, timestep, x).prev_sample
    return x / alphas[-1]


def _zero_tau(timestep: Any) -> int:
    return 0


def _unipc(order: int, variant: str) -> Rival:
    return partial(_diffusers, "UniPCMultistepScheduler", {"solver_order": order, "solver_type": variant})


def _sa_solver(order: int) -> Rival:
    options = {"predictor_order": order, "corrector_order": order, "tau_func": _zero_tau}
    return partial(_diffusers, "SASolverScheduler", options)


RIVALS: dict[str, Rival] = {
    "euler": partial(_k_diffusion, "euler"),
    "lms": partial(_k_diffusion, "lms"),
    "dpmpp_2m": partial(_k_diffusion, "dpmpp_2m"),
    "dpmpp_2m_diffusers": partial(_diffusers, "DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpmpp_2m_heun_diffusers": partial(_diffusers, "DPMSolverMultistepScheduler", {"solver_order": 2, "solver_type": "heun"}),
    "dpmpp_3m_diffusers": partial(_diffusers, "DPMSolverMultistepScheduler", {"solver_order": 3}),
    "unipc_bh1_2": _unipc(2, "bh1"),
    "unipc_bh1_3": _unipc(3, "bh1"),
    "unipc_bh2_2": _unipc(2, "bh2"),
    "unipc_bh2_3": _unipc(3, "bh2"),
    "deis_2": partial(_diffusers, "DEISMultistepScheduler", {"solver_order": 2}),
    "deis_3": partial(_diffusers, "DEISMultistepScheduler", {"solver_order": 3}),
    "ipndm": _ipndm,
    "sa_solver_2": _sa_solver(2),
    "sa_solver_3": _sa_solver(3),
}
"""euler is DDIM. Left out: samplers with more than one call a step (Heun, DPM-Solver-2, ...) and stochastic ones.

Measured order of convergence (tests/benchmarks/test_rivals.py): euler 1, lms 4, UniPC of order 2 (with its corrector) and
DEIS 3 third; the others second: UniPC 3 and SA-Solver 3 because of their low-order ends, iPNDM because the steps differ in
length, DPM-Solver++ 3M of diffusers as it is coded.
"""
