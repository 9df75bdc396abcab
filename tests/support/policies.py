"""Cases of the suite over all policies (`tests/contract/policies`), and what its files share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from torch import Tensor

from progrpo.diffusion.process import Process
from progrpo.policies.base import Policy, PolicyContext
from progrpo.policies.load import load_policy
from progrpo.policies.settings import ModelSettings
from progrpo.types import Prompt
from tests.support.grids import SAMPLERS

TEXTS = ("red cat", "blue dog")
SOURCES = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 20, 3), np.uint8)) for i in range(2)]
PROMPTS = tuple(Prompt(text, {"image": source}) for text, source in zip(TEXTS, SOURCES, strict=True))
STEPS = 4
TOKENS = 12
FRAMES = 3


@dataclass(frozen=True)
class Case:
    model: str
    """The name of the fixture that gives the pipeline's folder."""
    weights: str
    without_gradient: tuple[str, ...] = ()
    """The denoiser's parameters that cannot change the picture, as parts of their names."""
    always_float32: tuple[str, ...] = ()
    """Those that diffusers keeps in float32, likewise."""


# SD3's last block throws its text stream away, and with it the text's queries.
SD3_UNUSED = ("blocks.1.attn.add_q_proj", "blocks.1.attn.norm_added_q")
# So does Qwen-Image's, with what comes after its attention as well.
QWEN_IMAGE_UNUSED = tuple(f"blocks.1.{name}" for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp"))
CASES = {
    "sd3-lora": Case("tiny_sd3", "lora", without_gradient=SD3_UNUSED),
    "sd3-full": Case("tiny_sd3", "full", without_gradient=SD3_UNUSED),
    "sd-lora": Case("tiny_sd", "lora"),
    "sd-v-lora": Case("tiny_sd_v", "lora"),
    "flux-lora": Case("tiny_flux", "lora"),
    "flux-schnell-lora": Case("tiny_flux_schnell", "lora"),
    "kontext-lora": Case("tiny_kontext", "lora"),
    "flux2-klein-lora": Case("tiny_flux2_klein", "lora"),
    "qwen-image-lora": Case("tiny_qwen_image", "lora", without_gradient=QWEN_IMAGE_UNUSED),
    "sdxl-lora": Case("tiny_sdxl", "lora"),
    "wan-lora": Case("tiny_wan", "lora", always_float32=("time_embedder",)),
}
"""Every model with a LoRA, and one that is trained whole."""
FULL_CASES = {
    "sd-full": Case("tiny_sd", "full"),
    "flux-full": Case("tiny_flux", "full"),
    "sdxl-full": Case("tiny_sdxl", "full"),
}
"""Other kinds of denoiser that are trained whole, for tests of what becomes of weights."""


def load(folder: Path | str, weights: Any, context: PolicyContext | None = None, **changes: Any) -> Any:
    settings = ModelSettings(str(folder), weights, lora_rank=2, lora_alpha=6, max_sequence_length=TOKENS, resolution=16)
    length = FRAMES if Path(folder).name == "tiny-wan" else None
    return load_policy(replace(settings, **{"frames": length, **changes}), context)


def untouched_pipeline(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline, "unet"):  # whatever it came with, its noise schedule is sampled by DDIM
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    if type(pipeline).__name__ == "WanPipeline":  # in place of UniPC, of the same shift
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipeline.scheduler.config.flow_shift)
    return pipeline


def noise(policy: Policy, count: int = len(TEXTS)) -> Tensor:
    return torch.randn(count, *policy.latent_shape, generator=torch.Generator().manual_seed(3))


def perturb(policy: Policy, scale: float = 0.1) -> None:
    """Move every trained weight: a fresh LoRA is the base model and hides its own mistakes."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in policy.trainable.values():
            p.add_(torch.randn(p.shape, generator=generator), alpha=scale)


@torch.no_grad()
def sample_without_noise(policy: Policy, guidance_scale: float) -> Tensor:
    x, condition = noise(policy), policy.encode(PROMPTS)
    process = Process(policy.prediction, SAMPLERS["ddim"], policy.levels(STEPS), (0.0,) * STEPS)
    for step in range(STEPS):
        output = policy.predict(x, process.timestep(step, x), condition, guidance_scale)
        x = process.deterministic(step, x, output)
    return x


def sample_by_diffusers(pipeline: Any, policy: Policy, guidance_scale: float, output_type: str, **prompt: Any) -> Any:
    video = hasattr(pipeline, "vae_scale_factor_spatial")
    scale = pipeline.vae_scale_factor_spatial if video else pipeline.vae_scale_factor
    latents, (height, width) = noise(policy), (side * scale for side in policy.latent_shape[-2:])
    packed = hasattr(pipeline, "_pack_latents")
    patchified = hasattr(pipeline, "_patchify_latents")  # before it packs; and it is guided by itself
    if patchified:
        latents = pipeline._patchify_latents(latents)
    elif packed:
        latents = pipeline._pack_latents(latents, *latents.shape)
    if packed and not patchified and not policy.embeds_guidance and guidance_scale > 1:
        nothing = " " if type(pipeline).__name__ == "QwenImagePipeline" else ""
        prompt = {"true_cfg_scale": guidance_scale, "negative_prompt": [nothing] * len(TEXTS), **prompt}
    if policy.edits:  # it would go by the source's size, and by the million pixels of the model's own
        covering = [pipeline.image_processor.resize(source, height, width, "crop") for source in SOURCES]
        prompt |= {"image": prompt.pop("image_latents", covering), "max_area": height * width, "_auto_resize": False}
    if hasattr(pipeline, "text_encoder_3") or packed or video:
        prompt["max_sequence_length"] = TOKENS
    if video:
        prompt["num_frames"] = FRAMES
    steps: list[Tensor] = []

    def note(pipeline: Any, step: int, timestep: Any, callback_kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(callback_kwargs["latents"])
        return {}

    output = pipeline(
        **({} if "prompt_embeds" in prompt else {"prompt": list(TEXTS)}),
        **prompt,
        height=height,
        width=width,
        latents=latents,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        output_type=output_type,
        return_dict=False,
        callback_on_step_end=note,
    )[0]
    if not packed or output_type != "latent":
        return output
    rows, columns = (count // 2 for count in policy.latent_shape[1:])
    return torch.nn.functional.pixel_shuffle(steps[-1].transpose(1, 2).unflatten(2, (rows, columns)), 2)


def velocity(policy: Policy) -> Tensor:
    with torch.no_grad():
        return policy.predict(noise(policy), torch.tensor(700.0), policy.encode(PROMPTS))


def pixels(picture: Any) -> Tensor:
    """A picture of PIL, or a list of frames, as a tensor."""
    if isinstance(picture, list):
        return torch.stack([pixels(frame) for frame in picture])
    return torch.tensor(list(picture.tobytes()), dtype=torch.int32).view(picture.height, picture.width, 3)
