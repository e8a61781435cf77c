"""Writes example_workflows/*.jpg: what each example ends with, on the embedded model."""

import io
from collections.abc import Callable
from pathlib import Path

import k_diffusion.sampling as rivals
import torch
from PIL import Image
from torch import Tensor

from dpm_solver_v3.ems_tools.embedded import CLASSES, load_denoiser
from dpm_solver_v3.ems_tools.file.reader import load_ems_file
from dpm_solver_v3.ems_tools.show import png_of, summary_of
from dpm_solver_v3.sampler import VPDiscrete, karras, sample_dpm_solver_v3

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "example_workflows"
SIDE = 420


def picture(x: Tensor) -> Image.Image:
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)


def grid(rows: list[list[Tensor]]) -> Image.Image:
    cell = SIDE // len(rows[0])
    sheet = Image.new("RGB", (SIDE, cell * len(rows)), "white")
    for i, row in enumerate(rows):
        for k, x in enumerate(row):
            sheet.paste(picture(x).resize((cell - 8, cell - 8), Image.Resampling.NEAREST), (k * cell + 4, i * cell + 4))
    return sheet


@torch.no_grad()
def main() -> None:
    path = ROOT / "stats" / "embedded-emoji.ems.safetensors"
    file, count = load_ems_file(path), len(CLASSES)
    model = load_denoiser(labels=torch.arange(count), guidance=4.0)
    noise = torch.randn((count, 3, 32, 32), generator=torch.Generator().manual_seed(12))

    def run(steps: int, function: Callable[..., Tensor]) -> Tensor:
        sigmas = karras(VPDiscrete.linear(), steps, to_zero=True).float()
        if function is sample_dpm_solver_v3:
            return sample_dpm_solver_v3(model, noise * sigmas[0], sigmas, disable=True, ems=file.at(4.0), guidance=4.0)
        return function(model, noise * sigmas[0], sigmas, disable=True)

    final = run(8, sample_dpm_solver_v3)
    grid([[final[3 * i + k] for k in range(3)] for i in range(3)]).save(FOLDER / "Text to image.jpg", quality=88)
    exact = run(80, sample_dpm_solver_v3)
    functions = (sample_dpm_solver_v3, rivals.sample_dpmpp_2m, rivals.sample_euler)
    rows = [[run(5, f)[2], run(8, f)[2], exact[2]] for f in functions]
    grid(rows).save(FOLDER / "Compare samplers.jpg", quality=88)
    plot = Image.open(io.BytesIO(png_of(summary_of(file), "Compute EMS"))).convert("RGB")
    plot.save(FOLDER / "Compute EMS.jpg", quality=88)


if __name__ == "__main__":
    main()
