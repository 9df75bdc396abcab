"""Slow rewards: an iteration's prompts go in waves, and while the pictures of one are scored the next is sampled.

Each wave is a rollout in a thread of its own, and a lock gives the turn to one of them. A wave releases it only while
it waits for a reward. So networks never run at the same time, and no more scoring is under way than there are waves.
Noise is keyed by slot and member, so the result does not depend on the order of waves.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from progrpo.rewards.base import Scorer
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.rollout import rollout
from progrpo.rollout.sampler import Sampler
from progrpo.types import Condition, GroupScores, Pictures, Preview, Prompt, Rollout, Scores, Trajectories

_Grouped = TypeVar("_Grouped", Trajectories, GroupScores, Preview)


class _YieldingReward:
    """A reward that gives up the turn while it scores, so that another wave runs."""

    def __init__(self, reward: Scorer, turn: threading.Lock) -> None:
        self._reward, self._turn, self.weights = reward, turn, reward.weights

    def score(
        self,
        pictures_NHWC: np.ndarray,
        prompts: Sequence[Prompt],
        group_N: Tensor,
        there_N: Tensor | None = None,
        fault: str = "",
    ) -> Scores:
        self._turn.release()
        try:
            return self._reward.score(pictures_NHWC, prompts, group_N, there_N, fault)
        finally:
            self._turn.acquire()


def in_waves(
    sampler: Sampler, prompts: Sequence[Prompt], slot_P: Tensor, key: NoiseKey, meter: Meter, waves: int
) -> Rollout:
    """The rollout of some prompts, in waves of neighbours.

    Stages of different waves overlap, so the meter's seconds can come to more than the time that passed. The first
    error of a wave is raised once all have ended.
    """
    places = torch.arange(len(prompts)).tensor_split(min(waves, len(prompts)))
    if len(places) == 1:
        return rollout(sampler, prompts, slot_P, key, meter)
    turn, meters = threading.Lock(), [Meter() for _ in places]
    yielding = replace(sampler, reward=_YieldingReward(sampler.reward, turn))

    def wave(places: Tensor, own_meter: Meter) -> Rollout:
        with turn:
            return rollout(yielding, [prompts[i] for i in places.tolist()], slot_P[places], key, own_meter)

    with ThreadPoolExecutor(len(places)) as threads:
        futures = [threads.submit(wave, *part) for part in zip(places, meters, strict=True)]
    parts = [future.result() for future in futures]  # `map` would cancel a wave whose thread has not begun yet
    for own_meter in meters:
        meter.add(own_meter)
    return joined(parts)


def joined(parts: Sequence[Rollout]) -> Rollout:
    """Rollouts one after another, with the groups of later ones numbered on."""
    starts = accumulate([len(r.prompts) for r in parts], initial=0)
    numbered = [_numbered_from(start, r) for start, r in zip(starts, parts, strict=False)]
    return Rollout(
        prompts=tuple(prompt for r in numbered for prompt in r.prompts),
        condition=Condition.cat([r.condition for r in numbered]),
        trajectories=Trajectories.cat([r.trajectories for r in numbered]),
        pictures=Pictures.cat([r.pictures for r in numbered]),
        survivors=GroupScores.cat([r.survivors for r in numbered]),
        finalists=GroupScores.cat([r.finalists for r in numbered]),
        previews=tuple(preview for r in numbered for preview in r.previews),
    )


def _numbered_from(start: int, rollout: Rollout) -> Rollout:
    """Number the groups of a rollout from `start`."""

    def numbered(rows: _Grouped) -> _Grouped:
        return replace(rows, group_N=rows.group_N + start)

    return replace(
        rollout,
        trajectories=numbered(rollout.trajectories),
        survivors=numbered(rollout.survivors),
        finalists=numbered(rollout.finalists),
        previews=tuple(map(numbered, rollout.previews)),
    )
