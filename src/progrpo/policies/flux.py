"""FLUX.1, flow models: the one file that knows their pipeline and their network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from progrpo.policies.packed import PATCH, PackedFlowPolicy, packed, unpacked
from progrpo.types import Condition


class FluxPolicy(PackedFlowPolicy):
    """A `FluxPipeline`. A LoRA adapts attention and feed-forward of both kinds of blocks: of two streams, and of one.

    FLUX.1-dev is told the guidance scale; FLUX.1-schnell is not, and is guided
    by a pair of calls, which its pipeline calls `true_cfg_scale`.
    """

    lora_targets: ClassVar[tuple[str, ...]] = (
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        *(f"{feed_forward}.{name}" for feed_forward in ("ff", "ff_context") for name in ("net.0.proj", "net.2")),
        *(f"single_transformer_blocks.*.{name}" for name in ("proj_mlp", "proj_out")),
    )

    @classmethod
    def _check(cls, pipeline: DiffusionPipeline) -> None:
        super()._check(pipeline)
        if pipeline.text_encoder is None or pipeline.text_encoder_2 is None:
            raise ValueError("model.path: the pipeline lacks a text encoder; FLUX is told a text by CLIP and by T5")

    def _encode_text(self, text: str) -> dict[str, Tensor]:
        embeds, pooled, _ = self._pipeline.encode_prompt(
            prompt=[text], device=self.device, max_sequence_length=self._settings.max_sequence_length
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config, tokens = self.denoiser.config, self._settings.max_sequence_length
        return {
            "prompt_embeds": (tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def _call(self, x_BCHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        told, (height, width) = condition.tensors, (side // PATCH for side in x_BCHW.shape[2:])
        places = (torch.arange(count, dtype=torch.float32, device=x_BCHW.device) for count in (1, height, width))
        tokens_BLD = self.denoiser(
            hidden_states=packed(x_BCHW),
            timestep=timestep_B / 1000,  # by which the network multiplies it again
            guidance=told.get("guidance"),
            pooled_projections=told["pooled_prompt_embeds"],
            encoder_hidden_states=told["prompt_embeds"],
            txt_ids=x_BCHW.new_zeros(told["prompt_embeds"].shape[1], 3),
            img_ids=torch.cartesian_prod(*places),
            return_dict=False,
        )[0]
        return unpacked(tokens_BLD, height, width)

    def _observed_modules(self) -> Sequence[nn.Module]:
        blocks = [*self.denoiser.transformer_blocks, *self.denoiser.single_transformer_blocks]
        return blocks[len(blocks) // 2], blocks[-1]
