"""Published architectures of a small width and with random weights, for pictures of 512 and 1024 pixels.

Blocks are as in the published models, and latents have their channels and sides. Text encoders are small: those of
`shapes-flow` for SD 3.5, and those of the tests for SDXL and FLUX.1. Pictures tell nothing about a trained model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from iteration import fill

from progrpo.config import Config, ModelSettings
from progrpo.policies.base import PolicyContext, torch_dtype
from progrpo.policies.decoding import PictureDecoder, unscale_tiny
from progrpo.policies.load import family_of, locate, policy_from_pipeline, read_pipeline
from progrpo.policies.pipeline import PipelinePolicy
from progrpo.recipes import load_recipe

sys.path.append(str(Path(__file__).parents[1]))  # the tests have small pipelines of SDXL and FLUX.1
from tests.support import pipelines

Decoding = Literal["whole", "sliced", "tiled"]


@dataclass(frozen=True)
class NarrowModel:
    """A published architecture: its title, its narrow network, and the recipe whose costs are predicted."""

    title: str
    pipeline: Callable[[], Any]
    network: Callable[[], torch.nn.Module]
    latent_channels: int
    scaling: dict[str, float]
    recipe: str
    published: str = ""
    """The model's hub id, where the recipe is of another one."""

    def policy(self, side: int, decoding: Decoding = "whole") -> PipelinePolicy:
        """The policy for one size, with equal weights for all ways to decode."""
        torch.manual_seed(0)
        pipeline = self.pipeline()
        network, vae = self.network(), _autoencoder(self.latent_channels, self.scaling)
        kept = {name: buffer.clone() for name, buffer in network.named_buffers() if "pos_embed" in name}
        for module in (network, vae):
            fill(module)
        for name, buffer in kept.items():
            network.get_buffer(name).copy_(buffer)
        name = "unet" if "unet" in pipeline.components else "transformer"
        pipeline = type(pipeline)(**{**pipeline.components, name: network, "vae": vae})
        settings = ModelSettings(lora_rank=8, max_sequence_length=16, resolution=side, decoding=decoding)
        policy = policy_from_pipeline(pipeline, settings, PolicyContext())
        tiny = AutoencoderTiny(
            latent_channels=self.latent_channels,
            encoder_block_out_channels=(4,) * 4,
            decoder_block_out_channels=(4,) * 4,
        )
        fill(tiny.requires_grad_(False).eval())
        policy.previewer = PictureDecoder(tiny, unscale_tiny(tiny), "tiny decoder", "")
        return policy

    def config(self, side: int, decoding: Decoding) -> Config:
        """The recipe of the published model at this size."""
        config = load_recipe(self.recipe)
        model = replace(config.model, resolution=side, decoding=decoding, path=self.published or config.model.path)
        return replace(config, model=model)


def _autoencoder(latent_channels: int, scaling: dict[str, float]) -> AutoencoderKL:
    """The published blocks at a sixteenth of the width."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=1024,
        use_quant_conv=latent_channels == 4,
        use_post_quant_conv=latent_channels == 4,
        **scaling,
    )


def _shapes_flow() -> Any:
    settings = ModelSettings(path="shapes-flow")
    source = locate(settings.path)
    return read_pipeline(source, family_of(source), settings, {"default": torch_dtype(settings)})


def _sd3() -> SD3Transformer2DModel:
    """Three of SD 3.5 Medium's 24 blocks at a twelfth of the width, two with its second attention."""
    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
        dual_attention_layers=(0, 1),
    )


def _sdxl() -> UNet2DConditionModel:
    """All of SDXL's blocks at a tenth of the width, with two transformer layers where it has ten."""
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 2),
        attention_head_dim=(1, 1, 2),
        norm_num_groups=8,
        cross_attention_dim=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
    )


def _flux() -> FluxTransformer2DModel:
    """One of FLUX.1's 19 blocks of two streams and two of its 38 of one, with one head of 24."""
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=1,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=True,
    )


NARROW_MODELS = {
    "sd3": NarrowModel(
        "SD 3.5 M", _shapes_flow, _sd3, 16, {"scaling_factor": 1.5305, "shift_factor": 0.0609}, "sd35m-ocr"
    ),
    "sdxl": NarrowModel(
        "SDXL",
        pipelines.sdxl,
        _sdxl,
        4,
        {"scaling_factor": 0.13025},
        "sd14-hpsv2",
        "stabilityai/stable-diffusion-xl-base-1.0",
    ),
    "flux": NarrowModel(
        "FLUX.1", pipelines.flux, _flux, 16, {"scaling_factor": 0.3611, "shift_factor": 0.1159}, "flux-pickscore"
    ),
}
