"""A reward of pictures that scores videos, by some of their frames."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from progrpo.frames import evenly
from progrpo.rewards.base import Reward, RewardWrapper, Score
from progrpo.types import Prompt


class FrameAverageReward(RewardWrapper):
    """A video (F, H, W, 3) is worth the mean over `count` of its frames, evenly spaced; a picture what `reward` says of it.

    The score is missing where one frame's is, and a verdict is passed where all frames pass. A call has one frame of each
    video, so that a reward that ranks a group compares the same moment of its members.
    """

    def __init__(self, reward: Reward, count: int) -> None:
        super().__init__(reward)
        self.video, self._count = True, count

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        if pictures_NHWC.ndim == 4:
            return self._reward.score(pictures_NHWC, prompts)
        places = evenly(self._count, pictures_NHWC.shape[1])
        moments = [self._reward.score(pictures_NHWC[:, place], prompts) for place in places]
        return [_of_all(frames) for frames in zip(*moments, strict=True)]


def _of_all(frames: Sequence[Score]) -> Score:
    """One score of a video from those of its frames."""
    values, verdicts = [frame.value for frame in frames], [frame.passed for frame in frames]
    there = [value for value in values if value is not None]
    return Score(
        sum(there) / len(there) if len(there) == len(values) else None,
        None if None in verdicts else all(verdicts),
        next((frame.error for frame in frames if frame.error), None),
    )
