"""Attention, GELU and decoders of a model in low precision on a CPU, where those of torch and diffusers are slow."""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from diffusers.models.activations import GELU
from torch import nn

from progrpo.policies.decoder import optimize_for_cpu
from progrpo.policies.family import ModelFamily


def is_low_precision_on_cpu(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a model runs in low precision on a CPU, where some of what torch and diffusers have is slow.

    Torch's fused attention has a gradient slower than the whole rest there. Torch's products without it are in float32
    and take two to three times as long as products in the dtype itself.
    """
    return dtype != torch.float32 and device.type == "cpu"


def adapt_to_cpu(family: ModelFamily) -> None:
    """Give a model in low precision on a CPU layers and processors that are faster there. In place."""
    if is_low_precision_on_cpu(family.dtype, family.device):
        optimize_for_cpu(family.pipeline.vae)
        for denoiser in family.denoisers.values():
            if family.plain_attention is not None:
                denoiser.set_attn_processor(family.plain_attention())
            _take_exact_gelu(denoiser)


def _take_exact_gelu(denoiser: ModelMixin) -> None:
    """Replace GELU's approximation by tanh with GELU itself, which takes a sixth of the time in bfloat16.

    They differ by 5e-4 at most. In the output of the built-in flow model that is a thirtieth of bfloat16's rounding.
    """
    for layer in denoiser.modules():
        if isinstance(layer, GELU | nn.GELU) and layer.approximate == "tanh":
            layer.approximate = "none"
