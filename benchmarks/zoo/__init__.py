"""Eleven small networks that differ in what matters to a sampler: data, parameterisation, architecture, guidance.

    python benchmarks/zoo_train.py --data FOLDER [--only mnist shapes]

trains what is missing, each in minutes on one core, into out/zoo. `load(name)` returns a network ready to sample from. Eight
are to develop on; three (`split` "final") are for tables only: nobody looks at them while choosing anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dpm_solver_v3.sampler import EDM, NoiseSchedule, VPContinuous, VPDiscrete

from . import data
from .denoisers import CosineTime, FlowTime, ZooDenoiser
from .networks import ConvNet1d, Mixer, Transformer, UNet

__all__ = ["NETWORKS", "WEIGHTS", "Entry", "Loaded", "load"]

WEIGHTS = Path(__file__).resolve().parents[2] / "out" / "zoo"


@dataclass(frozen=True)
class Entry:
    """One network of the zoo.

    Args:
        split: "development" or "final".
        prediction: see `denoisers`.
        schedule: the noise schedule that a host of this model would have, in sigma space.
        shape: of a sample, without the batch.
        classes: 0 for an unconditional network, which knows no guidance.
        build: makes the untrained network.
        source: makes the data from a folder of archives; None for the embedded model.
        minutes: of training.
        batch, lr: of training.
    """

    split: str
    prediction: str
    schedule: NoiseSchedule
    shape: tuple[int, ...]
    classes: int
    build: Callable[[], nn.Module] | None
    source: Callable[[Path], tuple[Tensor, Tensor]] | None
    minutes: float = 6.0
    batch: int = 64
    lr: float = 2e-3

    @property
    def guidances(self) -> tuple[float, ...]:
        """Scales that make sense."""
        return (1.0, 2.0, 4.0, 7.5) if self.classes else (1.0,)

    def classes_of(self, part: str) -> tuple[int, ...]:
        """Classes to fit on ("fit") or to judge on ("judge"): different ones where there are many."""
        if self.classes < 8:
            return tuple(range(max(self.classes, 1)))
        return tuple(range(0 if part == "fit" else 1, self.classes, 2))


NETWORKS: dict[str, Entry] = {
    "digits": Entry("development", "edm", EDM(), (1, 8, 8), 10, lambda: Mixer((1, 8, 8), 10), data.digits, 4.0, 128),
    "galaxies": Entry(
        "development", "eps", VPContinuous(), (1, 32, 32), 0, lambda: UNet(1, 0, (32, 48, 64)), data.galaxies, 7.0
    ),
    "mnist": Entry(
        "development", "flow", FlowTime(), (1, 28, 28), 10, lambda: Transformer((1, 28, 28), 10, 4), data.handwritten, 8.0
    ),
    "photographs": Entry(
        "development", "eps", VPContinuous(), (3, 32, 32), 0, lambda: UNet(3, 0, (48, 64, 96)), data.photographs, 9.0
    ),
    "emoji": Entry("development", "edm", VPDiscrete.linear(), (3, 32, 32), 9, None, None),
    "ddpm": Entry(
        "development", "eps", VPContinuous(), (1, 28, 28), 0, lambda: UNet(1, 0, (32, 48, 64)), data.unlabelled, 12.0
    ),
    "waves": Entry("development", "v", CosineTime(), (1, 1, 96), 3, lambda: ConvNet1d(1, 3), data.waves, 5.0),
    "textures": Entry(
        "development", "flow", FlowTime(shift=2.0), (3, 32, 32), 4, lambda: UNet(3, 4, (32, 48, 64)), data.textures, 14.0
    ),
    "signals": Entry("final", "edm", EDM(), (1, 1, 128), 4, lambda: ConvNet1d(1, 4), data.signals, 5.0),
    "shapes": Entry("final", "v", CosineTime(), (3, 32, 32), 3, lambda: UNet(3, 3), data.shapes, 8.0),
    "latents": Entry(
        "final", "flow", FlowTime(shift=3.0), (16, 8, 8), 9, lambda: Transformer((16, 8, 8), 9, 2, 128, 5), None, 8.0
    ),
}


@dataclass(frozen=True)
class Loaded:
    """A network ready for use."""

    name: str
    entry: Entry
    network: nn.Module

    @property
    def ends(self) -> tuple[float, float]:
        """sigma_max and sigma_min."""
        times = torch.tensor([self.entry.schedule.time_max, self.entry.schedule.time_min], dtype=torch.float64)
        high, low = self.entry.schedule.level_at(times).tolist()
        return high, low

    def denoiser(self, guidance: float = 1.0, classes: Sequence[int] | None = None) -> nn.Module:
        """D(y, sigma) in sigma space; sample i has class classes[i mod n] (all of them, where not given)."""
        labels = torch.tensor(list(classes) if classes is not None else list(range(max(self.entry.classes, 1))))
        if self.entry.build is None:
            from dpm_solver_v3.ems_tools.embedded import GuidedDenoiser

            return GuidedDenoiser(self.network, labels, guidance)
        return ZooDenoiser(self.network, self.entry.prediction, labels, self.entry.classes, guidance)


def load(name: str, folder: Path = WEIGHTS) -> Loaded:
    """The network of this name. Raises FileNotFoundError, saying what to run, where it has not been trained."""
    entry = NETWORKS[name]
    if entry.build is None:
        from dpm_solver_v3.ems_tools.embedded import load_network

        return Loaded(name, entry, load_network())
    path = folder / f"{name}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: python benchmarks/zoo_train.py --data FOLDER --only {name}")
    from safetensors.torch import load_file

    network = entry.build()
    network.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return Loaded(name, entry, network.eval().requires_grad_(False))
