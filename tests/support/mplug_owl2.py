"""A small mPLUG-Owl2 of random weights, with Llama's vocabulary, and DeQA-Score on it."""

from __future__ import annotations

from typing import Any

import torch

from progrpo.rewards.deqa import DeQA, DeQANetwork, image_processor
from progrpo.rewards.mplug_owl2 import MPLUGOwl2Config

SIDE, QUERIES = 56, 3
VISUAL: dict[str, dict[str, Any]] = {
    "visual_model": {
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": SIDE, "patch_size": 28, "layer_norm_eps": 1e-6, "hidden_act": "quick_gelu"},
        "model_type": "mplug_owl_vision_model",
    },
    "visual_abstractor": {
        **{"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_learnable_queries": QUERIES, "encoder_hidden_size": 16, "layer_norm_eps": 1e-6, "grid_size": 2},
        "model_type": "mplug_owl_visual_abstract",
    },
}
LLAMA: dict[str, Any] = {
    **{"vocab_size": 32000, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64},
}


def small_network() -> DeQANetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DeQANetwork(MPLUGOwl2Config(**LLAMA, visual_config=VISUAL))
        for name, parameter in network.named_parameters():
            parameter.data.normal_(float("norm" in name and name.endswith("weight")), 0.3)
    return network.eval().requires_grad_(False)


def small_deqa(batch_size: int = 16) -> DeQA:
    return DeQA(small_network(), image_processor(SIDE), batch_size)
