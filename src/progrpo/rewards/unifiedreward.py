"""UnifiedReward (arXiv 2503.05236): a vision-language model that was trained to mark pictures, behind a server."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from progrpo.rewards.chat import ChatReward, short
from progrpo.rewards.questions import question_text
from progrpo.types import Prompt

AXES = ("Alignment Score", "Coherence Score", "Style Score")
_BEST = 5


class UnifiedReward(ChatReward):
    """The final score from 1 to 5 of version 1, over 5: 0.2..1, as in Flow-GRPO's code (arXiv 2505.05470).

    The question is Flow-GRPO's. There pictures are first resized to 512 by 512; here they are sent as they are.
    """

    name = "unifiedreward"
    default_model = "CodeGoat24/UnifiedReward-7b-v1.5"

    def value(self, picture_HWC: np.ndarray, prompt: Prompt) -> float:
        question = question_text("unifiedreward").replace("{request}", prompt.text)
        (mark,) = parse_marks(self.ask(picture_HWC, question), ["Final Score"])
        return mark / _BEST


class UnifiedReward2(ChatReward):
    """The mean of the marks from 1 to 5 for alignment, coherence and style of version 2.0, over 5: 0.2..1.

    The question is the published one. That their mean is taken is this project's choice.
    """

    name = "unifiedreward2"
    default_model = "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b"

    def value(self, picture_HWC: np.ndarray, prompt: Prompt) -> float:
        question = question_text("unifiedreward2").replace("{request}", prompt.text)
        marks = parse_marks(self.ask(picture_HWC, question), AXES)
        return sum(marks) / len(marks) / _BEST


def parse_marks(answer: str, names: Sequence[str]) -> list[float]:
    """The mark from 1 to 5 after each name, as in `Style Score (1-5): 2.8`. ValueError where one is not there once."""
    marks: list[float] = []
    for name in names:
        pattern = rf"{name}(?:\s*\(1-5\))?[\s*]*:[\s*]*(-?\d+(?:\.\d+)?)"
        values = {float(number) for number in re.findall(pattern, answer, re.IGNORECASE)}
        if len(values) != 1:
            raise ValueError(f"the answer has {'several' if values else 'no'} {name}: {short(answer)}")
        marks += values
        if not 1 <= marks[-1] <= _BEST:
            raise ValueError(f"the {name} is not from 1 to {_BEST}: {short(answer)}")
    return marks
