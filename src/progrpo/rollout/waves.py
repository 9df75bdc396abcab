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

import numpy as np
import torch
from torch import Tensor

from progrpo.packing import join
from progrpo.rewards.base import Scorer
from progrpo.rollout.meter import Meter
from progrpo.types import Condition, Prompt, Rollout, Scores


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
    """Rollouts one after another: the groups of later ones are numbered on."""
    starts = [sum(len(r.prompts) for r in parts[:i]) for i in range(len(parts))]
    first = parts[0]
    return Rollout(
        prompts=tuple(prompt for r in parts for prompt in r.prompts),
        condition=Condition(
            {name: torch.cat([r.condition.tensors[name] for r in parts]) for name in first.condition.tensors}
        ),
        trajectories=join(
            [replace(r.trajectories, group_N=r.group_N + start) for r, start in zip(parts, starts, strict=True)]
        ),
        images_NHWC=torch.cat([r.images_NHWC for r in parts]),
        there_N=torch.cat([r.there_N for r in parts]),
        rewards_N=torch.cat([r.rewards_N for r in parts]),
        ranking_N=torch.cat([r.ranking_N for r in parts]),
        passed_N=torch.cat([r.passed_N for r in parts]),
        rewards_NR=torch.cat([r.rewards_NR for r in parts]),
        finalist_rewards_F=torch.cat([r.finalist_rewards_F for r in parts]),
        finalist_group_F=torch.cat([r.finalist_group_F + start for r, start in zip(parts, starts, strict=True)]),
        previews=tuple(
            replace(p, group_N=p.group_N + start) for r, start in zip(parts, starts, strict=True) for p in r.previews
        ),
    )
