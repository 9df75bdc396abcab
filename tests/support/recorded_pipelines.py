"""Pipelines of the true classes and of random weights that have no family: they are learnt from their own call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from tests.support.pipelines import FLUX_SHIFTS, picture_vae
from tests.support.text_encoders import (
    WIDTH,
    clip_encoder,
    clip_tokenizer,
    gemma_tokenizer,
    llm,
    mistral,
    qwen3_vl,
    qwen_tokenizer,
    qwen_vl,
    qwen_vl_processor,
    t5_encoder,
    t5_tokenizer,
    umt5_encoder,
)


def _of(kind: str, **config: Any) -> Any:
    """One of diffusers' classes, made with this configuration."""
    import diffusers

    return getattr(diffusers, kind)(**config)


def _pipeline(kind: str, texts: dict[str, Any], **components: Any) -> Any:
    return _of(kind, **texts, **components)


def _flow(**config: Any) -> Any:
    return _of("FlowMatchEulerDiscreteScheduler", **config)


def _solver(kind: str, **config: Any) -> Any:
    """A multi-step solver on a flow's levels."""
    return _of(kind, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, **config)


def _vae(**config: Any) -> Any:
    return picture_vae(scaling_factor=0.36, shift_factor=0.12, **config)


def _t5(encoder: Callable[[Any], Any] = t5_encoder) -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    return {"tokenizer": tokenizer, "text_encoder": encoder(tokenizer)}


def _llm(kind: str, tokenizer: Any, layers: int = 2) -> dict[str, Any]:
    return {"tokenizer": tokenizer, "text_encoder": llm(kind, tokenizer, layers=layers)}


HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8}
FEW: dict[str, Any] = {"num_layers": 1, "num_single_layers": 1}
IN_OUT: dict[str, Any] = {"in_channels": 4, "out_channels": 4}
TEXT: dict[str, Any] = {"joint_attention_dim": WIDTH}
COGVIEW: dict[str, Any] = {
    **HEADS, **IN_OUT, "num_layers": 2, "text_embed_dim": WIDTH, "time_embed_dim": 8, "condition_dim": 4,
    "sample_size": 8, "pos_embed_max_size": 16,
}  # fmt: skip


def z_image() -> Any:
    """Z-Image: the network takes lists of rows, and the pipeline turns its output's sign."""
    return _pipeline(
        "ZImagePipeline",
        _llm("Qwen3Model", qwen_tokenizer()),
        scheduler=_flow(shift=3.0),
        vae=_vae(),
        transformer=_of(
            "ZImageTransformer2DModel", in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
            cap_feat_dim=WIDTH, axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
        ),
    )  # fmt: skip


def lumina2() -> Any:
    """Lumina 2: it counts timesteps from noise, turns the sign, and gives guidance the conditional length."""
    return _pipeline(
        "Lumina2Pipeline",
        _llm("Gemma2Model", gemma_tokenizer()),
        scheduler=_flow(**FLUX_SHIFTS),
        vae=_vae(blocks=4),
        transformer=_of(
            "Lumina2Transformer2DModel", sample_size=8, in_channels=4, hidden_size=16, num_layers=2,
            num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2),
            axes_lens=(600, 64, 64), cap_feat_dim=WIDTH,
        ),
    )  # fmt: skip


def sana() -> Any:
    """SANA: linear attention, a deep-compression autoencoder, a multi-step solver's flow."""
    blocks, sizes, layers = ("ResBlock", "EfficientViTBlock"), (8, 8), (1, 1)
    return _pipeline(
        "SanaPipeline",
        _llm("Gemma2Model", gemma_tokenizer(), layers=1),
        scheduler=_solver("DPMSolverMultistepScheduler", final_sigmas_type="zero"),
        vae=_of(
            "AutoencoderDC", latent_channels=4, attention_head_dim=2, encoder_block_types=blocks,
            decoder_block_types=blocks, encoder_block_out_channels=sizes, decoder_block_out_channels=sizes,
            encoder_layers_per_block=layers, decoder_layers_per_block=layers, encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)), upsample_block_type="interpolate", downsample_block_type="conv",
            scaling_factor=0.41,
        ),
        transformer=_of(
            "SanaTransformer2DModel", **HEADS, **IN_OUT, num_layers=2, num_cross_attention_heads=2,
            cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH, sample_size=8,
        ),
    )  # fmt: skip


def chroma() -> Any:
    """Chroma: packed latents, a mask over text and picture, guidance by two calls."""
    return _pipeline(
        "ChromaPipeline",
        _t5(),
        scheduler=_flow(**FLUX_SHIFTS),
        vae=_vae(),
        transformer=_of(
            "ChromaTransformer2DModel", in_channels=16, **FEW, attention_head_dim=16, num_attention_heads=2, **TEXT,
            axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1,
        ),
    )  # fmt: skip


def aura_flow() -> Any:
    """AuraFlow: timesteps of 0 to 1, guidance by one call of two rows."""
    return _pipeline(
        "AuraFlowPipeline",
        _t5(umt5_encoder),
        scheduler=_flow(shift=1.73),
        vae=picture_vae(scaling_factor=0.13),
        transformer=_of(
            "AuraFlowTransformer2DModel", sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
            **HEADS, **TEXT, caption_projection_dim=16, pos_embed_max_size=64,
        ),
    )  # fmt: skip


def _pixart(kind: str) -> Any:
    return _pipeline(
        kind,
        _t5(),
        scheduler=_of("DPMSolverMultistepScheduler", solver_order=2),
        vae=picture_vae(scaling_factor=0.13),
        transformer=_of(
            "PixArtTransformer2DModel", **HEADS, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=16,
            sample_size=8, caption_channels=WIDTH, use_additional_conditions=False,
        ),
    )  # fmt: skip


def pixart_sigma() -> Any:
    """PixArt-Sigma: a transformer that predicts noise and, beside it, a variance that is thrown away."""
    return _pixart("PixArtSigmaPipeline")


def pixart_alpha() -> Any:
    """PixArt-Alpha, likewise."""
    return _pixart("PixArtAlphaPipeline")


def cogview4() -> Any:
    """CogView 4: texts of any length without a mask, and timesteps that are not those of its levels."""
    return _pipeline(
        "CogView4Pipeline",
        _llm("GlmModel", gemma_tokenizer()),
        scheduler=_flow(
            base_shift=0.25, max_shift=0.75, base_image_seq_len=9, use_dynamic_shifting=True, time_shift_type="linear"
        ),
        vae=picture_vae(scaling_factor=0.36),
        transformer=_of("CogView4Transformer2DModel", **COGVIEW, rope_axes_dim=(16, 16)),
    )


def cogview3_plus() -> Any:
    """CogView 3 Plus: a diffusion model that says v, on a shifted schedule of noise."""
    return _pipeline(
        "CogView3PlusPipeline",
        _t5(),
        scheduler=_of(
            "CogVideoXDDIMScheduler", prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=4.0,
            timestep_spacing="trailing",
        ),
        vae=picture_vae(scaling_factor=0.36),
        transformer=_of("CogView3PlusTransformer2DModel", **COGVIEW),
    )  # fmt: skip


def bria() -> Any:
    """Bria: texts of any length, padded with zeros by the pipeline."""
    return _pipeline(
        "BriaPipeline",
        _t5(),
        scheduler=_flow(**FLUX_SHIFTS),
        vae=_vae(),
        transformer=_of(
            "BriaTransformer2DModel", in_channels=16, **FEW, **HEADS, **TEXT, axes_dims_rope=[2, 2, 4]
        ),
    )  # fmt: skip


def ovis_image() -> Any:
    """Ovis-Image: packed latents beside the hidden states of a language model."""
    return _pipeline(
        "OvisImagePipeline",
        _llm("Qwen3Model", qwen_tokenizer()),
        scheduler=_flow(**FLUX_SHIFTS),
        vae=_vae(),
        transformer=_of(
            "OvisImageTransformer2DModel", in_channels=16, out_channels=16, **FEW, **HEADS, **TEXT,
            axes_dims_rope=(2, 2, 4),
        ),
    )  # fmt: skip


def flux2() -> Any:
    """FLUX.2 dev: a guidance scale as an input, and a language model that is read at layers 10, 20 and 30.

    Its tokenizer is published as a part of a processor of texts and pictures, whose half of texts it is.
    """
    vae = picture_vae("AutoencoderKLFlux2", batch_norm_eps=0.1)
    for statistic in (vae.bn.running_mean, vae.bn.running_var):
        statistic.uniform_(0.5, 1.5)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    transformer = _of(
        "Flux2Transformer2DModel", in_channels=16, num_layers=1, num_single_layers=2, **HEADS,
        joint_attention_dim=3 * 8, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2),
    )  # fmt: skip
    for weights in transformer.parameters():
        weights.data *= 2  # random, but not blind to the text
    pipeline = _pipeline(
        "Flux2Pipeline",
        {"tokenizer": tokenizer, "text_encoder": mistral(tokenizer)},
        scheduler=_flow(use_dynamic_shifting=True),
        vae=vae,
        transformer=transformer,
    )
    pipeline.system_message = ""
    return pipeline


def ltx() -> Any:
    """LTX: videos, whose latents are tokens."""
    sizes, twice = (8,) * 4, (True, True, False, False)
    return _pipeline(
        "LTXPipeline",
        _t5(),
        scheduler=_flow(**FLUX_SHIFTS),
        vae=_of(
            "AutoencoderKLLTXVideo", latent_channels=4, block_out_channels=sizes, decoder_block_out_channels=sizes,
            layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=twice,
            decoder_spatio_temporal_scaling=twice, patch_size=2,
        ),
        transformer=_of(
            "LTXVideoTransformer3DModel", **IN_OUT, **HEADS, cross_attention_dim=16, num_layers=2,
            caption_channels=WIDTH,
        ),
    )  # fmt: skip


def mochi() -> Any:
    """Mochi: videos, of levels that run from 1 to 0 the other way round."""
    sizes = (32,) * 4
    return _pipeline(
        "MochiPipeline",
        _t5(),
        scheduler=_flow(),
        vae=_of(
            "AutoencoderKLMochi", encoder_block_out_channels=sizes, decoder_block_out_channels=sizes,
            layers_per_block=(1,) * 5,
        ),
        transformer=_of(
            "MochiTransformer3DModel", **HEADS, num_layers=2, pooled_projection_dim=16, in_channels=12,
            text_embed_dim=WIDTH, time_embed_dim=8, max_sequence_length=12,
        ),
    )  # fmt: skip


def hunyuan_video() -> Any:
    """HunyuanVideo: a guidance scale as an input, times 1000; a language model and a CLIP.

    The long template leaves none of the text to the language model, whose tokens are letters.
    """
    from transformers import CLIPTextModel

    clip = clip_tokenizer()
    clip_config = clip_encoder(clip).config
    clip_config.max_position_embeddings = 77  # as many as the pipeline asks for
    return _pipeline(
        "HunyuanVideoPipeline",
        _llm("LlamaModel", gemma_tokenizer(), layers=3),
        scheduler=_flow(shift=7.0),
        vae=_of(
            "AutoencoderKLHunyuanVideo", latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1,
            norm_num_groups=4,
        ),
        transformer=_of(
            "HunyuanVideoTransformer3DModel", **IN_OUT, **HEADS, **FEW, num_refiner_layers=1, patch_size=1,
            text_embed_dim=WIDTH, pooled_projection_dim=WIDTH // 2, rope_axes_dim=(2, 2, 4),
        ),
        text_encoder_2=CLIPTextModel(clip_config),
        tokenizer_2=clip,
    )  # fmt: skip


def _qwen_and_byt5(layers: int) -> dict[str, Any]:
    """The language model of HunyuanImage and HunyuanVideo 1.5, and the encoder of the words that a prompt quotes."""
    from transformers import ByT5Tokenizer

    tokenizer, byt5 = qwen_tokenizer(), ByT5Tokenizer()
    encoder = qwen_vl(tokenizer, layers)
    return {"tokenizer": tokenizer, "text_encoder": encoder, "tokenizer_2": byt5, "text_encoder_2": t5_encoder(byt5)}


def hunyuan_image() -> Any:
    """HunyuanImage: guidance by a component, masks, and quoted words that are encoded by themselves."""
    pipeline = _pipeline(
        "HunyuanImagePipeline",
        _qwen_and_byt5(layers=3),
        scheduler=_flow(shift=5.0),
        vae=_of(
            "AutoencoderKLHunyuanImage", in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32),
            layers_per_block=1, spatial_compression_ratio=2, sample_size=16, scaling_factor=0.75,
        ),
        transformer=_of(
            "HunyuanImageTransformer2DModel", **IN_OUT, **HEADS, **FEW, num_refiner_layers=1, text_embed_dim=WIDTH,
            text_embed_2_dim=WIDTH, rope_axes_dim=(4, 4),
        ),
        guider=_of("AdaptiveProjectedMixGuidance", guidance_scale=3.5),
        ocr_guider=_of("AdaptiveProjectedMixGuidance", guidance_scale=3.5),
    )  # fmt: skip
    pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length = 24, 16  # of 1000 and 128
    return pipeline


def hunyuan_video15() -> Any:
    """HunyuanVideo 1.5: guidance by a component, and an empty picture beside the latents and the text."""
    texts = _qwen_and_byt5(layers=3)
    texts["text_encoder"] = texts["text_encoder"].model.language_model
    pipeline = _pipeline(
        "HunyuanVideo15Pipeline",
        texts,
        scheduler=_flow(shift=5.0),
        vae=_of(
            "AutoencoderKLHunyuanVideo15", latent_channels=4, block_out_channels=(32, 32, 32), layers_per_block=1,
            spatial_compression_ratio=4, temporal_compression_ratio=4,
        ),
        transformer=_of(
            "HunyuanVideo15Transformer3DModel", in_channels=9, out_channels=4, **HEADS, num_layers=1,
            num_refiner_layers=1, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH, image_embed_dim=4,
            rope_axes_dim=(4, 2, 2), target_size=16,
        ),
        guider=_of("ClassifierFreeGuidance", guidance_scale=6.0),
    )  # fmt: skip
    pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length = 24, 16  # of 1000 and 256
    pipeline.vision_num_semantic_tokens = 3  # of 729
    pipeline.system_message = ""
    pipeline.prompt_template_encode_start_idx = 6  # of 108, all before the text
    return pipeline


def latte() -> Any:
    """Latte: videos by a diffusion model, whose autoencoder decodes frames as pictures."""
    return _pipeline(
        "LattePipeline",
        _t5(),
        scheduler=_of("DDIMScheduler", clip_sample=False),
        vae=picture_vae(scaling_factor=0.18),
        transformer=_of(
            "LatteTransformer3DModel", **HEADS, in_channels=4, out_channels=8, num_layers=1, cross_attention_dim=16,
            sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_single",
            norm_elementwise_affine=False, caption_channels=WIDTH, video_length=2,
        ),
    )  # fmt: skip


WAN_NETWORK: dict[str, Any] = {
    "out_channels": 4, "text_dim": WIDTH, "freq_dim": 8, "ffn_dim": WIDTH, "num_layers": 2, "num_attention_heads": 2,
    "attention_head_dim": 12, "rope_max_seq_len": 32,
}  # fmt: skip


def wan_image_to_video() -> Any:
    """Wan 2.1 from a picture to a video: the picture's latents and a mask are further channels."""
    from diffusers.pipelines.wan import pipeline_wan_i2v

    # a package that this pipeline needs and that tests do without: it leaves letters as they are
    vars(pipeline_wan_i2v).setdefault("ftfy", SimpleNamespace(fix_text=str))
    return _pipeline(
        "WanImageToVideoPipeline",
        _t5(umt5_encoder),
        scheduler=_solver("UniPCMultistepScheduler", num_train_timesteps=1000),
        vae=_of(
            "AutoencoderKLWan", base_dim=4, z_dim=4, dim_mult=[1, 1, 2], num_res_blocks=1,
            temperal_downsample=[True, True], latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.2, 2.0],
            scale_factor_temporal=4, scale_factor_spatial=4,
        ),
        transformer=_of("WanTransformer3DModel", in_channels=4 + 4 + 4, **WAN_NETWORK),
    )  # fmt: skip


def wan22_image_to_video() -> Any:
    """Wan 2.2 from a picture to a video: two networks by noise level."""
    pipeline = wan_image_to_video()
    pipeline.register_modules(transformer_2=_of("WanTransformer3DModel", in_channels=4 + 4 + 4, **WAN_NETWORK))
    pipeline.register_to_config(boundary_ratio=0.8)
    return pipeline


QWEN_VAE: dict[str, Any] = {
    "base_dim": 4, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False],
    "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.8, 1.2, 2.0],
}  # fmt: skip


def krea2() -> Any:
    """Krea 2: several layers of a language model for each token, whose mask the network reads."""
    tokenizer = qwen_tokenizer()
    return _pipeline(
        "Krea2Pipeline",
        {"tokenizer": tokenizer, "text_encoder": qwen3_vl(tokenizer).model},
        scheduler=_flow(**FLUX_SHIFTS),
        vae=_of("AutoencoderKLQwenImage", **QWEN_VAE),
        transformer=_of(
            "Krea2Transformer2DModel", in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            num_key_value_heads=2, intermediate_size=16, timestep_embed_dim=8, text_hidden_dim=WIDTH,
            num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=16,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2),
        ),
        text_encoder_select_layers=(1, 2),
    )  # fmt: skip


def qwen_image21() -> Any:
    """Qwen-Image 2.1: a cache of the text's keys and values between steps, which is left off."""
    tokenizer = qwen_tokenizer()
    processor = qwen_vl_processor(tokenizer)
    processor.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>{% endfor %}"
    return _pipeline(
        "QwenImage21Pipeline",
        {"processor": processor, "text_encoder": qwen3_vl(tokenizer)},
        scheduler=_flow(**FLUX_SHIFTS),
        vae=_of(
            "AutoencoderKLQwenImage21", **QWEN_VAE | {"dim_mult": [1] * 5, "temperal_downsample": [False] * 4},
            decoder_base_dim=4,
        ),
        transformer=_of(
            "QwenImage21Transformer2DModel", **IN_OUT, num_layers=2, **HEADS, context_in_dim=WIDTH,
            axes_dims_rope=(4, 2, 2),
        ),
    )  # fmt: skip


def _qwen_image_edit(kind: str) -> Any:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    # they show a picture of a million pixels, whatever its own size
    vars(pipeline_qwenimage_edit)["calculate_dimensions"] = lambda area, ratio: (32, 32, None)
    vars(pipeline_qwenimage_edit_plus)["calculate_dimensions"] = lambda area, ratio: (32, 32)
    tokenizer = qwen_tokenizer()
    processor = qwen_vl_processor(tokenizer)
    pipeline = _pipeline(
        kind,
        {"tokenizer": tokenizer, "text_encoder": qwen_vl(tokenizer), "processor": processor},
        scheduler=_flow(
            use_dynamic_shifting=True, base_image_seq_len=9, base_shift=0.5, max_shift=0.9, shift_terminal=0.02
        ),
        vae=_of("AutoencoderKLQwenImage", **QWEN_VAE),
        transformer=_of(
            "QwenImageTransformer2DModel", in_channels=16, out_channels=4, num_layers=2, **HEADS, **TEXT,
            axes_dims_rope=(2, 2, 4),
        ),
    )  # fmt: skip
    picture = "" if kind.endswith("PlusPipeline") else "<|vision_start|><|image_pad|><|vision_end|>"
    pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx = f"{picture}{{}}", 1
    return pipeline


def qwen_image_edit() -> Any:
    """Qwen-Image-Edit: an encoder reads the text and the picture together, also for the negative prompt."""
    return _qwen_image_edit("QwenImageEditPipeline")


def qwen_image_edit_plus() -> Any:
    """Qwen-Image-Edit-Plus: likewise; it takes a single prompt."""
    return _qwen_image_edit("QwenImageEditPlusPipeline")


@dataclass(frozen=True)
class Recorded:
    """A pipeline by the function that builds it, and the settings that tests load it with."""

    build: Callable[[], Any]
    resolution: int = 16
    frames: int | None = None
    tokens: int | None = 12
    start: Callable[[torch.Tensor], torch.Tensor] = lambda latents: latents
    """The latents of the pipeline's loop as its call takes them."""


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
    "flux2": Recorded(flux2, tokens=32, start=lambda tokens: tokens.mT.unflatten(-1, (4, 4))),
    "mochi": Recorded(mochi, frames=7),
    "hunyuan-video": Recorded(hunyuan_video, frames=5),
    "hunyuan-image": Recorded(hunyuan_image, tokens=None),
    "hunyuan-video-1.5": Recorded(hunyuan_video15, frames=5, tokens=None),
    "cogview3-plus": Recorded(cogview3_plus),
    "krea2": Recorded(krea2, tokens=32),
    "qwen-image-2.1": Recorded(qwen_image21, resolution=64, tokens=None),
    "qwen-image-edit": Recorded(qwen_image_edit),
    "qwen-image-edit-plus": Recorded(qwen_image_edit_plus),
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
