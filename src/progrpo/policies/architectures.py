"""The architectures of published models by their hub ids, from their config.json files.

With one a plan needs neither the hub nor a token. A model that is not here is planned from its folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import cast

NetworkConfig = dict[str, object]
"""The content of a config.json."""


@dataclass(frozen=True)
class Architecture:
    """The class of a pipeline, and the library, class and configuration of each of its components by name.

    `settings` are the pipeline's own, such as a boundary between two denoisers.
    """

    pipeline: str
    components: dict[str, tuple[str, str, NetworkConfig]]
    settings: dict[str, object] = field(default_factory=dict)


_CLIP_L: NetworkConfig = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_CLIP_L |= {"projection_dim": 768, "vocab_size": 49408, "max_position_embeddings": 77}
_CLIP_G = _CLIP_L | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
_CLIP_G |= {"num_attention_heads": 20, "projection_dim": 1280}
_T5: NetworkConfig = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
}
_T5 |= {"feed_forward_proj": "gated-gelu"}

_CLIP_TEXT, _CLIP_PROJECTED = ("transformers", "CLIPTextModel"), ("transformers", "CLIPTextModelWithProjection")
_EULER: tuple[str, str, NetworkConfig] = ("diffusers", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
_NOISE: NetworkConfig = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
}
_DDIM = ("diffusers", "DDIMScheduler", _NOISE)


def _vae(latent_channels: int, **more: object) -> tuple[str, str, NetworkConfig]:
    config: NetworkConfig = {
        "latent_channels": latent_channels,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        **more,
    }
    return "diffusers", "AutoencoderKL", config


def _sd3(layers: int, heads: int, **transformer: object) -> Architecture:
    config: NetworkConfig = {"num_layers": layers, "num_attention_heads": heads, "caption_projection_dim": 64 * heads}
    config |= {"sample_size": 128, "in_channels": 16, "out_channels": 16, "patch_size": 2, "attention_head_dim": 64}
    config |= {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, **transformer}
    return Architecture(
        "StableDiffusion3Pipeline",
        {
            "transformer": ("diffusers", "SD3Transformer2DModel", config),
            "scheduler": _EULER,
            "vae": _vae(
                16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609
            ),
            "text_encoder": (*_CLIP_PROJECTED, _CLIP_L),
            "text_encoder_2": (*_CLIP_PROJECTED, _CLIP_G),
            "text_encoder_3": ("transformers", "T5EncoderModel", _T5),
        },
    )


def _flux(guidance_embeds: bool) -> Architecture:
    config: NetworkConfig = {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24}
    config |= {"attention_head_dim": 128, "joint_attention_dim": 4096, "pooled_projection_dim": 768}
    return Architecture(
        "FluxPipeline",
        {
            "transformer": ("diffusers", "FluxTransformer2DModel", config | {"guidance_embeds": guidance_embeds}),
            "scheduler": _EULER,
            "vae": _vae(
                16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159
            ),
            "text_encoder": (*_CLIP_TEXT, _CLIP_L),
            "text_encoder_2": ("transformers", "T5EncoderModel", _T5),
        },
    )


_QWEN3: NetworkConfig = {
    "vocab_size": 151936,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
_QWEN3_4B: NetworkConfig = {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}


def _klein(layers: int, single_layers: int, heads: int, text: NetworkConfig) -> Architecture:
    config: NetworkConfig = {"num_layers": layers, "num_single_layers": single_layers, "num_attention_heads": heads}
    config |= {"joint_attention_dim": 3 * cast(int, text["hidden_size"]), "guidance_embeds": False}
    return Architecture(
        "Flux2KleinPipeline",
        {
            "transformer": ("diffusers", "Flux2Transformer2DModel", config),
            "scheduler": _EULER,
            "vae": ("diffusers", "AutoencoderKLFlux2", {}),
            "text_encoder": ("transformers", "Qwen3ForCausalLM", _QWEN3 | text),
        },
    )


def _qwen_image() -> Architecture:
    text: NetworkConfig = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
    }
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4}
    vision: NetworkConfig = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    }
    encoder: NetworkConfig = {"text_config": text, "vision_config": vision}
    return Architecture(
        "QwenImagePipeline",
        {
            "transformer": ("diffusers", "QwenImageTransformer2DModel", {}),
            "scheduler": _EULER,
            "vae": ("diffusers", "AutoencoderKLQwenImage", {}),
            "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration", encoder),
        },
    )


def _sd1() -> Architecture:
    return Architecture(
        "StableDiffusionPipeline",
        {
            "unet": ("diffusers", "UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}),
            "scheduler": _DDIM,
            "vae": _vae(4),
            "text_encoder": (*_CLIP_TEXT, _CLIP_L),
        },
    )


def _sdxl() -> Architecture:
    config: NetworkConfig = {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    return Architecture(
        "StableDiffusionXLPipeline",
        {
            "unet": ("diffusers", "UNet2DConditionModel", config),
            "scheduler": _DDIM,
            "vae": _vae(4, scaling_factor=0.13025),
            "text_encoder": (*_CLIP_TEXT, _CLIP_L),
            "text_encoder_2": (*_CLIP_PROJECTED, _CLIP_G),
        },
    )


def _wan_of_two() -> Architecture:
    """Wan 2.2: two networks of Wan 2.1's size by noise level."""
    one = _wan(heads=40, ffn_dim=13824, layers=40)
    both = one.components | {"transformer_2": one.components["transformer"]}
    return replace(one, components=both, settings={"boundary_ratio": 0.875})


def _wan(heads: int, ffn_dim: int, layers: int) -> Architecture:
    config: NetworkConfig = {
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "ffn_dim": ffn_dim,
        "num_layers": layers,
    }
    return Architecture(
        "WanPipeline",
        {
            "transformer": ("diffusers", "WanTransformer3DModel", config | {"text_dim": 4096}),
            "scheduler": _EULER,
            "vae": ("diffusers", "AutoencoderKLWan", {}),
            "text_encoder": ("transformers", "UMT5EncoderModel", _T5 | {"vocab_size": 256384}),
        },
    )


def _z_image() -> Architecture:
    return Architecture(
        "ZImagePipeline",
        {
            "transformer": ("diffusers", "ZImageTransformer2DModel", {}),
            "scheduler": _EULER,
            "vae": _vae(
                16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159
            ),
            "text_encoder": ("transformers", "Qwen3Model", _QWEN3 | _QWEN3_4B),
        },
    )


def _sana() -> Architecture:
    """SANA of 1.6 billion parameters."""
    sana: NetworkConfig = {"sample_size": 32}
    block = {"block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3, "qkv_multiscales": [[]] * 3 + [[5]] * 3}
    autoencoder: NetworkConfig = {
        f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in block.items()
    }
    autoencoder |= {"encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "decoder_layers_per_block": [3] * 6}
    autoencoder |= {"downsample_block_type": "conv", "upsample_block_type": "interpolate", "scaling_factor": 0.41407}
    gemma2: NetworkConfig = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    gemma2 |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000}
    return Architecture(
        "SanaPipeline",
        {
            "transformer": ("diffusers", "SanaTransformer2DModel", sana),
            "scheduler": _EULER,
            "vae": ("diffusers", "AutoencoderDC", autoencoder),
            "text_encoder": ("transformers", "Gemma2Model", gemma2),
        },
    )


_KLEIN_4B = _klein(5, 20, 24, _QWEN3_4B)
_KLEIN_9B = _klein(8, 24, 32, {"hidden_size": 4096, "intermediate_size": 12288})
_EDIT_PLUS = replace(_qwen_image(), pipeline="QwenImageEditPlusPipeline")
ARCHITECTURES: dict[str, Architecture] = {
    "stabilityai/stable-diffusion-3.5-medium": _sd3(
        24, 24, pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=list(range(13))
    ),
    "stabilityai/stable-diffusion-3.5-large": _sd3(38, 38, pos_embed_max_size=192, qk_norm="rms_norm"),
    "stabilityai/stable-diffusion-3-medium-diffusers": _sd3(24, 24, pos_embed_max_size=192),
    "black-forest-labs/FLUX.1-dev": _flux(guidance_embeds=True),
    "black-forest-labs/FLUX.1-schnell": _flux(guidance_embeds=False),
    "black-forest-labs/FLUX.1-Kontext-dev": replace(_flux(guidance_embeds=True), pipeline="FluxKontextPipeline"),
    "black-forest-labs/FLUX.2-klein-base-4B": _KLEIN_4B,
    "black-forest-labs/FLUX.2-klein-4B": _KLEIN_4B,
    "black-forest-labs/FLUX.2-klein-base-9B": _KLEIN_9B,
    "black-forest-labs/FLUX.2-klein-9B": _KLEIN_9B,
    "Qwen/Qwen-Image": _qwen_image(),
    "Qwen/Qwen-Image-Edit-2509": _EDIT_PLUS,
    "Qwen/Qwen-Image-Edit-2511": _EDIT_PLUS,
    "Tongyi-MAI/Z-Image": _z_image(),
    "Tongyi-MAI/Z-Image-Turbo": _z_image(),
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": _sana(),
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": _sana(),
    "CompVis/stable-diffusion-v1-4": _sd1(),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _sd1(),
    "stabilityai/stable-diffusion-xl-base-1.0": _sdxl(),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _wan(heads=12, ffn_dim=8960, layers=30),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan(heads=40, ffn_dim=13824, layers=40),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _wan_of_two(),
}
