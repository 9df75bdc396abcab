"""Pictures from a model, with or without what a run trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from progrpo.rollout.denoise import denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.sources import COLUMN
from progrpo.training.build import trained_policy
from progrpo.training.distributed import Ranks
from progrpo.training.evaluate import ode, rows_at_once
from progrpo.types import Prompt
from progrpo.words import named

_FRAME = 62
"""Milliseconds, of Wan's 16 frames a second."""


def sample_pictures(
    model: str,
    prompts: Sequence[Prompt],
    *,
    lora: Path | None,
    out: Path,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
    count: int,
) -> list[Path]:
    """Write `count` pictures a prompt to `out` as PNG, videos as animated WebP; noise is keyed by the prompt's place and the picture's number."""
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"--out: {named(out)} is a file; give a folder")
    policy = trained_policy(model, lora, Ranks())
    if not policy.edits and any(COLUMN in prompt.columns for prompt in prompts):
        raise ValueError(f"--image: {named(model)} is told a text alone; leave it out, or give a model that edits")
    sampling = ode(policy, num_inference_steps, guidance_scale, rows_at_once(policy))
    key = NoiseKey(seed, 0)
    start = expand(policy, torch.arange(len(prompts)), count, sampling, key)
    final = denoise(policy, policy.encode(prompts), start, sampling, key, Meter())
    images_NHWC = policy.decode(final.x_NCHW).numpy()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {named(out)} cannot be made: {error.strerror}; give another folder") from error
    kind = "webp" if images_NHWC.ndim == 5 else "png"
    files = [
        out / f"{g:03d}-{m:02d}.{kind}" for g, m in zip(final.group_N.tolist(), final.member_N.tolist(), strict=True)
    ]
    for file, image in zip(files, images_NHWC, strict=True):
        if kind == "webp":
            first, *rest = map(Image.fromarray, image)
            first.save(file, save_all=True, append_images=rest, duration=_FRAME, loop=0, quality=90)
        else:
            Image.fromarray(image).save(file)
    return files
