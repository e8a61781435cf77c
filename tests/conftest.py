"""Ground truth for the tests: a mixture of Gaussians with its denoiser in closed form, and its trajectories.

Helpers reach the tests as fixtures only, because the folder is no package.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from dpm_solver_v3.ems_tools.embedded.hosts import FlowHost, VPHost
from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.rows import EMSMeta, EvidenceRow, RecommendedSetting
from dpm_solver_v3.sampler import EMS, Settings, VPDiscrete

torch.set_num_threads(1)  # tiny tensors: more threads are slower, and on a busy machine far slower

SIGMA_MAX, SIGMA_MIN = 6.0, 0.15


class Mixture(nn.Module):
    """D(y, sigma) = E[x0 | y] for x0 ~ sum_k w_k N(mean_k, diag var_k), computed in float64.

    The components are weighed by all elements of a sample together, so that D couples them as a network does.
    """

    def __init__(self, shape: tuple[int, ...] = (2, 2, 2), components: int = 3, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.shape = shape
        channel = (components, shape[0]) + (1,) * (len(shape) - 1)
        self.weights = torch.rand(components, generator=draw, dtype=torch.float64) + 0.5
        self.means = 0.8 * torch.randn(components, *shape, generator=draw, dtype=torch.float64)
        self.variances = (0.15 + 0.5 * torch.rand(channel, generator=draw, dtype=torch.float64)).expand(-1, *shape)

    def forward(self, y: Tensor, sigma: Tensor, cond: object = None) -> Tensor:
        """x0 for y [B, *shape] and sigma [B], in y's dtype."""
        weights, means, variances = (v.to(y.device) for v in (self.weights, self.means, self.variances))
        total = variances + sigma.double().reshape(-1, *(1,) * y.ndim) ** 2  # [B, K, *shape]
        away = y.double()[:, None] - means
        log_density = -0.5 * (away**2 / total + total.log()).flatten(2).sum(2)
        posterior = (weights.log() + log_density).softmax(1).reshape(*total.shape[:1], -1, *(1,) * len(self.shape))
        return (posterior * (means + variances / total * away)).sum(1).to(y.dtype)


class Form(NamedTuple):
    """A host's form of the mixture: what the sampler is given, and how x relates to y = x0 + sigma n."""

    model: Callable[..., Tensor]
    space: str = "sigma"
    extra_args: dict[str, Any] | None = None

    def sample(self, sampler: Callable[..., Tensor], y: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
        """Run `sampler` from y at sigmas[0]; the result as y at sigmas[-1]."""
        flow = self.space == "flow"
        levels = sigmas / (1 + sigmas) if flow else sigmas
        x = y / (1 + sigmas[0]) if flow else y
        out = sampler(self.model, x, levels, self.extra_args, disable=True, space=self.space, **options)
        return out * (1 + sigmas[-1]) if flow else out


class EDMNetwork(nn.Module):
    """The raw network F of an EDM denoiser D = c_skip x + c_out F(c_in x, sigma), for sigma_data = 1."""

    def __init__(self, denoiser: Callable[..., Tensor]) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, scaled: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.reshape(-1, *(1,) * (scaled.ndim - 1))
        x = scaled * (1 + s**2).sqrt()
        return (self.denoiser(x, sigma) - x / (1 + s**2)) * (1 + s**2).sqrt() / s


def k_diffusion_form(name: str, denoiser: Callable[..., Tensor], dtype: torch.dtype = torch.float64) -> Form:
    """`denoiser` behind a real k-diffusion wrapper, its tables in `dtype`, or as a flow or a plain callable."""
    import k_diffusion as K

    if name == "plain":
        return Form(denoiser)
    if name == "flow":
        return Form(FlowHost(denoiser), "flow")
    if name == "Denoiser":
        return Form(K.layers.Denoiser(EDMNetwork(denoiser), sigma_data=1.0))
    schedule = VPDiscrete.linear()
    host = VPHost(denoiser, "v" if "V" in name.replace("CompVis", "") else "eps", schedule)
    host.alphas_cumprod = schedule.alphas_cumprod.to(dtype)
    if name.startswith("CompVis"):
        extra = {"cond": None}
        return Form(getattr(K.external, name)(host, quantize=False), extra_args=extra)
    return Form(getattr(K.external, name)(host, host.alphas_cumprod, quantize=False))


def exact_solution(denoiser: Callable[..., Tensor], y: Tensor, sigma_start: float, sigma_end: float) -> Tensor:
    """y [B, ...] at sigma_end by scipy's DOP853 on dy/dlambda = D(y, lambda) - y; error below 1e-11."""

    def slope(lam: float, state: np.ndarray) -> np.ndarray:
        now = torch.from_numpy(state).reshape(y.shape)
        sigma = torch.full((len(y),), math.exp(-lam), dtype=torch.float64)
        return (denoiser(now, sigma) - now).flatten().numpy()

    span = (-math.log(sigma_start), -math.log(sigma_end))
    found = solve_ivp(slope, span, y.double().flatten().numpy(), method="DOP853", rtol=1e-13, atol=1e-13)
    return torch.from_numpy(found.y[:, -1]).reshape(y.shape)


def ems_file_of(channels: int = 3, spatial: tuple[int, ...] = (), evidence: bool = True) -> EMSFile:
    """A file with random statistics at guidance 1 and 7.5, standard errors 0.1, and evidence on one schedule."""
    guidance = torch.tensor([1.0, 7.5], dtype=torch.float64)
    shape = (2, 21, channels, *spatial)
    l, s, b = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    rows: list[EvidenceRow] = []
    advice: list[RecommendedSetting] = []
    for g in guidance.tolist() if evidence else []:
        for steps in (5, 10):
            rows.append(EvidenceRow(g, "karras_zero", steps, "calibration", 0.02, 0.01, 0.03))
            rows.append(EvidenceRow(g, "karras_zero", steps, "report", 0.02, 0.015, 0.03))
            lambdas = tuple(torch.linspace(-2, 3, steps).tolist())
            advice.append(RecommendedSetting(g, "karras_zero", lambdas, Settings(order=steps // 5 + 1, corrector="none")))
    meta = EMSMeta("sigma", 0.03, 14.6, "vp", {"name": "a <b> & $c$"}, evidence=tuple(rows), recommendation=tuple(advice))
    errors = {name: torch.full(shape, 0.1) for name in "lsb"}
    return EMSFile(torch.linspace(-2.6, 3.5, 21, dtype=torch.float64), guidance, l, s, b, meta, errors)


@pytest.fixture(scope="session")
def make_ems_file() -> Callable[..., EMSFile]:
    """`ems_file_of`."""
    return ems_file_of


@pytest.fixture(scope="session")
def make_mixture() -> type[Mixture]:
    """Mixture(shape, components, seed)."""
    return Mixture


@pytest.fixture(scope="session")
def mixture() -> Mixture:
    """The denoiser of most tests, on [B, 2, 2, 2]."""
    return Mixture()


@pytest.fixture(scope="session")
def y_start() -> Tensor:
    """[2, 2, 2, 2] float64: noise at SIGMA_MAX."""
    draw = torch.Generator().manual_seed(1)
    return SIGMA_MAX * torch.randn(2, 2, 2, 2, generator=draw, dtype=torch.float64)


@pytest.fixture(scope="session")
def ends() -> tuple[float, float]:
    """(SIGMA_MAX, SIGMA_MIN) of the tests' usual schedule."""
    return SIGMA_MAX, SIGMA_MIN


@pytest.fixture(scope="session")
def sigmas() -> Callable[..., Tensor]:
    """sigmas(n, high, low): n steps uniform in lambda, float64."""

    def uniform(n: int, high: float = SIGMA_MAX, low: float = SIGMA_MIN) -> Tensor:
        return torch.linspace(math.log(high), math.log(low), n + 1, dtype=torch.float64).exp()

    return uniform


@pytest.fixture(scope="session")
def solve_exactly() -> Callable[..., Tensor]:
    """`exact_solution`."""
    return exact_solution


@pytest.fixture(scope="session")
def form() -> Callable[..., Form]:
    """`k_diffusion_form`."""
    return k_diffusion_form


@pytest.fixture(scope="session")
def smooth_ems() -> EMS:
    """Per-channel statistics far from degenerate and smooth to the eye of a solver of order 4.

    Linear interpolation has kinks: they leave no trace in l, which is linear in lambda here, and a trace of the third
    power of the grid's spacing in the integrals of s and b.
    """
    lam = torch.linspace(-2.5, 2.5, 4001, dtype=torch.float64)[:, None]
    channel = torch.tensor([0.0, 1.0], dtype=torch.float64)
    l = 0.6 + 0.1 * channel + (0.15 - 0.05 * channel) * lam
    return EMS(lam[:, 0], l, 0.4 * torch.sin(lam + channel) - 0.5, 0.3 * torch.cos(1.3 * lam - channel))


@pytest.fixture
def new_tensors() -> Iterator[Callable[[torch.Size], int]]:
    """Number of distinct tensors of a shape that were made since the test began and are alive now."""

    def count(shape: torch.Size) -> int:
        found = (o for o in gc.get_objects() if isinstance(o, Tensor) and o.shape == shape)
        return len({t.untyped_storage().data_ptr() for t in found})

    gc.collect()
    gc.freeze()  # hides all older objects from get_objects
    yield count
    gc.unfreeze()
