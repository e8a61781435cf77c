"""An extension for the WebUI under test: a tiny effort, the library's plain sampler as "Library", and a record of each run.

The record of the latest run lies at <data>/record.pt: what the denoiser was called with and returned, the rows that the network
evaluated, the latents, the images.
"""

import dataclasses
from typing import Any

import gradio
import torch
from modules import script_callbacks, scripts, sd_samplers, sd_samplers_common, sd_samplers_kdiffusion
from modules.paths import data_path

from dpm_solver_v3.ems_tools.compute import EFFORTS
from dpm_solver_v3.sampler import Settings, sample_dpm_solver_v3
from dpm_solver_v3.webui.find import library

FEW: dict[str, Any] = {
    "samples": 4,
    "intervals": 10,
    "noises": 2,
    "steps": (5,),
    "schedules": 1,
    "strengths": (0.5,),
    "reference_steps": 12,
}
FIT = dataclasses.replace(EFFORTS["quick"].fit, steps=(5,), noises=2, held_out=2, search=0)
EFFORTS["tiny"] = dataclasses.replace(EFFORTS["quick"], combinations=(Settings(order=2, corrector="pseudo"),), fit=FIT, **FEW)
RECORD: dict[str, Any] = {"calls": []}


def plain(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """With the computed file, at the pass's scale: no host layer of ours between."""
    file = library().get("tiny.ems.safetensors").file
    scale = extra_args["cond_scale"]
    return sample_dpm_solver_v3(model, x, sigmas, extra_args, callback, disable, ems=file.at(scale), guidance=scale)


def construct(model):
    return sd_samplers_kdiffusion.KDiffusionSampler(plain, model)


if not any(s.name == "Library" for s in sd_samplers.all_samplers):
    entry = sd_samplers_common.SamplerData("Library", construct, [], {})
    sd_samplers.all_samplers.append(entry)
    sd_samplers.all_samplers_map["Library"] = entry
    sd_samplers.set_samplers()


def called(params):
    RECORD["calls"].append([params.x.detach().cpu().clone(), params.sigma.detach().cpu().clone()])


def returned(params):
    RECORD["calls"][-1].append(params.x.detach().cpu().clone())


script_callbacks.on_cfg_denoiser(called)
script_callbacks.on_cfg_after_cfg(returned)


class Recorder(scripts.Script):
    def title(self):
        return "DPM-Solver-v3 recorder"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        return [gradio.Checkbox(False, visible=False)]

    def before_process(self, p, *args):
        RECORD["calls"].clear()
        RECORD["rows"] = 0

    def process_batch(self, p, *args, **kwargs):
        unet = getattr(getattr(p.sd_model, "forge_objects", None), "unet", None)
        network = p.sd_model.model.diffusion_model if unet is None else unet.model.diffusion_model
        if not getattr(network, "is_counted", False):
            network.is_counted = True
            network.register_forward_hook(lambda module, args, out: RECORD.update(rows=RECORD["rows"] + len(out)))

    def post_sample(self, p, ps, *args):
        RECORD["latents"] = torch.stack([s.detach().cpu() for s in ps.samples])

    def postprocess_batch(self, p, *args, images, **kwargs):
        RECORD["images"] = images.detach().float().cpu().clone()
        torch.save(RECORD, f"{data_path}/record.pt")
