"""Stable Diffusion 1.x, 2.x and XL, diffusion models with a U-Net."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from progrpo.diffusion.levels import Levels, between_diffusion_levels, diffusion_levels
from progrpo.diffusion.prediction import PREDICTIONS
from progrpo.policies.family import GRIDS, ModelFamily, require_text_encoder, unused_settings
from progrpo.types import Condition


class StableDiffusion(ModelFamily):
    """A `StableDiffusionPipeline`. A LoRA adapts attention and feed-forward of the U-Net's transformer blocks.

    It is sampled on DDIM's grid, with the noise schedule, prediction type and spacing of the pipeline's own scheduler.
    Steps end where those of diffusers' DDIM do, or (`step_ends` next) where the next ones begin.
    """

    denoiser_name: ClassVar[str] = "unet"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    plain_attention: ClassVar[type] = AttnProcessor
    channels_last: ClassVar[bool] = True
    omitted_components: ClassVar[Mapping[str, object]] = {
        **dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder")),
        "requires_safety_checker": False,
    }

    @cached_property
    def scheduler(self) -> DDIMScheduler:
        """The pipeline's noise as DDIM's scheduler. Latents are never clipped: they are no pictures."""
        # the list of what was left to a scheduler's own defaults, which diffusers would have DDIM replace by its own
        own = {name: value for name, value in self.pipeline.scheduler.config.items() if name != "_use_default_values"}
        return DDIMScheduler.from_config(own, clip_sample=False, thresholding=False)

    @property
    def prediction(self) -> str:
        prediction: str = self.scheduler.config.prediction_type
        return prediction

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
        own = pipeline.scheduler.config
        if "beta_schedule" not in own or own.prediction_type not in PREDICTIONS:
            raise ValueError(
                f"model.path: the scheduler is a {type(pipeline.scheduler).__name__}, for whose noise DDIM has no"
                " steps; use a model that says epsilon, v_prediction or sample on a schedule of betas"
            )
        if self.prediction == "epsilon" and self.scheduler.alphas_cumprod[-1] == 0:
            raise ValueError(
                "model.path: a model that predicts noise has nothing to say of pure noise; set the scheduler's"
                " rescale_betas_zero_snr to false"
            )
        if getattr(pipeline, "safety_checker", None) is not None:
            pipeline.safety_checker = None  # it judges pictures, which here rewards do; it would only take memory

    def ignored(self) -> str:
        names = (*GRIDS, "clip_sample", "thresholding")
        return unused_settings(
            self.pipeline.scheduler, names, "steps are DDIM's, on its spacing's grid, and latents are not clipped"
        )

    def levels(self, num_inference_steps: int, shift: float | None = None) -> Levels:
        if shift is not None:
            raise ValueError("sampling.shift: this is a diffusion model, whose grid has no shift; leave it empty")
        scheduler, count = self.scheduler, self.scheduler.config.num_train_timesteps
        if num_inference_steps > count:
            raise ValueError(
                f"sampling.num_inference_steps: {num_inference_steps} is more than the {count} timesteps of the model"
            )
        scheduler.set_timesteps(num_inference_steps)
        timesteps = scheduler.timesteps[:num_inference_steps]  # the rounding of some trailing grids gives one too many
        if timesteps[0] >= count:  # as many steps as timesteps, on a grid that is offset by one
            raise ValueError(
                f"sampling.num_inference_steps: {num_inference_steps} steps begin beyond the {count} timesteps of the"
                " model; use fewer"
            )
        end_T = timesteps - count // num_inference_steps  # as in DDIMScheduler.step
        alphas = scheduler.alphas_cumprod
        signal_T = torch.where(end_T >= 0, alphas[end_T.clamp(min=0)], scheduler.final_alpha_cumprod)
        levels = diffusion_levels(timesteps, alphas, signal_T[-1])
        if self.settings.step_ends == "next" or torch.equal(end_T[:-1], timesteps[1:]):
            return levels
        ends = Levels(signal_T.sqrt(), (1 - signal_T).sqrt(), end_T.clamp(min=0).to(signal_T.dtype))
        return replace(levels, ends=ends)

    def levels_between(self, levels_T1: Levels, place_B: Tensor) -> Levels:
        return between_diffusion_levels(levels_T1, place_B, self.scheduler.alphas_cumprod)

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
