"""Stable Diffusion 1.x, 2.x and XL, diffusion models with a U-Net."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from progrpo.policies.ddim import DiffusionFamily
from progrpo.policies.family import require_text_encoder
from progrpo.types import Condition


class StableDiffusion(DiffusionFamily):
    """A `StableDiffusionPipeline`. A LoRA adapts attention and feed-forward of the U-Net's transformer blocks."""

    denoiser_name: ClassVar[str] = "unet"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    plain_attention: ClassVar[type] = AttnProcessor
    channels_last: ClassVar[bool] = True
    omitted_components: ClassVar[Mapping[str, object]] = {
        **dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder")),
        "requires_safety_checker": False,
    }

    def check(self) -> None:
        pipeline = self.pipeline
        require_text_encoder(pipeline)
        if pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
            raise ValueError(
                f"model.path: the U-Net takes {pipeline.unet.config.in_channels} channels where latents have"
                f" {pipeline.vae.config.latent_channels}; use a model that takes text alone, not one for inpainting"
            )
        if pipeline.unet.config.time_cond_proj_dim is not None:
            raise ValueError(
                "model.path: the guidance scale is an input of the U-Net, as of a latent consistency model's, which is"
                " not supported here; use the model that it was distilled from"
            )
        if pipeline.unet.config.encoder_hid_dim_type is not None:
            raise ValueError(
                "model.path: the U-Net is shown a picture as well, by an IP-Adapter; take it off with"
                " unload_ip_adapter()"
            )
        self.check_noise()
        if getattr(pipeline, "safety_checker", None) is not None:
            pipeline.safety_checker = None  # it judges pictures, which here rewards do; it would only take memory

    def encode_text(self, text: str) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(
            prompt=[text], device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.pipeline.text_encoder.config.max_position_embeddings
        return {"prompt_embeds": (tokens, self.denoiser.config.cross_attention_dim)}

    def denoise(self, x_BCHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        output: Tensor = self.denoiser(
            x_BCHW,
            timestep_B,
            condition.tensors["prompt_embeds"],
            return_dict=False,
            **self.added_conditions(condition),
        )[0]
        return output

    def added_conditions(self, condition: Condition) -> dict[str, dict[str, Tensor]]:
        """The U-Net's keyword arguments beside the text."""
        return {}

    def unscale(self, x0_BCHW: Tensor) -> Tensor:
        latents: Tensor = x0_BCHW / self.pipeline.vae.config.scaling_factor
        return latents


class StableDiffusionXL(StableDiffusion):
    """A `StableDiffusionXLPipeline`: pooled embeddings, and the picture's size, uncropped, as time ids."""

    omitted_components: ClassVar[Mapping[str, object]] = dict.fromkeys(("feature_extractor", "image_encoder"))

    @property
    def loaded_vae_dtype(self) -> torch.dtype:
        overflows = self.dtype == torch.float16 and self.pipeline.vae.config.force_upcast
        return torch.float32 if overflows else self.dtype

    def check(self) -> None:
        super().check()
        if self.pipeline.text_encoder_2 is None:
            raise ValueError("model.path: the pipeline lacks its second text encoder; load it with the pipeline")

    def encode_text(self, text: str) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=[text], device=self.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        pooled: int = self.pipeline.text_encoder_2.config.projection_dim
        return super().condition_shapes() | {"pooled_prompt_embeds": (pooled,)}

    @property
    def zero_embeddings_for_no_prompt(self) -> bool:
        return bool(self.pipeline.config.force_zeros_for_empty_prompt)

    def added_conditions(self, condition: Condition) -> dict[str, dict[str, Tensor]]:
        pooled = condition.tensors["pooled_prompt_embeds"]
        # original size, crop, target size
        time_ids = pooled.new_tensor([*self.size, 0, 0, *self.size]).expand(len(pooled), -1)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}

    def unscale(self, x0_BCHW: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return super().unscale(x0_BCHW)
        mean, std = (x0_BCHW.new_tensor(v).reshape(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return super().unscale(x0_BCHW * std) + mean
