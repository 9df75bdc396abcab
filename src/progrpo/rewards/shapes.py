"""The built-in reward: the shapes world's verifier, graded for training, strict for reporting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from progrpo.rewards.base import Score
from progrpo.types import Prompt
from progrpo.zoo.shapes.verifier import verify


class ShapesReward:
    """Needs prompts of the shapes world: their columns list what the picture must hold."""

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        strangers = [p.text for p in prompts if "objects" not in p.columns]
        if strangers:
            raise ValueError(
                f"the reward `shapes` cannot read the prompt {strangers[0]!r}: it needs the built-in prompts"
                " (--prompts.source shapes); name a reward of your own as module:function"
            )
        return [Score(v.graded, v.strict) for v in verify(pictures_NHWC, prompts)]
