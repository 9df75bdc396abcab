"""The half of mPLUG-Owl2 (arXiv 2311.04257) that sees pictures: a tower, and an abstractor of its features.

All parts have their published names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPMLP


@dataclass(frozen=True)
class AbstractorConfig:
    """The sizes of the visual abstractor; the defaults are the published ones."""

    num_learnable_queries: int = 64
    hidden_size: int = 1024
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    intermediate_size: int = 2816
    layer_norm_eps: float = 1e-6
    encoder_hidden_size: int = 1024


class _Encoder(nn.Module):
    """Layers under their published name."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


def _attend(query_BLD: Tensor, key_BSD: Tensor, value_BSD: Tensor, heads: int) -> Tensor:
    """Attention of several heads without a mask, (B, L, D)."""
    split = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query_BLD, key_BSD, value_BSD))
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


# --- the tower, a CLIP's with a norm after all of its tokens ----------------------------------------------------------


class Tower(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = _Patches(config)
        self.encoder = _Encoder([_TowerLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """The features (B, 1 + patches, D)."""
        x_BPD = self.embeddings(pixels_BCHW)
        for layer in self.encoder.layers:
            x_BPD = layer(x_BPD)
        features_BPD: Tensor = self.post_layernorm(x_BPD)
        return features_BPD


class _Patches(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        places = (config.image_size // config.patch_size) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(1, places, width))
        self.pre_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x_BPD = self.patch_embed(pixels_BCHW).flatten(2).transpose(1, 2)
        x_BPD = torch.cat([self.cls_token.expand(len(x_BPD), -1, -1), x_BPD], dim=1) + self.position_embedding
        embedded_BPD: Tensor = self.pre_layernorm(x_BPD)
        return embedded_BPD


class _TowerLayer(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.self_attn = _TowerAttention(config.hidden_size, config.num_attention_heads)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x_BPD: Tensor) -> Tensor:
        x_BPD = x_BPD + self.self_attn(self.input_layernorm(x_BPD))
        x_BPD = x_BPD + self.mlp(self.post_attention_layernorm(x_BPD))
        return x_BPD


class _TowerAttention(nn.Module):
    """Self-attention whose queries, keys and values are rows of one matrix, a head's three side by side."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)
        self._heads = heads

    def forward(self, x_BPD: Tensor) -> Tensor:
        query, key, value = self.query_key_value(x_BPD).unflatten(-1, (self._heads, 3, -1)).unbind(-2)
        attended_BPD: Tensor = self.dense(_attend(query.flatten(2), key.flatten(2), value.flatten(2), self._heads))
        return attended_BPD


# --- the abstractor: learnt queries that read the tower's features ----------------------------------------------------


class Abstractor(nn.Module):
    def __init__(self, config: AbstractorConfig, tower: CLIPVisionConfig, width: int) -> None:
        super().__init__()
        side = tower.image_size // tower.patch_size
        self.encoder = _Encoder([_AbstractorLayer(config, side) for _ in range(config.num_hidden_layers)])
        self.visual_fc = nn.Linear(config.hidden_size, width)
        self.query_embeds = nn.Parameter(torch.zeros(1, config.num_learnable_queries, config.hidden_size))
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, features_BPD: Tensor) -> Tensor:
        """The picture's tokens (B, queries + 1, width of the language model)."""
        x_BQD = self.query_embeds.expand(len(features_BPD), -1, -1)
        for layer in self.encoder.layers:
            x_BQD = layer(x_BQD, features_BPD)
        return torch.cat([self.visual_fc(x_BQD), self.vit_eos.expand(len(x_BQD), -1, -1)], dim=1)


class _AbstractorLayer(nn.Module):
    """A layer under its published name."""

    def __init__(self, config: AbstractorConfig, side: int) -> None:
        super().__init__()
        self.crossattention = _Reader(config, side)

    def forward(self, x_BQD: Tensor, features_BPD: Tensor) -> Tensor:
        read_BQD: Tensor = self.crossattention(x_BQD, features_BPD)
        return read_BQD


class _Reader(nn.Module):
    """A layer of the abstractor. What is added to is the normed queries, as published."""

    def __init__(self, config: AbstractorConfig, side: int) -> None:
        super().__init__()
        self.attention = Resampling(config, side)
        self.output = _Output(config)
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.normk = nn.LayerNorm(config.encoder_hidden_size)

    def forward(self, x_BQD: Tensor, features_BPD: Tensor) -> Tensor:
        x_BQD = self.norm1(x_BQD)
        seen_BSD = torch.cat([x_BQD, self.normk(features_BPD)], dim=1)
        read_BQD: Tensor = self.output(self.attention(x_BQD, seen_BSD), x_BQD)
        return read_BQD


class Resampling(nn.Module):
    """Attention of the queries to themselves and to the features, with positions in queries and keys."""

    q_pos_embed: Tensor
    k_pos_embed: Tensor

    def __init__(self, config: AbstractorConfig, side: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(config.encoder_hidden_size, width)
        self.value = nn.Linear(config.encoder_hidden_size, width)
        self._config = config
        self._side = side
        for name, positions in self.positions().items():
            self.register_buffer(name, positions)

    def positions(self) -> dict[str, Tensor]:
        """Sines and cosines of the queries' numbers, and of the patches' columns and rows; 0 for the class token."""
        width = self._config.hidden_size
        y_SS, x_SS = torch.meshgrid(torch.arange(self._side), torch.arange(self._side), indexing="ij")
        patches_PD = torch.cat([_waves(axis.flatten(), width // 2) for axis in (x_SS, y_SS)], dim=1)
        return {
            "q_pos_embed": _waves(torch.arange(self._config.num_learnable_queries), width),
            "k_pos_embed": torch.cat([torch.zeros(1, width), patches_PD]),
        }

    def forward(self, x_BQD: Tensor, seen_BSD: Tensor) -> Tensor:
        query_BQD = self.query(x_BQD + self.q_pos_embed)
        key_BSD = self.key(seen_BSD + torch.cat([self.q_pos_embed, self.k_pos_embed]))
        return _attend(query_BQD, key_BSD, self.value(seen_BSD), self._config.num_attention_heads)


def _waves(at_N: Tensor, width: int) -> Tensor:
    """sin(n w_k) and cos(n w_k) with w_k = 10000^(-2k / width), (N, width)."""
    frequency_K = 10_000 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle_NK = at_N[:, None] * frequency_K
    return torch.cat([angle_NK.sin(), angle_NK.cos()], dim=1).float()


class _Output(nn.Module):
    def __init__(self, config: AbstractorConfig) -> None:
        super().__init__()
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size)
        self.mlp = _GatedMLP(config)

    def forward(self, attended_BQD: Tensor, x_BQD: Tensor) -> Tensor:
        x_BQD = x_BQD + self.out_proj(attended_BQD)
        x_BQD = x_BQD + self.mlp(self.norm2(x_BQD))
        return x_BQD


class _GatedMLP(nn.Module):
    def __init__(self, config: AbstractorConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_ln = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)

    def forward(self, x_BQD: Tensor) -> Tensor:
        mixed_BQD: Tensor = self.w2(self.ffn_ln(F.silu(self.w1(x_BQD)) * self.w3(x_BQD)))
        return mixed_BQD
