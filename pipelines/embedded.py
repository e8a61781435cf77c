"""The embedded model as a pipeline of diffusers: something to try the scheduler on without a download.

pipe = EmbeddedPipeline.load()
image = pipe(class_labels=[3], guidance_scale=4.0, num_inference_steps=8).images[0]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, ImagePipelineOutput
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..ems_tools.embedded import NULL_CLASS, SHAPE, VPHost, load_network

__all__ = ["EmbeddedModel", "EmbeddedPipeline"]


class EmbeddedModel(ModelMixin, ConfigMixin):
    """The embedded network as one that predicts epsilon on Stable Diffusion's noise schedule, by classes."""

    @register_to_config
    def __init__(self, sample_size: int = SHAPE[-1], in_channels: int = SHAPE[0], num_class_embeds: int = NULL_CLASS) -> None:
        super().__init__()
        self.network = load_network()

    def forward(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor) -> Tensor:
        """Epsilon [B, 3, 32, 32] of x = alpha y at a time step in 0 .. 999 (any real between), for class indices [B]."""
        host = VPHost(lambda y, sigma: self.network(y, sigma, class_labels))
        return host.apply_model(sample, torch.as_tensor(timestep, device=sample.device).expand(len(sample)))


class EmbeddedPipeline(DiffusionPipeline):
    """From class labels to 32x32 pictures, with classifier-free guidance as Stable Diffusion's pipelines have it."""

    def __init__(self, unet: EmbeddedModel, scheduler: object) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @classmethod
    def load(cls) -> EmbeddedPipeline:
        """With the weights that come with this project, and DPM-Solver++ for a scheduler."""
        scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        return cls(EmbeddedModel().eval().requires_grad_(False), scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] = (0,),
        guidance_scale: float = 4.0,
        num_inference_steps: int = 10,
        latents: Tensor | None = None,
        generator: object = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> object:
        """Pictures of these classes (see `ems_tools.embedded.CLASSES`), one each.

        Args:
            class_labels: [B] class indices.
            guidance_scale: at 1 the model is called without guidance.
            num_inference_steps: model calls.
            latents: [B, 3, 32, 32] unit noise to begin with.
            generator: draws it otherwise.
            output_type: "pil", "np", "pt" or, for the latents themselves, in -1 .. 1, "latent".
            return_dict: False for a tuple.
        """
        device, dtype = self._execution_device, self.unet.dtype
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        labels = torch.as_tensor(class_labels, device=device)
        if latents is None:
            latents = randn_tensor((len(labels), *SHAPE), generator=generator, device=device, dtype=dtype)
        latents = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        both = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])
        for t in self.progress_bar(self.scheduler.timesteps):
            x = self.scheduler.scale_model_input(latents, t)
            if guidance_scale > 1:
                cond, null = self.unet(torch.cat([x, x]), t, both).chunk(2)
                output = null + guidance_scale * (cond - null)
            else:
                output = self.unet(x, t, labels)
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        images = latents if output_type == "latent" else self._pictures(latents, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @staticmethod
    def _pictures(latents: Tensor, output_type: str) -> object:
        pictures = (latents.float() / 2 + 0.5).clamp(0, 1).cpu()
        if output_type == "pt":
            return pictures
        array = pictures.permute(0, 2, 3, 1).numpy()
        return array if output_type == "np" else DiffusionPipeline.numpy_to_pil(array)
