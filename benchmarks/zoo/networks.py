"""Architectures of the zoo: a U-Net, a vision transformer, an MLP-mixer and a one-dimensional convolutional network.

Each is F(x, time, label): x [B, C, ...], time [B] between 0 and 1, label [B] (the number of classes stands for none), and
returns a tensor like x. What F predicts is the affair of `denoisers`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ConvNet1d", "Mixer", "Transformer", "UNet"]


class _Embedding(nn.Module):
    """Time and label to one vector [B, width]."""

    def __init__(self, classes: int, width: int, frequencies: int = 16) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.time = nn.Sequential(nn.Linear(2 * frequencies + 1, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)

    def forward(self, time: Tensor, label: Tensor) -> Tensor:
        angle = time[:, None] * torch.arange(1, self.frequencies + 1, device=time.device) * (math.pi / 2)
        return F.silu(self.time(torch.cat([time[:, None], angle.sin(), angle.cos()], 1)) + self.label(label))


class _ResBlock(nn.Module):
    """Two convolutions with group norm; the embedding scales and shifts the second norm."""

    def __init__(self, n_in: int, n_out: int, width: int, dims: int, dilation: int = 1) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv1d
        self.norm1, self.conv1 = nn.GroupNorm(8, n_in), conv(n_in, n_out, 3, padding=dilation, dilation=dilation)
        self.norm2, self.conv2 = nn.GroupNorm(8, n_out), conv(n_out, n_out, 3, padding=1)
        self.affine = nn.Linear(width, 2 * n_out)
        self.skip = conv(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        affine = self.affine(emb)
        scale, shift = affine.reshape(*affine.shape, *(1,) * (x.ndim - 2)).chunk(2, dim=1)
        out: Tensor = self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return out


class _Attention(nn.Module):
    """Self-attention over positions [B, N, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        out: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        return out


class UNet(nn.Module):
    """Three resolutions after an optional pixel-unshuffle by 2, attention at the lowest one."""

    def __init__(self, channels: int, classes: int, widths: tuple[int, int, int] = (32, 64, 96), shuffle: int = 2) -> None:
        super().__init__()
        a, b, c = widths
        self.shuffle, inner, emb = shuffle, channels * shuffle**2, 128
        self.embed = _Embedding(classes, emb)
        self.conv_in = nn.Conv2d(inner + 1, a, 3, padding=1)
        self.down1, self.down2, self.down3 = (_ResBlock(i, o, emb, 2) for i, o in ((a, a), (a, b), (b, c)))
        self.norm, self.attention = nn.GroupNorm(8, c), _Attention(c, 4)
        self.middle = _ResBlock(c, c, emb, 2)
        self.up3, self.up2, self.up1 = (_ResBlock(i, o, emb, 2) for i, o in ((2 * c, b), (2 * b, a), (2 * a, a)))
        self.out = nn.Sequential(nn.GroupNorm(8, a), nn.SiLU(), nn.Conv2d(a, inner, 3, padding=1))
        nn.init.zeros_(self.out[2].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        emb = self.embed(time, label)
        h = F.pixel_unshuffle(x, self.shuffle)
        h = self.conv_in(torch.cat([h, torch.ones_like(h[:, :1])], 1))  # the plane of ones shows where the border is
        one = self.down1(h, emb)
        two = self.down2(F.avg_pool2d(one, 2), emb)
        three = self.down3(F.avg_pool2d(two, 2), emb)
        tokens = self.norm(three).flatten(2).transpose(1, 2)
        h = three + self.attention(tokens).transpose(1, 2).reshape(three.shape)
        h = self.up3(torch.cat([self.middle(h, emb), three], 1), emb)
        h = self.up2(torch.cat([F.interpolate(h, size=two.shape[2:]), two], 1), emb)
        h = self.up1(torch.cat([F.interpolate(h, size=one.shape[2:]), one], 1), emb)
        return F.pixel_shuffle(self.out(h), self.shuffle)


class _TransformerBlock(nn.Module):
    """Attention and MLP, each modulated by the embedding as in DiT (adaLN-zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = _Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))
        self.modulate = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        s1, b1, g1, s2, b2, g2 = self.modulate(emb)[:, None].chunk(6, dim=-1)
        x = x + g1 * self.attention(self.norm(x) * (1 + s1) + b1)
        out: Tensor = x + g2 * self.mlp(self.norm(x) * (1 + s2) + b2)
        return out


class Transformer(nn.Module):
    """Patches of an image as tokens, learned positions, `depth` blocks."""

    def __init__(self, shape: tuple[int, int, int], classes: int, patch: int, width: int = 128, depth: int = 5) -> None:
        super().__init__()
        channels, high, wide = shape
        self.patch = patch
        self.embed = _Embedding(classes, width)
        self.tokens = nn.Linear(channels * patch**2, width)
        self.positions = nn.Parameter(0.1 * torch.randn(1, high * wide // patch**2, width))
        self.blocks = nn.ModuleList([_TransformerBlock(width, 4) for _ in range(depth)])
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, channels * patch**2)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        emb = self.embed(time, label)
        grid = F.pixel_unshuffle(x, self.patch)
        h = self.tokens(grid.flatten(2).transpose(1, 2)) + self.positions
        for block in self.blocks:
            h = block(h, emb)
        return F.pixel_shuffle(self.out(self.norm(h)).transpose(1, 2).reshape(grid.shape), self.patch)


class _MixerBlock(nn.Module):
    """An MLP over positions, then one over channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, elementwise_affine=False), nn.LayerNorm(width, elementwise_affine=False)
        self.over_tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.over_width = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.modulate = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        s1, b1, s2, b2 = self.modulate(emb)[:, None].chunk(4, dim=-1)
        x = x + self.over_tokens((self.norm1(x) * (1 + s1) + b1).transpose(1, 2)).transpose(1, 2)
        out: Tensor = x + self.over_width(self.norm2(x) * (1 + s2) + b2)
        return out


class Mixer(nn.Module):
    """MLP-mixer on the pixels (or patches) of a small image."""

    def __init__(self, shape: tuple[int, int, int], classes: int, patch: int = 1, width: int = 96, depth: int = 5) -> None:
        super().__init__()
        channels, high, wide = shape
        self.patch = patch
        self.embed = _Embedding(classes, width)
        self.tokens = nn.Linear(channels * patch**2, width)
        self.blocks = nn.ModuleList([_MixerBlock(high * wide // patch**2, width) for _ in range(depth)])
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, channels * patch**2)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        emb = self.embed(time, label)
        grid = F.pixel_unshuffle(x, self.patch)
        h = self.tokens(grid.flatten(2).transpose(1, 2))
        for block in self.blocks:
            h = block(h, emb)
        return F.pixel_shuffle(self.out(self.norm(h)).transpose(1, 2).reshape(grid.shape), self.patch)


class ConvNet1d(nn.Module):
    """Residual blocks with growing dilation on a signal [B, C, 1, N], four samples folded into channels."""

    def __init__(self, channels: int, classes: int, width: int = 64, fold: int = 4) -> None:
        super().__init__()
        self.fold, emb = fold, 128
        self.embed = _Embedding(classes, emb)
        self.conv_in = nn.Conv1d(channels * fold, width, 3, padding=1)
        self.blocks = nn.ModuleList([_ResBlock(width, width, emb, 1, d) for d in (1, 2, 4, 8, 4, 2)])
        self.out = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv1d(width, channels * fold, 3, padding=1))
        nn.init.zeros_(self.out[2].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        emb = self.embed(time, label)
        b, c, _, n = x.shape
        h = x.reshape(b, c, n // self.fold, self.fold).transpose(2, 3).reshape(b, c * self.fold, n // self.fold)
        h = self.conv_in(h)
        for block in self.blocks:
            h = block(h, emb)
        return self.out(h).reshape(b, c, self.fold, n // self.fold).transpose(2, 3).reshape(x.shape)
