"""Qwen-Image, flow models: the one file that knows their pipeline and their network."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.functional import pad

from progrpo.policies.packed import PATCH, PackedFlowPolicy, packed, unpacked
from progrpo.policies.tokens import Reader
from progrpo.types import Condition, Pictures


class QwenImagePolicy(PackedFlowPolicy):
    """A `QwenImagePipeline` (Qwen-Image, arXiv 2508.02324). A LoRA adapts attention and feed-forward of both streams.

    Its autoencoder is one of videos, and a picture is a video of one frame to it alone. Texts are as long as they are: embeddings are
    filled up to `max_sequence_length`, and a mask tells the network where.
    """

    no_prompt: ClassVar[str] = " "
    lora_targets: ClassVar[tuple[str, ...]] = (
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        *(f"{feed_forward}.{name}" for feed_forward in ("img_mlp", "txt_mlp") for name in ("net.0.proj", "net.2")),
    )

    @classmethod
    def _check(cls, pipeline: DiffusionPipeline) -> None:
        super()._check(pipeline)
        if pipeline.text_encoder is None:
            raise ValueError("model.path: the pipeline lacks its text encoder; load it with the pipeline")

    def _encode_text(self, text: str) -> dict[str, Tensor]:
        length = self._text_tokens
        embeds, _ = self._pipeline.encode_prompt(prompt=[text], device=self.device, max_sequence_length=length)
        missing = length - embeds.shape[1]
        return {
            "prompt_embeds": pad(embeds, (0, 0, 0, missing)),
            "prompt_embeds_mask": pad(embeds.new_ones(embeds.shape[:2]), (0, missing)),
        }

    def _text_readers(self) -> list[Reader]:
        """As its pipeline: tokens of the instruction before the text are dropped, those after it count."""
        own: int = self._pipeline.tokenizer_max_length
        limit = self._pipeline.prompt_template_encode_start_idx + min(self._text_tokens, own)
        return [Reader("text_encoder", self._pipeline.tokenizer, limit, self._text_tokens < own, self._written)]

    def _written(self, text: str) -> str:
        written: str = self._pipeline.prompt_template_encode.format(text)
        return written

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self._text_tokens
        return {
            "prompt_embeds": (tokens, self.denoiser.config.joint_attention_dim),
            "prompt_embeds_mask": (tokens,),
        }

    def _guided(self, unconditional_BCHW: Tensor, conditional_BCHW: Tensor, guidance_scale: float) -> Tensor:
        """As its pipeline: each token of the combination is given the length that the conditional one has."""
        combined = packed(super()._guided(unconditional_BCHW, conditional_BCHW, guidance_scale))
        wanted, found = (tokens.norm(dim=-1, keepdim=True) for tokens in (packed(conditional_BCHW), combined))
        height, width = (side // PATCH for side in conditional_BCHW.shape[2:])
        return unpacked(combined * (wanted / found), height, width)

    def _call(self, x_BCHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        told, (height, width) = condition.tensors, (side // PATCH for side in x_BCHW.shape[2:])
        tokens_BLD = self.denoiser(
            hidden_states=packed(x_BCHW),
            timestep=timestep_B / 1000,  # by which the network multiplies it again
            encoder_hidden_states=told["prompt_embeds"],
            encoder_hidden_states_mask=told["prompt_embeds_mask"],
            img_shapes=[[(1, height, width)]] * len(x_BCHW),
            return_dict=False,
        )[0]
        return unpacked(tokens_BLD, height, width)

    def _unscaled(self, x0_BCHW: Tensor) -> Tensor:
        """With the axis of frames."""
        config = self._pipeline.vae.config
        mean, std = (x0_BCHW.new_tensor(v).reshape(-1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return (x0_BCHW * std + mean).unsqueeze(2)

    def decode(self, x0_BCHW: Tensor) -> Pictures:
        whole = super().decode(x0_BCHW)
        return replace(whole, images_NHWC=whole.images_NHWC[:, 0])
