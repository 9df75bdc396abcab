"""The settings of the model that is trained: the part `model` of a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from progrpo.settings import Rule, at_least, between, matches, setting

_SIDES = Rule(
    lambda v: all(8 <= side <= 4096 for side in (v if isinstance(v, tuple) else (v,))),
    "between 8 and 4,096 pixels, one number for a square or height and width",
)


@dataclass(frozen=True)
class ModelSettings:
    path: str = "shapes-flow"
    """A built-in model's name, a folder in diffusers' format, or a hub id."""
    weights: Literal["lora", "full"] = "lora"
    """Train low-rank adapters (peft) or every weight of the denoiser. The reference of a fresh LoRA is the model without it. That of full
    weights is a frozen copy, kept only where the objective measures a distance to it (a kl_beta above 0, or dgpo)."""
    lora: str = ""
    """A LoRA to train further: a run folder, a folder in diffusers' or peft's format (with adapter_config.json), a file in safetensors, also in
    kohya's format where diffusers reads it, or a hub id; empty: a fresh one. Its rank, alpha and layers are its own, the three fields below are not
    read. The reference, from which a KL is measured and with which a run compares itself, is the model with this LoRA; what is saved
    takes its place, on the same base."""
    lora_rank: int = setting(16, between(1, 4096))
    lora_alpha: int = setting(32, at_least(1))
    """The LoRA counts lora_alpha / lora_rank times. What is saved has that in its numbers, and alpha = rank."""
    lora_targets: tuple[str, ...] = ()
    """Endings of module names to adapt, where `*` stands for anything; empty: attention and feed-forward projections (of both
    streams of SD3, FLUX and Qwen-Image, and of FLUX's single blocks; of Wan's attention to the video and to the text)."""
    max_sequence_length: int | None = setting(None, between(1, 512).or_empty(" for the model's own"))
    """T5 tokens of SD3, FLUX and Wan, past which a text is cut; empty: as many as the model's pipeline takes (256 of SD3, 512 of the others), and
    16 of the built-in. There is no attention mask in them, so this changes the picture and multiplies the cost; in Wan those after the
    text are zeros. FLUX.2 klein and Qwen-Image count the tokens of their own encoder, the words of its chat around the prompt included; in
    Qwen-Image those after a text are masked. How many prompts are cut is said at the start of a run."""
    resolution: int | tuple[int, int] | None = setting(None, _SIDES.or_empty(" for the model's own"))
    """Pixels of a picture or video: one number for a square, or height and width (`--model.resolution 480 832`, in JSON `[480, 832]`), in
    diffusers' order and in the multiples that the model takes. Empty: the model's own (1024 of SD 3.5, FLUX and Qwen-Image, 480 832 of Wan)."""
    frames: int | None = setting(None, between(1, 1024).or_empty(" for the model's own"))
    """Frames of a video, one more than a multiple of 4 for Wan; empty: the model's own (81 of Wan). Models of pictures have none."""
    keep_text_encoders: bool = False
    """False: every prompt that the run will meet is encoded at its start, and the text encoders leave memory. True: they
    stay, and encode as prompts come; for runs of so many prompts that the embeddings would not fit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Of the frozen weights and the network's forward pass; step math is always float32. `auto`: float32 or bfloat16, whichever
    this device multiplies matrices faster in, measured when the run begins and then kept in its configuration. In float16, for GPUs
    without bfloat16, losses are scaled, and a model whose numbers pass 65,504 gives no picture."""
    quantize: Literal["none", "int8"] = "none"
    """int8: the frozen weights of the linear layers of the denoiser's blocks are kept as 8-bit integers, a scale to each row, half of bfloat16's
    memory. The reference, samples and evaluations of the run are this model's; the saved LoRA is for the unquantised one."""
    compile: bool = False
    """Have torch compile the denoiser's blocks, which takes a minute or two at the start and needs a C++ compiler on a CPU."""
    activation_checkpointing: bool = False
    """Compute activations anew in the backward pass: less memory, about a third more time in the update."""
    offload: bool = False
    """The denoiser and the text encoders are on the device by turns, and on the CPU else. The start then takes what the larger of both
    takes, and not their sum; with `keep_text_encoders` every iteration moves them."""
    decoding: Literal["whole", "sliced", "tiled"] = "whole"
    """How many pictures the decoder takes at once: a microbatch, one (the same picture up to rounding), or one in overlapping tiles, whose
    seams are blended."""
    shard: bool = False
    """With several processes: each holds a part of the denoiser's weights (torch's fully_shard), and blocks are gathered while they run. A LoRA
    stays whole; of weights that are trained in full gradients, averages and the optimizer's state are shared out too. For models too large for
    one device, with microbatches that are given."""
    revision: str = setting("", matches(r"(\w[\w./-]*)?", "a branch, tag or commit of the hub, or empty"))
    """Branch, tag or commit of a hub id; empty: its main branch. A commit is the same model whenever the run goes on."""
    variant: str = setting("", matches(r"([A-Za-z]\w*)?", "a name such as fp16, or empty"))
    """Which of several kinds of weights files is read, such as fp16 (`model.fp16.safetensors`), of a folder or a hub id;
    parts that lack it are read without. It names files and chooses no precision: that is `dtype`."""
    step_ends: Literal["diffusers", "next"] = "diffusers"
    """Where a diffusion model's step ends. `diffusers`: 1000 // T timesteps on, as in its DDIMScheduler, so that without
    noise a picture is its pipeline's own. `next`: where the next step begins. They are one for the spacing `leading`, and
    for `trailing` where T divides 1000; else where a step leads differs, by up to 15 % at 6 steps of `linspace` and 0.3 %
    of `trailing`. A run whose config.json lacks this field was begun by `next`, and goes on so."""

    def check(self) -> None:
        """ValueError for settings that only a LoRA has, beside weights that are trained in full."""
        if self.weights == "lora":
            return
        if self.lora:
            raise ValueError(
                f"model.lora must be empty for model.weights {self.weights}: a LoRA is trained further as a LoRA"
            )
        if self.quantize != "none":
            raise ValueError(
                f"model.quantize must be none for model.weights {self.weights}: weights in 8 bits are frozen, so train a LoRA"
            )
