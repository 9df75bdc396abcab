"""The kernels of attention: diffusers' backends, and matrix products where torch's fused kernels are slow."""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


def set_attention_backend(denoiser: ModelMixin, backend: str) -> None:
    """Have the network attend by one of diffusers' backends.

    ValueError for a network whose attention knows none, and where the backend's package is missing.
    """
    processors = [getattr(module, "processor", None) for module in denoiser.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ValueError(
            f"model.attention: the attention of a {type(denoiser).__name__} has no backends in diffusers; leave it at"
            " default"
        )
    try:
        with attention_backend("native"):  # which puts back the backend of all other networks
            denoiser.set_attention_backend(backend)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model.attention: {backend} cannot be used: {reason}") from error


class JointAttention:
    """A processor of attention over a picture's places and a text's tokens together (arXiv 2403.03206).

    Diffusers has such a processor for U-Nets, `AttnProcessor`, and none for these networks.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return (B, places, width), and (B, tokens, width) as well where the layer attends to a text."""
        projected = [
            _heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k, None)),
        ]
        if encoder_hidden_states is not None:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            norms = (attn.norm_added_q, attn.norm_added_k, None)
            projected.append(_heads(attn, encoder_hidden_states, layers, norms))
        query, key, value = (torch.cat(streams, dim=2).flatten(0, 1) for streams in zip(*projected, strict=True))
        with torch.autocast(query.device.type, enabled=False):  # which would raise the scores to float32 and back
            scores = torch.baddbmm(query.new_empty(1, 1, 1), query, key.mT, beta=0, alpha=attn.scale)
            attended = (scores.softmax(dim=-1) @ value).unflatten(0, (-1, attn.heads))
        # each part contiguous: a layer multiplies others by a copy of its weights for every row
        places, tokens = (
            part.transpose(1, 2).flatten(2) for part in attended.tensor_split([hidden_states.shape[1]], dim=2)
        )
        for layer in attn.to_out:
            places = layer(places)
        if encoder_hidden_states is None:
            return places
        return places, tokens if attn.context_pre_only else attn.to_add_out(tokens)


def _heads(
    attn: Attention, states: Tensor, layers: tuple[nn.Module, ...], norms: tuple[nn.Module | None, ...]
) -> list[Tensor]:
    """The queries, keys and values of one stream, each (B, heads, tokens, width of a head), in one dtype.

    Norms compute in float32, before heads are moved, where rows are contiguous.
    """
    split = [layer(states).unflatten(2, (attn.heads, -1)) for layer in layers]
    normed = [x if norm is None else norm(x).to(x.dtype) for x, norm in zip(split, norms, strict=True)]
    return [x.transpose(1, 2) for x in normed]
