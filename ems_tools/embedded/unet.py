"""The embedded model's network: a class-conditional denoiser of 32x32 RGB images.

A small U-Net after pixel-unshuffle(2), preconditioned as in EDM (Karras et al. 2022, table 1):

    D(x, sigma, c) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x, log(sigma) / 4, c)

Everything in it is smooth (SiLU, group norm, slow sines of log sigma), so its probability-flow ODE is well-behaved.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["UNet", "UNetConfig"]


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the network. `classes` excludes the null class, whose index is `classes`."""

    classes: int = 9
    channels: tuple[int, ...] = (64, 128, 192)
    blocks: int = 1
    embedding: int = 256
    frequencies: int = 16
    sigma_data: float = 0.72

    def to_dict(self) -> dict[str, object]:
        """The configuration as JSON-serialisable values."""
        return {**asdict(self), "channels": list(self.channels)}


def _begin_at_zero(layer: nn.Module) -> None:
    """So that an untrained block adds nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class _Block(nn.Module):
    """Residual block: norm, SiLU, conv, twice; the embedding scales and shifts the second norm."""

    def __init__(self, n_in: int, n_out: int, n_emb: int, attention: bool) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(min(32, n_in // 4), n_in)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.affine = nn.Linear(n_emb, 2 * n_out)
        self.norm2 = nn.GroupNorm(min(32, n_out // 4), n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.skip = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.attention = _Attention(n_out) if attention else nn.Identity()
        _begin_at_zero(self.conv2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        out: Tensor = self.attention((self.skip(x) + h) * 0.5**0.5)
        return out


class _Attention(nn.Module):
    """Single-head self-attention over positions."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(min(32, n // 4), n)
        self.qkv = nn.Conv2d(n, 3 * n, 1)
        self.out = nn.Conv2d(n, n, 1)
        _begin_at_zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        weights = torch.einsum("bcq,bck->bqk", q * q.shape[1] ** -0.5, k).softmax(-1)
        h = torch.einsum("bqk,bck->bcq", weights, v).reshape(x.shape)
        out: Tensor = x + self.out(h)
        return out


class UNet(nn.Module):
    """The denoiser D(x, sigma, c). x [B, 3, H, W] with H, W divisible by 8; sigma [B] > 0; c [B] class indices."""

    def __init__(self, config: UNetConfig | None = None) -> None:
        super().__init__()
        config = config or UNetConfig()
        self.config = config
        widths, n_emb = config.channels, config.embedding
        freqs = torch.logspace(-1, 1.5, config.frequencies, base=2.0)
        self.register_buffer("freqs", freqs, persistent=False)
        self.freqs: Tensor
        self.embed_sigma = nn.Sequential(nn.Linear(2 * config.frequencies, n_emb), nn.SiLU(), nn.Linear(n_emb, n_emb))
        self.embed_class = nn.Embedding(config.classes + 1, n_emb)
        self.conv_in = nn.Conv2d(13, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        kept = [widths[0]]
        n = widths[0]
        for level, width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(_Block(n, width, n_emb, attention=level > 0))
                n = width
                kept.append(n)
            if level + 1 < len(widths):
                kept.append(n)
        self.middle = _Block(n, n, n_emb, attention=True)
        for width in reversed(widths):
            for _ in range(config.blocks + 1):
                self.up.append(_Block(n + kept.pop(), width, n_emb, attention=False))
                n = width
        self.norm_out = nn.GroupNorm(min(32, n // 4), n)
        self.conv_out = nn.Conv2d(n, 12, 3, padding=1)
        _begin_at_zero(self.conv_out)

    def network(self, x: Tensor, noise: Tensor, label: Tensor) -> Tensor:
        """F: the raw network on scaled input x [B, 3, H, W] and noise level log(sigma) / 4 [B]."""
        angle = noise[:, None] * self.freqs.to(noise.dtype) * 4
        emb = self.embed_sigma(torch.cat([angle.sin(), angle.cos()], dim=1)) + self.embed_class(label)
        emb = F.silu(emb)
        h = F.pixel_unshuffle(x, 2)
        # A constant plane lets zero padding be told from an image border of the same value.
        h = self.conv_in(torch.cat([h, torch.ones_like(h[:, :1])], dim=1))
        kept = [h]
        levels, blocks = len(self.config.channels), self.config.blocks
        for level in range(levels):
            for j in range(blocks):
                h = self.down[level * blocks + j](h, emb)
                kept.append(h)
            if level + 1 < levels:
                h = F.avg_pool2d(h, 2)
                kept.append(h)
        h = self.middle(h, emb)
        for level in range(levels):
            for j in range(blocks + 1):
                h = self.up[level * (blocks + 1) + j](torch.cat([h, kept.pop()], dim=1), emb)
            if level + 1 < levels:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), 2)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """D(x, sigma) of x [B, 3, H, W], sigma [B] and label [B]."""
        s = sigma.reshape(-1, 1, 1, 1)
        d = self.config.sigma_data
        total = (s**2 + d**2).sqrt()
        f = self.network(x / total, sigma.log() / 4, label)
        return x * (d / total) ** 2 + f * (s * d / total)
