"""A Stable Diffusion 3 pipeline of the true classes and of random weights; a call takes milliseconds."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # tensors here are tiny: on a busy machine threads wait for each other for seconds

WIDTH = 16  # of the T5, of the joined CLIPs and of the tokens: diffusers pads or crops silently if they differ
CLIP_TOKENS = 16


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CLIP_TOKENS)


def _clip_encoder(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH // 2,
            intermediate_size=WIDTH,
            projection_dim=WIDTH // 2,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_factor=8.0,  # random, but not blind to the text
        )
    )


def _t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -1.0)]
    return T5Tokenizer(vocab=[*special, *((letter, -2.0) for letter in string.ascii_lowercase)], extra_ids=0)


def _t5_encoder(tokenizer: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=4, d_ff=WIDTH, num_layers=1, num_heads=2)
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


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.5,
        shift_factor=0.06,
    )


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder written by save_pretrained: latents of 4x8x8, pictures of 16x16, time shift 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    clip_1, clip_2, t5 = _clip_tokenizer(), _clip_tokenizer(), _t5_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusion3Pipeline(
            transformer=_denoiser(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=_clip_encoder(clip_1),
            tokenizer=clip_1,
            text_encoder_2=_clip_encoder(clip_2),
            tokenizer_2=clip_2,
            text_encoder_3=_t5_encoder(t5),
            tokenizer_3=t5,
        )
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    pipeline.save_pretrained(folder)
    return folder
