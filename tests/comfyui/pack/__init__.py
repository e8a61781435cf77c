"""A node pack for the tests only: small real models of every parameterisation, built on the host's own BaseModel.

One denoiser D(y, sigma) is re-expressed for whatever `model_sampling` the host has at the moment (patches included), so the
host's result must be the library's with D itself.
"""

from __future__ import annotations

import importlib
import sys

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import torch

EMOJI_NULL = 9


def pack_module(name):
    """Of the pack as the host has loaded it: imported under its own name, the host would have it, and its nodes, twice."""
    packs = [m for m in list(sys.modules.values()) if isinstance(getattr(m, "WEB_DIRECTORY", None), str)]
    pack = next(m for m in packs if "DPMSolverV3_Sampler" in m.NODE_CLASS_MAPPINGS)
    return importlib.import_module(f"{pack.__name__}.{name}")


class Emoji(torch.nn.Module):
    """The embedded model: 3 channels, 32x32, classes 0 to 8, 9 for none."""

    channels, axes = 3, 2

    def __init__(self):
        super().__init__()
        self.net = pack_module("ems_tools.embedded").load_network()

    def forward(self, y, sigma, label):
        return self.net(y, sigma, label)


class Toy(torch.nn.Module):
    """x0 = m + (+1 or -1) + 0.2 n in every element, m = label / 10: exact for any number of axes."""

    def __init__(self, channels, axes):
        super().__init__()
        self.channels, self.axes = channels, axes
        self.weight = torch.nn.Parameter(torch.tensor([0.04]), requires_grad=False)  # something to fingerprint

    def forward(self, y, sigma, label):
        column = (-1, *(1,) * (y.ndim - 1))
        s2, mean = sigma.reshape(column) ** 2, label.reshape(column) / 10
        v = self.weight.to(y)
        centred = y - mean
        return mean + (v * centred + s2 * torch.tanh(centred / (v + s2))) / (v + s2)


class Network(torch.nn.Module):
    """What the host calls: D in the host's own parameterisation."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.dtype, self.host = denoiser, torch.float32, []

    def forward(self, x, t, context=None, control=None, transformer_options=None, **kwargs):
        sampling = self.host[0].model_sampling
        kinds = {c.__name__ for c in type(sampling).__mro__}
        label = context[:, 0, 0].round().long()
        column = (-1, *(1,) * (x.ndim - 1))
        if "CONST" in kinds:
            time = (t.float() / getattr(sampling, "multiplier", 1)).clamp(1e-4, 0.9999)
            r = time.reshape(column)
            return (x - self.denoiser(x / (1 - r), time / (1 - time), label)) / r
        sigma = sampling.sigma(t.float()).float()
        s = sigma.reshape(column)
        d = getattr(sampling, "sigma_data", 1.0)
        y = x * (s**2 + d**2).sqrt()
        denoised = self.denoiser(y, sigma, label)
        if "X0" in kinds:
            return denoised
        shared = y * d**2 / (s**2 + d**2)
        if "EDM" in kinds:
            return (denoised - shared) * (s**2 + d**2).sqrt() / (s * d)
        if "V_PREDICTION" in kinds:
            return (shared - denoised) * (s**2 + d**2).sqrt() / (s * d)
        return (y - denoised) / s


def build(denoiser, prediction):
    class Format(comfy.latent_formats.LatentFormat):
        latent_channels, latent_dimensions, scale_factor = denoiser.channels, denoiser.axes, 1.0

    class Config(comfy.supported_models_base.BASE):
        unet_config = {"disable_unet_model_creation": True}  # noqa: RUF012
        sampling_settings = {"shift": 1.0, "sigma_max": 80.0}  # noqa: RUF012
        latent_format = Format

    config = Config({})
    config.unet_config = {"disable_unet_model_creation": True}
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType[prediction])
    model.diffusion_model = Network(denoiser)
    model.diffusion_model.host.append(model)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


PREDICTIONS = ["EPS", "V_PREDICTION", "EDM", "V_PREDICTION_EDM", "FLOW", "FLUX"]


class EmojiModel:
    CATEGORY, FUNCTION, RETURN_TYPES = "test", "build", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"prediction": (PREDICTIONS,)}}

    def build(self, prediction):
        return (build(Emoji(), prediction),)


class ToyModel:
    CATEGORY, FUNCTION, RETURN_TYPES = "test", "build", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"prediction": (PREDICTIONS,), "channels": ("INT",), "axes": ("INT",)}}

    def build(self, prediction, channels, axes):
        return (build(Toy(channels, axes), prediction),)


class Clip:
    """Text to label: its length."""

    def tokenize(self, text):
        return {"text": text}

    def encode_from_tokens_scheduled(self, tokens):
        return [[torch.full((1, 1, 1), float(len(tokens["text"]) % EMOJI_NULL)), {}]]


class TextLabel:
    """A CLIP whose prompts are labels."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "build", ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def build(self):
        return (Clip(),)


class Label:
    CATEGORY, FUNCTION, RETURN_TYPES = "test", "build", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"label": ("INT", {"default": 0, "min": 0, "max": EMOJI_NULL})}}

    def build(self, label):
        return ([[torch.full((1, 1, 1), float(label)), {}]],)


class SD3Text:
    """A conditioning of the widths that an SD3 model wants."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "build", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT",)}}

    def build(self, seed):
        generator = torch.Generator().manual_seed(seed)
        pooled = torch.randn((1, 2048), generator=generator)
        return ([[torch.randn((1, 16, 4096), generator=generator), {"pooled_output": pooled}]],)


class Latent:
    CATEGORY, FUNCTION, RETURN_TYPES = "test", "build", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"shape": ("STRING", {"default": "1,3,32,32"}), "value": ("FLOAT", {"default": 0.0})}}

    def build(self, shape, value=0.0):
        return ({"samples": torch.full([int(n) for n in shape.split(",")], value)},)


class Sigmas:
    CATEGORY, FUNCTION, RETURN_TYPES = "test", "build", ("SIGMAS",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"levels": ("STRING", {})}}

    def build(self, levels):
        return (torch.tensor([float(s) for s in levels.split(",")]),)


class Number:
    """A number that another node makes: the graph alone does not say which."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "build", ("FLOAT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"half": ("FLOAT", {"default": 2.0, "step": 0.01})}}

    def build(self, half):
        return (2 * half,)


class Nested:
    """Two latents in one, as video with sound has them."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "build", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"first": ("STRING", {}), "second": ("STRING", {})}}

    def build(self, first, second):
        from comfy.nested_tensor import NestedTensor

        return ({"samples": NestedTensor([torch.zeros([int(n) for n in part.split(",")]) for part in (first, second)])},)


class Pixels:
    """A VAE for 3-channel latents that are pixels in [-1, 1] already."""

    def decode(self, x):
        return (x.movedim(1, -1) / 2 + 0.5).clamp(0, 1)


class PixelVAE:
    CATEGORY, FUNCTION, RETURN_TYPES = "test", "build", ("VAE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def build(self):
        return (Pixels(),)


class Slow:
    """A MODEL that takes its time: for cancelling and killing."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "build", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "seconds": ("FLOAT", {"default": 0.01, "step": 0.001})}}

    def build(self, model, seconds):
        import time

        clone = model.clone()

        def wrapper(apply, arguments):
            time.sleep(seconds)
            print(f"evaluated {len(arguments['input'])} rows", flush=True)
            return apply(arguments["input"], arguments["timestep"], **arguments["c"])

        clone.set_model_unet_function_wrapper(wrapper)
        return (clone,)


class Memory:
    """A MODEL that runs out of memory above a number of rows."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "build", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "rows": ("INT", {"default": 2})}}

    def build(self, model, rows):
        clone = model.clone()

        def wrapper(apply, arguments):
            if len(arguments["input"]) > rows:
                raise comfy.model_management.OOM_EXCEPTION("a test's")
            return apply(arguments["input"], arguments["timestep"], **arguments["c"])

        clone.set_model_unet_function_wrapper(wrapper)
        return (clone,)


NODE_CLASS_MAPPINGS = {
    f"Test_{c.__name__}": c
    for c in (EmojiModel, ToyModel, TextLabel, Label, SD3Text, Latent, Nested, Number, Sigmas, PixelVAE, Slow, Memory)
}
