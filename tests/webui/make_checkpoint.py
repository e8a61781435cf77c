"""A checkpoint of random weights that WebUIs take for a published one: `make_checkpoint.py FILE [SEED] [sd15|sdxl|flux]`.

Text encoder and VAE have the published sizes (hosts build them from a fixed configuration); the UNet of Stable Diffusion 1.5,
whose configuration hosts read off the weights, has one resolution instead of four, so that a 64 x 64 picture takes a fraction
of a second on a CPU. SDXL and Flux need the sizes below in the host too: `pack/scripts/small.py` puts them there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
WIDTH, CONTEXT, TIME = 320, 768, 1280
FLUX, T5 = 256, 64


def _layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": shape, **({f"{name}.bias": shape[:1]} if bias else {})}


def _unet_block(name: str, inputs: int = WIDTH) -> Shapes:
    shapes = {**_layer(f"{name}.in_layers.0", inputs), **_layer(f"{name}.in_layers.2", WIDTH, inputs, 3, 3)}
    shapes |= {**_layer(f"{name}.emb_layers.1", WIDTH, TIME), **_layer(f"{name}.out_layers.0", WIDTH)}
    shapes |= _layer(f"{name}.out_layers.3", WIDTH, WIDTH, 3, 3)
    return shapes | (_layer(f"{name}.skip_connection", WIDTH, inputs, 1, 1) if inputs != WIDTH else {})


def _transformer(name: str, text: int = CONTEXT, linear: bool = False) -> Shapes:
    block, square = f"{name}.transformer_blocks.0", (WIDTH, WIDTH) if linear else (WIDTH, WIDTH, 1, 1)
    shapes = {**_layer(f"{name}.norm", WIDTH), **_layer(f"{name}.proj_in", *square)}
    for attention, context in (("attn1", WIDTH), ("attn2", text)):
        shapes |= _layer(f"{block}.{attention}.to_q", WIDTH, WIDTH, bias=False)
        for part in ("to_k", "to_v"):
            shapes |= _layer(f"{block}.{attention}.{part}", WIDTH, context, bias=False)
        shapes |= _layer(f"{block}.{attention}.to_out.0", WIDTH, WIDTH)
    shapes |= {**_layer(f"{block}.ff.net.0.proj", 8 * WIDTH, WIDTH), **_layer(f"{block}.ff.net.2", WIDTH, 4 * WIDTH)}
    for k in (1, 2, 3):
        shapes |= _layer(f"{block}.norm{k}", WIDTH)
    return shapes | _layer(f"{name}.proj_out", *square)


def unet() -> Shapes:
    """One block down, the middle, two blocks up."""
    shapes = {**_layer("time_embed.0", TIME, WIDTH), **_layer("time_embed.2", TIME, TIME)}
    shapes |= _layer("input_blocks.0.0", WIDTH, 4, 3, 3)
    shapes |= {**_unet_block("input_blocks.1.0", WIDTH), **_transformer("input_blocks.1.1")}
    shapes |= {**_unet_block("middle_block.0", WIDTH), **_transformer("middle_block.1"), **_unet_block("middle_block.2", WIDTH)}
    for k in (0, 1):
        shapes |= {**_unet_block(f"output_blocks.{k}.0", 2 * WIDTH), **_transformer(f"output_blocks.{k}.1")}
    return shapes | {**_layer("out.0", WIDTH), **_layer("out.2", 4, WIDTH, 3, 3)}


def unet_xl() -> Shapes:
    """As SDXL's, with two resolutions: attention in the lower one only, in linear layers, and a vector of sizes and text."""
    shapes = {**_layer("time_embed.0", TIME, WIDTH), **_layer("time_embed.2", TIME, TIME)}
    shapes |= {**_layer("label_emb.0.0", TIME, 2816), **_layer("label_emb.0.2", TIME, TIME)}
    shapes |= {**_layer("input_blocks.0.0", WIDTH, 4, 3, 3), **_unet_block("input_blocks.1.0")}
    shapes |= {**_layer("input_blocks.2.0.op", WIDTH, WIDTH, 3, 3), **_unet_block("input_blocks.3.0")}
    shapes |= {**_unet_block("middle_block.0"), **_unet_block("middle_block.2")}
    for k in range(4):
        shapes |= _unet_block(f"output_blocks.{k}.0", 2 * WIDTH)
    for name in ("input_blocks.3.1", "middle_block.1", "output_blocks.0.1", "output_blocks.1.1"):
        shapes |= _transformer(name, 2048, linear=True)
    shapes |= _layer("output_blocks.1.2.conv", WIDTH, WIDTH, 3, 3)
    return shapes | {**_layer("out.0", WIDTH), **_layer("out.2", 4, WIDTH, 3, 3)}


def flux() -> Shapes:
    """As Flux's transformer, guidance distilled, with one block of each kind, FLUX wide."""
    shapes = {**_layer("img_in", FLUX, 64), **_layer("txt_in", FLUX, T5)}
    for name, inputs in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        shapes |= {**_layer(f"{name}.in_layer", FLUX, inputs), **_layer(f"{name}.out_layer", FLUX, FLUX)}
    for side in ("img", "txt"):
        name = f"double_blocks.0.{side}"
        shapes |= {**_layer(f"{name}_mod.lin", 6 * FLUX, FLUX), **_layer(f"{name}_attn.qkv", 3 * FLUX, FLUX)}
        shapes |= {f"{name}_attn.norm.{part}_norm.scale": (128,) for part in ("query", "key")}
        shapes |= _layer(f"{name}_attn.proj", FLUX, FLUX)
        shapes |= {**_layer(f"{name}_mlp.0", 4 * FLUX, FLUX), **_layer(f"{name}_mlp.2", FLUX, 4 * FLUX)}
    shapes |= {f"single_blocks.0.norm.{part}_norm.scale": (128,) for part in ("query", "key")}
    shapes |= {**_layer("single_blocks.0.linear1", 7 * FLUX, FLUX), **_layer("single_blocks.0.linear2", FLUX, 5 * FLUX)}
    shapes |= _layer("single_blocks.0.modulation.lin", 3 * FLUX, FLUX)
    return shapes | {**_layer("final_layer.linear", 64, FLUX), **_layer("final_layer.adaLN_modulation.1", 2 * FLUX, FLUX)}


def _vae_block(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = {**_layer(f"{name}.norm1", inputs), **_layer(f"{name}.conv1", outputs, inputs, 3, 3)}
    shapes |= {**_layer(f"{name}.norm2", outputs), **_layer(f"{name}.conv2", outputs, outputs, 3, 3)}
    return shapes | (_layer(f"{name}.nin_shortcut", outputs, inputs, 1, 1) if inputs != outputs else {})


def _vae_middle(name: str) -> Shapes:
    shapes = {**_vae_block(f"{name}.block_1", 512, 512), **_vae_block(f"{name}.block_2", 512, 512)}
    for part in ("q", "k", "v", "proj_out"):
        shapes |= _layer(f"{name}.attn_1.{part}", 512, 512, 1, 1)
    return shapes | _layer(f"{name}.attn_1.norm", 512)


def vae(channels: int = 4) -> Shapes:
    """Encoder and decoder at 128, 256, 512, 512 channels, for latents of 4 channels, or of Flux's 16."""
    shapes = {**_layer("encoder.conv_in", 128, 3, 3, 3), **_vae_middle("encoder.mid"), **_vae_middle("decoder.mid")}
    width = 128
    for level, after in enumerate((128, 256, 512, 512)):
        for k in range(2):
            shapes |= _vae_block(f"encoder.down.{level}.block.{k}", width, after)
            width = after
        if level < 3:
            shapes |= _layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    shapes |= {**_layer("encoder.norm_out", 512), **_layer("encoder.conv_out", 2 * channels, 512, 3, 3)}
    shapes |= _layer("decoder.conv_in", 512, channels, 3, 3)
    for level, after in ((3, 512), (2, 512), (1, 256), (0, 128)):
        for k in range(3):
            shapes |= _vae_block(f"decoder.up.{level}.block.{k}", width, after)
            width = after
        if level > 0:
            shapes |= _layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    shapes |= {**_layer("decoder.norm_out", 128), **_layer("decoder.conv_out", 3, 128, 3, 3)}
    return shapes if channels > 4 else {**shapes, **_layer("quant_conv", 8, 8, 1, 1), **_layer("post_quant_conv", 4, 4, 1, 1)}


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


def second_text_encoder() -> Shapes:
    """OpenCLIP's ViT-bigG/14, two layers of it, with its own names."""
    wide = 1280
    shapes: Shapes = {"positional_embedding": (77, wide), "token_embedding.weight": (49408, wide)}
    for k in range(2):
        name = f"transformer.resblocks.{k}"
        shapes |= {f"{name}.attn.in_proj_weight": (3 * wide, wide), f"{name}.attn.in_proj_bias": (3 * wide,)}
        shapes |= {
            **_layer(f"{name}.ln_1", wide),
            **_layer(f"{name}.ln_2", wide),
            **_layer(f"{name}.attn.out_proj", wide, wide),
        }
        shapes |= {**_layer(f"{name}.mlp.c_fc", 4 * wide, wide), **_layer(f"{name}.mlp.c_proj", wide, 4 * wide)}
    return shapes | {**_layer("ln_final", wide), "text_projection": (wide, wide)}


def t5() -> Shapes:
    """T5's encoder, two blocks of it, T5 wide; with one, Forge takes its few entries for none."""
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    shapes: Shapes = {"shared.weight": (32128, T5), bias: (32, 1), "encoder.final_layer_norm.weight": (T5,)}
    for k in (0, 1):
        attention, dense = (f"encoder.block.{k}.layer.{part}" for part in (0, 1))
        for part in "qkvo":
            shapes |= _layer(f"{attention}.SelfAttention.{part}", T5, T5, bias=False)
        for part, shape in (("wi_0", (2 * T5, T5)), ("wi_1", (2 * T5, T5)), ("wo", (T5, 2 * T5))):
            shapes |= _layer(f"{dense}.DenseReluDense.{part}", *shape, bias=False)
        shapes |= {f"{part}.layer_norm.weight": (T5,) for part in (attention, dense)}
    return shapes


def parts_of(kind: str) -> dict[str, Shapes]:
    """Shapes by the prefix of their names in a checkpoint of this kind."""
    clip = "transformer.text_model"
    if kind == "sdxl":
        encoders = {f"conditioner.embedders.0.{clip}": text_encoder(), "conditioner.embedders.1.model": second_text_encoder()}
        return {"model.diffusion_model": unet_xl(), "first_stage_model": vae(), **encoders}
    if kind == "flux":
        encoders = {f"text_encoders.clip_l.{clip}": text_encoder(), "text_encoders.t5xxl.transformer": t5()}
        return {"model.diffusion_model": flux(), "vae": vae(16), **encoders}
    return {"model.diffusion_model": unet(), "first_stage_model": vae(), f"cond_stage_model.{clip}": text_encoder()}


def make(path: Path, seed: int = 0, kind: str = "sd15") -> None:
    """Write the checkpoint: half precision, about 460 MB."""
    parts = parts_of(kind)
    draw = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for prefix, shapes in parts.items():
        for name, shape in shapes.items():
            if name == "final_layer_norm.bias":  # hosts divide by the mean of what CLIP returns
                value = torch.full(shape, 0.1)
            elif len(shape) == 1:
                value = torch.full(shape, float(name.endswith(("weight", "scale"))))
            else:
                value = torch.randn(shape, generator=draw) / torch.tensor(shape[1:]).prod().sqrt()
            state[f"{prefix}.{name}"] = value.half()
    if kind != "flux":
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        state["alphas_cumprod"] = (1 - betas).cumprod(0).float()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"format": "pt"})


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, sys.argv[3] if len(sys.argv) > 3 else "sd15")
