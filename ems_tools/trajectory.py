"""Trajectories of a model in y and lambda: the one fine solve that everything is measured against, and runs of few steps.

A `Runner` carries what every stage needs to evaluate a model (batch, device, dtype, progress), a `Pair` is two of them;
`Trajectories` are what a fine solve leaves behind: y and D at every point of a grid, on some elements of every sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..sampler import FittedSteps, LambdaDenoiser, StepInfo, sample_dpm_solver_v3
from .estimate.job import Job, JobState, Model, denoiser_for, in_batches, sample_noise

__all__ = [
    "ELEMENTS",
    "Pair",
    "Path",
    "Runner",
    "Trajectories",
    "elements_of",
    "few_steps",
    "kept_trajectories",
    "pictures_of",
    "solve_finely",
    "teach",
]

ELEMENTS = 2048
"""Latent elements of each sample that trajectories keep; chosen at random where a latent has more."""
_AT_THE_END = 1e-5
"""Levels so near in lambda to the noisiest are that one: ComfyUI asks so too, and files round."""


@dataclass(frozen=True)
class Runner:
    """The denoiser of one guidance scale, evaluated in batches.

    Args:
        job: gives shape, space, range of lambda and the noise of every sample.
        model: D(x, level) of the host.
        device, dtype: of the states that the model sees.
        batch: samples in one call; halved when memory runs out.
        tick: called with the number of samples just evaluated.
        pictures: for image to image, by sample: what a run begins with, [C, ...], before noise is put on it. None: with noise
            alone.
    """

    job: Job
    model: Model
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    batch: int = 16
    tick: Callable[[int], None] = lambda evaluations: None
    pictures: Mapping[int, Tensor] | None = None

    def start(self, samples: Sequence[int], lam: float) -> Tensor:
        """Y [K, C, ...] as a host begins at `lam`: noise times sigma, at the noisiest level times `Job.start`; on the CPU.

        With `pictures` it is the picture with noise on it.
        """
        more = self.job.start if lam - self.job.lambdas[0] < _AT_THE_END else 1.0
        noise = sample_noise(self.job, list(samples))[0] * (math.exp(-lam) * more)
        return noise if self.pictures is None else noise + torch.stack([self.pictures[k] for k in samples])

    def unit_start(self, samples: Sequence[int]) -> Tensor:
        """What a fine solution begins with at the grid's first point, over its sigma; on the CPU."""
        noise = sample_noise(self.job, list(samples))[0] * self.job.start
        if self.pictures is None:
            return noise
        return noise + torch.stack([self.pictures[k] for k in samples]) * math.exp(self.job.lambdas[0])

    def answers(self, samples: Sequence[int], y: Tensor, lam: float, both: bool = False) -> list[Tensor]:
        """[D]: what a run of few steps combines. See `Pair` for `both`."""
        del both
        return [self.denoise(samples, y, lam)]

    def denoise(self, samples: Sequence[int], y: Tensor, lam: float) -> Tensor:
        """D [K, C, ...] of y [K, C, ...], float32 on the CPU."""
        at = {k: i for i, k in enumerate(samples)}

        def run(part: list[int]) -> Tensor:
            rows = y[[at[k] for k in part]].to(self.device, self.dtype)
            with torch.no_grad():
                D = denoiser_for(self.model, part, self.job.space)(rows, lam)
            self.tick(len(part))
            return D.to("cpu", torch.float32)

        return torch.cat([D for _, D in in_batches(list(samples), self.batch, run)])


@dataclass(frozen=True)
class Pair:
    """Both answers of a guided model, for steps in fewer passes of the network.

    Args:
        conditional: c, one pass.
        guided: D, two passes.
    """

    conditional: Runner
    guided: Runner

    @property
    def job(self) -> Job:
        """See `Runner`."""
        return self.guided.job

    def start(self, samples: Sequence[int], lam: float) -> Tensor:
        """See `Runner`."""
        return self.guided.start(samples, lam)

    def answers(self, samples: Sequence[int], y: Tensor, lam: float, both: bool = False) -> list[Tensor]:
        """[c], or [c, D] for `both`, each [K, C, ...]."""
        parts = (self.conditional, self.guided) if both else (self.conditional,)
        return [runner.denoise(samples, y, lam) for runner in parts]


@dataclass(frozen=True, eq=False)
class Trajectories:
    """y and D [M, K, P] of K samples at M lambdas, on P `elements` of every sample (indices into the flattened latent)."""

    lambdas: tuple[float, ...]
    elements: Tensor
    y: Tensor
    D: Tensor

    @property
    def clean(self) -> Tensor:
        """x0 [K, P] in float64: the denoised at the clean end."""
        return self.D[-1].double()

    def at(self, lam: float) -> Tensor:
        """Y [K, P] at `lam`, by the cubic through two grid points with their exact slopes D - y."""
        grid = self.lambdas
        i = min(max(sum(v <= lam for v in grid), 1), len(grid) - 1)
        h = grid[i] - grid[i - 1]
        u = (lam - grid[i - 1]) / h
        a, b = self.y[i - 1].double(), self.y[i].double()
        da, db = (self.D[i - 1].double() - a) * h, (self.D[i].double() - b) * h
        return (1 + 2 * u) * (1 - u) ** 2 * a + u * (1 - u) ** 2 * da + u**2 * (3 - 2 * u) * b - u**2 * (1 - u) * db

    def lambda_where_left(self, share: float) -> float:
        """Lambda from which D is nearer to the picture than `share` of the squared distance at the noisy end."""
        gap = torch.stack([(D.double() - self.clean).square().mean(1).clamp(min=1e-30).log().mean() for D in self.D[:-1]])
        left = (gap - gap[0]).cummin(0).values.tolist()
        goal = math.log(share)
        i = next((i for i, v in enumerate(left) if v < goal), None)
        if not i:
            return self.lambdas[0 if i == 0 else len(left) - 1]
        u = (left[i - 1] - goal) / (left[i - 1] - left[i])
        return self.lambdas[i - 1] + u * (self.lambdas[i] - self.lambdas[i - 1])

    def part(self, samples: int) -> Trajectories:
        """The first samples only."""
        return Trajectories(self.lambdas, self.elements, self.y[:, :samples], self.D[:, :samples])

    def errors(self, y: Tensor) -> Tensor:
        """Mean squared error [K] of end points y [K, C, ...] or [K, P]."""
        rows = y.flatten(1)
        rows = rows[:, self.elements] if rows.shape[1] != len(self.elements) else rows
        return (rows.double() - self.clean).square().mean(1)


@dataclass
class Path:
    """y and D of one batch's fine solution as it goes by, on some elements: what `Trajectories` are made of."""

    elements: Tensor
    y: list[Tensor] = field(default_factory=list)
    D: list[Tensor] = field(default_factory=list)

    def add(self, i: int, y: Tensor, D: Tensor) -> None:
        """Take over grid point i; y and D [B, C, ...]."""
        del i
        for values, rows in ((y, self.y), (D, self.D)):
            rows.append(values.flatten(1)[:, self.elements.to(values.device)].to("cpu", torch.float32))

    def save(self, state: JobState, name: str, first: int, most: int) -> None:
        """Append to the state's trajectories `name`, where sample `first` comes next there, up to `most` samples in all."""
        known = state.tensors[f"{name}.y"].shape[1] if f"{name}.y" in state.tensors else 0
        if first != known or known >= most:
            return
        for what, rows in (("y", self.y), ("D", self.D)):
            values, before = torch.stack(rows)[:, : most - known], state.tensors.get(f"{name}.{what}")
            state.tensors[f"{name}.{what}"] = values if before is None else torch.cat([before, values], 1)


def elements_of(job: Job) -> Tensor:
    """The elements of a latent that trajectories keep, the same ones for every sample of a job."""
    draw = torch.Generator().manual_seed(job.seed)
    return torch.randperm(math.prod(job.shape), generator=draw)[:ELEMENTS].sort().values


def solve_finely(
    denoiser: LambdaDenoiser,
    lambdas: Tensor,
    noise: Tensor,
    visit: Callable[[int, Tensor, Tensor], None],
    tick: Callable[[int], None],
) -> Tensor:
    """Solve at order 3 on the grid from sigma_max * noise, one call a grid point.

    Calls visit(i, y, D) at every grid point, with y and D [B, C, ...] on the model's device; returns the last D.
    """
    levels = denoiser.space.level_of(lambdas)
    alphas = denoiser.space.alpha_of(levels)
    last: list[Tensor] = []

    def on_step(info: StepInfo) -> None:
        i, x, D = info["i"], info["x"], info["denoised"]
        tick(len(x))
        visit(i, x / alphas[i].item(), D)
        last[:] = [D]

    start = noise * (alphas[0] * (-lambdas[0]).exp()).item()
    end = torch.cat([levels, levels.new_zeros(1)])  # the step to 0 makes the solver evaluate D at the last grid point
    sample_dpm_solver_v3(
        denoiser.model,
        start,
        end.to(noise.device),
        denoiser.extra_args,
        on_step,
        True,
        space=denoiser.space,
        order=3,
        predictor="true",
        corrector="none",
        lower_order_final=False,
    )
    return last[0]


def teach(runner: Runner, samples: Sequence[int]) -> Trajectories:
    """Fine solutions of these samples on the job's grid, one evaluation a grid point and sample."""
    elements = elements_of(runner.job)

    def run(part: list[int]) -> Path:
        path = Path(elements)
        _solved(runner, part, path.add)
        return path

    parts = [path for _, path in in_batches(list(samples), runner.batch, run)]
    y, D = (torch.cat([torch.stack(rows) for rows in values], 1) for values in ([p.y for p in parts], [p.D for p in parts]))
    return Trajectories(runner.job.lambdas, elements, y, D)


def pictures_of(runner: Runner, samples: Sequence[int]) -> Tensor:
    """Where fine solutions of these samples end, [K, C, ...]: pictures of the model, float32 on the CPU."""
    run = lambda part: _solved(runner, part, lambda i, y, D: None).to("cpu", torch.float32)  # noqa: E731
    return torch.cat([end for _, end in in_batches(list(samples), runner.batch, run)])


def _solved(runner: Runner, part: list[int], visit: Callable[[int, Tensor, Tensor], None]) -> Tensor:
    """`solve_finely` on the job's grid, as a host begins."""
    lambdas = torch.tensor(runner.job.lambdas, dtype=torch.float64)
    start, denoiser = runner.unit_start(part), denoiser_for(runner.model, part, runner.job.space)
    with torch.no_grad():
        return solve_finely(denoiser, lambdas, start.to(runner.device, runner.dtype), visit, runner.tick)


def kept_trajectories(runner: Runner, state: JobState, name: str, samples: Sequence[int]) -> Trajectories:
    """Trajectories of these samples; those that the state holds under `name` are not solved again, the others are saved."""
    elements, wanted = elements_of(runner.job), list(samples)
    known = state.tensors[f"{name}.y"].shape[1] if f"{name}.y" in state.tensors else 0
    while known < len(wanted):
        part = wanted[known : known + runner.batch]
        made = teach(runner, part)
        for what, values in (("y", made.y), ("D", made.D)):
            before = state.tensors.get(f"{name}.{what}")
            state.tensors[f"{name}.{what}"] = values if before is None else torch.cat([before, values], 1)
        known += len(part)
        state.save()
    y, D = (state.tensors[f"{name}.{what}"][:, : len(wanted)] for what in ("y", "D"))
    return Trajectories(runner.job.lambdas, elements, y, D)


def few_steps(runner: Runner | Pair, samples: Sequence[int], steps: FittedSteps) -> Tensor:
    """The end y [K, C, ...] of a run of few steps with these coefficients; those in fewer passes need a `Pair`."""
    y, history = runner.start(samples, steps.lambdas[0]) * steps.start, list[Tensor]()
    guided = steps.guided or (False,) * len(steps.lambdas)
    for lam, both, decay, weights in zip(steps.lambdas, guided, steps.decay, steps.weights, strict=True):
        history += runner.answers(samples, y, lam, both)
        y = y * decay
        for weight, past in zip(weights, history, strict=True):
            y = y.add_(past, alpha=weight) if weight else y
    return y
