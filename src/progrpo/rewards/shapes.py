"""The rewards of the built-in shapes world: by its verifier, with its strict verdict, and continuous ones beside it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from progrpo.messages import quoted
from progrpo.rewards.base import Refusal, Reward, Score
from progrpo.types import Prompt
from progrpo.zoo.shapes.match import match
from progrpo.zoo.shapes.taste import taste
from progrpo.zoo.shapes.verifier import verify


class _OfShapesPrompts(Reward):
    """A reward for prompts of the shapes world: their columns list the objects of the picture."""

    parameters = 0

    def check(self, prompts: Sequence[Prompt]) -> None:
        unknown = [p.text for p in prompts if "objects" not in p.columns]
        if unknown:
            raise Refusal(
                f"the reward `shapes` cannot read the prompt {quoted(unknown[0])}: it needs the built-in prompts,"
                " `shapes`; give these, or another reward, such as module:function of your own"
            )


class ShapesReward(_OfShapesPrompts):
    """The verifier's graded score."""

    _strict_share = 0.0
    """The share of the value that is the strict verdict, 1 or 0."""

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        self.check(prompts)
        share = self._strict_share
        return [
            Score((1 - share) * v.graded + share * float(v.strict), v.strict) for v in verify(pictures_NHWC, prompts)
        ]


class StrictShapesReward(ShapesReward):
    """1 where the picture holds exactly the objects of the prompt, else 0."""

    _strict_share = 1.0


class MixedShapesReward(ShapesReward):
    """The mean of the graded score and the strict verdict."""

    _strict_share = 0.5


class MatchReward(_OfShapesPrompts):
    """The match of each object's colour, outline, size and place with the prompt's words, without thresholds.

    The strict verdict stands beside it and has no part in the value.
    """

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        self.check(prompts)
        verdicts = verify(pictures_NHWC, prompts)
        return [Score(value, v.strict) for value, v in zip(match(pictures_NHWC, prompts), verdicts, strict=True)]


class TasteReward(Reward):
    """The size, centring and warmth of the ink, without thresholds. Prompts are not read."""

    parameters = 0

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        return [Score(value) for value in taste(pictures_NHWC)]
