"""Qwen-Image, flow models."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn.functional import pad

from progrpo.policies.family import require_text_encoder
from progrpo.policies.packed import PATCH, PackedFlowFamily, packed, unpacked
from progrpo.policies.tokens import Reader
from progrpo.types import Condition


class QwenImage(PackedFlowFamily):
    """A `QwenImagePipeline` (Qwen-Image, arXiv 2508.02324). A LoRA adapts attention and feed-forward of both streams.

    Its autoencoder is one of videos, to which a picture is a video of one frame. Embeddings of a text are padded to
    `max_sequence_length`, and a mask says where.
    """

    default_negative_prompt: ClassVar[str] = " "
    lora_targets: ClassVar[tuple[str, ...]] = (
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        *(f"{feed_forward}.{name}" for feed_forward in ("img_mlp", "txt_mlp") for name in ("net.0.proj", "net.2")),
    )

    def check(self) -> None:
        super().check()
        require_text_encoder(self.pipeline)

    def encode_text(self, text: str) -> dict[str, Tensor]:
        length = self.text_tokens
        embeds, _ = self.pipeline.encode_prompt(prompt=[text], device=self.device, max_sequence_length=length)
        missing = length - embeds.shape[1]
        return {
            "prompt_embeds": pad(embeds, (0, 0, 0, missing)),
            "prompt_embeds_mask": pad(embeds.new_ones(embeds.shape[:2]), (0, missing)),
        }

    def text_readers(self) -> list[Reader]:
        """One reader. Tokens of the instruction before the text are dropped by the pipeline, those after it count."""
        own: int = self.pipeline.tokenizer_max_length
        limit = self.pipeline.prompt_template_encode_start_idx + min(self.text_tokens, own)
        return [Reader("text_encoder", self.pipeline.tokenizer, limit, self.text_tokens < own, self.tokenizer_text)]

    def tokenizer_text(self, text: str) -> str:
        written: str = self.pipeline.prompt_template_encode.format(text)
        return written

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.text_tokens
        return {
            "prompt_embeds": (tokens, self.denoiser.config.joint_attention_dim),
            "prompt_embeds_mask": (tokens,),
        }

    def combine_guidance(self, unconditional_BCHW: Tensor, conditional_BCHW: Tensor, guidance_scale: float) -> Tensor:
        """Give each token of the combination the length of the conditional one, like the pipeline."""
        combined = packed(super().combine_guidance(unconditional_BCHW, conditional_BCHW, guidance_scale))
        length = combined.norm(dim=-1, keepdim=True)
        conditional_length = packed(conditional_BCHW).norm(dim=-1, keepdim=True)
        height, width = (side // PATCH for side in conditional_BCHW.shape[2:])
        return unpacked(combined * (conditional_length / length), height, width)

    def denoise(self, x_BCHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        inputs = condition.tensors
        height, width = (side // PATCH for side in x_BCHW.shape[2:])
        tokens_BLD = self.denoiser(
            hidden_states=packed(x_BCHW),
            timestep=timestep_B / 1000,  # by which the network multiplies it again
            encoder_hidden_states=inputs["prompt_embeds"],
            encoder_hidden_states_mask=inputs["prompt_embeds_mask"],
            img_shapes=[[(1, height, width)]] * len(x_BCHW),
            return_dict=False,
        )[0]
        return unpacked(tokens_BLD, height, width)

    def unscale(self, x0_BCHW: Tensor) -> Tensor:
        """Scale latents and add the axis of frames."""
        config = self.pipeline.vae.config
        mean, std = (x0_BCHW.new_tensor(v).reshape(-1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return (x0_BCHW * std + mean).unsqueeze(2)
