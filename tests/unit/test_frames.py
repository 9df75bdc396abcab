"""Which frames stand for a video, and what a reward of pictures makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from progrpo.config import RewardTerm
from progrpo.frames import frame_places, still_pictures
from progrpo.rewards.base import Refusal, Reward, Score
from progrpo.rewards.frames import FrameAverageReward
from progrpo.rewards.function import FunctionReward
from progrpo.rewards.mixture import RewardMixture, component_from
from progrpo.types import Prompt

PROMPTS = [Prompt("a"), Prompt("b")]
# frame f of video n is grey 10 n + f
VIDEOS = np.broadcast_to(
    (10 * np.arange(2)[:, None] + np.arange(9)).astype(np.uint8)[..., None, None, None], (2, 9, 4, 5, 3)
)


@pytest.mark.parametrize(
    ("count", "frames", "expected"),
    [
        (1, 81, [40]),
        (2, 81, [0, 80]),
        (4, 81, [0, 27, 53, 80]),
        (5, 81, [0, 20, 40, 60, 80]),
        (4, 5, [0, 1, 3, 4]),
        (9, 5, [0, 1, 2, 3, 4]),
        (4, 1, [0]),
        (1, 1, [0]),
    ],
)
def test_frames_are_even_with_the_first_and_the_last(count, frames, expected):
    assert frame_places(count, frames) == expected


def test_frames_are_never_taken_twice():
    for frames in range(1, 60):
        for count in range(1, frames + 3):
            places = frame_places(count, frames)
            assert len(set(places)) == len(places) == min(count, frames) and places == sorted(places)


@pytest.mark.parametrize("kind", [np.asarray, lambda a: torch.from_numpy(np.ascontiguousarray(a))])
def test_the_middle_frame_stands_for_a_video_and_holds_no_other(kind):
    stills = still_pictures(kind(VIDEOS))
    assert stills.shape == (2, 4, 5, 3) and [int(picture[0, 0, 0]) for picture in stills] == [4, 14]
    size = stills.untyped_storage().nbytes() if isinstance(stills, torch.Tensor) else stills.base.nbytes
    assert size == 2 * 4 * 5 * 3
    pictures = kind(VIDEOS[:, 0])
    assert still_pictures(pictures) is pictures


@dataclass
class Grey(Reward):
    """The grey of each picture, or what a table says of it; it notes how often it was asked."""

    table: dict[int, Score] = field(default_factory=dict)
    calls: list[list[int]] = field(default_factory=list)
    closed: bool = False

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        assert pictures_NHWC.shape[1:] == (4, 5, 3) and len(prompts) == len(pictures_NHWC)
        self.calls.append([int(picture[0, 0, 0]) for picture in pictures_NHWC])
        return [self.table.get(grey, Score(float(grey), True)) for grey in self.calls[-1]]

    def check(self, prompts: Sequence[Prompt]) -> None:
        raise Refusal("not these")

    def close(self) -> None:
        self.closed = True


def test_a_video_is_worth_the_mean_of_its_frames():
    reward = Grey()
    assert FrameAverageReward(reward, 3).score(VIDEOS, PROMPTS) == [Score(4.0, True), Score(14.0, True)]
    assert reward.calls == [[0, 10], [4, 14], [8, 18]]  # a moment of all of them at a time
    assert FrameAverageReward(reward, 2).score(VIDEOS, PROMPTS)[0] == Score(4.0, True)
    assert FrameAverageReward(reward, 1).score(VIDEOS[1:], PROMPTS[1:]) == [Score(14.0, True)]


@pytest.mark.parametrize(
    ("of_a_frame", "expected"),
    [
        (Score(None, None, "no face"), Score(None, None, "no face")),
        (Score(None, True), Score(None, True)),
        (Score(1.0, False), Score((0 + 1 + 8) / 3, False)),
        (Score(1.0), Score((0 + 1 + 8) / 3)),
    ],
)
def test_a_frame_without_a_score_or_a_pass_is_a_video_without(of_a_frame, expected):
    scores = FrameAverageReward(Grey({4: of_a_frame}), 3).score(VIDEOS, PROMPTS)
    assert scores == [expected, Score(14.0, True)]
    nan = FrameAverageReward(Grey({4: Score(math.nan)}), 3).score(VIDEOS, PROMPTS)
    assert math.isnan(nan[0].number()) and nan[1].value == 14


def test_a_picture_is_scored_as_it_is():
    reward = Grey()
    assert [s.value for s in FrameAverageReward(reward, 3).score(VIDEOS[:, 2], PROMPTS)] == [2, 12]
    assert len(reward.calls) == 1


def test_what_a_reward_says_and_holds_is_passed_on():
    reward = Grey()
    with pytest.raises(Refusal, match="not these"):
        FrameAverageReward(reward, 2).check(PROMPTS)
    FrameAverageReward(reward, 2).close()
    assert reward.closed


def moving(images: list[np.ndarray], prompts: list[str]) -> list[float]:
    """The distance of the last frame from the first."""
    assert all(image.dtype == np.uint8 and image.shape[1:] == (4, 5, 3) for image in images)
    return [float(image[-1, 0, 0, 0]) - float(image[0, 0, 0, 0]) for image in images]


moving.video = True  # type: ignore[attr-defined]


def ranking(images: list[Any], prompts: list[str]) -> list[float]:
    """Place in the group by grey."""
    greys = [float(np.asarray(image).mean()) for image in images]
    return [float(sorted(greys).index(grey)) for grey in greys]


ranking.groupwise = True  # type: ignore[attr-defined]


def test_a_function_is_given_frames_whole_videos_or_a_moment_of_its_group():
    def grey(images, prompts):
        assert all(image.size == (5, 4) and image.mode == "RGB" for image in images)
        return [float(np.asarray(image).mean()) for image in images]

    terms = [component_from(RewardTerm(name), FunctionReward(f), 3) for name, f in (("grey", grey), ("moving", moving))]
    terms.append(component_from(RewardTerm("ranking", 0.5), FunctionReward(ranking), 3))
    scores = RewardMixture(terms).score(VIDEOS, PROMPTS, torch.tensor([0, 0]))
    assert scores.rewards_NR.tolist() == [[4, 8, 0], [14, 8, 1]]
    assert scores.value_N.tolist() == [12, 22.5]


def test_a_picture_is_a_video_of_one_frame_to_a_function_of_videos():
    term = component_from(RewardTerm("moving"), FunctionReward(moving), 3)
    assert RewardMixture([term]).score(VIDEOS[:, 3], PROMPTS, torch.tensor([0, 0])).value_N.tolist() == [0, 0]


def test_frames_are_cached_one_by_one(tmp_path):
    reward = Grey()
    term = component_from(RewardTerm("grey", cache=str(tmp_path)), reward, 3)
    for _ in range(2):
        assert [s.value for s in term.reward.score(VIDEOS, PROMPTS)] == [4, 14]
    assert len(reward.calls) == 3
