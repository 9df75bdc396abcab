"""RationalRewards: a vision-language model that explains its marks of a picture or an edit, behind a server."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from progrpo.rewards.chat import ChatReward, Part, short
from progrpo.rewards.questions import question_text
from progrpo.rewards.source import check_source_column, source_pixels
from progrpo.types import Prompt

TEXT, IMAGE = "Text Faithfulness", "Image Faithfulness"
QUALITY, RENDERING = "Physical and Visual Quality", "Text Rendering"
SYSTEM = (
    "You are an expert image generation evaluator. Your task is to evaluate the quality of a generated image based on a"
    " user instruction. Afterwards, you need to suggest how to refine the original user request to produce better image"
    " generation (if any)."
)
EDIT_SYSTEM = (
    "You are an expert image editing evaluator. Your task is to evaluate the quality of an edited image based on a"
    " source image and a user instruction. Afterwards, you need to suggest how to refine the original user request to"
    " produce better image edits (if any)."
)
_LEAST, _BEST = 1, 4


class RationalRewards(ChatReward):
    """(m - 1) / 3 for the mean m of the marks from 1 to 4 for text, quality and rendered text: 0..1.

    A mark N/A (no text was asked for) does not count. Question and formula are those of Flow-Factory's
    `rational_rewards_t2i`, which the model's authors wrote. There a mark that is missing is left out of the mean, and
    one out of range is moved into it; here the score is missing.
    """

    name = "rationalrewards"
    default_model = "TIGER-Lab/RationalRewards-8B-T2I"
    max_tokens = 2048

    def value(self, picture_HWC: np.ndarray, prompt: Prompt) -> float:
        question = _parts(question_text("rationalrewards"), prompt.text, [picture_HWC])
        return rational_value(parse_aspects(self.ask(*question, system=SYSTEM), [TEXT, QUALITY, RENDERING]))


class RationalRewardsEdit(ChatReward):
    """RationalRewards of an edit, with a mark for what the source, the column `image`, should keep: 0..1."""

    name = "rationalrewards_edit"
    needed = ("image",)
    default_model = "TIGER-Lab/RationalRewards-8B-Edit"
    max_tokens = 2048

    def check(self, prompts: Sequence[Prompt]) -> None:
        check_source_column(self.name, prompts)

    def value(self, picture_HWC: np.ndarray, prompt: Prompt) -> float:
        pictures = [source_pixels(prompt), picture_HWC]
        question = _parts(question_text("rationalrewards_edit"), prompt.text, pictures)
        return rational_value(parse_aspects(self.ask(*question, system=EDIT_SYSTEM), [TEXT, IMAGE, QUALITY, RENDERING]))


def _parts(question: str, request: str, pictures: Sequence[np.ndarray]) -> list[Part]:
    """The question with the pictures at their places. What the request holds does not count as a place."""
    texts = [text.replace("{request}", request) for text in question.split("<image>")]
    assert len(texts) == len(pictures) + 1
    return [texts[0], *(part for pair in zip(pictures, texts[1:], strict=True) for part in pair)]


def parse_aspects(answer: str, aspects: Sequence[str]) -> list[float]:
    """The marks of the aspects that have one, in `1. Text Faithfulness: ... ## Score: 3.5`.

    ValueError where an aspect has no score and no N/A, or none of them has a score.
    """
    judgement = re.split(r"^#+\s*Summary", answer, maxsplit=1, flags=re.MULTILINE)[0]
    marks: list[float] = []
    for n, aspect in enumerate(aspects, 1):
        start = re.search(rf"^\W*{n}\.\W*{aspect}", judgement, re.MULTILINE)
        block = "" if start is None else judgement[start.end() :]
        end = re.search(rf"^\W*{n + 1}\.\W*(?:{'|'.join(aspects)})", block, re.MULTILINE)
        block = block if end is None else block[: end.start()]
        mark = re.search(r"\bScore[\s*]*:[\s*\[]*(-?\d+(?:\.\d+)?|N/A)", block, re.IGNORECASE)
        if mark is None:
            raise ValueError(f"the answer has no score of {aspect}: {short(answer)}")
        if mark[1].upper() != "N/A":
            marks.append(float(mark[1]))
            if not _LEAST <= marks[-1] <= _BEST:
                raise ValueError(f"the score of {aspect} is {mark[1]}, which is not from {_LEAST} to {_BEST}")
    if not marks:
        raise ValueError(f"the answer has no score at all: {short(answer)}")
    return marks


def rational_value(marks: Sequence[float]) -> float:
    """Compute (m - 1) / 3 of the mean m of marks from 1 to 4."""
    return (sum(marks) / len(marks) - _LEAST) / (_BEST - _LEAST)
