"""The networks that the built-in flow models share: small ones of diffusers' and transformers' own classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LATENT = (8, 16, 16)
CLIP_WIDTH = 64
_JOINT_WIDTH = 128  # T5's width; at least the sum of the CLIP widths, else diffusers crops them without a word
_SHIFT = 2.0


def build_vae() -> AutoencoderKL:
    """Build the autoencoder: 64x64x3 -> 16x16x8, 0.7 M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT[0],
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=False,
    )


class TextStack(nn.Module):
    """Two CLIP text encoders and a T5 encoder with their tokenizers, called as StableDiffusion3Pipeline calls them."""

    def __init__(self, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5Tokenizer) -> None:
        super().__init__()
        self.clip_tokenizer = clip_tokenizer
        self.t5_tokenizer = t5_tokenizer
        self.clip_1 = self._clip("quick_gelu")
        self.clip_2 = self._clip("gelu")
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(self.t5_tokenizer),
                d_model=_JOINT_WIDTH,
                d_kv=32,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                pad_token_id=self.t5_tokenizer.pad_token_id,
                eos_token_id=self.t5_tokenizer.eos_token_id,
            )
        )

    def _clip(self, activation: str) -> CLIPTextModelWithProjection:
        tokenizer = self.clip_tokenizer
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=CLIP_WIDTH,
                intermediate_size=2 * CLIP_WIDTH,
                projection_dim=CLIP_WIDTH,
                num_hidden_layers=3,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                hidden_act=activation,
                bos_token_id=tokenizer.bos_token_id,
                # with the default, the pooled embedding is that of the first position and holds no prompt
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )

    def tokenize(self, texts: list[str], max_sequence_length: int) -> tuple[Tensor, Tensor]:
        """Tokenize texts into CLIP ids (N, the tokenizer's length) and T5 ids (N, max_sequence_length)."""
        clip = self.clip_tokenizer(texts, padding="max_length", truncation=True)
        t5 = self.t5_tokenizer(texts, padding="max_length", max_length=max_sequence_length, truncation=True)
        return torch.tensor(clip["input_ids"]), torch.tensor(t5["input_ids"])

    def forward(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode ids into token embeddings (N, CLIP's length + L, 128) and pooled embeddings (N, 128)."""
        clips = [encoder(clip_ids, output_hidden_states=True) for encoder in (self.clip_1, self.clip_2)]
        tokens = torch.cat([c.hidden_states[-2] for c in clips], dim=-1)
        tokens = nn.functional.pad(tokens, (0, _JOINT_WIDTH - tokens.shape[-1]))
        pooled = torch.cat([c.text_embeds for c in clips], dim=-1)
        return torch.cat([tokens, self.t5(t5_ids)[0]], dim=1), pooled


def build_transformer() -> SD3Transformer2DModel:
    """Build the flow model's denoiser: four joint blocks of width 128 over 64 picture tokens, 2.3 M parameters."""
    return SD3Transformer2DModel(
        sample_size=LATENT[1],
        patch_size=2,
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=_JOINT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=LATENT[1] // 2,
        qk_norm="rms_norm",
    )


def assemble(vae: AutoencoderKL, text: TextStack, transformer: SD3Transformer2DModel) -> StableDiffusion3Pipeline:
    """Put the networks into one pipeline. Its `save_pretrained` writes diffusers' folder format."""
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=_SHIFT),
        vae=vae,
        text_encoder=text.clip_1,
        tokenizer=text.clip_tokenizer,
        text_encoder_2=text.clip_2,
        tokenizer_2=text.clip_tokenizer,
        text_encoder_3=text.t5,
        tokenizer_3=text.t5_tokenizer,
    )


def load_parts(folder: Path, text: TextStack, transformer: SD3Transformer2DModel) -> AutoencoderKL:
    """Load the weights of an exported pipeline's folder into both, and return its autoencoder.

    Every token keeps its embedding, also where the folder's tokenizer numbers tokens in another order than `text`.
    """
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    for encoder, trained in ((text.clip_1, pipeline.text_encoder), (text.clip_2, pipeline.text_encoder_2)):
        _load_encoder(encoder, text.clip_tokenizer, trained, pipeline.tokenizer)
    _load_encoder(text.t5, text.t5_tokenizer, pipeline.text_encoder_3, pipeline.tokenizer_3)
    transformer.load_state_dict(pipeline.transformer.state_dict())
    pipeline.vae.register_to_config(_name_or_path="shapes-flow")  # else an export would hold the path of this folder
    return pipeline.vae


@torch.no_grad()
def _load_encoder(
    encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trained: PreTrainedModel,
    its_tokenizer: PreTrainedTokenizerBase,
) -> None:
    embedding = encoder.get_input_embeddings().weight.clone()
    encoder.load_state_dict(trained.state_dict())
    ours, theirs = tokenizer.get_vocab(), its_tokenizer.get_vocab()
    for token in ours.keys() & theirs.keys():
        embedding[ours[token]] = trained.get_input_embeddings().weight[theirs[token]]
    encoder.get_input_embeddings().weight.copy_(embedding)


def to_tensor(pictures_NHWC: np.ndarray) -> Tensor:
    """Convert pictures, uint8 (N, H, W, 3), to a tensor, float32 (N, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(pictures_NHWC).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_pictures(x_NCHW: Tensor) -> np.ndarray:
    """Convert a tensor, float (N, 3, H, W) in [-1, 1], to pictures, uint8 (N, H, W, 3)."""
    return x_NCHW.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
