"""The settings of the model that is trained: the section `model` of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from progrpo.settings import Rule, Values, at_least, between, matches, setting

_SIDES = Rule(
    lambda v: all(8 <= side <= 4096 for side in (v if isinstance(v, tuple) else (v,))),
    "between 8 and 4,096 pixels, one number for a square or height and width",
)


def _whole_numbers(most: int) -> Rule:
    return Rule(
        lambda v: all(type(number) is int and 1 <= number <= most for number in v.values()),
        f'an object of whole numbers between 1 and {most:,}, by endings of names of modules, such as {{"to_v": 4}}',
    )


@dataclass(frozen=True)
class ModelSettings:
    path: str = "shapes-flow"
    """The model: a built-in model's name, a folder in diffusers' format, or a hub id."""
    weights: Literal["lora", "full"] = "lora"
    """The weights that are trained: low-rank adapters (`lora`, by peft) or all weights of the denoiser (`full`).
    The reference of a fresh LoRA is the model without it.
    The reference of full weights is a frozen copy.
    The copy is kept only if the objective measures a distance to it (kl_beta above 0, dgpo or dpo)."""
    lora: str = ""
    """A LoRA to train further; empty: a fresh one.
    It is a run folder, a folder in diffusers' or peft's format (with adapter_config.json), a safetensors file,
    or a hub id.
    Files in kohya's format work where diffusers reads them.
    The loaded LoRA keeps its own rank, alpha and layers, and the other fields `lora_...` are not read.
    The reference, for the KL and for the run's own comparison, is the model with this LoRA.
    The saved LoRA takes its place on the same base model."""
    lora_rank: int = setting(16, between(1, 4096))
    """The rank of a fresh LoRA."""
    lora_alpha: int = setting(32, at_least(1))
    """The scale of a fresh LoRA: its output is multiplied by lora_alpha / lora_rank.
    The saved file has this factor in its weights, and alpha = rank."""
    lora_targets: tuple[str, ...] = ()
    """Endings of the names of the modules to adapt; `*` matches anything.
    Empty: the attention and feed-forward projections.
    In SD3, FLUX and Qwen-Image these are the projections of both streams, and in FLUX also those of the single
    blocks.
    In Wan they include the attention to the video and to the text."""
    max_sequence_length: int | None = setting(None, between(1, 512).or_empty(" for the model's own"))
    """The number of text tokens after which a prompt is cut.
    Empty: what the model's pipeline takes (256 for SD3, 512 for the others), and 16 for the built-in model.
    In SD3, FLUX and Wan these are T5 tokens without an attention mask, so the number changes the picture and
    the cost.
    In Wan the tokens after the text are zeros.
    FLUX.2 klein and Qwen-Image count the tokens of their own encoder, including the chat template around the
    prompt.
    Qwen-Image masks the tokens after the text.
    A run reports at its start how many prompts are cut."""
    resolution: int | tuple[int, int] | None = setting(None, _SIDES.or_empty(" for the model's own"))
    """The size of a picture or video in pixels: one number for a square, or height and width, in diffusers' order.
    Write `--model.resolution 480 832` on the command line and `[480, 832]` in JSON.
    Each side must be a multiple that the model takes.
    Empty: the model's own size (1024 for SD 3.5, FLUX and Qwen-Image, 480 832 for Wan)."""
    frames: int | None = setting(None, between(1, 1024).or_empty(" for the model's own"))
    """The number of frames of a video; for Wan, one more than a multiple of 4.
    Empty: the model's own number (81 for Wan). Picture models have none."""
    keep_text_encoders: bool = False
    """Whether the text encoders stay in memory and encode prompts when they are needed.
    False: all prompts of the run are encoded at its start, and then the text encoders leave memory.
    Use True if a run has so many prompts that their embeddings would not fit in memory."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """The dtype of the frozen weights and of the network's forward pass. Step math always runs in float32.
    `auto`: float32 or bfloat16, whichever multiplies matrices faster on this device.
    It is measured when the run begins, and the choice is kept in the run's configuration.
    `float16` is for GPUs without bfloat16: losses are scaled.
    A model whose values exceed 65,504 gives no picture in float16."""
    quantize: Literal["none", "int8"] = "none"
    """`int8`: store the frozen weights of the linear layers in the denoiser's blocks as 8-bit integers with a
    scale per row.
    This takes half of bfloat16's memory.
    The run's reference, samples and evaluations use the quantized model.
    The saved LoRA is for the model that is not quantized."""
    attention: Literal[
        "default", "native", "flash", "_flash_3", "xformers", "_native_cudnn", "_native_efficient", "_native_math"
    ] = "default"
    """The attention backend of the denoiser, by diffusers' names, for sampling and for training.
    `default`: diffusers' own choice, which is torch's fused attention.
    `flash` and `_flash_3` need the packages of FlashAttention, `xformers` needs xformers.
    FLUX, FLUX.2 klein, Qwen-Image, Wan and most learnt pipelines have backends.
    SD3 and the U-Nets of SD 1.x, 2.x and XL have none.
    Backends that round values to 8 bits or load kernels from a hub are not offered."""
    compile: bool = False
    """Compile the denoiser's blocks with torch.compile.
    This takes a minute or two at the start. On a CPU it needs a C++ compiler."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass.
    This takes less memory, and about a third more time in the update."""
    offload: bool = False
    """Keep only one of the denoiser and the text encoders on the device at a time, and the other on the CPU.
    The start then needs as much device memory as the larger of the two, and not their sum.
    With `keep_text_encoders` both are moved in every iteration."""
    decoding: Literal["whole", "sliced", "tiled"] = "whole"
    """The number of pictures that the decoder takes at once.
    `whole`: a microbatch. `sliced`: one picture, with the same result up to rounding.
    `tiled`: one picture in overlapping tiles, whose seams are blended.
    A tile is half as high as the picture's shorter side, and 512 pixels at most.
    Videos and Qwen-Image have tiles of 256 pixels. A source picture is encoded likewise."""
    shard: bool = False
    """Split the denoiser's weights among the processes (torch's fully_shard); blocks are gathered while they run.
    A LoRA stays whole.
    With full weights, gradients, averages and the optimizer's state are split too.
    This is for models too large for one device. Microbatches must be given."""
    revision: str = setting("", matches(r"(\w[\w./-]*)?", "a branch, tag or commit of the hub, or empty"))
    """The branch, tag or commit of a hub id; empty: its main branch.
    Only a commit guarantees that a resumed run loads the same model."""
    variant: str = setting("", matches(r"([A-Za-z]\w*)?", "a name such as fp16, or empty"))
    """The kind of weight files to read from a folder or hub id, such as fp16 (`model.fp16.safetensors`).
    Components that have no such file are read without it.
    This only selects files; `dtype` sets the precision."""
    single_file: str = ""
    """A checkpoint in one safetensors file, as ComfyUI and A1111 have them; empty: none.
    Its denoiser takes the place of the denoiser of `path`, and so do its autoencoder and text encoders, where it has
    them.
    `path` is the model that it was made from, which gives configurations, tokenizers and the other networks.
    Files of Stable Diffusion, SDXL, SD3 and FLUX are read, by diffusers' from_single_file."""
    step_ends: Literal["diffusers", "next"] = "diffusers"
    """The end of a step of a diffusion model.
    `diffusers`: 1000 // T timesteps further, as in diffusers' DDIMScheduler.
    A picture without noise is then the pipeline's own. `next`: where the next step begins.
    Both are the same for the spacing `leading`, and for `trailing` if T divides 1000.
    Otherwise the end of a step differs, by up to 15 % at 6 steps of `linspace` and by 0.3 % for `trailing`.
    A run whose config.json lacks this field began with `next` and continues with it."""
    lora_rank_pattern: Values = field(default_factory=Values, metadata={"rule": _whole_numbers(4096)})
    """The ranks of single layers of a fresh LoRA, by endings of names as in `lora_targets`, such as `{"to_v": 4}`.
    The first ending that a name has counts. Other layers have `lora_rank`."""
    lora_alpha_pattern: Values = field(default_factory=Values, metadata={"rule": _whole_numbers(2**31 - 1)})
    """The alphas of single layers of a fresh LoRA, likewise. Other layers have `lora_alpha`.
    A layer's output is multiplied by its alpha / its rank."""
    lora_use_dora: bool = False
    """Whether a fresh LoRA is a DoRA (arXiv 2402.09353), which also trains the length of each row of a weight.
    It is exported to diffusers' format and as a merged model. It takes more time and memory, which `plan` counts."""
    text_quantize: Literal["none", "int8"] = "none"
    """`int8`: store the weights of the linear layers in the text encoders' blocks as 8-bit integers, as `quantize` does
    for the denoiser.
    This matters where memory is short when prompts are encoded, or with `keep_text_encoders`.
    Samples and evaluations of what the run saved use the whole encoders."""

    def check(self) -> None:
        """Raise ValueError for settings of a LoRA if all weights are trained."""
        if self.weights == "lora":
            return
        if self.lora:
            raise ValueError(
                f"model.lora must be empty for model.weights {self.weights}: a LoRA is trained further as a LoRA"
            )
        if self.quantize != "none":
            raise ValueError(
                f"model.quantize must be none for model.weights {self.weights}: weights in 8 bits are frozen,"
                " so train a LoRA"
            )
