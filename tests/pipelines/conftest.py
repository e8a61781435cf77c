"""Real pipelines of diffusers with random weights, as small as they come. Prompts are letters: the tokenizers know no more."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""Stable Diffusion's."""
WIDTH = 8
"""Of the text encoders."""


def tokenizer_in(folder: Path) -> Any:
    """A CLIP tokenizer whose vocabulary is letters."""
    transformers = pytest.importorskip("transformers")
    letters = list(string.ascii_lowercase)
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def text_encoder(projection: bool) -> Any:
    """A CLIP text encoder of one layer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def autoencoder(channels: int = 4) -> Any:
    """An autoencoder that halves the size once."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=channels, norm_num_groups=4, sample_size=16, shift_factor=0.1, **blocks
    )


def unet(**more: Any) -> Any:
    """A U-Net with cross-attention."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        **{"cross_attention_dim": WIDTH, **more},
    )


def stable_diffusion(folder: Path) -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    return StableDiffusionPipeline(
        autoencoder(), text_encoder(False), tokenizer_in(folder), unet(), scheduler, None, None, requires_safety_checker=False
    )


def stable_diffusion_xl(folder: Path) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    times = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    times["projection_class_embeddings_input_dim"] = 6 * 4 + WIDTH
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    tokenizer = tokenizer_in(folder)
    encoders = text_encoder(False), text_encoder(True), tokenizer, tokenizer
    return StableDiffusionXLPipeline(autoencoder(), *encoders, unet(cross_attention_dim=2 * WIDTH, **times), scheduler)


def stable_diffusion_3(folder: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
    )
    encoders = text_encoder(True), tokenizer_in(folder), text_encoder(True), tokenizer_in(folder), None, None
    return StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(), *encoders)


def flux(folder: Path) -> Any:
    """Flux with the prompt's embeddings handed in, as its second text encoder is a T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )

    class FluxPipelineWithoutText(FluxPipeline):
        """The same embeddings for every prompt."""

        def encode_prompt(self, prompt: Any = None, **options: Any) -> Any:
            n = len(prompt) if isinstance(prompt, list) else 1
            draw = torch.Generator().manual_seed(2)
            of_tokens, of_all = torch.randn(1, 5, WIDTH, generator=draw), torch.randn(1, WIDTH, generator=draw)
            dtype = self.transformer.dtype
            return of_tokens.repeat(n, 1, 1).to(dtype), of_all.repeat(n, 1).to(dtype), torch.zeros(5, 3)

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64)
    return FluxPipelineWithoutText(scheduler, autoencoder(), None, None, None, None, transformer)


MAKERS = {"SD": stable_diffusion, "SDXL": stable_diffusion_xl, "SD3": stable_diffusion_3, "Flux": flux}


@pytest.fixture(scope="session")
def make_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """make_pipeline(name): a new pipeline of `MAKERS` with the same random weights every time, in float64 unless told."""

    def make(name: str, dtype: torch.dtype = torch.float64) -> Any:
        torch.manual_seed(0)
        pipe = MAKERS[name](tmp_path_factory.mktemp(name))
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(torch.device("cpu"), dtype)

    return make
