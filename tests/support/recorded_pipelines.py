"""Pipelines of the true classes and of random weights that have no family: they are learnt from their own call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from tests.support.pipelines import picture_vae
from tests.support.text_encoders import (
    WIDTH,
    clip_encoder,
    clip_tokenizer,
    gemma_tokenizer,
    llm,
    qwen_tokenizer,
    t5_encoder,
    t5_tokenizer,
    umt5_encoder,
)


def _flow(**scheduler: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**scheduler)


_SHIFTS: dict[str, Any] = {"use_dynamic_shifting": True, "base_image_seq_len": 9, "base_shift": 0.4, "max_shift": 1.3}


def z_image() -> Any:
    """Z-Image: the network takes lists of rows, and the pipeline turns its output's sign."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    tokenizer = qwen_tokenizer()
    return ZImagePipeline(
        scheduler=_flow(shift=3.0),
        vae=picture_vae(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=llm("Qwen3Model", tokenizer),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[256, 64, 64],
        ),
    )


def lumina2() -> Any:
    """Lumina 2: it counts timesteps from noise, turns the sign, and gives guidance the conditional length."""
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    tokenizer = gemma_tokenizer()
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=16,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(600, 64, 64),
            cap_feat_dim=WIDTH,
        ),
        scheduler=_flow(**_SHIFTS),
        vae=picture_vae(blocks=4, scaling_factor=0.36, shift_factor=0.12),
        text_encoder=llm("Gemma2Model", tokenizer, layers=2),
        tokenizer=tokenizer,
    )


def sana() -> Any:
    """SANA: linear attention, a deep-compression autoencoder, a multi-step solver's flow."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    tokenizer = gemma_tokenizer()
    blocks = ("ResBlock", "EfficientViTBlock")
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=llm("Gemma2Model", tokenizer, layers=1),
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            upsample_block_type="interpolate",
            downsample_block_type="conv",
            scaling_factor=0.41,
        ),
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            sample_size=8,
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
        ),
    )


def chroma() -> Any:
    """Chroma: packed latents, a mask over text and picture, guidance by two calls."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    t5 = t5_tokenizer()
    return ChromaPipeline(
        scheduler=_flow(**_SHIFTS),
        vae=picture_vae(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=t5_encoder(t5),
        tokenizer=t5,
        transformer=ChromaTransformer2DModel(
            in_channels=4 * 2 * 2,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
    )


def aura_flow() -> Any:
    """AuraFlow: timesteps of 0 to 1, guidance by one call of two rows."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    t5 = t5_tokenizer()
    return AuraFlowPipeline(
        tokenizer=t5,
        text_encoder=umt5_encoder(t5),
        vae=picture_vae(scaling_factor=0.13),
        transformer=AuraFlowTransformer2DModel(
            sample_size=8,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=16,
            pos_embed_max_size=64,
        ),
        scheduler=_flow(shift=1.73),
    )


def _pixart(kind: str) -> Any:
    import diffusers
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    t5 = t5_tokenizer()
    return getattr(diffusers, kind)(
        tokenizer=t5,
        text_encoder=t5_encoder(t5),
        vae=picture_vae(scaling_factor=0.13),
        transformer=PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=8,
            caption_channels=WIDTH,
            use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(solver_order=2),
    )


def pixart_sigma() -> Any:
    """PixArt-Sigma: a transformer that predicts noise and, beside it, a variance that is thrown away."""
    return _pixart("PixArtSigmaPipeline")


def pixart_alpha() -> Any:
    """PixArt-Alpha, likewise."""
    return _pixart("PixArtAlphaPipeline")


def cogview4() -> Any:
    """CogView 4: texts of any length without a mask, and timesteps that are not those of its levels."""
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel

    tokenizer = gemma_tokenizer()
    return CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=llm("GlmModel", tokenizer),
        vae=picture_vae(scaling_factor=0.36),
        transformer=CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=WIDTH,
            time_embed_dim=8,
            condition_dim=4,
            sample_size=8,
            pos_embed_max_size=16,
            rope_axes_dim=(16, 16),
        ),
        scheduler=_flow(
            base_shift=0.25, max_shift=0.75, base_image_seq_len=9, use_dynamic_shifting=True, time_shift_type="linear"
        ),
    )


def ltx() -> Any:
    """LTX: videos, whose latents are tokens."""
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    t5 = t5_tokenizer()
    return LTXPipeline(
        scheduler=_flow(**_SHIFTS),
        vae=AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=2,
        ),
        text_encoder=t5_encoder(t5),
        tokenizer=t5,
        transformer=LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=2,
            caption_channels=WIDTH,
        ),
    )


def bria() -> Any:
    """Bria: texts of any length, padded with zeros by the pipeline."""
    from diffusers import BriaPipeline, BriaTransformer2DModel

    t5 = t5_tokenizer()
    return BriaPipeline(
        transformer=BriaTransformer2DModel(
            in_channels=4 * 2 * 2,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=[2, 2, 4],
        ),
        scheduler=_flow(**_SHIFTS),
        vae=picture_vae(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=t5_encoder(t5),
        tokenizer=t5,
    )


def ovis_image() -> Any:
    """Ovis-Image: packed latents beside the hidden states of a language model."""
    from diffusers import OvisImagePipeline, OvisImageTransformer2DModel

    tokenizer = qwen_tokenizer()
    return OvisImagePipeline(
        scheduler=_flow(**_SHIFTS),
        vae=picture_vae(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=llm("Qwen3Model", tokenizer),
        tokenizer=tokenizer,
        transformer=OvisImageTransformer2DModel(
            in_channels=4 * 2 * 2,
            out_channels=4 * 2 * 2,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(2, 2, 4),
        ),
    )


def mochi() -> Any:
    """Mochi: videos, of levels that run from 1 to 0 the other way round."""
    from diffusers import AutoencoderKLMochi, MochiPipeline, MochiTransformer3DModel

    t5 = t5_tokenizer()
    return MochiPipeline(
        scheduler=_flow(),
        vae=AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        text_encoder=t5_encoder(t5),
        tokenizer=t5,
        transformer=MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=WIDTH,
            time_embed_dim=8,
            max_sequence_length=12,
        ),
    )


def hunyuan_video() -> Any:
    """HunyuanVideo: a guidance scale as an input, times 1000; a language model and a CLIP.

    The long template leaves none of the text to the language model, whose tokens are letters.
    """
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
    from transformers import CLIPTextModel

    tokenizer, clip = gemma_tokenizer(), clip_tokenizer()
    clip_config = clip_encoder(clip).config
    clip_config.max_position_embeddings = 77  # as many as the pipeline asks for
    return HunyuanVideoPipeline(
        text_encoder=llm("LlamaModel", tokenizer, layers=3),
        tokenizer=tokenizer,
        transformer=HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            text_embed_dim=WIDTH,
            pooled_projection_dim=WIDTH // 2,
            rope_axes_dim=(2, 2, 4),
        ),
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        scheduler=_flow(shift=7.0),
        text_encoder_2=CLIPTextModel(clip_config),
        tokenizer_2=clip,
    )


def latte() -> Any:
    """Latte: videos by a diffusion model, whose autoencoder decodes frames as pictures."""
    from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

    t5 = t5_tokenizer()
    return LattePipeline(
        tokenizer=t5,
        text_encoder=t5_encoder(t5),
        vae=picture_vae(scaling_factor=0.18),
        transformer=LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=16,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=WIDTH,
            video_length=2,
        ),
        scheduler=DDIMScheduler(clip_sample=False),
    )


def cogview3_plus() -> Any:
    """CogView 3 Plus: a diffusion model that says v, on a shifted schedule of noise."""
    from diffusers import CogVideoXDDIMScheduler, CogView3PlusPipeline, CogView3PlusTransformer2DModel

    t5 = t5_tokenizer()
    return CogView3PlusPipeline(
        tokenizer=t5,
        text_encoder=t5_encoder(t5),
        vae=picture_vae(scaling_factor=0.36),
        transformer=CogView3PlusTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=WIDTH,
            time_embed_dim=8,
            condition_dim=4,
            sample_size=8,
            pos_embed_max_size=16,
        ),
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=4.0,
            timestep_spacing="trailing",
        ),
    )


def wan_image_to_video() -> Any:
    """Wan 2.1 from a picture to a video: the picture's latents and a mask are further channels."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
    from diffusers.pipelines.wan import pipeline_wan_i2v

    # a package that this pipeline needs and that tests do without: it leaves letters as they are
    vars(pipeline_wan_i2v).setdefault("ftfy", SimpleNamespace(fix_text=str))
    t5 = t5_tokenizer()
    return WanImageToVideoPipeline(
        tokenizer=t5,
        text_encoder=umt5_encoder(t5),
        transformer=WanTransformer3DModel(
            in_channels=4 + 4 + 4,
            out_channels=4,
            text_dim=WIDTH,
            freq_dim=8,
            ffn_dim=WIDTH,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=12,
            rope_max_seq_len=32,
        ),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 2],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.8, 1.2, 2.0],
            scale_factor_temporal=4,
            scale_factor_spatial=4,
        ),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    )


@dataclass(frozen=True)
class Recorded:
    """A pipeline by the function that builds it, and the settings that tests load it with."""

    build: Callable[[], Any]
    resolution: int = 16
    frames: int | None = None
    tokens: int | None = 12


RECORDED_PIPELINES: dict[str, Recorded] = {
    "z-image": Recorded(z_image, tokens=64),
    "lumina2": Recorded(lumina2, resolution=64, tokens=None),
    "sana": Recorded(sana, resolution=32),
    "chroma": Recorded(chroma),
    "aura-flow": Recorded(aura_flow),
    "pixart-sigma": Recorded(pixart_sigma),
    "pixart-alpha": Recorded(pixart_alpha, tokens=None),
    "cogview4": Recorded(cogview4, tokens=64),
    "ltx": Recorded(ltx, resolution=32, frames=9),
    "wan-i2v": Recorded(wan_image_to_video, frames=5),
    "bria": Recorded(bria),
    "ovis-image": Recorded(ovis_image),
    "mochi": Recorded(mochi, frames=7),
    "hunyuan-video": Recorded(hunyuan_video, frames=5),
    "cogview3-plus": Recorded(cogview3_plus),
}


REFUSED_PIPELINES: dict[str, Recorded] = {"latte": Recorded(latte, frames=2, tokens=None)}
"""Pipelines whose call is of no known kind."""


def build(name: str) -> Any:
    """The pipeline, with the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = (RECORDED_PIPELINES | REFUSED_PIPELINES)[name].build()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()  # as loaded from files
    return pipeline
