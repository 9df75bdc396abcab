"""Stable Diffusion 3 and 3.5, flow models: the one file that knows their pipeline and their network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from progrpo.diffusion.levels import Levels
from progrpo.policies.attention import JointAttention
from progrpo.policies.flow import FlowFamily
from progrpo.policies.geometry import Geometry
from progrpo.types import Condition


class SD3(FlowFamily):
    """A `StableDiffusion3Pipeline`. A LoRA adapts attention and feed-forward of the picture's and the text's stream.

    Of its three text encoders any may be absent, but not all: the model was trained with zeros in the place of each (arXiv 2403.03206).
    """

    lora_targets: ClassVar[tuple[str, ...]] = (
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        *(f"{feed_forward}.{name}" for feed_forward in ("ff", "ff_context") for name in ("net.0.proj", "net.2")),
    )
    plain_attention: ClassVar[type] = JointAttention

    def check(self) -> None:
        super().check()
        pipeline = self.pipeline
        if not any((pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)):
            raise ValueError("model.path: the pipeline has no text encoder at all; it needs one of its three at least")

    def geometry(self) -> Geometry:
        own, patch = super().geometry(), self.pipeline.patch_size
        longest = self.denoiser.config.pos_embed_max_size * patch * own.pixels_per_latent
        return replace(own, patch=patch, longest_side=longest)

    def levels(self, num_inference_steps: int, shift: float | None = None) -> Levels:
        if shift is None and self.pipeline.scheduler.config.use_dynamic_shifting:
            raise ValueError("sampling.shift: this model shifts its grid by picture size; give a number, such as 3")
        return super().levels(num_inference_steps, shift)

    def encode_text(self, text: str) -> dict[str, Tensor]:
        if self.pipeline.text_encoder is None or self.pipeline.text_encoder_2 is None:
            return self._encode_without_clip(text)
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=[text],
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def _encode_without_clip(self, text: str) -> dict[str, Tensor]:
        """What the pipeline cannot: an absent CLIP's embeddings are zeros, as wide as the network and the other one leave it."""
        pipeline, config = self.pipeline, self.denoiser.config
        clips = (pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)
        there = [tokenizer for tokenizer, encoder in clips if encoder is not None]
        length = there[0].model_max_length if there else pipeline.tokenizer_max_length
        t5 = pipeline._get_t5_prompt_embeds(
            [text],
            max_sequence_length=self.text_tokens,
            device=self.device,
            dtype=self.dtype,
        )
        found = [None if encoder is None else self._clip(text, tokenizer, encoder) for tokenizer, encoder in clips]
        left = config.pooled_projection_dim - sum(pooled.shape[-1] for _, pooled in filter(None, found))
        width = left // found.count(None)
        nothing = t5.new_zeros(1, length, width), t5.new_zeros(1, width)
        hidden, pooled = (
            torch.cat([part.to(t5) for part in parts], -1) for parts in zip(*(f or nothing for f in found), strict=True)
        )
        beside = torch.nn.functional.pad(hidden, (0, t5.shape[-1] - hidden.shape[-1]))
        return {"prompt_embeds": torch.cat([beside, t5], dim=-2), "pooled_prompt_embeds": pooled}

    def _clip(self, text: str, tokenizer: Any, encoder: nn.Module) -> tuple[Tensor, Tensor]:
        told = tokenizer(
            [text], padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        said = encoder(told.input_ids.to(self.device), output_hidden_states=True)
        return said.hidden_states[-2], said[0]

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        config, clip = self.denoiser.config, self.pipeline.text_encoder or self.pipeline.text_encoder_2
        places = clip.config.max_position_embeddings if clip else self.pipeline.tokenizer_max_length
        tokens = places + self.text_tokens
        return {
            "prompt_embeds": (tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def denoise(self, x_BCHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        output: Tensor = self.denoiser(
            hidden_states=x_BCHW,
            timestep=timestep_B,
            encoder_hidden_states=condition.tensors["prompt_embeds"],
            pooled_projections=condition.tensors["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return output
