"""Train the embedded model on the Noto emoji of the npm package `emoji-datasource-google`.

    npm pack emoji-datasource-google@16.0.0
    python benchmarks/embedded_train.py --data emoji-datasource-google-16.0.0.tgz --out out/train --compile

Resumes from `--out` when it holds a checkpoint, and else begins with the weights of `--weights` where they are given (to train
longer what was trained); writes `emoji.safetensors` (EMA weights in float16) and `loss.csv` there. Data and licence: see
ems_tools/embedded/MODEL_CARD.md.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpm_solver_v3.ems_tools.embedded import load_network
from dpm_solver_v3.ems_tools.embedded.denoiser import CLASSES
from dpm_solver_v3.ems_tools.embedded.unet import UNet, UNetConfig

SKIN_TONE_WEIGHT = 0.1
"""Sampling weight of a skin-tone variant; half of the images are such variants of one tenth of the emoji."""


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(f"package/{name}")
    if file is None:
        raise ValueError(f"{name} is missing from the archive")
    return file.read()


def load_emoji(archive: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Images [N, 3, 32, 32] in [-1, 1] on white, class indices [N], sampling weights [N]."""
    from PIL import Image

    images, labels, weights = [], [], []
    with tarfile.open(archive) as tar:
        for emoji in json.loads(_member(tar, "emoji.json")):
            if emoji["category"] not in CLASSES:
                continue
            files = [(emoji["image"], 1.0)]
            files += [(v["image"], SKIN_TONE_WEIGHT) for v in emoji.get("skin_variations", {}).values()]
            for name, weight in files:
                image = Image.open(io.BytesIO(_member(tar, f"img/google/64/{name}"))).convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
                images.append(np.asarray(image.resize((32, 32), Image.Resampling.BOX)))
                labels.append(CLASSES.index(emoji["category"]))
                weights.append(weight)
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x, torch.tensor(labels), torch.tensor(weights)


def loss_of(model: UNet, x0: Tensor, label: Tensor, gen: torch.Generator, bf16: bool) -> Tensor:
    """EDM's weighted denoising loss, log sigma ~ N(-0.6, 1.5^2), 12% of labels dropped."""
    sigma = (torch.randn(len(x0), generator=gen) * 1.5 - 0.6).exp()
    label = torch.where(torch.rand(len(x0), generator=gen) < 0.12, model.config.classes, label)
    noise = torch.randn(x0.shape, generator=gen)
    s, d = sigma.reshape(-1, 1, 1, 1), model.config.sigma_data
    total = (s**2 + d**2).sqrt()
    y = x0 + s * noise
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        f = model.network(y / total, sigma.log() / 4, label).float()
    target = (x0 - y * (d / total) ** 2) / (s * d / total)
    return ((f - target) ** 2).mean()


def save_weights(state: dict[str, Tensor], config: UNetConfig, path: Path) -> None:
    """Write weights in float16 with the configuration in the metadata, atomically."""
    from safetensors.torch import save_file

    temporary = path.with_suffix(".tmp")
    half = {k: v.detach().to(torch.float16).contiguous() for k, v in state.items()}
    save_file(half, temporary, {"config": json.dumps(config.to_dict())})
    os.replace(temporary, path)


def train(  # noqa: PLR0913 - what the command line gives
    archive: Path,
    out: Path,
    steps: int,
    batch: int,
    lr: float,
    bf16: bool,
    compiled: bool,
    seed: int,
    weights_from: Path | None = None,
    decay_most: float = 0.999,
) -> None:
    """Run or resume the training."""
    out.mkdir(parents=True, exist_ok=True)
    images, labels, weights = load_emoji(archive)
    torch.manual_seed(seed)
    model = (
        load_network(weights_from).train().requires_grad_(True)
        if weights_from
        else UNet(UNetConfig(sigma_data=round(images.std().item(), 3)))
    )
    model = model.to(memory_format=torch.channels_last)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(images)} images, sigma_data {model.config.sigma_data}, {parameters / 1e6:.2f}M parameters", flush=True)
    checkpoint, start = out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, start = state["ema"], state["step"]
        print(f"resumed at step {start}", flush=True)
    if compiled:
        model.network = torch.compile(model.network)  # type: ignore[method-assign]
    running, since = 0.0, time.monotonic()
    for step in range(start, steps):
        gen = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = torch.multinomial(weights, batch, replacement=True, generator=gen)
        x0 = images[index]
        x0 = torch.where(torch.rand(batch, 1, 1, 1, generator=gen) < 0.5, x0.flip(-1), x0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 200, max(0.01, 2 * (1 - step / steps)))
        loss = loss_of(model, x0, labels[index], gen, bf16)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(decay_most, (step + 1) / (step + 20))
        with torch.no_grad():
            for k, v in model.state_dict().items():
                ema[k].lerp_(v, 1 - decay)
        running += loss.item()
        if (step + 1) % 100 == 0:
            speed = 100 * batch / (time.monotonic() - since)
            print(f"step {step + 1}/{steps} loss {running / 100:.4f} {speed:.0f} images/s", flush=True)
            with open(out / "loss.csv", "a", newline="") as log:
                csv.writer(log).writerow([step + 1, f"{running / 100:.5f}"])
            running, since = 0.0, time.monotonic()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            temporary = checkpoint.with_suffix(".tmp")
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema, "step": step + 1}, temporary
            )
            os.replace(temporary, checkpoint)
            save_weights(ema, model.config, out / "emoji.safetensors")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="emoji-datasource-google-16.0.0.tgz from npm")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, the weights and the loss curve")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights")
    parser.add_argument("--weights", type=Path, help="begin with these, such as ems_tools/embedded/emoji.safetensors")
    parser.add_argument("--no-bf16", action="store_true", help="train in float32 throughout")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the network: 1.6 times as fast on a CPU with bf16"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    bf16, begin = not args.no_bf16, args.weights
    train(args.data, args.out, args.steps, args.batch, args.lr, bf16, args.compile, args.seed, begin, args.ema)


if __name__ == "__main__":
    main()
