"""The estimator against statistics known by quadrature, and what happens when a job is cut, split or starved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpm_solver_v3.ems_tools.estimate.job import EstimateError, Job, JobState, evaluations_of, snapped_grid, uniform_grid
from dpm_solver_v3.ems_tools.estimate.moments import Moments, smoothed_slope
from dpm_solver_v3.ems_tools.estimate.points import difference_weights
from dpm_solver_v3.ems_tools.estimate.run import estimate_moments
from dpm_solver_v3.sampler import EDM, EMSError, SamplingError, Space, VPDiscrete

SIGMA_MIN, SIGMA_MAX = 0.05, 60.0


class Mixture1D:
    """Every element an independent one-dimensional mixture of Gaussians, another one in each of two channels."""

    weights = torch.tensor([[0.3, 0.7], [0.5, 0.5]], dtype=torch.float64)  # [C, K]
    means = torch.tensor([[-1.0, 0.6], [-0.4, 1.0]], dtype=torch.float64)
    stds = torch.tensor([[0.3, 0.4], [0.2, 0.5]], dtype=torch.float64)

    def posterior(self, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Density (up to a constant of y), D and dD/dy for y [..., C] and sigma broadcastable to it."""
        var = self.stds**2 + sigma[..., None] ** 2
        delta = y[..., None] - self.means
        log_p = self.weights.log() - delta**2 / (2 * var) - var.log() / 2
        r = log_p.softmax(-1)
        gain = self.stds**2 / var
        mean = self.means + gain * delta
        D = (r * mean).sum(-1)
        d_log = -delta / var
        slope = (r * (gain + mean * (d_log - (r * d_log).sum(-1, keepdim=True)))).sum(-1)
        return log_p.logsumexp(-1).exp() / math.sqrt(2 * math.pi), D, slope

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        channels_last = x.double().movedim(1, -1)
        s = sigma.double().reshape(-1, *(1,) * (channels_last.ndim - 1)).expand(channels_last.shape)
        return self.posterior(channels_last, s)[1].movedim(-1, 1).to(x.dtype)


def exact_statistics(model: Mixture1D, lambdas: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """l, s, b [N+1, C] by quadrature over y, derivatives along the ODE by central differences in float64."""

    def averages(lam: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sigma = math.exp(-lam)
        reach = 6 * math.sqrt(1 + sigma**2)
        y = torch.linspace(-reach, reach, 20001, dtype=torch.float64)[:, None].expand(-1, 2)
        p, D, slope = model.posterior(y, torch.full_like(y, sigma))
        return y, p / p.sum(0), D, slope

    def l_at(lam: float) -> Tensor:
        _, p, _, slope = averages(lam)
        return (p * (1 - slope)).sum(0)

    out = []
    for lam in lambdas.tolist():
        y, p, D, _ = averages(lam)
        l, h = l_at(lam), 1e-4
        l_slope = (l_at(lam + h) - l_at(lam - h)) / (2 * h)

        def along(step: float, lam: float = lam, y: Tensor = y, D: Tensor = D) -> Tensor:
            moved = y + step * (D - y)  # first order suffices: the difference is central
            return model.posterior(moved, torch.full_like(y, math.exp(-lam - step)))[1]

        D_rate = (along(h) - along(-h)) / (2 * h)
        f = (1 - l) * y - D
        f_rate = -l_slope * y + (1 - l) * (D - y) - D_rate
        mean_f, mean_r = (p * f).sum(0), (p * f_rate).sum(0)
        s = (p * (f - mean_f) * (f_rate - mean_r)).sum(0) / (p * (f - mean_f) ** 2).sum(0)
        out.append((l.numpy(), s.numpy(), (mean_r - s * mean_f).numpy()))
    ls, ss, bs = (np.stack(v) for v in zip(*out, strict=True))
    return ls, ss, bs


def job(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "shape": (2, 8, 8),
        "lambdas": uniform_grid(SIGMA_MIN, SIGMA_MAX, 120),
        "samples": 64,
        "groups": 64,
    }
    return Job(**{**values, **changes})


def estimate(j: Job, model: Any = None, **options: Any) -> Moments:
    models = {g: model or Mixture1D() for g in j.guidance}
    return estimate_moments(models, j, options.pop("state", JobState()), dtype=torch.float64, **options)[0]


@pytest.fixture(scope="module")
def exact() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return exact_statistics(Mixture1D(), np.array(uniform_grid(SIGMA_MIN, SIGMA_MAX, 120)))


def test_statistics_match_quadrature(exact) -> None:
    """l, s, b against the exact ones, in units of their standard errors.

    2 channels x 3 functions x 121 points are compared; a t distribution with 63 degrees of freedom puts 0.4 % of the
    points beyond 3, so a few are allowed there and none beyond 4.5.
    """
    st = estimate(job()).statistics()
    for name, truth in zip("lsb", exact, strict=True):
        z = (getattr(st, name).numpy() - truth) / getattr(st, f"{name}_se").numpy()
        assert np.mean(np.abs(z) > 3) <= 0.02, f"{name}: {np.abs(z).max():.2f} standard errors off"
        assert np.abs(z).max() < 4.5


def test_standard_errors_cover(exact) -> None:
    """Over independent jobs the deviations have the size that the standard errors say: 68 % within 1, 95 % within 2.

    Measured on 96 jobs: l 0.73 and 0.96; s and b 0.63 and 0.91, because at the noisy end, where f hardly varies, a ratio
    of few samples is skewed. The bounds leave room for the chance of 48 correlated jobs beside that.
    """
    z: dict[str, list[Tensor]] = {name: [] for name in "lsb"}
    points = slice(5, None, 10)
    for seed in range(48):
        st = estimate(job(seed=seed + 1, samples=32, groups=32, shape=(2, 6, 6))).statistics()
        for name, truth in zip("lsb", exact, strict=True):
            deviation = (getattr(st, name).numpy() - truth) / getattr(st, f"{name}_se").numpy()
            z[name].append(deviation[points])
    for name, values in z.items():
        inside = np.abs(np.stack(values))
        assert 0.56 < np.mean(inside < 1) < 0.80, name
        assert 0.87 < np.mean(inside < 2) < 0.99, name


def test_spaces_agree() -> None:
    """The same model hosted as a rectified flow has the same statistics."""
    from dpm_solver_v3.ems_tools.embedded import FlowHost

    in_sigma = estimate(job(samples=8)).statistics()
    in_flow = estimate(job(samples=8, space=Space.FLOW), FlowHost(Mixture1D())).statistics()
    for name in "lsb":
        torch.testing.assert_close(getattr(in_flow, name), getattr(in_sigma, name), rtol=1e-6, atol=1e-7)


def test_batch_size_does_not_matter() -> None:
    whole, parts = estimate(job(samples=10), batch=10), estimate(job(samples=10), batch=3)
    torch.testing.assert_close(whole.sums, parts.sums, rtol=1e-12, atol=1e-12)
    assert torch.equal(whole.count, parts.count)


def test_resume_is_bitwise(tmp_path) -> None:
    """Cut in the middle of the third batch, then resumed: the same sums, bit for bit."""
    j = job(samples=10, guidance=(1.0, 2.0))
    models = {1.0: Mixture1D(), 2.0: Mixture1D()}
    full = estimate_moments(models, j, JobState(), batch=2, dtype=torch.float64)
    path = tmp_path / "a.partial"

    class Cut(BaseException):
        pass

    def stop(p) -> None:
        if p.done > 2 * 2 * 121 * 2 + 50:
            raise Cut

    with pytest.raises(Cut):
        estimate_moments(models, j, JobState.open(path, j), batch=2, dtype=torch.float64, progress=stop)
    state = JobState.open(path, j)
    assert state.moments(j, 0).samples == 4
    resumed = estimate_moments(models, j, state, batch=2, dtype=torch.float64)
    for a, b in zip(full, resumed, strict=True):
        assert torch.equal(a.sums, b.sums) and torch.equal(a.count, b.count)


def test_extend_and_merge() -> None:
    """A longer job begins with the shorter one's samples; two disjoint seeds add up."""
    state = JobState()
    estimate(job(samples=4), state=state, batch=4)
    extended = estimate(job(samples=8), state=state, batch=4)
    torch.testing.assert_close(extended.sums, estimate(job(samples=8), batch=4).sums, rtol=0, atol=0)
    other = estimate(job(samples=4, seed=9))
    assert extended.merged(other).samples == 12
    with pytest.raises(EMSError, match="grids"):
        extended.merged(estimate(job(samples=1, lambdas=uniform_grid(0.1, 10, 20))))


def test_foreign_state_is_refused(tmp_path) -> None:
    path = tmp_path / "a.partial"
    estimate(job(samples=2), state=JobState.open(path, job()))
    with pytest.raises(EstimateError, match="seed"):
        JobState.open(path, job(seed=3))
    path.write_bytes(b"nonsense")
    with pytest.raises(EstimateError, match="cannot be resumed"):
        JobState.open(path, job())


def test_until_stops_early() -> None:
    m = estimate(job(samples=512, groups=8), batch=8, until=0.2)
    assert 8 <= m.samples < 512
    assert m.statistics().worst_error() <= 0.2


def test_out_of_memory_halves_the_batch() -> None:
    sizes = []

    class Small(Mixture1D):
        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            sizes.append(len(x))
            if len(x) > 3:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return super().__call__(x, sigma)

    j = job(samples=16)
    m = estimate(j, Small(), batch=16)
    torch.testing.assert_close(m.sums, estimate(j).sums, rtol=1e-12, atol=1e-12)
    assert sizes[:3] == [16, 8, 4] and max(sizes[3:]) == 2

    class Never(Mixture1D):
        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("no")

    with pytest.raises(EstimateError, match="smaller latent"):
        estimate(j, Never(), batch=4)


def test_progress_counts_every_evaluation() -> None:
    calls: list[Any] = []
    seen: list[Any] = []

    class Counting(Mixture1D):
        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            calls.append(len(x))
            return super().__call__(x, sigma)

    j = job(samples=3, lambdas=uniform_grid(0.1, 20, 20))
    estimate(j, Counting(), progress=seen.append)
    assert sum(calls) == evaluations_of(j) == seen[-1].done


def test_rounded_noise_levels_do_not_spoil() -> None:
    """A host that rounds sigma to one of 1000 time steps: exact on a grid of its own levels, not on any other."""
    schedule = VPDiscrete.linear()
    table = schedule.level_at(torch.arange(1, 1001, dtype=torch.float64) / 1000)

    class Rounding(Mixture1D):
        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            nearest = (sigma.double()[:, None].log() - table.log()).abs().argmin(1)
            return super().__call__(x, table[nearest])

    grid = uniform_grid(0.0292, 14.6, 60)
    snapped = snapped_grid(grid, table)
    truth = estimate(job(samples=8, lambdas=snapped)).statistics()
    rounded = estimate(job(samples=8, lambdas=snapped), Rounding()).statistics()
    off_grid = estimate(job(samples=8, lambdas=grid), Rounding()).statistics()
    off_truth = estimate(job(samples=8, lambdas=grid)).statistics()
    assert (rounded.s - truth.s).abs().max() < 1e-6
    assert (off_grid.s - off_truth.s).abs().max() > 0.05


def test_nan_and_divergence_name_sigma() -> None:
    class Broken(Mixture1D):
        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            return torch.where(sigma.reshape(-1, 1, 1, 1) < 1, torch.nan, super().__call__(x, sigma))

    with pytest.raises(RuntimeError, match=r"sigma = 0\.9"):
        estimate(job(samples=2), Broken())

    class Runaway(Mixture1D):
        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            return 40 * x

    with pytest.raises(SamplingError, match="sigma = "):
        estimate(job(samples=2), Runaway())


def test_per_element_pools_to_per_channel() -> None:
    """First moments per element, averaged over positions, are those per channel."""
    j = job(samples=4, shape=(2, 3, 3))
    pooled = estimate(j).sums
    kept = estimate(Job(**{**j.__dict__, "per_element": True})).sums
    torch.testing.assert_close(kept.flatten(4).mean(4), pooled, rtol=1e-12, atol=1e-12)


def test_difference_weights_are_exact_for_parabolas() -> None:
    lam = torch.tensor([0.0, 0.3, 0.5, 1.1, 1.2], dtype=torch.float64)
    first, weights = difference_weights(lam)
    values = 2 + 3 * lam - 0.7 * lam**2
    slope = torch.stack([(weights[i] * values[first[i] : first[i] + 3]).sum() for i in range(5)])
    torch.testing.assert_close(slope, 3 - 1.4 * lam)


def test_smoothed_slope_is_exact_for_cubics() -> None:
    lam = torch.tensor(uniform_grid(*_edm_range(), 40), dtype=torch.float64)
    values = (1 + 2 * lam + 0.5 * lam**2 - 0.1 * lam**3)[:, None]
    torch.testing.assert_close(smoothed_slope(lam, values), (2 + lam - 0.3 * lam**2)[:, None])


def _edm_range() -> tuple[float, float]:
    return EDM().sigma_min, EDM().sigma_max


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lambdas": (0.0, 1.0)}, "at least 5 points"),
        ({"lambdas": (0.0, 1.0, 0.5, 2.0, 3.0)}, "increase"),
        ({"samples": 0}, "at least 1"),
        ({"guidance": (2.0, 1.0)}, "increasing"),
    ],
)
def test_bad_jobs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EstimateError, match=message):
        job(**changes)


def test_slopes_of_many_scales_are_fitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's file of 64 scales on 4,001 points took a minute to check: the same factors were found 64 times."""
    solve, calls = torch.linalg.lstsq, list[int]()
    monkeypatch.setattr(torch.linalg, "lstsq", lambda a, b: calls.append(1) or solve(a, b))
    grid = torch.linspace(-2.1, 3.3, 37, dtype=torch.float64)
    for scale in range(3):
        assert torch.allclose(smoothed_slope(grid, (scale + 1) * grid**2), (scale + 1) * 2 * grid)
    assert len(calls) == 37


def test_slopes_of_crowded_points_are_fitted_to_few_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checking a stranger's 161 KiB of 1,001 points within 0.3 of lambda took 56 s: every slope was fitted to all of them."""
    solve, sizes = torch.linalg.lstsq, list[int]()
    monkeypatch.setattr(torch.linalg, "lstsq", lambda a, b: sizes.append(len(a)) or solve(a, b))
    grid = torch.linspace(0, 0.3, 1001, dtype=torch.float64)
    torch.testing.assert_close(smoothed_slope(grid, grid**3), 3 * grid**2)
    assert len(sizes) == 1001 and max(sizes) < 130


@pytest.mark.parametrize("facts", ["[]", '{"job": []}', "3", "[" * 100_000])
def test_a_state_that_is_no_table_is_refused_in_words(tmp_path: Path, facts: str) -> None:
    path = tmp_path / "a.partial"
    job = Job((2, 4, 4), uniform_grid(0.1, 10, 8), samples=4)
    state = JobState.open(path, job)
    state.save()
    with safe_open(path, "pt") as file:
        kind = file.metadata()["format"]
    save_file({"x": torch.zeros(1)}, path, {"format": kind, "facts": facts})
    with pytest.raises(EstimateError, match="delete it to start again"):
        JobState.open(path, job)
