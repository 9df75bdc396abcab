"""Attention as matrix products, for where torch's fused kernels are slow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class JointAttention:
    """A processor for attention over a picture's places and a text's tokens together (arXiv 2403.03206).

    Diffusers has one for U-Nets, `AttnProcessor`, and none for these networks.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, places, width), and beside it (B, tokens, width) where the layer attends to a text as well."""
        projected = [
            _heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k, None)),
        ]
        if encoder_hidden_states is not None:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            norms = (attn.norm_added_q, attn.norm_added_k, None)
            projected.append(_heads(attn, encoder_hidden_states, layers, norms))
        query, key, value = (torch.cat(parts, dim=2).flatten(0, 1) for parts in zip(*projected, strict=True))
        attended = attn.get_attention_scores(query, key) @ value
        attended = attended.unflatten(0, (-1, attn.heads)).transpose(1, 2).flatten(2)
        places, tokens = attended.tensor_split([hidden_states.shape[1]], dim=1)
        for layer in attn.to_out:
            places = layer(places)
        if encoder_hidden_states is None:
            return places
        return places, tokens if attn.context_pre_only else attn.to_add_out(tokens)


def _heads(attn: Any, states: Tensor, layers: tuple[Any, ...], norms: tuple[Any, ...]) -> list[Tensor]:
    """Queries, keys and values of one stream, each (B, heads, tokens, width of a head)."""
    split = [layer(states).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer in layers]
    return [x if norm is None else norm(x) for x, norm in zip(split, norms, strict=True)]
