"""How a fit transfers: to other noise, classes, guidance scales, sizes, a part of the way (denoise), and a fine-tuned model.

    python benchmarks/transfer.py --ems out/emoji-fitted.ems.safetensors [--noises 36] [--tuned out/tuned.safetensors]
    python benchmarks/transfer.py --ems out/quick.ems.safetensors out/standard.ems.safetensors --steps 4 5 6 8 10
    python benchmarks/transfer.py --tune emoji-datasource-google-16.0.0.tgz --tuned out/tuned.safetensors

Prints, for the embedded model, the geometric mean of the error of v3 on the fitted schedule over that of the best of a few
strong settings that need no file (UniPC bh2 of order 2, DEIS of order 2 and DPM-Solver++ 2M, on Karras and uniform-time
steps to sigma_min), with bootstrap 95 % intervals. --tune fine-tunes the embedded model a little (on one class, with its
colours exchanged) and writes the weights; with --tuned the fit made for the original model is used on them. Several files, as
of several efforts, are compared with each other on the other classes only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from common import Problem, bootstrap_ratio, geometric_mean, per_sample_error, schedules_on, solve
from rivals import RIVALS, Rival
from torch import Tensor

from dpm_solver_v3.ems_tools.embedded.denoiser import WEIGHTS
from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.reader import load_ems_file
from dpm_solver_v3.sampler import LevelTable, karras, sample_dpm_solver_v3

SEED, REFERENCE = 7, 100
"""Of noise that no fit, choice or other benchmark uses."""
STRONG = ("unipc_bh2_2", "deis_2", "dpmpp_2m")
SEEN, UNSEEN = (0, 2, 4, 6, 8), (1, 3, 5, 7)


def of_classes(classes: Sequence[int], count: int) -> list[int]:
    """The first samples of these classes."""
    return [k for k in range(100 * count) if k % 9 in classes][:count]


def on_steps(rival: Rival, sigmas: Tensor, denoiser: torch.nn.Module, x: Tensor) -> Tensor:
    """A rival's result on given steps."""
    return rival(denoiser, x, sigmas)


def errors(problem: Problem, samples: list[int], guidance: float, run: Callable[[torch.nn.Module, Tensor], Tensor]) -> Tensor:
    """Per-sample errors [n] against the converged picture."""
    x = run(problem.denoiser(samples, guidance), problem.start(samples))
    return per_sample_error(x, problem.reference(samples, guidance).clean)


def fitted(file: EMSFile, steps: int, fit_for: float, problem: Problem, samples: list[int], guidance: float) -> Tensor:
    """Errors with the schedule and coefficients fitted for the guidance scale `fit_for`."""
    sigmas, ems = file.fitted_sigmas(steps, fit_for), file.at(fit_for)
    shrink = sigmas[0].item() / problem.ends[0]  # noise at the first sigma, as hosts begin
    return errors(problem, samples, guidance, lambda D, x: sample_dpm_solver_v3(D, x * shrink, sigmas, ems=ems, disable=True))


def strongest(steps: int, problem: Problem, samples: list[int], guidance: float) -> Tensor:
    """Errors of the best of the strong settings, chosen on these very samples: in their favour."""
    schedules = schedules_on(problem.noise)
    found = []
    for name in STRONG:
        for schedule in ("karras", "uniform_time"):
            sigmas = schedules[schedule](steps)
            found.append(errors(problem, samples, guidance, partial(on_steps, RIVALS[name], sigmas)))
    return min(found, key=lambda e: geometric_mean(e).item())


def from_picture(
    file: EMSFile, steps: int, denoise: float, problem: Problem, samples: list[int], guidance: float
) -> tuple[Tensor, Tensor]:
    """Image to image: errors of the last steps of the schedule fitted for `steps`, and of the best strong setting there.

    Both begin with a picture of the model plus noise of the first sigma, and have the same range and number of steps.
    """
    n = round(steps * denoise)
    sigmas, ems = file.fitted_sigmas(n, guidance, n / steps), file.at(guidance)
    first, low = sigmas[0].item(), problem.ends[1]
    denoiser, noise = problem.denoiser(samples, guidance), problem.start([100_000 + k for k in samples], first)
    x = problem.reference(samples, guidance).clean + noise
    clean = solve(denoiser, x, REFERENCE, first, low)["clean"]
    ours = per_sample_error(sample_dpm_solver_v3(denoiser, x, sigmas, ems=ems, disable=True), clean)
    ends = LevelTable(torch.tensor([low, first], dtype=torch.float64))
    levels = [karras(ends, n), karras(ends, n, to_zero=True)]
    theirs = [per_sample_error(RIVALS[name](denoiser, x, s), clean) for name in STRONG for s in levels]
    return ours, min(theirs, key=lambda e: geometric_mean(e).item())


def line(what: str, ours: Tensor, theirs: Tensor) -> None:
    """One case as text."""
    value, low, high = bootstrap_ratio(ours, theirs)["geometric_mean"]
    print(f"  {what:<58} {geometric_mean(ours).item():.3g}  ratio {value:.3f} [{low:.3f}, {high:.3f}]", flush=True)


def report(file: EMSFile, noises: int, counts: Sequence[int], judged: Sequence[float], tuned: Path | None) -> None:
    """Every case for every number of steps."""
    problem = Problem(SEED, REFERENCE)
    cases = [(Problem(SEED, REFERENCE, shape=(3, size, size)), f"{size}x{size} pixels") for size in (24, 48, 64)]
    if tuned and tuned.exists():
        cases.append((Problem(SEED, REFERENCE, weights=tuned), "a fine-tuned model"))
    scales = file.guidance.tolist()
    for steps in counts:
        for guidance in judged:
            print(f"\nguidance {guidance:g}, {steps} steps: error of the fit, and over the best of six strong settings")
            for name, classes in (("classes of the fit, other noise", SEEN), ("other classes, other noise", UNSEEN)):
                samples = of_classes(classes, noises)
                line(
                    name,
                    fitted(file, steps, guidance, problem, samples, guidance),
                    strongest(steps, problem, samples, guidance),
                )
            samples = of_classes(UNSEEN, noises)
            theirs = strongest(steps, problem, samples, guidance)
            for other in scales:
                if other != guidance:
                    line(f"the fit for guidance {other:g}", fitted(file, steps, other, problem, samples, guidance), theirs)
            for other, name in cases:
                theirs = strongest(steps, other, samples, guidance)
                line(name, fitted(file, steps, guidance, other, samples, guidance), theirs)
            for denoise in (0.75, 0.5):
                line(f"image to image, denoise {denoise:g}", *from_picture(file, steps, denoise, problem, samples, guidance))
        between = [(a * b) ** 0.5 for a, b in pairwise(scales) if a in judged]
        for guidance in between:
            samples = of_classes(UNSEEN, noises)
            theirs = strongest(steps, problem, samples, guidance)
            line(
                f"guidance {guidance:.3g}, between two fits", fitted(file, steps, guidance, problem, samples, guidance), theirs
            )


def compare(files: dict[str, EMSFile], noises: int, counts: Sequence[int], judged: Sequence[float]) -> None:
    """Every file on noise and classes that no fit has seen."""
    problem, samples = Problem(SEED, REFERENCE), of_classes(UNSEEN, noises)
    for steps in counts:
        for guidance in judged:
            print(f"\nguidance {guidance:g}, {steps} steps: error of the fit, and over the best of six strong settings")
            theirs = strongest(steps, problem, samples, guidance)
            for name, file in files.items():
                line(name, fitted(file, steps, guidance, problem, samples, guidance), theirs)


def tune(archive: Path, out: Path, batches: int) -> None:
    """Fine-tune on one class ("Smileys & Emotion"), as a style LoRA would, and write the weights."""
    from embedded_train import load_emoji, loss_of, save_weights

    from dpm_solver_v3.ems_tools.embedded import CLASSES, load_network

    images, labels, _ = load_emoji(archive)
    images = images[labels == CLASSES.index("Smileys & Emotion")].flip(1)  # and with red and blue exchanged
    network = load_network().requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    draw = torch.Generator().manual_seed(0)
    for step in range(batches):
        x0 = images[torch.randint(len(images), (16,), generator=draw)]
        label = torch.randint(len(CLASSES), (16,), generator=draw)
        loss = loss_of(network, x0, label, draw, bf16=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"batch {step}, loss {loss.item():.4f}", flush=True)
    save_weights(network.state_dict(), network.config, out)
    old = load_network(WEIGHTS).state_dict()
    moved = sum(((v - old[k]).square().sum() for k, v in network.state_dict().items()), torch.tensor(0.0)).sqrt()
    print(f"wrote {out}; the weights moved by {moved / sum(v.square().sum() for v in old.values()).sqrt():.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ems", type=Path, nargs="+", help="files with fitted schedules, fitted on classes 0, 2, 4, 6, 8")
    parser.add_argument("--tuned", type=Path, help="weights of a fine-tuned embedded model")
    parser.add_argument("--tune", type=Path, help="the images to fine-tune on")
    parser.add_argument("--batches", type=int, default=300, help="of 16 images, to fine-tune (300)")
    parser.add_argument("--guidance", type=float, nargs="+", help="scales to judge at (those of the file)")
    parser.add_argument("--noises", type=int, default=36)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.tune:
        if not args.tuned:
            parser.error("--tune needs --tuned, where the weights go")
        tune(args.tune, args.tuned, args.batches)
    if args.ems:
        with torch.no_grad():
            files = {path.name: load_ems_file(path) for path in args.ems}
            file = next(iter(files.values()))
            judged = args.guidance or file.guidance.tolist()
            if len(files) > 1:
                compare(files, args.noises, args.steps, judged)
            else:
                report(file, args.noises, args.steps, judged, args.tuned)


if __name__ == "__main__":
    main()
