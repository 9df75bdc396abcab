"""A rollout of pictures that exist already: pairs of which one is preferred take the place of sampled groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from progrpo.policies.base import Policy
from progrpo.preferences.pairs import PICTURES, PREFERENCE, STRENGTH
from progrpo.prompts.pictures import open_picture
from progrpo.types import GroupScores, Pictures, Prompt, Rollout, Scores, Trajectories


def recorded_pairs(policy: Policy, prompts: Sequence[Prompt], slot_P: Tensor) -> Rollout:
    """One group of two finished trajectories per pair: its pictures, encoded by the policy's autoencoder.

    A prompt is a pair's (`Pair.as_prompt`). A picture's score is the share of votes for it, and a pair's weight is its
    strength times the votes' majority, from 0 for a tie to 1. `slot_P` (int64) has the global places of pairs in the
    iteration. ValueError for a picture that cannot be read.
    """
    images = [open_picture(prompt.columns[name], name) for prompt in prompts for name in PICTURES]
    latents_NCHW = policy.encode_pictures(images)
    condition = policy.encode(prompts)
    shares_P, strengths_P = (
        torch.tensor([prompt.columns[name] for prompt in prompts], dtype=torch.float64)
        for name in (PREFERENCE, STRENGTH)
    )
    group_N = torch.arange(len(prompts)).repeat_interleave(2)
    votes_N = torch.stack([shares_P, 1 - shares_P], dim=1).flatten()
    scores = GroupScores.of(_without_rewards(votes_N), group_N)
    trajectories = Trajectories(group_N, slot_P[group_N], torch.arange(2).repeat(len(prompts)), latents_NCHW)
    return Rollout(
        prompts=tuple(prompts),
        condition=condition,
        trajectories=trajectories,
        pictures=Pictures(_of_one_size(images), torch.ones(len(images), dtype=torch.bool)),
        survivors=scores,
        finalists=scores,
        previews=(),
        weight_P=strengths_P * (2 * shares_P - 1).abs(),
    )


def _without_rewards(votes_N: Tensor) -> Scores:
    missing_N = torch.full_like(votes_N, torch.nan)
    return Scores(votes_N, votes_N, missing_N, missing_N[:, None])


def _of_one_size(images: Sequence[Image.Image]) -> Tensor:
    """The pictures, uint8 (N, H, W, 3), fitted to the size of the first."""
    fitted = [np.asarray(ImageOps.fit(image, images[0].size, Image.Resampling.LANCZOS)) for image in images]
    return torch.as_tensor(np.stack(fitted))
