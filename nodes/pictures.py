"""Plots and grids as ComfyUI IMAGE tensors [B, H, W, 3] in [0, 1]."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..ems_tools.file.contents import EMSFile
    from ..ems_tools.show.panels import Panel

__all__ = ["ems_picture", "image_of_png", "labelled_grid", "panels_picture"]


def image_of_png(data: bytes) -> Tensor:
    """IMAGE [1, H, W, 3] of a PNG."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels.copy())[None]


def ems_picture(file: EMSFile, title: str, statistics: bool = False) -> Tensor:
    """What a file gains, readable at a node's size; or all of it: l, s, b and the evidence."""
    from ..ems_tools.show.panels import statistics_of, summary_of

    return panels_picture(statistics_of(file), title) if statistics else panels_picture(summary_of(file), title, 1.6)


def panels_picture(rows: list[list[Panel]], title: str, zoom: float = 1.0) -> Tensor:
    """Any panels."""
    from ..ems_tools.show.draw import png_of

    return image_of_png(png_of(rows, title, zoom))


def labelled_grid(rows: list[list[Tensor]], row_names: list[str], column_names: list[str]) -> Tensor:
    """IMAGE [1, H, W, 3] of equally large images [h, w, 3] with names at the left and on top."""
    import numpy as np
    from PIL import Image, ImageDraw

    from ..ems_tools.show.png import font

    zoom = max(1, 128 // min(rows[0][0].shape[:2]))
    rows = [[image.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1) for image in row] for row in rows]
    height, width = rows[0][0].shape[:2]
    size = max(12, min(width, height) // 7)  # readable at a node's size, too
    letters = font(size)
    left = int(max(letters.getlength(line) for name in row_names for line in name.split("\n"))) + size
    top, gap = 2 * size, max(2, size // 4)
    canvas = Image.new("RGB", (left + len(rows[0]) * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for c, name in enumerate(column_names):
        draw.text((left + c * (width + gap) + width / 2, top / 2), name, fill="black", font=letters, anchor="mm")
    for r, name in enumerate(row_names):
        y = top + r * (height + gap)
        draw.multiline_text((left - size / 2, y + height / 2), name, fill="black", font=letters, anchor="rm", align="right")
        for c, image in enumerate(rows[r]):
            pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
            canvas.paste(Image.fromarray(np.ascontiguousarray(pixels)), (left + c * (width + gap), y))
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32).copy() / 255)[None]
