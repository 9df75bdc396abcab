"""A SigLIP's picture network of random weights, and a head of the aesthetic predictor v2.5 for it."""

from __future__ import annotations

from itertools import pairwise

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from progrpo.rewards.aesthetic_v2_5 import WIDTHS, AestheticV25, convert_head, image_processor
from progrpo.rewards.settings import RewardTerm

WIDTH, SIDE = 32, 56


def small_siglip() -> SiglipVisionModel:
    config = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=14,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiglipVisionModel(config)
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.3)
    return model.eval()


def published_head() -> dict[str, torch.Tensor]:
    """The head's weights by their published names: 0, 2, 4, 6 and 8, since dropouts stand between the layers."""
    generator = torch.Generator().manual_seed(1)
    state: dict[str, torch.Tensor] = {}
    for i, (inputs, outputs) in enumerate(pairwise((WIDTH, *WIDTHS))):
        weight_OI = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        state[f"scoring_head.{2 * i}.weight"] = weight_OI
        state[f"scoring_head.{2 * i}.bias"] = torch.randn(outputs, generator=generator)
    return state


def small_aesthetic_v2_5(batch_size: int = 16) -> AestheticV25:
    head = convert_head(RewardTerm("aesthetic_v2_5"), published_head(), WIDTH)
    return AestheticV25(small_siglip(), head, image_processor(SIDE), batch_size)
