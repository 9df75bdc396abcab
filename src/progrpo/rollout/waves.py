"""Slow rewards: an iteration's prompts go in waves, and while the pictures of one are scored the next is sampled.

Each wave is a rollout in a thread of its own, and one lock says whose turn it is. It is given up for a reward's answer alone,
so that networks never run at the same time, and no more scoring is under way than there are waves. Noise knows whose it is, so
what comes out does not depend on who was first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from progrpo.rewards.base import Scorer
from progrpo.rollout.meter import Meter
from progrpo.types import Condition, GroupScores, Pictures, Preview, Prompt, Rollout, Scores, Trajectories

_Grouped = TypeVar("_Grouped", Trajectories, GroupScores, Preview)


class _Elsewhere:
    """A reward that lets others have the turn while it scores."""

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
    sample: Callable[[Scorer, Tensor, Meter], Rollout], reward: Scorer, count: int, waves: int, meter: Meter
) -> Rollout:
    """The rollouts of `count` prompts, in waves of neighbours: `sample(reward, places, meter)` is that of some of them.

    Stages of different waves overlap, so the meter's seconds may come to more than went by. The first error of a wave is raised
    once all have ended.
    """
    parts = torch.arange(count).tensor_split(min(waves, count))
    if len(parts) == 1:
        return sample(reward, parts[0], meter)
    turn, meters = threading.Lock(), [Meter() for _ in parts]

    def wave(places: Tensor, its_meter: Meter) -> Rollout:
        with turn:
            return sample(_Elsewhere(reward, turn), places, its_meter)

    with ThreadPoolExecutor(len(parts)) as threads:
        found = list(threads.map(wave, parts, meters))
    for one in meters:
        meter.add(one)
    return joined(found)


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
    """The same rollout with group numbers that begin at `start`."""

    def numbered(rows: _Grouped) -> _Grouped:
        return replace(rows, group_N=rows.group_N + start)

    return replace(
        rollout,
        trajectories=numbered(rollout.trajectories),
        survivors=numbered(rollout.survivors),
        finalists=numbered(rollout.finalists),
        previews=tuple(map(numbered, rollout.previews)),
    )
