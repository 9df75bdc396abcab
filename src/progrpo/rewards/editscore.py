"""EditScore (arXiv 2509.23909): a vision-language model that was trained to mark edits, behind a server."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from progrpo.rewards.chat import ChatReward, short
from progrpo.rewards.questions import question_text
from progrpo.rewards.source import check_source_column, source_pixels
from progrpo.types import Prompt

_BEST = 25


class EditScore(ChatReward):
    """sqrt(min(success, restraint) min(naturalness, no artifacts)) / 25 of marks from 0 to 25: 0..1.

    The first two marks are of the edit, asked with the source picture (the column `image`) and the instruction; the
    others of the edited picture alone. Questions and formula are the published ones, over 10 here. There the model is
    asked at temperature 0.7, one time or several, and an answer without marks counts as half of the best; here it is
    asked once at temperature 0, and such a score is missing.
    """

    name = "editscore"
    needed = ("image",)

    def check(self, prompts: Sequence[Prompt]) -> None:
        check_source_column(self.name, prompts)

    def value(self, picture_HWC: np.ndarray, prompt: Prompt) -> float:
        question = question_text("editscore_edit").replace("{request}", prompt.text)
        edit = parse_marks(self.ask(source_pixels(prompt), picture_HWC, question))
        quality = parse_marks(self.ask(picture_HWC, question_text("editscore_quality")))
        return math.sqrt(min(edit) * min(quality)) / _BEST


def parse_marks(answer: str) -> list[float]:
    """The two marks from 0 to 25 in `{"reasoning": "...", "score": [20, 22]}`. ValueError where they are not there.

    Marks also count where the reasoning breaks the JSON, as by quotation marks.
    """
    match = re.search(r"\{.*\}", answer, re.DOTALL)
    try:
        record = json.loads(match[0]) if match else None
        marks = record["score"] if isinstance(record, Mapping) else None
    except (ValueError, LookupError):
        listed = re.findall(r"[\"']?score[\"']?\s*:\s*\[([^\[\]]*)\]", answer)
        marks = [_number(text) for text in listed[-1].split(",")] if listed else None
    if not isinstance(marks, list) or len(marks) != 2 or any(type(mark) not in (int, float) for mark in marks):
        raise ValueError(f"the answer has no two marks: {short(answer)}")
    if not all(0 <= mark <= _BEST for mark in marks):
        raise ValueError(f"the marks are not from 0 to {_BEST}: {short(answer)}")
    return [float(mark) for mark in marks]


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\s*-?\d+(?:\.\d+)?\s*", text) else None
