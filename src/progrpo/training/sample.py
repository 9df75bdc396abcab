"""Pictures from a model, with or without the weights that a run has trained."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from progrpo.config import EvalSettings
from progrpo.durable import append
from progrpo.messages import named
from progrpo.policies.base import Policy
from progrpo.preferences.questions import PROMPTS, prompt_line
from progrpo.prompts.pictures import IMAGE_COLUMN
from progrpo.rollout.denoise import Denoiser, denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.preview import decoded
from progrpo.training.distributed import Ranks, explain_lost_process
from progrpo.training.errors import MissingPicturesError
from progrpo.training.trained_model import ModelChoice, negative_prompt_for, ode_by, warn_of_cuts, with_given
from progrpo.types import Prompt

_NAME = re.compile(r"(\d+)-\d+\.(png|webp)")
_FRAME = 62
"""Milliseconds per frame of a video, for Wan's 16 frames per second."""


@dataclass(frozen=True)
class _Picture:
    """A picture (H, W, 3) or video (F, H, W, 3), or None for a missing one; its prompt's place and its number there."""

    place: int
    number: int
    image: np.ndarray | None


def sample_pictures(
    model: ModelChoice,
    prompts: Sequence[Prompt],
    out: Path,
    count: int,
    given: Mapping[str, float | None],
    negative_prompt: str | None = None,
) -> list[Path]:
    """Write `count` pictures per prompt to `out`, as PNG or videos as animated WebP, beside those that are there.

    Noise is keyed by the prompt's place and the picture's number. `given` are the settings of evaluations
    (`EvalSettings`) to take in place of the run's own, or of the defaults and the seed 0 without a run. Several
    processes share the pictures out, and the main one alone returns the files. MissingPicturesError where numbers of a
    picture are not finite; the others are written.
    """
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"--out: {named(out)} is a file; give a folder")
    run = model.run_config
    settings = with_given(EvalSettings(seed=0) if run is None else run.eval, given)
    negative_prompt = negative_prompt_for(run, negative_prompt, settings.guidance_scale)
    with explain_lost_process(lambda: "give the command again"):
        ranks = Ranks()
        policy = model.load(ranks, negative_prompt)
        if not policy.edits and any(IMAGE_COLUMN in prompt.columns for prompt in prompts):
            raise ValueError(
                f"--image: {named(model.target)} takes prompts alone; leave it out, or give a model that edits"
            )
        warn_of_cuts(policy, prompts, ranks)
        own, faults = _sampled(policy, prompts, count, settings, ranks)
        pictures = sorted(ranks.gather(own), key=lambda picture: (picture.place, picture.number))
        drawn = [picture for picture in pictures if picture.image is not None]
        files = ranks.from_main(lambda: _write(drawn, prompts, out)) if drawn else []
        faults = ranks.gather(faults)
        ranks.wait_for_all()
        if faults:
            rest = f"; the others are in {named(out)}" if drawn else ""
            missing = len(pictures) - len(drawn)
            raise MissingPicturesError(f"{missing} of {len(pictures)} pictures are missing: {faults[-1]}{rest}")
    return files if ranks.is_main else []


def _sampled(
    policy: Policy, prompts: Sequence[Prompt], count: int, settings: EvalSettings, ranks: Ranks
) -> tuple[list[_Picture], list[str]]:
    """This process' share of the pictures, and the reasons why some are missing."""
    sampling = ode_by(policy, settings)
    key = NoiseKey(settings.seed, 0)
    denoiser = Denoiser(policy, policy.encode(prompts), sampling)
    start = expand(policy, torch.arange(len(prompts)), count, sampling, key)
    own = ranks.deal(len(start))
    pictures: list[_Picture] = []
    faults: list[str] = []
    for rows in own.split(sampling.microbatch) if len(own) else ():  # splitting nothing gives one empty part
        final = denoise(denoiser, start.take(rows), key, Meter())
        made = decoded(policy, final.x_NCHW, sampling.microbatch)
        images, is_there = made.images_NHWC.numpy(), made.there_N.tolist()
        for i, (place, number) in enumerate(zip(final.group_N.tolist(), final.member_N.tolist(), strict=True)):
            pictures.append(_Picture(place, number, images[i] if is_there[i] else None))
        if made.fault:
            faults.append(made.fault)
    return pictures, faults


def _write(pictures: Sequence[_Picture], prompts: Sequence[Prompt], out: Path) -> list[Path]:
    """Write pictures and videos, and the prompts for `progrpo label`.

    The numbers of prompts continue those of the files that are there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {named(out)} cannot be made: {error.strerror}; give another folder") from error
    names = [_NAME.fullmatch(file.name) for file in out.iterdir()]
    first = max((int(name[1]) for name in names if name), default=-1) + 1
    lines = [prompt_line(first + place, prompts[place], out) for place in sorted({p.place for p in pictures})]
    append(out / PROMPTS, "".join(lines).encode())
    files: list[Path] = []
    for picture in pictures:
        image = picture.image
        assert image is not None
        is_video = image.ndim == 4
        file = out / f"{first + picture.place:03d}-{picture.number:02d}.{'webp' if is_video else 'png'}"
        if is_video:
            start, *rest = map(Image.fromarray, image)
            start.save(file, save_all=True, append_images=rest, duration=_FRAME, loop=0, quality=90)
        else:
            Image.fromarray(image).save(file)
        files.append(file)
    return files
