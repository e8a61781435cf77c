"""A checkpoint of random weights that WebUIs take for Stable Diffusion 1.5: `python make_checkpoint.py FILE [SEED]`.

Text encoder and VAE have the published sizes (hosts build them from a fixed configuration); the UNet, whose configuration hosts
read off the weights, has one resolution instead of four, so that a 64 x 64 picture takes a fraction of a second on a CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
WIDTH, CONTEXT, TIME = 320, 768, 1280


def _layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": shape, **({f"{name}.bias": shape[:1]} if bias else {})}


def _unet_block(name: str, inputs: int) -> Shapes:
    shapes = {**_layer(f"{name}.in_layers.0", inputs), **_layer(f"{name}.in_layers.2", WIDTH, inputs, 3, 3)}
    shapes |= {**_layer(f"{name}.emb_layers.1", WIDTH, TIME), **_layer(f"{name}.out_layers.0", WIDTH)}
    shapes |= _layer(f"{name}.out_layers.3", WIDTH, WIDTH, 3, 3)
    return shapes | (_layer(f"{name}.skip_connection", WIDTH, inputs, 1, 1) if inputs != WIDTH else {})


def _transformer(name: str) -> Shapes:
    block = f"{name}.transformer_blocks.0"
    shapes = {**_layer(f"{name}.norm", WIDTH), **_layer(f"{name}.proj_in", WIDTH, WIDTH, 1, 1)}
    for attention, context in (("attn1", WIDTH), ("attn2", CONTEXT)):
        shapes |= _layer(f"{block}.{attention}.to_q", WIDTH, WIDTH, bias=False)
        for part in ("to_k", "to_v"):
            shapes |= _layer(f"{block}.{attention}.{part}", WIDTH, context, bias=False)
        shapes |= _layer(f"{block}.{attention}.to_out.0", WIDTH, WIDTH)
    shapes |= {**_layer(f"{block}.ff.net.0.proj", 8 * WIDTH, WIDTH), **_layer(f"{block}.ff.net.2", WIDTH, 4 * WIDTH)}
    for k in (1, 2, 3):
        shapes |= _layer(f"{block}.norm{k}", WIDTH)
    return shapes | _layer(f"{name}.proj_out", WIDTH, WIDTH, 1, 1)


def unet() -> Shapes:
    """One block down, the middle, two blocks up."""
    shapes = {**_layer("time_embed.0", TIME, WIDTH), **_layer("time_embed.2", TIME, TIME)}
    shapes |= _layer("input_blocks.0.0", WIDTH, 4, 3, 3)
    shapes |= {**_unet_block("input_blocks.1.0", WIDTH), **_transformer("input_blocks.1.1")}
    shapes |= {**_unet_block("middle_block.0", WIDTH), **_transformer("middle_block.1"), **_unet_block("middle_block.2", WIDTH)}
    for k in (0, 1):
        shapes |= {**_unet_block(f"output_blocks.{k}.0", 2 * WIDTH), **_transformer(f"output_blocks.{k}.1")}
    return shapes | {**_layer("out.0", WIDTH), **_layer("out.2", 4, WIDTH, 3, 3)}


def _vae_block(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = {**_layer(f"{name}.norm1", inputs), **_layer(f"{name}.conv1", outputs, inputs, 3, 3)}
    shapes |= {**_layer(f"{name}.norm2", outputs), **_layer(f"{name}.conv2", outputs, outputs, 3, 3)}
    return shapes | (_layer(f"{name}.nin_shortcut", outputs, inputs, 1, 1) if inputs != outputs else {})


def _vae_middle(name: str) -> Shapes:
    shapes = {**_vae_block(f"{name}.block_1", 512, 512), **_vae_block(f"{name}.block_2", 512, 512)}
    for part in ("q", "k", "v", "proj_out"):
        shapes |= _layer(f"{name}.attn_1.{part}", 512, 512, 1, 1)
    return shapes | _layer(f"{name}.attn_1.norm", 512)


def vae() -> Shapes:
    """Encoder and decoder at 128, 256, 512, 512 channels."""
    shapes = {**_layer("encoder.conv_in", 128, 3, 3, 3), **_vae_middle("encoder.mid"), **_vae_middle("decoder.mid")}
    width = 128
    for level, after in enumerate((128, 256, 512, 512)):
        for k in range(2):
            shapes |= _vae_block(f"encoder.down.{level}.block.{k}", width, after)
            width = after
        if level < 3:
            shapes |= _layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    shapes |= {**_layer("encoder.norm_out", 512), **_layer("encoder.conv_out", 8, 512, 3, 3)}
    shapes |= _layer("decoder.conv_in", 512, 4, 3, 3)
    for level, after in ((3, 512), (2, 512), (1, 256), (0, 128)):
        for k in range(3):
            shapes |= _vae_block(f"decoder.up.{level}.block.{k}", width, after)
            width = after
        if level > 0:
            shapes |= _layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    shapes |= {**_layer("decoder.norm_out", 128), **_layer("decoder.conv_out", 3, 128, 3, 3)}
    return shapes | {**_layer("quant_conv", 8, 8, 1, 1), **_layer("post_quant_conv", 4, 4, 1, 1)}


def text_encoder() -> Shapes:
    """CLIP ViT-L/14's text model."""
    shapes: Shapes = {"embeddings.token_embedding.weight": (49408, 768), "embeddings.position_embedding.weight": (77, 768)}
    for k in range(12):
        name = f"encoder.layers.{k}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _layer(f"{name}.self_attn.{part}", 768, 768)
        shapes |= {**_layer(f"{name}.layer_norm1", 768), **_layer(f"{name}.layer_norm2", 768)}
        shapes |= {**_layer(f"{name}.mlp.fc1", 3072, 768), **_layer(f"{name}.mlp.fc2", 768, 3072)}
    return shapes | _layer("final_layer_norm", 768)


def make(path: Path, seed: int = 0) -> None:
    """Write the checkpoint: half precision, about 460 MB."""
    parts = {
        "model.diffusion_model": unet(),
        "first_stage_model": vae(),
        "cond_stage_model.transformer.text_model": text_encoder(),
    }
    draw = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for prefix, shapes in parts.items():
        for name, shape in shapes.items():
            if name == "final_layer_norm.bias":  # hosts divide by the mean of what CLIP returns
                value = torch.full(shape, 0.1)
            elif len(shape) == 1:
                value = torch.full(shape, float(name.endswith("weight")))
            else:
                value = torch.randn(shape, generator=draw) / torch.tensor(shape[1:]).prod().sqrt()
            state[f"{prefix}.{name}"] = value.half()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    state["alphas_cumprod"] = (1 - betas).cumprod(0).float()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"format": "pt"})


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
