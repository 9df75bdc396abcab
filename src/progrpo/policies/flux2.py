"""FLUX.2 klein, flow models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from progrpo.policies.family import require_text_encoder
from progrpo.policies.packed import PATCH, PackedFlowFamily, packed, unpacked
from progrpo.types import Condition


class Flux2Klein(PackedFlowFamily):
    """A `Flux2KleinPipeline`.

    A LoRA adapts attention and feed-forward of both kinds of blocks, of two streams and of one.

    The base models are guided by a pair of calls, the distilled ones not at all. The grid's shift depends on the
    picture's size and on the number of steps.
    """

    lora_targets: ClassVar[tuple[str, ...]] = (
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        *(f"{feed_forward}.{name}" for feed_forward in ("ff", "ff_context") for name in ("linear_in", "linear_out")),
        *(f"single_transformer_blocks.*.attn.{name}" for name in ("to_qkv_mlp_proj", "to_out")),
    )

    def check(self) -> None:
        super().check()
        require_text_encoder(self.pipeline)

    def grid_shift(self, tokens: int, num_inference_steps: int) -> float:
        shift: float = compute_empirical_mu(tokens, num_inference_steps)
        return shift

    def encode_text(self, text: str) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(prompt=[text], device=self.device, max_sequence_length=self.text_tokens)
        return {"prompt_embeds": embeds}

    def tokenizer_text(self, text: str) -> str:
        """The turn of a user in a chat, like in the pipeline; the marks around the text count as tokens."""
        written: str = self.pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return written

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.text_tokens, self.denoiser.config.joint_attention_dim)}

    def combine_guidance(self, unconditional_BCHW: Tensor, conditional_BCHW: Tensor, guidance_scale: float) -> Tensor:
        if self.pipeline.config.is_distilled:
            raise ValueError(
                f"sampling.guidance_scale: {guidance_scale:g} would guide a distilled model, which is guided already;"
                " use 1, or a base model"
            )
        return super().combine_guidance(unconditional_BCHW, conditional_BCHW, guidance_scale)

    def denoise(self, x_BCHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        embeds = condition.tensors["prompt_embeds"]
        height, width = (side // PATCH for side in x_BCHW.shape[2:])
        tokens_BLD = self.denoiser(
            hidden_states=packed(x_BCHW),
            timestep=timestep_B / 1000,  # by which the network multiplies it again
            encoder_hidden_states=embeds,
            txt_ids=_places((1, 1, 1, embeds.shape[1]), x_BCHW.device),
            img_ids=_places((1, height, width, 1), x_BCHW.device),
            return_dict=False,
        )[0]
        return unpacked(tokens_BLD, height, width)

    def unscale(self, x0_BCHW: Tensor) -> Tensor:
        """Scale each channel of a token by the autoencoder's statistics."""
        norm, epsilon = self.pipeline.vae.bn, self.pipeline.vae.config.batch_norm_eps
        mean, std = (t.to(x0_BCHW).reshape(-1, 1, 1) for t in (norm.running_mean, (norm.running_var + epsilon).sqrt()))
        return pixel_shuffle(pixel_unshuffle(x0_BCHW, PATCH) * std + mean, PATCH)


def _places(counts: Sequence[int], device: torch.device) -> Tensor:
    """The places of tokens, int (L, 4): time, row, column, and place in the text."""
    return torch.cartesian_prod(*(torch.arange(count, device=device) for count in counts))
