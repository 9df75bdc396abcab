"""The application of a LoRA file to a model by other tools, by the rules that they publish.

A tool has the model under the names of its first release, in which layers may lie one above another in a module. The
tables say which of diffusers' layers a module is; `#` is a number. A rule is given a file's tensors and the module's
names, and says by how much each module changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_FLUX_BLOCK = """
double_blocks.#.img_attn.qkv: transformer_blocks.#.attn.to_q transformer_blocks.#.attn.to_k\
 transformer_blocks.#.attn.to_v
double_blocks.#.txt_attn.qkv: transformer_blocks.#.attn.add_q_proj transformer_blocks.#.attn.add_k_proj\
 transformer_blocks.#.attn.add_v_proj
double_blocks.#.img_attn.proj: transformer_blocks.#.attn.to_out.0
double_blocks.#.txt_attn.proj: transformer_blocks.#.attn.to_add_out
"""
_FLUX_ENDS = """
img_in: x_embedder
txt_in: context_embedder
final_layer.linear: proj_out
final_layer.adaLN_modulation.1: norm_out.linear
"""
_FLUX_1 = f"""
{_FLUX_BLOCK}
double_blocks.#.img_mlp.0: transformer_blocks.#.ff.net.0.proj
double_blocks.#.img_mlp.2: transformer_blocks.#.ff.net.2
double_blocks.#.txt_mlp.0: transformer_blocks.#.ff_context.net.0.proj
double_blocks.#.txt_mlp.2: transformer_blocks.#.ff_context.net.2
double_blocks.#.img_mod.lin: transformer_blocks.#.norm1.linear
double_blocks.#.txt_mod.lin: transformer_blocks.#.norm1_context.linear
single_blocks.#.linear1: single_transformer_blocks.#.attn.to_q single_transformer_blocks.#.attn.to_k\
 single_transformer_blocks.#.attn.to_v single_transformer_blocks.#.proj_mlp
single_blocks.#.linear2: single_transformer_blocks.#.proj_out
single_blocks.#.modulation.lin: single_transformer_blocks.#.norm.linear
{_FLUX_ENDS}
time_in.in_layer: time_text_embed.timestep_embedder.linear_1
time_in.out_layer: time_text_embed.timestep_embedder.linear_2
vector_in.in_layer: time_text_embed.text_embedder.linear_1
vector_in.out_layer: time_text_embed.text_embedder.linear_2
guidance_in.in_layer: time_text_embed.guidance_embedder.linear_1
guidance_in.out_layer: time_text_embed.guidance_embedder.linear_2
"""
_FLUX_2 = f"""
{_FLUX_BLOCK}
double_blocks.#.img_mlp.0: transformer_blocks.#.ff.linear_in
double_blocks.#.img_mlp.2: transformer_blocks.#.ff.linear_out
double_blocks.#.txt_mlp.0: transformer_blocks.#.ff_context.linear_in
double_blocks.#.txt_mlp.2: transformer_blocks.#.ff_context.linear_out
single_blocks.#.linear1: single_transformer_blocks.#.attn.to_qkv_mlp_proj
single_blocks.#.linear2: single_transformer_blocks.#.attn.to_out
{_FLUX_ENDS}
time_in.in_layer: time_guidance_embed.timestep_embedder.linear_1
time_in.out_layer: time_guidance_embed.timestep_embedder.linear_2
double_stream_modulation_img.lin: double_stream_modulation_img.linear
double_stream_modulation_txt.lin: double_stream_modulation_txt.linear
single_stream_modulation.lin: single_stream_modulation.linear
"""
_SD3 = """
joint_blocks.#.x_block.attn.qkv: transformer_blocks.#.attn.to_q transformer_blocks.#.attn.to_k\
 transformer_blocks.#.attn.to_v
joint_blocks.#.x_block.attn.proj: transformer_blocks.#.attn.to_out.0
joint_blocks.#.x_block.attn2.qkv: transformer_blocks.#.attn2.to_q transformer_blocks.#.attn2.to_k\
 transformer_blocks.#.attn2.to_v
joint_blocks.#.x_block.attn2.proj: transformer_blocks.#.attn2.to_out.0
joint_blocks.#.x_block.mlp.fc1: transformer_blocks.#.ff.net.0.proj
joint_blocks.#.x_block.mlp.fc2: transformer_blocks.#.ff.net.2
joint_blocks.#.x_block.adaLN_modulation.1: transformer_blocks.#.norm1.linear
joint_blocks.#.context_block.attn.qkv: transformer_blocks.#.attn.add_q_proj transformer_blocks.#.attn.add_k_proj\
 transformer_blocks.#.attn.add_v_proj
joint_blocks.#.context_block.attn.proj: transformer_blocks.#.attn.to_add_out
joint_blocks.#.context_block.mlp.fc1: transformer_blocks.#.ff_context.net.0.proj
joint_blocks.#.context_block.mlp.fc2: transformer_blocks.#.ff_context.net.2
joint_blocks.#.context_block.adaLN_modulation.1: transformer_blocks.#.norm1_context.linear
x_embedder.proj: pos_embed.proj
context_embedder: context_embedder
t_embedder.mlp.0: time_text_embed.timestep_embedder.linear_1
t_embedder.mlp.2: time_text_embed.timestep_embedder.linear_2
y_embedder.mlp.0: time_text_embed.text_embedder.linear_1
y_embedder.mlp.2: time_text_embed.text_embedder.linear_2
final_layer.linear: proj_out
final_layer.adaLN_modulation.1: norm_out.linear
"""
_WAN = """
blocks.#.self_attn.q: blocks.#.attn1.to_q
blocks.#.self_attn.k: blocks.#.attn1.to_k
blocks.#.self_attn.v: blocks.#.attn1.to_v
blocks.#.self_attn.o: blocks.#.attn1.to_out.0
blocks.#.cross_attn.q: blocks.#.attn2.to_q
blocks.#.cross_attn.k: blocks.#.attn2.to_k
blocks.#.cross_attn.v: blocks.#.attn2.to_v
blocks.#.cross_attn.o: blocks.#.attn2.to_out.0
blocks.#.ffn.0: blocks.#.ffn.net.0.proj
blocks.#.ffn.2: blocks.#.ffn.net.2
time_embedding.0: condition_embedder.time_embedder.linear_1
time_embedding.2: condition_embedder.time_embedder.linear_2
time_projection.1: condition_embedder.time_proj
text_embedding.0: condition_embedder.text_embedder.linear_1
text_embedding.2: condition_embedder.text_embedder.linear_2
head.head: proj_out
"""
_TABLES = {
    "StableDiffusion3Pipeline": _SD3,
    "FluxPipeline": _FLUX_1,
    "FluxKontextPipeline": _FLUX_1,
    "Flux2KleinPipeline": _FLUX_2,
    "WanPipeline": _WAN,
}


@dataclass(frozen=True)
class Module:
    """A module of the first release: diffusers' layers, one above another, in halves that may be swapped."""

    layers: tuple[str, ...]
    swapped: bool = False


def first_release(pipeline: str, denoiser: nn.Module) -> dict[str, Module]:
    """The modules of a model by the names of its first release."""
    layers = {
        name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
    }
    if pipeline == "StableDiffusionXLPipeline":
        return {theirs: Module((ours,)) for theirs, ours in _sgm(denoiser) if ours in layers}
    if pipeline in ("StableDiffusionPipeline", "QwenImagePipeline"):  # sd-scripts has diffusers' names for both
        return {name: Module((name,)) for name in layers}
    modules = {}
    for line in _TABLES[pipeline].split("\n"):
        theirs, _, ours = line.partition(": ")
        for i in range(len(layers) if "#" in theirs else bool(theirs)):
            names = tuple(name.replace("#", str(i)) for name in ours.split())
            if layers.issuperset(names):
                # of diffusers' AdaLayerNormContinuous the scale comes first, of the first releases the shift
                parent = denoiser.get_submodule(names[0].rpartition(".")[0])
                swapped = type(parent).__name__ == "AdaLayerNormContinuous"
                modules[theirs.replace("#", str(i))] = Module(names, swapped)
    return modules


def _sgm(unet: Any) -> Iterator[tuple[str, str]]:
    """The U-Net of Stability AI, walked through as it is built: every residual network or change of size is a block."""
    yield from (("input_blocks.0.0", "conv_in"), ("out.2", "conv_out"))
    yield from ((f"time_embed.{2 * i}", f"time_embedding.linear_{i + 1}") for i in (0, 1))
    yield from ((f"label_emb.0.{2 * i}", f"add_embedding.linear_{i + 1}") for i in (0, 1))
    n = 1
    for b, block in enumerate(unet.down_blocks):
        for i in range(len(block.resnets)):
            yield from _sgm_block(f"input_blocks.{n}", f"down_blocks.{b}", i, block)
            n += 1
        if block.downsamplers:
            yield f"input_blocks.{n}.0.op", f"down_blocks.{b}.downsamplers.0.conv"
            n += 1
    middle = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
    for theirs, ours in middle.items():
        yield from _inner(f"middle_block.{theirs}", f"mid_block.{ours}", unet)
    n = 0
    for b, block in enumerate(unet.up_blocks):
        for i in range(len(block.resnets)):
            yield from _sgm_block(f"output_blocks.{n}", f"up_blocks.{b}", i, block)
            if i + 1 == len(block.resnets) and block.upsamplers:
                place = 2 if getattr(block, "attentions", None) else 1
                yield f"output_blocks.{n}.{place}.conv", f"up_blocks.{b}.upsamplers.0.conv"
            n += 1


def _sgm_block(theirs: str, ours: str, i: int, block: Any) -> Iterator[tuple[str, str]]:
    yield from _inner(f"{theirs}.0", f"{ours}.resnets.{i}", block, f"resnets.{i}")
    if getattr(block, "attentions", None):
        yield from _inner(f"{theirs}.1", f"{ours}.attentions.{i}", block, f"attentions.{i}")


def _inner(theirs: str, ours: str, root: Any, place: str = "") -> Iterator[tuple[str, str]]:
    resnet = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3"}
    resnet["conv_shortcut"] = "skip_connection"
    for name, _ in root.get_submodule(place or ours).named_modules():
        if name:
            yield f"{theirs}.{resnet.get(name, name)}", f"{ours}.{name}"


# --- the rules --------------------------------------------------------------------------------------------------------

Rule = Callable[[Mapping[str, Tensor], str, nn.Module], dict[str, Tensor]]


def product(up: Tensor, down: Tensor) -> Tensor:
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def flat(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def kohyas_modules(pipeline: str, denoiser: nn.Module) -> dict[str, Module]:
    """The modules for which sd-scripts and musubi-tuner make a network: those in blocks."""
    blocks = r"(double_blocks|single_blocks|joint_blocks|transformer_blocks|blocks)\.\d+\..*"
    in_unet = r"(down|up|input|output)_blocks.*|mid(dle)?_block.*"
    modules = first_release(pipeline, denoiser)
    inside = {name for name in modules if re.fullmatch(f"{blocks}|{in_unet}", name)} - {"input_blocks.0.0"}
    return {name: modules[name] for name in inside}


def kohya(file: Mapping[str, Tensor], pipeline: str, denoiser: nn.Module) -> dict[str, Tensor]:
    """The rule of sd-scripts and musubi-tuner: a file's tensors are loaded into a network made for the model.

    Its names are `lora_unet_` and the module's with underscores. The strength is alpha / rank; alpha must be there. A
    tensor for another module is not loaded.
    """
    changes: dict[str, Tensor] = {}
    used: set[str] = set()
    for module in kohyas_modules(pipeline, denoiser):
        down, up, alpha = (f"{flat(module)}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        if down in file:
            changes[module] = product(file[up], file[down]) * file[alpha].item() / len(file[down])
            used |= {down, up, alpha}
    assert used == file.keys(), f"not loaded: {sorted(file.keys() - used)}"
    return changes


def comfyui(file: Mapping[str, Tensor], pipeline: str, denoiser: nn.Module) -> dict[str, Tensor]:
    """ComfyUI's rule: a map from keys to modules, or to rows of them.

    The strength is alpha / rank, or 1 where there is no alpha. A tensor without a key in the map is not loaded.
    """
    modules = first_release(pipeline, denoiser)
    changes: dict[str, Tensor] = {}
    used: set[str] = set()
    for key, (module, rows, swaps) in _keys(pipeline, modules, denoiser).items():
        pairs = (("lora_up", "lora_down"), ("lora_B", "lora_A"))
        ends = next((pair for pair in pairs if f"{key}.{pair[0]}.weight" in file), None)
        if ends is None:
            continue
        up, down = (f"{key}.{end}.weight" for end in ends)
        alpha = file.get(f"{key}.alpha")
        change = product(file[up], file[down]) * (1.0 if alpha is None else alpha.item() / len(file[down]))
        height = sum(_height(denoiser, layer) for layer in modules[module].layers)
        whole = changes.setdefault(module, change.new_zeros(height, *change.shape[1:]))
        whole[rows] += torch.cat(change.chunk(2)[::-1]) if swaps else change
        used |= {up, down, f"{key}.alpha"}
    assert file.keys() <= used, f"lora key not loaded: {sorted(file.keys() - used)}"
    return changes


def _height(denoiser: nn.Module, layer: str) -> int:
    weight: Any = denoiser.get_submodule(layer).weight
    return len(weight)


_Keys = dict[str, tuple[str, slice, bool]]


def _keys(pipeline: str, modules: Mapping[str, Module], denoiser: nn.Module) -> _Keys:
    """ComfyUI's map from keys to a module, its rows, and whether the halves are swapped on the way."""
    keys: _Keys = {}
    for module, of in modules.items():
        whole = module, slice(None), False
        keys |= dict.fromkeys((flat(module), f"diffusion_model.{module}"), whole)
        if pipeline in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
            keys[flat(of.layers[0])] = whole  # diffusers' names of a U-Net, but in kohya's format alone
        if pipeline == "QwenImagePipeline":
            keys[f"transformer.{module}"] = whole
        in_map = not re.match(r"time_guidance|.*_stream_modulation", of.layers[0])
        if pipeline in _TABLES and pipeline != "WanPipeline" and in_map:
            first = 0
            for layer in of.layers:
                height = _height(denoiser, layer)
                keys[f"transformer.{layer}"] = module, slice(first, first + height), of.swapped
                first += height
    return keys


@torch.no_grad()
def apply(rule: Rule, file: Mapping[str, Tensor], pipeline: str, denoiser: nn.Module) -> None:
    """Change a denoiser as a tool changes its own model by a LoRA file."""
    modules = first_release(pipeline, denoiser)
    for name, change in rule(file, pipeline, denoiser).items():
        module = modules[name]
        change = torch.cat(change.chunk(2)[::-1]) if module.swapped else change
        weights: list[Any] = [denoiser.get_submodule(layer).weight for layer in module.layers]
        for weight, own in zip(weights, change.split([len(weight) for weight in weights]), strict=True):
            weight += own.reshape(weight.shape)
