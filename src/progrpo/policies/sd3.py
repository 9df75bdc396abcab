"""Stable Diffusion 3 and 3.5, flow models: the one file that knows their pipeline and their network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from progrpo.diffusion.levels import Levels
from progrpo.policies.flow import FlowPolicy
from progrpo.types import Condition


class SD3Policy(FlowPolicy):
    """A `StableDiffusion3Pipeline`. A LoRA adapts attention and feed-forward of the picture's and the text's stream."""

    lora_targets: ClassVar[tuple[str, ...]] = (
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        *(f"{feed_forward}.{name}" for feed_forward in ("ff", "ff_context") for name in ("net.0.proj", "net.2")),
    )

    @classmethod
    def _check(cls, pipeline: DiffusionPipeline) -> None:
        super()._check(pipeline)
        if pipeline.text_encoder is None or pipeline.text_encoder_2 is None:
            raise ValueError(
                "model.path: the pipeline lacks a CLIP text encoder; only text_encoder_3 (T5) may be left out"
            )

    @classmethod
    def _patch(cls, pipeline: DiffusionPipeline) -> int:
        patch: int = pipeline.patch_size
        return patch

    def levels(self, num_inference_steps: int, shift: float | None = None) -> Levels:
        if shift is None and self._pipeline.scheduler.config.use_dynamic_shifting:
            raise ValueError("sampling.shift: this model shifts its grid by picture size; give a number, such as 3")
        return super().levels(num_inference_steps, shift)

    def _encode_text(self, text: str) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self._pipeline.encode_prompt(
            prompt=[text],
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._settings.max_sequence_length,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def _call(self, x_BCHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        output: Tensor = self.denoiser(
            hidden_states=x_BCHW,
            timestep=timestep_B,
            encoder_hidden_states=condition.tensors["prompt_embeds"],
            pooled_projections=condition.tensors["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return output

    def _observed_modules(self) -> Sequence[nn.Module]:
        blocks = self.denoiser.transformer_blocks
        return blocks[len(blocks) // 2], blocks[-1]
