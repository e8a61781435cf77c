"""Real pipelines run with the scheduler, and the pipeline's own denoiser in the library's sampler: the same latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import diffusers
import pytest
import torch
from torch import Tensor

from dpm_solver_v3.diffusers import DPMSolverV3Scheduler, EmbeddedPipeline
from dpm_solver_v3.ems_tools.embedded import load_denoiser
from dpm_solver_v3.ems_tools.estimate.job import EstimateError
from dpm_solver_v3.ems_tools.file.contents import EMSFile
from dpm_solver_v3.ems_tools.file.reader import load_ems_file
from dpm_solver_v3.ems_tools.file.rows import EMSMeta
from dpm_solver_v3.pipelines.replay import PipelineDenoiser, Replay, inputs_of
from dpm_solver_v3.sampler import Space, sample_dpm_solver_v3

STATS = Path(__file__).resolve().parents[2] / "stats" / "embedded-emoji.ems.safetensors"
PROMPTS = ("a b c", "d")


def start(replay: Replay, samples: int = 2) -> Tensor:
    return torch.randn(samples, *replay.native, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def channel_file(tmp_path: Path) -> Callable[[Space], Path]:
    """Statistics that differ between the four channels, so that channels in the wrong place would be seen."""

    def write(space: Space) -> Path:
        lambdas = torch.linspace(-6.9, 4.0, 41, dtype=torch.float64)
        phase = lambdas[:, None] + torch.arange(4.0)
        sigma_max = 999.0 if space is Space.FLOW else 14.6146
        meta = EMSMeta(space=space.value, sigma_min=0.03, sigma_max=sigma_max, model={"name": "random"})
        values: dict[str, Any] = {"l": torch.sigmoid(phase)[None], "s": 0.1 * phase.cos()[None], "b": 0.05 * phase.sin()[None]}
        path = tmp_path / "random.ems.safetensors"
        EMSFile(lambdas=lambdas, guidance=torch.tensor([3.0], dtype=torch.float64), meta=meta, **values).save(path)
        return path

    return write


@pytest.mark.parametrize("name", ["SD", "SDXL", "SD3", "Flux"])
def test_equals_the_librarys_sampler(
    name: str, make_pipeline: Callable[..., Any], channel_file: Callable[[Space], Path]
) -> None:
    pipe = make_pipeline(name)
    replay = Replay(pipe, inputs_of(pipe, PROMPTS, 16))
    before = pipe.scheduler
    file = channel_file(replay.noise.space)
    noise, space = start(replay), replay.noise.space
    assert replay.shape[0] == 4 and replay.native == ((16, 16) if name == "Flux" else (4, 8, 8))
    for options in ({}, {"ems": str(file), "guidance_scale": 3.0}):
        scheduler = DPMSolverV3Scheduler.from_config(pipe.scheduler.config, **options)
        found = replay.run(scheduler, noise, 3.0, 5, [0, 1])
        levels = scheduler._levels
        x = replay.layout.channels_first(noise) / replay.noise.scale(levels[0].item())
        ems = load_ems_file(file).at(3.0) if options else None
        model = PipelineDenoiser(replay, 3.0, (0, 1))
        given: dict[str, Any] = {"ems": ems, "guidance": 3.0 if options else None}
        expected = sample_dpm_solver_v3(model, x, levels, space=space, disable=True, **given)
        size = expected.abs().max()
        assert (found - replay.layout.as_given(expected)).abs().max() < 1e-6 * size
    assert pipe.scheduler is before and "encode_prompt" not in pipe.__dict__


@pytest.mark.parametrize(("guidance", "steps"), [(1.0, 9), (4.0, 5)])
def test_the_embedded_model_as_a_pipeline(guidance: float, steps: int) -> None:
    """Against the library's own denoiser of the same network; with fitted steps, and with the file's settings."""
    pipe = EmbeddedPipeline.load()
    pipe.unet.double()
    pipe.set_progress_bar_config(disable=True)
    labels, file = [1, 3], load_ems_file(STATS)
    denoiser = load_denoiser(torch.tensor(labels), guidance, dtype=torch.float64)
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scheduler = pipe.scheduler = DPMSolverV3Scheduler.from_config(
        pipe.scheduler.config, ems=str(STATS), guidance_scale=guidance
    )
    options = {"class_labels": labels, "guidance_scale": guidance, "num_inference_steps": steps}
    found = pipe(**options, latents=noise, output_type="latent").images
    levels, fitted = scheduler._levels, file.covers_fit(steps, guidance)
    y = noise * (levels[0] if fitted else (1 + levels[0] ** 2).sqrt())
    expected = sample_dpm_solver_v3(denoiser, y, levels, ems=file.at(guidance), guidance=guidance, disable=True)
    assert fitted == (steps == 5) and (found - expected).abs().max() < 1e-5
    options["num_inference_steps"] = 1
    assert pipe(**options).images[0].size == (32, 32)


def test_image_to_image_begins_inside_the_schedule(make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline("SD")
    pipe.scheduler = DPMSolverV3Scheduler.from_config(pipe.scheduler.config)
    image_to_image = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    image_to_image.set_progress_bar_config(disable=True)
    given = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    draw = torch.Generator().manual_seed(6)
    found = image_to_image(
        "a", image=given, strength=0.5, num_inference_steps=8, guidance_scale=3.0, generator=draw, output_type="latent"
    ).images
    scheduler = image_to_image.scheduler
    levels = scheduler._levels[4:]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    replay = Replay(pipe, inputs_of(pipe, ("a",)))
    y = given + levels[0] * noise
    expected = sample_dpm_solver_v3(PipelineDenoiser(replay, 3.0), y, levels, disable=True)
    assert scheduler.begin_index == 4 and (found - expected).abs().max() < 1e-6 * expected.abs().max()


def test_inpainting_keeps_what_is_known(make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline("SD")
    pipe.scheduler = DPMSolverV3Scheduler.from_config(pipe.scheduler.config)
    inpaint = diffusers.StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    inpaint.set_progress_bar_config(disable=True)
    with torch.no_grad():  # an encoder without noise of its own
        pipe.vae.quant_conv.weight[4:] = 0
        pipe.vae.quant_conv.bias[4:] = -30
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1  # to be painted
    options = {"prompt": "a", "height": 16, "width": 16, "num_inference_steps": 6, "output_type": "latent"}
    image = torch.zeros(1, 3, 16, 16)
    ends = [
        inpaint(image=image, mask_image=mask, generator=torch.Generator().manual_seed(k), **options).images for k in (0, 0, 1)
    ]
    assert torch.isfinite(ends[0]).all() and torch.equal(ends[0], ends[1])  # deterministic
    assert torch.allclose(ends[0][..., :4], ends[2][..., :4], atol=1e-5)  # the known half, whatever the noise
    assert not torch.allclose(ends[0][..., 4:], ends[2][..., 4:])


def test_half_precision_and_batches(make_pipeline: Callable[..., Any]) -> None:
    """A batch gives what its pictures give alone; bfloat16 pipelines get bfloat16 latents."""
    pipe = make_pipeline("SDXL")
    pipe.scheduler = DPMSolverV3Scheduler.from_config(pipe.scheduler.config)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"num_inference_steps": 4, "output_type": "latent"}
    both = pipe(list(PROMPTS), latents=noise, **options).images
    alone = pipe(PROMPTS[1], latents=noise[1:], **options).images
    assert (both[1:] - alone).abs().max() < 1e-9 * alone.abs().max()
    low = make_pipeline("SDXL", torch.bfloat16)
    low.scheduler = pipe.scheduler
    assert low(list(PROMPTS), latents=noise.bfloat16(), **options).images.dtype == torch.bfloat16


def test_a_saved_pipeline_finds_the_scheduler_and_its_file(tmp_path: Path, make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline("SD", torch.float32)
    pipe.scheduler = DPMSolverV3Scheduler.from_config(pipe.scheduler.config, ems=str(STATS), guidance_scale=2.0)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is DPMSolverV3Scheduler and loaded.scheduler.config.guidance_scale == 2.0
    assert loaded.scheduler.config.ems == str(tmp_path / "scheduler" / "scheduler.ems.safetensors")


def test_statistics_of_another_model_are_refused_in_words(
    make_pipeline: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Four channels here, three in the file: sampled without it, as in the other hosts, and the log says so."""
    pipe = make_pipeline("SD", torch.float32)
    plain = DPMSolverV3Scheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True, guidance_scale=2.0)
    other = DPMSolverV3Scheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True, ems=str(STATS), guidance_scale=2.0)
    diffusers.utils.logging.enable_propagation()
    ends = []
    for pipe.scheduler in (plain, other):
        draw = torch.Generator().manual_seed(0)
        ends.append(pipe("a", num_inference_steps=3, generator=draw, guidance_scale=2.0, output_type="latent").images)
    diffusers.utils.logging.disable_propagation()
    assert torch.equal(*ends)
    assert "have 3 channels" in caplog.text


def test_replay_encodes_prompts_once(make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline("SD")
    replay = Replay(pipe, inputs_of(pipe, PROMPTS))
    calls = []
    pipe.text_encoder.register_forward_pre_hook(lambda *args: calls.append(1))
    model, x = PipelineDenoiser(replay, 3.0).for_samples([4, 5]), torch.zeros(2, 4, 8, 8)
    first = model(x, torch.full((2,), 2.0))
    calls.clear()
    again = PipelineDenoiser(replay, 3.0).for_samples([4, 5])(x, torch.full((2,), 2.0))
    assert not calls and torch.equal(first, again)
    assert not torch.allclose(first[0], first[1])  # two prompts
    swapped = PipelineDenoiser(replay, 3.0).for_samples([5, 4])(x, torch.full((2,), 2.0))
    assert torch.allclose(swapped.flip(0), first, atol=1e-6)


def test_pipelines_that_cannot_be_asked_are_refused(make_pipeline: Callable[..., Any]) -> None:
    pipe = make_pipeline("SD")
    with pytest.raises(EstimateError, match="no argument num_frames"):
        inputs_of(pipe, PROMPTS, None, {"num_frames": 3})

    class NoLatents:
        def __call__(self, prompt: str) -> None: ...

    with pytest.raises(EstimateError, match="takes no latents"):
        inputs_of(cast("Any", NoLatents()), PROMPTS)
