"""How good the embedded model is: its ODE (references of 200 and 400 steps, the range of l(lambda)), and what it draws.

    python benchmarks/model.py
    python benchmarks/model.py --data emoji-datasource-google-16.0.0.tgz [--pictures 400] [--weights FILE]

With --data (the archive that `embedded_train.py` trains on) it prints the kernel distance of the model's converged pictures
from its training images, in the features that `eyes.py` describes, beside that of other training images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import NOISE, SCHEDULES, Problem, per_sample_error
from torch import Tensor

from dpm_solver_v3.ems_tools.embedded import SHAPE, GuidedDenoiser, load_denoiser, load_network
from dpm_solver_v3.ems_tools.embedded.denoiser import WEIGHTS
from dpm_solver_v3.ems_tools.estimate.job import Job, JobState, uniform_grid
from dpm_solver_v3.ems_tools.estimate.run import estimate_moments
from dpm_solver_v3.sampler import sample_dpm_solver_v3

SEED, STEPS, BATCH = 3, 40, 25


def check_ode() -> None:
    """Print whether references have converged, and the range of l."""
    problem, samples = Problem(SEED, 200), range(18)
    for guidance in (1.0, 4.0, 7.5):
        coarse, fine = (problem.reference(samples, guidance, n).clean for n in (200, 400))
        error = per_sample_error(coarse, fine)
        print(
            f"guidance {guidance:g}: 200 and 400 steps differ by {error.mean():.2g} in mean square, at most {error.max():.2g}"
        )
    low, high = NOISE.level_at(torch.tensor([NOISE.time_min, NOISE.time_max])).tolist()
    job = Job(SHAPE, uniform_grid(low, high, 60), samples=36)
    statistics = estimate_moments({1.0: load_denoiser(torch.arange(9))}, job, JobState(), batch=18)[0].statistics()
    print(f"l(lambda) lies within [{statistics.l.min():.4f}, {statistics.l.max():.4f}]")


def check_pictures(archive: Path, weights: Path, count: int) -> None:
    """Print the kernel distance of `count` pictures from as many training images."""
    from embedded_train import load_emoji
    from eyes import kernel_interval, pretrained_features

    images, labels, weight = load_emoji(archive)
    draw = torch.Generator().manual_seed(SEED)
    order = torch.multinomial(weight, 2 * count, generator=draw)
    features = pretrained_features()
    shown, others = features(images[order[:count]]), features(images[order[count:]])
    drawn = features(_pictures(weights, labels[order[:count]], draw))
    for name, found in ((f"pictures of {weights.name}", drawn), ("other training images", others)):
        value, low, high = kernel_interval(found, shown)
        print(f"{count} {name}: kernel distance {value:.3f} [{low:.3f}, {high:.3f}] from as many training images")


def _pictures(weights: Path, labels: Tensor, draw: torch.Generator) -> Tensor:
    """Unguided pictures of these classes, 40 steps each."""
    network, sigmas, parts = load_network(weights), SCHEDULES["karras_to_zero"](STEPS).float(), []
    for some in labels.split(BATCH):
        x = torch.randn(len(some), *SHAPE, generator=draw) * sigmas[0]
        parts.append(sample_dpm_solver_v3(GuidedDenoiser(network, some, 1.0), x, sigmas, disable=True))
    return torch.cat(parts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="emoji-datasource-google-16.0.0.tgz from npm: judge the pictures instead")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="weights to judge (default: the embedded ones)")
    parser.add_argument("--pictures", type=int, default=400, help="how many (at most 1,300)")
    args = parser.parse_args()
    if args.data:
        check_pictures(args.data, args.weights, args.pictures)
    else:
        check_ode()


if __name__ == "__main__":
    main()
