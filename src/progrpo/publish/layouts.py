"""The layouts of LoRA files by format and model family: the place of each layer in the model of another tool.

What the readers take is from their sources. `kohya`: sd-scripts (networks/lora.py, lora_sd3.py, lora_flux.py) for
Stable Diffusion and FLUX.1, musubi-tuner (networks/lora_*.py) for the others. `comfyui`: ComfyUI (comfy/lora.py and
comfy/utils.py). Only layers that these readers take have a place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

Format = Literal["diffusers", "kohya", "comfyui", "merged"]
"""The formats of an export. `diffusers` is a run's own LoRA file, and `merged` a whole model."""
FORMATS: tuple[Format, ...] = get_args(Format)

Config = Mapping[str, Any]
"""The denoiser's config.json."""
Places = Callable[[str, Config], "Place | None"]
"""The place of one of our layers; None where the reader takes no LoRA of it."""


@dataclass(frozen=True)
class Place:
    """A module of the reader's model, or those rows of it that are one of our layers."""

    module: str
    part: int = 0
    heights: tuple[int, ...] = (1,)
    """The heights of the layers that are stacked in the module, in proportion; `part` is the number of ours."""
    swapped: bool = False
    """Whether the two halves of the module's rows are in the other order."""


@dataclass(frozen=True)
class Layout:
    """The names of a LoRA's tensors in a file."""

    place: Places
    flat: bool
    """Whether names are kohya's `lora_unet_a_b.lora_down.weight`, else `a.b.lora_A.weight`."""

    def names(self, module: str) -> tuple[str, str, str]:
        """The names of a module's first matrix, its second one and its alpha."""
        if self.flat:
            base = f"lora_unet_{module.replace('.', '_')}"
            return f"{base}.lora_down.weight", f"{base}.lora_up.weight", f"{base}.alpha"
        return f"{module}.lora_A.weight", f"{module}.lora_B.weight", f"{module}.alpha"


def formats_of(pipeline: str) -> tuple[Format, ...]:
    """The formats that the models of a diffusers pipeline have."""
    return tuple(name for name in FORMATS if name not in LAYOUTS or pipeline in LAYOUTS[name])


# --- transformers: numbered blocks, and the layers outside of them ----------------------------------------------------


@dataclass(frozen=True)
class _Blocks:
    """Numbered blocks, with the places of their layers below the block."""

    ours: str
    theirs: str
    layers: Mapping[str, Place]


def _renamed(names: Mapping[str, str]) -> dict[str, Place]:
    return {ours: Place(theirs) for ours, theirs in names.items()}


def _stacked(module: str, heights: Mapping[str, int]) -> dict[str, Place]:
    """The places of layers that lie one above another in a module."""
    return {layer: Place(module, part, tuple(heights.values())) for part, layer in enumerate(heights)}


def _qkv(module: str, *layers: str) -> dict[str, Place]:
    return _stacked(module, dict.fromkeys(layers, 1))


def _place_in(blocks: Iterable[_Blocks], layer: str) -> Place | None:
    for kind in blocks:
        match = re.fullmatch(rf"{kind.ours}\.(\d+)\.(.+)", layer)
        place = kind.layers.get(match[2]) if match else None
        if match and place:
            return replace(place, module=f"{kind.theirs}.{match[1]}.{place.module}")
    return None


def _theirs(*blocks: _Blocks, others: Mapping[str, str] = MappingProxyType({}), prefix: str = "") -> Places:
    """Places by the reader's own names."""

    def place(layer: str, config: Config) -> Place | None:
        own = _place_in(blocks, layer) or (Place(others[layer]) if layer in others else None)
        return own and replace(own, module=prefix + own.module)

    return place


def _ours(*blocks: _Blocks, others: Iterable[str] = (), instead: Mapping[str, str] = MappingProxyType({})) -> Places:
    """Places by our names, which the reader maps to its own: no layers are stacked. A few have the reader's name."""

    def place(layer: str, config: Config) -> Place | None:
        if layer in instead:
            return Place(f"diffusion_model.{instead[layer]}")
        return Place(f"transformer.{layer}") if _place_in(blocks, layer) or layer in others else None

    return place


_FEED_FORWARD = {
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_TWO_STREAMS = {
    **_qkv("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    **_qkv("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    **_renamed({"attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj"}),
}
_FLUX = (
    _Blocks(
        "transformer_blocks",
        "double_blocks",
        {
            **_TWO_STREAMS,
            **_renamed(_FEED_FORWARD),
            **_renamed({"norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin"}),
        },
    ),
    _Blocks(
        "single_transformer_blocks",
        "single_blocks",
        {
            **_stacked("linear1", {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1, "proj_mlp": 4}),
            **_renamed({"proj_out": "linear2", "norm.linear": "modulation.lin"}),
        },
    ),
)
_FLUX_EMBEDDERS = tuple(
    f"time_text_embed.{name}_embedder.linear_{i}" for name in ("timestep", "text", "guidance") for i in (1, 2)
)
_FLUX_OTHERS = ("x_embedder", "context_embedder", "norm_out.linear", "proj_out", *_FLUX_EMBEDDERS)

_FLUX_2 = (
    _Blocks(
        "transformer_blocks",
        "double_blocks",
        {
            **_TWO_STREAMS,
            **_renamed({"ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2"}),
            **_renamed({"ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2"}),
        },
    ),
    _Blocks(
        "single_transformer_blocks",
        "single_blocks",
        _renamed({"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}),
    ),
)
_FLUX_2_OTHERS = ("x_embedder", "context_embedder", "norm_out.linear", "proj_out")
_FLUX_2_INSTEAD = {
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
}

_SD3 = _Blocks(
    "transformer_blocks",
    "joint_blocks",
    {
        **_qkv("x_block.attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
        **_qkv("x_block.attn2.qkv", "attn2.to_q", "attn2.to_k", "attn2.to_v"),
        **_qkv("context_block.attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        **_renamed(
            {
                "attn.to_out.0": "x_block.attn.proj",
                "attn2.to_out.0": "x_block.attn2.proj",
                "attn.to_add_out": "context_block.attn.proj",
                "ff.net.0.proj": "x_block.mlp.fc1",
                "ff.net.2": "x_block.mlp.fc2",
                "ff_context.net.0.proj": "context_block.mlp.fc1",
                "ff_context.net.2": "context_block.mlp.fc2",
                "norm1.linear": "x_block.adaLN_modulation.1",
                "norm1_context.linear": "context_block.adaLN_modulation.1",
            }
        ),
    },
)
_SD3_EMBEDDERS = tuple(f"time_text_embed.{name}_embedder.linear_{i}" for name in ("timestep", "text") for i in (1, 2))
_SD3_OTHERS = ("pos_embed.proj", "context_embedder", "norm_out.linear", "proj_out", *_SD3_EMBEDDERS)


def _in_sd3(layer: str, config: Config) -> Place | None:
    """Places in sd-scripts' SD3, whose last block has shift and scale of its text in the other order than diffusers."""
    place = _place_in([_SD3], layer)
    is_last = layer == f"transformer_blocks.{config['num_layers'] - 1}.norm1_context.linear"
    return replace(place, swapped=True) if place and is_last else place


_QWEN_IMAGE = _Blocks(
    "transformer_blocks",
    "transformer_blocks",
    _renamed(
        {
            name: name
            for name in (
                *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
                *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
                *(f"{stream}_mlp.{name}" for stream in ("img", "txt") for name in ("net.0.proj", "net.2")),
                *("img_mod.1", "txt_mod.1"),
            )
        }
    ),
)
_QWEN_IMAGE_OTHERS = (
    *("img_in", "txt_in", "norm_out.linear", "proj_out"),
    *(f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)),
)

_WAN = _Blocks(
    "blocks",
    "blocks",
    _renamed(
        {
            **{
                f"{ours}.{name}": f"{theirs}.{letter}"
                for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
                for name, letter in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
            },
            "ffn.net.0.proj": "ffn.0",
            "ffn.net.2": "ffn.2",
        }
    ),
)
_WAN_OTHERS = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
}

# --- U-Nets -----------------------------------------------------------------------------------------------------------

_ATTENTION = r"transformer_blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"
_IN_UNET = re.compile(
    r"((?P<side>down|up)_blocks\.(?P<block>\d+)|mid_block)\.(?P<kind>attentions|resnets|downsamplers|upsamplers)"
    rf"\.(?P<number>\d+)\.(?P<rest>proj_in|proj_out|{_ATTENTION}|conv1|conv2|time_emb_proj|conv_shortcut|conv)"
)
_UNET_OTHERS = (
    *(f"{name}_embedding.linear_{i}" for name in ("time", "add") for i in (1, 2)),
    *("conv_in", "conv_out"),
)


def _in_unet(layer: str, config: Config) -> Place | None:
    """Places by diffusers' names, which sd-scripts has for Stable Diffusion 1 and 2."""
    return Place(layer) if _IN_UNET.fullmatch(layer) else None


def _in_whole_unet(layer: str, config: Config) -> Place | None:
    """The place with the layers outside of the blocks, which ComfyUI takes and sd-scripts does not."""
    return Place(layer) if layer in _UNET_OTHERS else _in_unet(layer, config)


_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _in_sgm_unet(layer: str, config: Config) -> Place | None:
    """Places in the U-Net of Stability AI, which sd-scripts has for Stable Diffusion XL.

    Its blocks are numbered through: one for each residual network, and one for each change of size.
    """
    match = _IN_UNET.fullmatch(layer)
    if match is None or not isinstance(config["layers_per_block"], int):  # else blocks of several sizes, as no XL has
        return None
    kind, number, rest = match["kind"], int(match["number"]), match["rest"]
    rest = _RESNET[rest] if kind == "resnets" else rest
    if match["side"] is None:
        return Place(f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}")
    block, per_block = int(match["block"]), config["layers_per_block"] + 1
    if match["side"] == "down":
        if kind == "downsamplers":
            return Place(f"input_blocks.{per_block * (block + 1)}.0.op")
        return Place(f"input_blocks.{1 + per_block * block + number}.{int(kind == 'attentions')}.{rest}")
    if kind == "upsamplers":
        has_attention = config["up_block_types"][block].startswith("CrossAttn")
        return Place(f"output_blocks.{per_block * (block + 1) - 1}.{1 + has_attention}.conv")
    return Place(f"output_blocks.{per_block * block + number}.{int(kind == 'attentions')}.{rest}")


# --- all of them ------------------------------------------------------------------------------------------------------

_FLUX_1 = ("FluxPipeline", "FluxKontextPipeline")

LAYOUTS: dict[str, dict[str, Layout]] = {
    "kohya": {
        "StableDiffusionPipeline": Layout(_in_unet, flat=True),
        "StableDiffusionXLPipeline": Layout(_in_sgm_unet, flat=True),
        "StableDiffusion3Pipeline": Layout(_in_sd3, flat=True),
        **dict.fromkeys(_FLUX_1, Layout(_theirs(*_FLUX), flat=True)),
        "Flux2KleinPipeline": Layout(_theirs(*_FLUX_2), flat=True),
        "QwenImagePipeline": Layout(_theirs(_QWEN_IMAGE), flat=True),
        "WanPipeline": Layout(_theirs(_WAN), flat=True),
    },
    "comfyui": {
        **dict.fromkeys(("StableDiffusionPipeline", "StableDiffusionXLPipeline"), Layout(_in_whole_unet, flat=True)),
        "StableDiffusion3Pipeline": Layout(_ours(_SD3, others=_SD3_OTHERS), flat=False),
        **dict.fromkeys(_FLUX_1, Layout(_ours(*_FLUX, others=_FLUX_OTHERS), flat=False)),
        "Flux2KleinPipeline": Layout(_ours(*_FLUX_2, others=_FLUX_2_OTHERS, instead=_FLUX_2_INSTEAD), flat=False),
        "QwenImagePipeline": Layout(_ours(_QWEN_IMAGE, others=_QWEN_IMAGE_OTHERS), flat=False),
        "WanPipeline": Layout(_theirs(_WAN, others=_WAN_OTHERS, prefix="diffusion_model."), flat=False),
    },
}
"""The layouts by format and by the name of diffusers' pipeline."""
