"""Train the networks of the zoo that are missing, one after the other, each for its minutes of one core's own time.

    python benchmarks/zoo_train.py --data FOLDER [--only NAME ...] [--share 1.0]

FOLDER holds the archives that `zoo/data.py` names. Weights (averaged, float16) and loss curves go to out/zoo.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from zoo import NETWORKS, WEIGHTS, Entry
from zoo import data as zoo_data
from zoo.denoisers import training_loss


class _Autoencoder(nn.Module):
    """Emoji [3, 32, 32] to latents [16, 8, 8] and back."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(12, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 16, 1),
        )
        self.decode = nn.Sequential(
            nn.Conv2d(16, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            nn.SiLU(),
            nn.PixelShuffle(2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 12, 3, padding=1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents, and the picture made from latents with a little noise."""
        latents = self.encode(F.pixel_unshuffle(x, 2))
        return latents, F.pixel_shuffle(self.decode(latents + 0.1 * torch.randn_like(latents)), 2)


def latents(folder: Path, minutes: float = 3.0) -> tuple[Tensor, Tensor]:
    """16-channel latents of the emoji, each channel of mean 0 and deviation 1, from an autoencoder trained here."""
    images, labels = zoo_data.emoji(folder)
    torch.manual_seed(0)
    model = _Autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    began = time.process_time()
    while (share := (time.process_time() - began) / (60 * minutes)) < 1:
        x = images[torch.randint(len(images), (64,))]
        with torch.autocast("cpu", torch.bfloat16):
            z, back = model(x)
        loss = F.mse_loss(back.float(), x) + 1e-3 * z.float().square().mean()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, 2 * (1 - share))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    print(f"autoencoder: loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        z = torch.cat([model.encode(F.pixel_unshuffle(part, 2)) for part in images.split(256)])
    return (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True), labels


def train(name: str, entry: Entry, folder: Path, share_of_time: float, seed: int = 0) -> None:
    """Train one network and write its averaged weights and its loss curve."""
    assert entry.build is not None
    source = entry.source or latents
    images, labels = source(folder)
    torch.manual_seed(seed)
    network = entry.build()
    average = {k: v.detach().clone() for k, v in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=entry.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    print(f"{name}: {len(images)} samples, {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters", flush=True)
    began, step, running, curve = time.process_time(), 0, 0.0, []
    seconds = 60 * entry.minutes * share_of_time
    while (share := (time.process_time() - began) / seconds) < 1:
        pick = torch.randint(len(images), (entry.batch,))
        label = labels[pick].clone()
        label[torch.rand(entry.batch) < 0.12] = entry.classes
        loss = training_loss(network, entry.prediction, entry.schedule, images[pick], label)
        for group in optimizer.param_groups:
            group["lr"] = entry.lr * min(1.0, (step + 1) / 100, 1.5 * (1 - share))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            keep = min(0.998, (step + 1) / (step + 10))
            for k, v in network.state_dict().items():
                average[k].lerp_(v, 1 - keep)
        step, running = step + 1, running + loss.item()
        if step % 200 == 0:
            curve.append(f"{step},{running / 200:.5f}")
            print(f"{name}: step {step}, {100 * share:.0f} %, loss {running / 200:.4f}", flush=True)
            running = 0.0
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    path = WEIGHTS / f"{name}.safetensors"
    save_file({k: v.half().contiguous() for k, v in average.items()}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
    (WEIGHTS / f"{name}.csv").write_text("\n".join(["step,loss", *curve]) + "\n")
    print(f"{name}: {step} steps; wrote {path}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the archives")
    parser.add_argument("--only", nargs="+", choices=sorted(NETWORKS), help="train these")
    parser.add_argument("--share", type=float, default=1.0, help="of the minutes, for a trial")
    parser.add_argument("--again", action="store_true", help="also those that are there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.only or NETWORKS:
        entry = NETWORKS[name]
        if entry.build is not None and (args.again or not (WEIGHTS / f"{name}.safetensors").exists()):
            train(name, entry, args.data, args.share)


if __name__ == "__main__":
    main()
