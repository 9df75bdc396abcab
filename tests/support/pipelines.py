"""Pipelines of the true classes and of random weights, whose calls take milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.text_encoders import (
    WIDTH,
    clip_encoder,
    clip_tokenizer,
    qwen_tokenizer,
    qwen_vl,
    t5_encoder,
    t5_tokenizer,
)


def _denoiser() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def _unet(cross_attention_dim: int = WIDTH // 2, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=4,
        **more,
    )


def picture_vae(kind: str = "AutoencoderKL", blocks: int = 2, **scaling: Any) -> Any:
    """An autoencoder of pictures: latents have 4 channels, and sides that are halved once for each block but one."""
    import diffusers

    return getattr(diffusers, kind)(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **scaling,
    )


def sd3() -> Any:
    """A Stable Diffusion 3: latents of 4x8x8, pictures of 16x16, time shift 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    clip_1, clip_2, t5 = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusion3Pipeline(
            transformer=_denoiser(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=picture_vae(scaling_factor=1.5, shift_factor=0.06),
            text_encoder=clip_encoder(clip_1),
            tokenizer=clip_1,
            text_encoder_2=clip_encoder(clip_2),
            tokenizer_2=clip_2,
            text_encoder_3=t5_encoder(t5),
            tokenizer_3=t5,
        )
    return pipeline


def _noise_schedule(prediction_type: str) -> dict[str, Any]:
    return {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }


def _stable_diffusion(prediction_type: str) -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    tokenizer = clip_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionPipeline(
            unet=_unet(),
            scheduler=PNDMScheduler(**_noise_schedule(prediction_type), set_alpha_to_one=False, skip_prk_steps=True),
            vae=picture_vae(scaling_factor=0.18),
            text_encoder=CLIPTextModel(clip_encoder(tokenizer).config),
            tokenizer=tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return pipeline


def sd() -> Any:
    """A Stable Diffusion 1.x that predicts noise: latents of 4x8x8, pictures of 16x16, and SD 1.4's PNDM scheduler."""
    return _stable_diffusion("epsilon")


def sd_v() -> Any:
    """A Stable Diffusion 2.x that says v."""
    return _stable_diffusion("v_prediction")


FLUX_SHIFTS: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 9,
    "base_shift": 0.4,
    "max_shift": 1.3,
}


def _flux(guidance_embeds: bool, kind: str = "FluxPipeline", **scheduler: Any) -> Any:
    import diffusers
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextModel

    clip, t5 = clip_tokenizer(), t5_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = getattr(diffusers, kind)(
            transformer=FluxTransformer2DModel(
                in_channels=4 * 2 * 2,
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH // 2,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(2, 2, 4),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
            vae=picture_vae(scaling_factor=0.36, shift_factor=0.12),
            text_encoder=CLIPTextModel(clip_encoder(clip).config),
            tokenizer=clip,
            text_encoder_2=t5_encoder(t5),
            tokenizer_2=t5,
        )
    return pipeline


def flux() -> Any:
    """A FLUX.1-dev, with embedded guidance, shifted by picture size. Its own is 256x256, and tests ask for 16x16."""
    return _flux(True, **FLUX_SHIFTS)


def flux_schnell() -> Any:
    """A FLUX.1-schnell: guided by a pair of calls if at all, on an even grid."""
    return _flux(False, shift=1.0)


def kontext() -> Any:
    """A FLUX.1-Kontext-dev, which edits a picture, with embedded guidance, shifted as the tiny FLUX.1-dev."""
    return _flux(True, "FluxKontextPipeline", **FLUX_SHIFTS)


def sdxl() -> Any:
    """A Stable Diffusion XL: pooled embeddings, time ids, and Euler's scheduler as it is shipped with."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel

    clip_1, clip_2 = clip_tokenizer(), clip_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pooled, time_ids = WIDTH // 2, 6 * 4
        pipeline = StableDiffusionXLPipeline(
            unet=_unet(
                cross_attention_dim=WIDTH,
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=pooled + time_ids,
            ),
            scheduler=EulerDiscreteScheduler(**_noise_schedule("epsilon"), timestep_spacing="leading"),
            vae=picture_vae(scaling_factor=0.13),
            text_encoder=CLIPTextModel(clip_encoder(clip_1, 3.0).config),  # it is read before its last norm
            tokenizer=clip_1,
            text_encoder_2=clip_encoder(clip_2, 3.0),
            tokenizer_2=clip_2,
            add_watermarker=False,
        )
    return pipeline


FRAMES = 3


def frames_of(folder: Path) -> int | None:
    """The number of frames that tests ask of a model's videos; its own are 81 frames."""
    return FRAMES if folder.name == "tiny-wan" else None


def wan22() -> Any:
    """A Wan 2.2 A14B: of four steps, two go to each of its transformers."""
    pipeline = wan()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        second = type(pipeline.transformer).from_config(pipeline.transformer.config)
    pipeline.register_modules(transformer_2=second)
    pipeline.register_to_config(boundary_ratio=0.8)
    return pipeline


def wan() -> Any:
    """A Wan 2.1 with its UniPC: of 16x16 and 3 frames, latents are 4x2x8x8."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    t5 = t5_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = WanPipeline(
            tokenizer=t5,
            text_encoder=UMT5EncoderModel(
                UMT5Config(vocab_size=len(t5), d_model=WIDTH, d_kv=4, d_ff=WIDTH, num_layers=1, num_heads=2)
            ),
            vae=AutoencoderKLWan(
                base_dim=4,
                z_dim=4,
                dim_mult=[1, 2],
                num_res_blocks=0,
                temperal_downsample=[True],
                latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[1.5, 0.8, 1.2, 2.0],
                scale_factor_temporal=2,
                scale_factor_spatial=2,
            ),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
            ),
            transformer=WanTransformer3DModel(
                in_channels=4,
                out_channels=4,
                text_dim=WIDTH,
                freq_dim=8,
                ffn_dim=WIDTH,
                num_layers=2,
                num_attention_heads=2,
                attention_head_dim=12,
                rope_max_seq_len=32,
            ),
        )
    return pipeline


def qwen_image() -> Any:
    """A Qwen-Image, whose grid is shifted by picture size and ends at 0.02: of 16x16, latents are 4x8x8."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    tokenizer = qwen_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = QwenImagePipeline(
            transformer=QwenImageTransformer2DModel(
                in_channels=4 * 2 * 2,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                axes_dims_rope=(2, 2, 4),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_image_seq_len=9, base_shift=0.5, max_shift=0.9, shift_terminal=0.02
            ),
            vae=AutoencoderKLQwenImage(
                base_dim=4,
                z_dim=4,
                dim_mult=[1, 2],
                num_res_blocks=1,
                temperal_downsample=[False],
                latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[1.5, 0.8, 1.2, 2.0],
            ),
            text_encoder=qwen_vl(tokenizer),
            tokenizer=tokenizer,
        )
    before = pipeline.prompt_template_encode.partition("{}")[0]
    assert len(tokenizer(before).input_ids) == pipeline.prompt_template_encode_start_idx
    return pipeline


def flux2_klein() -> Any:
    """A FLUX.2 klein base, guided by a pair of calls: of 16x16, latents are 4x8x8.

    Its text encoder is read at layers 9, 18 and 27.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = qwen_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = picture_vae("AutoencoderKLFlux2", batch_norm_eps=0.1)
        for statistic in (vae.bn.running_mean, vae.bn.running_var):
            statistic.uniform_(0.5, 1.5)
        transformer = Flux2Transformer2DModel(
            in_channels=4 * 2 * 2,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=3 * 8,
            timestep_guidance_channels=8,
            guidance_embeds=False,
            axes_dims_rope=(2, 2, 2, 2),
        )
        for weights in transformer.parameters():
            weights.data *= 2  # random, but not blind to the text
        pipeline = Flux2KleinPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=Qwen3ForCausalLM(
                Qwen3Config(
                    vocab_size=len(tokenizer),
                    hidden_size=8,
                    intermediate_size=4,
                    num_hidden_layers=27,
                    num_attention_heads=1,
                    num_key_value_heads=1,
                    head_dim=4,
                    initializer_range=0.3,
                )
            ),
            tokenizer=tokenizer,
        )
    return pipeline


TINY_PIPELINES: dict[str, Callable[[], Any]] = {
    "tiny_sd3": sd3,
    "tiny_flux": flux,
    "tiny_flux_schnell": flux_schnell,
    "tiny_kontext": kontext,
    "tiny_flux2_klein": flux2_klein,
    "tiny_qwen_image": qwen_image,
    "tiny_wan": wan,
    "tiny_sd": sd,
    "tiny_sd_v": sd_v,
    "tiny_sdxl": sdxl,
}
"""The pipelines by the name of the fixture that gives their folder.

A new family joins here and as a fixture of tests/conftest.py, and with it every suite over all policies.
"""
