"""A reward of pictures that scores videos by some of their frames."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from progrpo.frames import frame_places
from progrpo.rewards.base import Reward, RewardWrapper, Score
from progrpo.types import Prompt


class FrameAverageReward(RewardWrapper):
    """The mean of a reward over `count` evenly spaced frames of each video (F, H, W, 3); a picture has its own score.

    The score is missing where one frame's is missing, and a verdict is passed where all frames pass. A call has one
    frame of each video, so that a ranking compares the same moment of all members of a group.
    """

    def __init__(self, reward: Reward, count: int) -> None:
        super().__init__(reward)
        self.video = True
        self._count = count

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        if pictures_NHWC.ndim == 4:
            return self._reward.score(pictures_NHWC, prompts)
        places = frame_places(self._count, pictures_NHWC.shape[1])
        moments = [self._reward.score(pictures_NHWC[:, place], prompts) for place in places]
        return [_mean(frames) for frames in zip(*moments, strict=True)]


def _mean(frames: Sequence[Score]) -> Score:
    """The score of a video from those of its frames."""
    verdicts = [frame.passed for frame in frames]
    values = [frame.value for frame in frames if frame.value is not None]
    return Score(
        sum(values) / len(values) if len(values) == len(frames) else None,
        None if None in verdicts else all(verdicts),
        next((frame.error for frame in frames if frame.error), None),
    )
