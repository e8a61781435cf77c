"""Writes a random SD3 of two blocks, as core's loaders recognise it: make_sd3.py COMFYUI_TREE FILE."""

import os
import sys

tree, path = sys.argv[1:3]
os.chdir(tree)
sys.path.insert(0, tree)
sys.argv = ["main.py", "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ops  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

torch.manual_seed(0)
network = OpenAISignatureMMDITWrapper(
    input_size=None,
    patch_size=2,
    in_channels=16,
    depth=2,
    adm_in_channels=2048,
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}},
    pos_embed_max_size=32,
    num_patches=32 * 32,
    qk_norm="rms",
    device="cpu",
    dtype=torch.float32,
    operations=comfy.ops.disable_weight_init,
)
with torch.no_grad():
    for name, weight in network.named_parameters():
        weight.copy_(torch.ones_like(weight) if "ln_" in name else 0.1 * torch.randn_like(weight))
save_file({f"model.diffusion_model.{k}": v.contiguous() for k, v in network.state_dict().items()}, path)
