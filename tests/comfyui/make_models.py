"""Writes tiny random models as core's own loaders recognise them: make_models.py COMFYUI_TREE MODELS_FOLDER.

- diffusion_models/tiny_sd3.safetensors: an SD3 of two blocks.
- checkpoints/tiny_sd15.safetensors: a Stable Diffusion 1.5 with one level in its U-Net, its text encoder, and a TAESD.
"""

import os
import sys
from pathlib import Path

tree, models = sys.argv[1], Path(sys.argv[2])
os.chdir(tree)
sys.path.insert(0, tree)
sys.argv = ["main.py", "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ops  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from comfy.sd1_clip import SDClipModel  # noqa: E402
from comfy.taesd.taesd import TAESD  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

OPERATIONS = {"device": "cpu", "dtype": torch.float32, "operations": comfy.ops.disable_weight_init}


def random_state(network: torch.nn.Module, prefix: str, scale: float) -> dict[str, torch.Tensor]:
    """Half-precision weights, ones for what scales a normalised layer."""
    state = {}
    for name, weight in network.state_dict().items():
        norm = weight.ndim == 1 and name.endswith("weight")
        value = torch.ones_like(weight) if norm else scale * torch.randn(weight.shape)
        state[prefix + name] = value.half() if weight.is_floating_point() else weight
    return state


def sd3() -> dict[str, torch.Tensor]:
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}}
    sizes = {"input_size": None, "patch_size": 2, "in_channels": 16, "depth": 2, "adm_in_channels": 2048}
    places = {"pos_embed_max_size": 32, "num_patches": 32 * 32, "qk_norm": "rms"}
    network = OpenAISignatureMMDITWrapper(**sizes, **places, context_embedder_config=embedder, **OPERATIONS)
    return random_state(network, "model.diffusion_model.", 0.1)


def sd15() -> dict[str, torch.Tensor]:
    depths = {"transformer_depth": [1], "transformer_depth_output": [1, 1], "transformer_depth_middle": 1}
    sizes = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [1]}
    attention = {"num_heads": 8, "use_spatial_transformer": True, "context_dim": 768, "legacy": False}
    network = UNetModel(**sizes, channel_mult=(1,), **attention, **depths, **OPERATIONS)
    return {
        **random_state(network, "model.diffusion_model.", 0.02),
        **random_state(SDClipModel(device="cpu", dtype=torch.float32).transformer, "cond_stage_model.transformer.", 0.02),
        **random_state(TAESD(), "first_stage_model.", 0.05),
    }


torch.manual_seed(0)
for name, make in (("diffusion_models/tiny_sd3", sd3), ("checkpoints/tiny_sd15", sd15)):
    path = models / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(make(), path)
