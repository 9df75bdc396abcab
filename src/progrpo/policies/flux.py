"""FLUX.1, flow models."""

from __future__ import annotations

from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from progrpo.policies.packed import PATCH, PackedFlowFamily, packed, unpacked
from progrpo.types import Condition


class Flux(PackedFlowFamily):
    """A `FluxPipeline`. A LoRA adapts attention and feed-forward of both kinds of blocks, of two streams and of one.

    The guidance scale is an input of FLUX.1-dev. FLUX.1-schnell has no such input and is guided by a pair of calls,
    which its pipeline calls `true_cfg_scale`.
    """

    lora_targets: ClassVar[tuple[str, ...]] = (
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        *(f"{feed_forward}.{name}" for feed_forward in ("ff", "ff_context") for name in ("net.0.proj", "net.2")),
        *(f"single_transformer_blocks.*.{name}" for name in ("proj_mlp", "proj_out")),
    )

    def check(self) -> None:
        super().check()
        if self.pipeline.text_encoder is None or self.pipeline.text_encoder_2 is None:
            raise ValueError("model.path: the pipeline lacks a text encoder; FLUX reads a text by CLIP and by T5")

    def encode_text(self, text: str) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=[text], device=self.device, max_sequence_length=self.text_tokens
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        config, tokens = self.denoiser.config, self.text_tokens
        return {
            "prompt_embeds": (tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def denoise(self, x_BCHW: Tensor, timestep_B: Tensor, condition: Condition) -> Tensor:
        inputs = condition.tensors
        height, width = (side // PATCH for side in x_BCHW.shape[2:])
        shown = self.shown_latents(x_BCHW, condition)
        counts = len(shown), height, width
        places = (torch.arange(count, dtype=torch.float32, device=x_BCHW.device) for count in counts)
        tokens_BLD = self.denoiser(
            hidden_states=torch.cat([packed(x) for x in shown], dim=1),
            timestep=timestep_B / 1000,  # by which the network multiplies it again
            guidance=inputs.get("guidance"),
            pooled_projections=inputs["pooled_prompt_embeds"],
            encoder_hidden_states=inputs["prompt_embeds"],
            txt_ids=x_BCHW.new_zeros(inputs["prompt_embeds"].shape[1], 3),
            img_ids=torch.cartesian_prod(*places),
            return_dict=False,
        )[0]
        return unpacked(tokens_BLD[:, : height * width], height, width)

    def shown_latents(self, x_BCHW: Tensor, condition: Condition) -> list[Tensor]:
        """The latents that the network sees, numbered in this order: the sample's own come first."""
        return [x_BCHW]


class FluxKontext(Flux):
    """A `FluxKontextPipeline`, which changes a picture as the text says (FLUX.1 Kontext, arXiv 2506.15742).

    The source is resized until it covers the sampled size and cropped at its middle, so that all rows have the same
    number of tokens; the pipeline itself keeps the source's shape. The encoded source is further tokens of the
    network's input. Where guidance is a pair of calls, both see it.
    """

    edits: ClassVar[bool] = True

    def encode_picture(self, image: Image.Image) -> dict[str, Tensor]:
        (height, width), vae = self.size, self.pipeline.vae
        pixels = self.pipeline.image_processor.preprocess(image, height, width, resize_mode="crop")
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        return {"image_latents": self.scale(latents)}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return super().condition_shapes() | {"image_latents": self.latent_shape}

    def shown_latents(self, x_BCHW: Tensor, condition: Condition) -> list[Tensor]:
        return [x_BCHW, condition.tensors["image_latents"]]
