"""Pictures from a model, with or without what a run trained."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from progrpo.config import EvalSettings
from progrpo.messages import named
from progrpo.prompts.pictures import COLUMN
from progrpo.rollout.denoise import Denoiser, denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.preview import decoded
from progrpo.rollout.sampling import ode
from progrpo.training.build import run_of, trained_policy
from progrpo.training.distributed import Ranks, explain_lost_process
from progrpo.training.errors import MissingPicturesError
from progrpo.training.evaluate import asked_for, away_from, rows_at_once, warn_of_cuts
from progrpo.types import Prompt

_NAME = re.compile(r"(\d+)-\d+\.(png|webp)")
_FRAME = 62
"""Milliseconds, of Wan's 16 frames a second."""


def sample_pictures(
    model: str,
    prompts: Sequence[Prompt],
    *,
    lora: Path | None,
    out: Path,
    seed: int | None,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    count: int,
    negative_prompt: str | None = None,
    revision: str = "",
    variant: str = "",
) -> list[Path]:
    """Write `count` pictures a prompt to `out` as PNG, videos as animated WebP; noise is keyed by the prompt's place and the picture's number.

    None that is there is replaced: prompts are numbered on.
    For None the seed, steps, guidance and negative prompt are those of the evaluations of the run that `model` or `lora` is; of no run 0 and the configuration's defaults.
    MissingPicturesError where the model gave none that is finite; those that it gave are written.
    Several processes share the pictures out; the main one writes them, and the files are given to it alone.
    """
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"--out: {named(out)} is a file; give a folder")
    run = run_of(model, lora)
    own = EvalSettings(seed=0) if run is None else run.eval
    wanted = asked_for(own, num_inference_steps, guidance_scale, seed)
    away = away_from(run, negative_prompt, wanted.guidance_scale)
    with explain_lost_process(lambda: "give the command again"):
        ranks = Ranks()
        policy = trained_policy(model, lora, ranks, revision, variant, away)
        if not policy.edits and any(COLUMN in prompt.columns for prompt in prompts):
            raise ValueError(f"--image: {named(model)} is told a text alone; leave it out, or give a model that edits")
        warn_of_cuts(policy, prompts, ranks)
        sampling = ode(policy, wanted.num_inference_steps, wanted.guidance_scale, rows_at_once(policy))
        key, denoiser = NoiseKey(wanted.seed, 0), Denoiser(policy, policy.encode(prompts), sampling)
        start = expand(policy, torch.arange(len(prompts)), count, sampling, key)
        found: list[tuple[int, int, np.ndarray | None]] = []
        faults: list[str] = []
        mine = ranks.deal(len(start))
        for rows in mine.split(sampling.microbatch) if len(mine) else ():  # splitting nothing gives one empty part
            final = denoise(denoiser, start.take(rows), key, Meter())
            made = decoded(policy, final.x_NCHW, sampling.microbatch)
            shown = zip(made.images_NHWC.numpy(), made.there_N.tolist(), strict=True)
            images = (image if is_there else None for image, is_there in shown)
            found += zip(final.group_N.tolist(), final.member_N.tolist(), images, strict=True)
            faults += filter(None, [made.fault])
        drawn = sorted(ranks.gather(found), key=lambda one: one[:2])
        there = [(group, member, image) for group, member, image in drawn if image is not None]
        files = ranks.from_main(lambda: _written(there, out)) if there else []
        why = ranks.gather(faults)
        ranks.wait_for_all()
        if why:
            rest = f"; the others are in {named(out)}" if there else ""
            raise MissingPicturesError(
                f"{len(drawn) - len(there)} of {len(drawn)} pictures are missing: {why[-1]}{rest}"
            )
    return files if ranks.is_main else []


def _written(drawn: Sequence[tuple[int, int, np.ndarray]], out: Path) -> list[Path]:
    """The files of pictures (H, W, 3) or videos (F, H, W, 3), each with its group and its number there; groups follow those that lie there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {named(out)} cannot be made: {error.strerror}; give another folder") from error
    there = [int(found[1]) for file in out.iterdir() if (found := _NAME.fullmatch(file.name))]
    first, files = max(there, default=-1) + 1, list[Path]()
    for group, member, image in drawn:
        video = image.ndim == 4
        files.append(out / f"{first + group:03d}-{member:02d}.{'webp' if video else 'png'}")
        if video:
            start, *rest = map(Image.fromarray, image)
            start.save(files[-1], save_all=True, append_images=rest, duration=_FRAME, loop=0, quality=90)
        else:
            Image.fromarray(image).save(files[-1])
    return files
