"""Stable Diffusion 3 and 3.5, flow models."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from progrpo.diffusion.levels import Levels
from progrpo.policies.attention import JointAttention
from progrpo.policies.flow import FlowFamily
from progrpo.policies.geometry import Geometry
from progrpo.types import Condition


class SD3(FlowFamily):
    """A `StableDiffusion3Pipeline`. A LoRA adapts attention and feed-forward of the picture's and the text's stream.

    Any of its three text encoders may be absent, but not all: the model was trained with zeros in their place (arXiv
    2403.03206).
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
        """Encode a text where a CLIP is absent, which the pipeline cannot: its embeddings are zeros.

        They are as wide as the network's input and the other encoder leave it.
        """
        pipeline, config = self.pipeline, self.denoiser.config
        clips = (pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)
        tokenizers = [tokenizer for tokenizer, encoder in clips if encoder is not None]
        length = tokenizers[0].model_max_length if tokenizers else pipeline.tokenizer_max_length
        t5 = pipeline._get_t5_prompt_embeds(
            [text],
            max_sequence_length=self.text_tokens,
            device=self.device,
            dtype=self.dtype,
        )
        encoded = [None if encoder is None else self._clip(text, tokenizer, encoder) for tokenizer, encoder in clips]
        left = config.pooled_projection_dim - sum(pooled.shape[-1] for _, pooled in filter(None, encoded))
        width = left // encoded.count(None)
        zeros = t5.new_zeros(1, length, width), t5.new_zeros(1, width)
        hidden, pooled = (
            torch.cat([tensor.to(t5) for tensor in tensors], -1)
            for tensors in zip(*(one or zeros for one in encoded), strict=True)
        )
        beside = torch.nn.functional.pad(hidden, (0, t5.shape[-1] - hidden.shape[-1]))
        return {"prompt_embeds": torch.cat([beside, t5], dim=-2), "pooled_prompt_embeds": pooled}

    def _clip(self, text: str, tokenizer: PreTrainedTokenizerBase, encoder: nn.Module) -> tuple[Tensor, Tensor]:
        """The hidden states (1, tokens, width) and the pooled embedding (1, width) of one CLIP."""
        inputs = tokenizer(
            [text], padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        output = encoder(inputs.input_ids.to(self.device), output_hidden_states=True)
        return output.hidden_states[-2], output[0]

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
