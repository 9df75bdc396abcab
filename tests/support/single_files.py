"""Single-file checkpoints of tiny pipelines, under the names that their authors gave the tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    "conv_norm_out": "norm_out",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut",
}
_SD3 = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_SD3_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_SD3_STACKED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def write_sd(pipeline: Any, file: Path) -> Path:
    """Write a whole Stable Diffusion 1: U-Net, autoencoder and text encoder (CompVis' names)."""
    parts = {
        "model.diffusion_model.": _unet(pipeline.unet),
        "first_stage_model.": _vae(pipeline.vae),
        "cond_stage_model.transformer.text_model.": {
            name.removeprefix("text_model."): value for name, value in pipeline.text_encoder.state_dict().items()
        },
    }
    return _write({prefix + name: value for prefix, part in parts.items() for name, value in part.items()}, file)


def write_sd3_transformer(pipeline: Any, file: Path) -> Path:
    """Write a Stable Diffusion 3's transformer alone (Stability AI's names)."""
    state = pipeline.transformer.state_dict()
    layers = pipeline.transformer.config.num_layers
    tensors = {"pos_embed": state["pos_embed.pos_embed"]}
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        if layer in _SD3:
            tensors[f"{_SD3[layer]}.{kind}"] = _swapped(value) if layer == "norm_out.linear" else value
        elif block := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer):
            last = int(block[1]) == layers - 1 and block[2] == "norm1_context.linear"
            if block[2] in _SD3_BLOCK:
                tensors[f"joint_blocks.{block[1]}.{_SD3_BLOCK[block[2]]}.{kind}"] = _swapped(value) if last else value
    for i in range(layers):
        for place, names in _SD3_STACKED.items():
            for kind in ("weight", "bias"):
                stack = [state[f"transformer_blocks.{i}.{name}.{kind}"] for name in names]
                tensors[f"joint_blocks.{i}.{place}.{kind}"] = torch.cat(stack)
    return _write({f"model.diffusion_model.{name}": value for name, value in tensors.items()}, file)


def _write(tensors: Tensors, file: Path) -> Path:
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, file)
    return file


def _swapped(value: Tensor) -> Tensor:
    """Scale and shift in the other order."""
    return torch.cat(value.chunk(2)[::-1])


def _unet(unet: Any) -> Tensors:
    each = unet.config.layers_per_block + 1

    def place(name: str) -> str:
        if (plain := name.rpartition(".")[0]) in _UNET:
            return name.replace(plain, _UNET[plain])
        side, block, kind, number, rest = _parts(name)
        if side == "mid_block":
            return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{_renamed(rest, kind)}"
        if side == "down_blocks":
            if kind == "downsamplers":
                return f"input_blocks.{each * (block + 1)}.0.{rest.replace('conv', 'op')}"
            return f"input_blocks.{each * block + number + 1}.{int(kind == 'attentions')}.{_renamed(rest, kind)}"
        if kind == "upsamplers":
            attends = hasattr(unet.up_blocks[block], "attentions")
            return f"output_blocks.{each * (block + 1) - 1}.{1 + attends}.{rest}"
        return f"output_blocks.{each * block + number}.{int(kind == 'attentions')}.{_renamed(rest, kind)}"

    return {place(name): value for name, value in unet.state_dict().items()}


def _parts(name: str) -> tuple[str, int, str, int, str]:
    match = re.fullmatch(r"(mid_block|down_blocks|up_blocks)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", name)
    assert match is not None, name
    return match[1], int(match[2] or 0), match[3], int(match[4]), match[5]


def _renamed(rest: str, kind: str) -> str:
    return _replaced(rest, _RESNET) if kind == "resnets" else rest


def _vae(vae: Any) -> Tensors:
    blocks = len(vae.config.up_block_types)

    def place(name: str) -> str:
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{blocks - 1 - int(m[1])}.block.", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        return _replaced(name, _VAE)

    def as_convolution(name: str, value: Tensor) -> Tensor:
        return value[:, :, None, None] if "attn_1" in name and "norm" not in name and value.ndim == 2 else value

    return {(named := place(name)): as_convolution(named, value) for name, value in vae.state_dict().items()}


def _replaced(name: str, names: Mapping[str, str]) -> str:
    for diffusers, original in names.items():
        name = re.sub(rf"(^|\.){re.escape(diffusers)}(?=\.|$)", rf"\g<1>{original}", name)
    return name
