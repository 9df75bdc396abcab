"""mPLUG-Owl2 (arXiv 2311.04257) as far as the next token after a question about one picture needs it.

transformers has no such network, so its parts are written here. They have the published names, so that a checkpoint is
loaded as it is. The language model is transformers' Llama with some of its modules replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlamaModel, initialization
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from progrpo.rewards.mplug_owl2_vision import Abstractor, AbstractorConfig, Resampling, Tower

_TOWER = {
    **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    **{"image_size": 448, "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-6},
}


class MPLUGOwl2Config(LlamaConfig):
    """Llama's configuration with `visual_config`: the sizes of tower and abstractor by their published names."""

    model_type = "mplug_owl2"
    visual_config: dict[str, Any] | None = None

    @property
    def tower(self) -> CLIPVisionConfig:
        given = (self.visual_config or {}).get("visual_model", {})
        return CLIPVisionConfig(**{name: given.get(name, default) for name, default in _TOWER.items()})

    @property
    def abstractor(self) -> AbstractorConfig:
        given = (self.visual_config or {}).get("visual_abstractor", {})
        return AbstractorConfig(**{f.name: given.get(f.name, f.default) for f in fields(AbstractorConfig)})


class MPLUGOwl2(LlamaForCausalLM):
    """A Llama whose norms, keys and values have weights of their own for a picture's tokens.

    The picture's tokens are the abstractor's queries and an end token, at a fixed place in the question.
    """

    config_class = MPLUGOwl2Config
    # some checkpoints hold these sines and cosines, others do not
    _keys_to_ignore_on_load_missing = (r"\.[qk]_pos_embed$",)
    before: Sequence[int] = ()
    """The question's tokens before the picture."""
    after: Sequence[int] = ()
    """The question's tokens after it."""

    def __init__(self, config: MPLUGOwl2Config) -> None:
        super().__init__(config)
        start = len(self.before)
        self.model = _Owl(config, slice(start, start + config.abstractor.num_learnable_queries + 1))
        self.post_init()

    @torch.no_grad()
    def next_logits(self, pixels_BCHW: Tensor) -> Tensor:
        """The logits (B, V) of the token after the question about each picture (B, 3, H, W)."""
        embedding = self.model.embed_tokens
        picture_BPD = self.model.visual_abstractor(self.model.vision_model(pixels_BCHW.to(self.device, self.dtype)))
        words_LD = [embedding(torch.tensor(ids, device=self.device)) for ids in (self.before, self.after)]
        first_BLD, last_BLD = (words.expand(len(picture_BPD), -1, -1) for words in words_LD)
        embedded_BLD = torch.cat([first_BLD, picture_BPD, last_BLD], dim=1)
        logits_BV: Tensor = self(inputs_embeds=embedded_BLD, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits_BV


class _Owl(LlamaModel):
    """Llama without its last layer, with the tower and the abstractor."""

    def __init__(self, config: MPLUGOwl2Config, picture: slice) -> None:
        super().__init__(config)
        width = config.hidden_size
        keys = config.num_key_value_heads * config.head_dim

        def norms() -> _Multiway:
            return _Multiway(lambda: LlamaRMSNorm(width, eps=config.rms_norm_eps), picture)

        def projections() -> _Multiway:
            return _Multiway(lambda: nn.Linear(width, keys, bias=config.attention_bias), picture)

        for layer in self.layers:
            layer.input_layernorm = norms()
            layer.post_attention_layernorm = norms()
            layer.self_attn.k_proj = projections()
            layer.self_attn.v_proj = projections()
        self.vision_model = Tower(config.tower)
        self.visual_abstractor = Abstractor(config.abstractor, config.tower, width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Resampling):
            for name, positions in module.positions().items():
                initialization.copy_(getattr(module, name), positions)


class _Multiway(nn.Module):
    """Two modules of one shape: the first for words, the second for the picture's tokens."""

    def __init__(self, make: Callable[[], nn.Module], picture: slice) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([make(), make()])
        self._picture = picture

    def forward(self, x_BLD: Tensor) -> Tensor:
        words, picture = self.multiway
        first_BLD, last_BLD = x_BLD[:, : self._picture.start], x_BLD[:, self._picture.stop :]
        return torch.cat([words(first_BLD), picture(x_BLD[:, self._picture]), words(last_BLD)], dim=1)
