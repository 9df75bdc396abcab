"""Wan 2.1, flow models of videos: the one file that knows their pipeline and their network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor

from progrpo.policies.base import PolicyContext
from progrpo.policies.flow import FlowPolicy
from progrpo.policies.pipeline import GRIDS, unused
from progrpo.policies.settings import ModelSettings
from progrpo.types import Condition

_SIZE, _FRAMES = (480, 832), 81
"""Of the model's own videos: height and width in pixels, and pictures."""


class WanPolicy(FlowPolicy):
    """A `WanPipeline` from text to video (Wan, arXiv 2503.20314). A LoRA adapts attention, to the video and to the text, and feed-forward.

    It is sampled by Euler's steps, on the grid of the shift that its own UniPC has: a step of several orders has no
    transition density.
    """

    lora_targets: ClassVar[tuple[str, ...]] = (
        *(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"ffn.{name}" for name in ("net.0.proj", "net.2")),
    )
    vae_dtype: ClassVar[torch.dtype | None] = torch.float32

    def __init__(
        self, pipeline: DiffusionPipeline, settings: ModelSettings, context: PolicyContext, size: tuple[int, int]
    ) -> None:
        if context.decoder_for_previews:
            raise ValueError("preview.tiny_decoder: an AutoencoderTiny decodes pictures, and this model makes videos")
        super().__init__(pipeline, settings, context, size)
        pipeline.vae.enable_slicing()  # one video at a time: a video takes a batch of pictures' memory

    @classmethod
    def check_index(cls, index: Mapping[str, Any]) -> None:
        second = any(index.get("transformer_2") or ())
        if second or index.get("boundary_ratio") is not None or index.get("expand_timesteps"):
            raise ValueError(
                "model.path: this is a Wan 2.2, of two transformers or of timesteps for each place; use a text-to-video"
                " Wan 2.1, which has one transformer and one timestep"
            )

    @classmethod
    def _check(cls, pipeline: DiffusionPipeline) -> None:
        own = pipeline.scheduler.config
        if isinstance(pipeline.scheduler, UniPCMultistepScheduler) and own.use_flow_sigmas:
            pipeline.scheduler = FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=own.num_train_timesteps, shift=own.flow_shift
            )
        super()._check(pipeline)
        if pipeline.text_encoder is None:
            raise ValueError("model.path: the pipeline lacks its text encoder; load it with the pipeline")
        takes, channels = pipeline.transformer.config.in_channels, pipeline.vae.config.z_dim
        if takes != channels:
            raise ValueError(
                f"model.path: the transformer takes {takes} channels where latents have {channels}; use a model that"
                " takes text alone, not one from picture to video or for control"
            )

    @classmethod
    def _ignored(cls, pipeline: DiffusionPipeline) -> str:
        if isinstance(pipeline.scheduler, UniPCMultistepScheduler):
            return unused(pipeline.scheduler, GRIDS, "steps are Euler's, on the grid of its flow_shift")
        return super()._ignored(pipeline)

    @classmethod
    def _vae_scale(cls, pipeline: DiffusionPipeline) -> int:
        scale: int = pipeline.vae_scale_factor_spatial
        return scale

    @classmethod
    def _patch(cls, pipeline: DiffusionPipeline) -> int:
        patch: int = pipeline.transformer.config.patch_size[-1]
        return patch

    @classmethod
    def _own_size(cls, pipeline: DiffusionPipeline) -> tuple[int, int]:
        return _SIZE

    def _latents(self, height: int, width: int) -> tuple[int, ...]:
        frames = _FRAMES if self._settings.frames is None else self._settings.frames
        together: int = self._pipeline.vae_scale_factor_temporal
        if rest := (frames - 1) % together:
            raise ValueError(
                f"model.frames: {frames} is not one more than a multiple of {together}; the nearest are {frames - rest} and"
                f" {frames - rest + together}"
            )
        return (self._pipeline.vae.config.z_dim, 1 + (frames - 1) // together, height, width)

    def _encode_text(self, text: str) -> dict[str, Tensor]:
        embeds, _ = self._pipeline.encode_prompt(
            prompt=[text],
            do_classifier_free_guidance=False,
            max_sequence_length=self._text_tokens,
            device=self.device,
        )
        return {"prompt_embeds": embeds}

    def _written(self, text: str) -> str:
        written: str = prompt_clean(text)
        return written

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self._text_tokens, self.denoiser.config.text_dim)}

    def _call(self, x_BCHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        output: Tensor = self.denoiser(
            hidden_states=x_BCHW,
            timestep=timestep_B,
            encoder_hidden_states=condition.tensors["prompt_embeds"],
            return_dict=False,
        )[0]
        return output

    def _unscaled(self, x0_BCHW: Tensor) -> Tensor:
        config = self._pipeline.vae.config
        mean, std = (x0_BCHW.new_tensor(v).reshape(-1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return x0_BCHW * std + mean
