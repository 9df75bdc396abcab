"""The networks of the shapes world that the flow models do not share: text encoders that read its words, a U-Net."""

from __future__ import annotations

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from progrpo.zoo.networks import CLIP_WIDTH, LATENT, TextStack
from progrpo.zoo.shapes.tokens import clip_tokenizer, t5_tokenizer


def build_text() -> TextStack:
    """Build the flow model's text encoders, with the tokenizers of the shapes world."""
    return TextStack(clip_tokenizer(), t5_tokenizer())


def build_unet() -> UNet2DConditionModel:
    """Build the U-Net, 3.7 M parameters: 16x16 and 8x8.

    At the lower resolution two transformer blocks follow each of the three residual ones.
    """
    return UNet2DConditionModel(
        sample_size=LATENT[1],
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        block_out_channels=(48, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=2,
        cross_attention_dim=CLIP_WIDTH,
        addition_embed_type="text",  # the text, pooled, steers every residual block beside the timestep
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=4,  # the number of heads, by diffusers' history
        norm_num_groups=8,
    )


def noise_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise. Steps are counted from the noisy end, so that also a few steps begin at pure noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        steps_offset=1,  # without effect for this spacing; diffusers warns of another value
    )


def assemble_diffusion(
    vae: AutoencoderKL, clip: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """Put the networks into one pipeline. Its `save_pretrained` writes diffusers' folder format."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=noise_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
