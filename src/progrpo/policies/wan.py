"""Wan 2.1 and 2.2, flow models of videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor

from progrpo.policies.family import GRIDS, require_text_encoder, unused_settings
from progrpo.policies.flow import FlowFamily
from progrpo.policies.geometry import Geometry
from progrpo.types import Condition

_SIZE, _FRAMES = (480, 832), 81
"""The height, width and number of frames of the model's own videos."""


class Wan(FlowFamily):
    """A `WanPipeline` from text to video (Wan, arXiv 2503.20314).

    A LoRA adapts feed-forward and attention, to the video and to the text. The model is sampled by Euler's steps, on
    the grid of its own UniPC's shift: a step of higher order has no transition density. Wan 2.2 A14B has two
    transformers by noise level, and a LoRA for each.
    """

    lora_targets: ClassVar[tuple[str, ...]] = (
        *(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"ffn.{name}" for name in ("net.0.proj", "net.2")),
    )
    vae_dtype: ClassVar[torch.dtype | None] = torch.float32

    @classmethod
    def check_index(cls, index: Mapping[str, object]) -> None:
        first, second = index.get("transformer"), index.get("transformer_2")
        both = [isinstance(entry, list | tuple) and any(entry) for entry in (first, second)]
        if index.get("expand_timesteps"):
            raise ValueError(
                "model.path: this is a Wan 2.2 with a timestep for each place (TI2V-5B); use a text-to-video Wan of one"
                " timestep, such as Wan 2.1 or Wan 2.2 A14B"
            )
        if not both[0] or both[1] != (index.get("boundary_ratio") is not None):
            raise ValueError(
                "model.path: this is a part of a Wan 2.2; load it with its transformer, its transformer_2 and its"
                " boundary_ratio"
            )

    def check(self) -> None:
        pipeline = self.pipeline
        own = pipeline.scheduler.config
        if isinstance(pipeline.scheduler, UniPCMultistepScheduler) and own.use_flow_sigmas:
            pipeline.scheduler = FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=own.num_train_timesteps, shift=own.flow_shift
            )
        super().check()
        require_text_encoder(pipeline)
        channels = self.denoiser.config.in_channels
        if channels != self.latent_channels:
            raise ValueError(
                f"model.path: the transformer takes {channels} channels where latents have {self.latent_channels}; use"
                " a model that takes text alone, not one from picture to video or for control"
            )

    def ignored(self) -> str:
        scheduler = self.pipeline.scheduler
        if isinstance(scheduler, UniPCMultistepScheduler):
            return unused_settings(scheduler, GRIDS, "steps are Euler's, on the grid of its flow_shift")
        return super().ignored()

    def geometry(self) -> Geometry:
        return Geometry(
            channels=self.latent_channels,
            pixels_per_latent=self.pipeline.vae_scale_factor_spatial,
            default_size=_SIZE,
            patch=self.denoiser.config.patch_size[-1],
            default_frames=_FRAMES,
            frames_per_latent=self.pipeline.vae_scale_factor_temporal,
        )

    def encode_text(self, text: str) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(
            prompt=[text],
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
            device=self.device,
        )
        return {"prompt_embeds": embeds}

    def tokenizer_text(self, text: str) -> str:
        written: str = prompt_clean(text)
        return written

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.text_tokens, self.denoiser.config.text_dim)}

    def denoise(self, x_BCHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        output: Tensor = self.denoiser(
            hidden_states=x_BCHW,
            timestep=timestep_B,
            encoder_hidden_states=condition.tensors["prompt_embeds"],
            return_dict=False,
        )[0]
        return output

    def unscale(self, x0_BCHW: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        mean, std = (x0_BCHW.new_tensor(v).reshape(-1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return x0_BCHW * std + mean
