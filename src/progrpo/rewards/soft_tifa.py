"""Soft-TIFA, the metric of GenEval 2 (arXiv 2512.16853): a vision-language model is asked about each part of a prompt.

The questions and answers are the column `vqa_list` of GenEval 2's prompts, or of your own.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from progrpo.messages import quoted
from progrpo.rewards.base import Refusal
from progrpo.rewards.chat import ChatReward
from progrpo.types import Prompt

COLUMN = "vqa_list"
_DIGITS = {
    word: str(n)
    for n, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}


class _SoftTIFA(ChatReward):
    """A mean of the probabilities that the model's first token is the right answer, over a prompt's questions: 0..1.

    A question that begins with "How many" has the answer that stands beside it, as a word or as digits, the others
    "Yes". The tokens' probabilities are those that the server gives, of the 20 likeliest; others count as 0.
    """

    needed = (COLUMN,)
    default_model = "Qwen/Qwen3-VL-8B-Instruct"

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            _questions(self.name, prompt)

    def value(self, picture_HWC: np.ndarray, prompt: Prompt) -> float:
        return self._mean(
            [
                answer_probability(self.first_token(picture_HWC, f"{question} Answer in one word."), question, answer)
                for question, answer in _questions(self.name, prompt)
            ]
        )

    @staticmethod
    @abstractmethod
    def _mean(probabilities: Sequence[float]) -> float: ...


class SoftTIFA(_SoftTIFA):
    """Soft-TIFA GM: the geometric mean, which is small where one answer is wrong. It is the figure of a prompt."""

    name = "soft_tifa"

    @staticmethod
    def _mean(probabilities: Sequence[float]) -> float:
        return math.prod(probabilities) ** (1 / len(probabilities))


class SoftTIFAMean(_SoftTIFA):
    """Soft-TIFA AM: the arithmetic mean, in which each right answer counts. It is the figure of the parts."""

    name = "soft_tifa_am"

    @staticmethod
    def _mean(probabilities: Sequence[float]) -> float:
        return sum(probabilities) / len(probabilities)


def answer_probability(probabilities: Mapping[str, float], question: str, answer: str) -> float:
    """The probability of all tokens that say the answer: with or without a space before it, with a small or a great
    first letter, a number also as digits.
    """
    word = answer.strip().lower() if question.startswith("How many") else "yes"
    forms = {word, word.capitalize(), _DIGITS.get(word, word)}
    return sum(p for token, p in probabilities.items() if token.removeprefix(" ") in forms)


def _questions(name: str, prompt: Prompt) -> list[tuple[str, str]]:
    """The questions and answers of a prompt. Refusal for a prompt without any."""
    given = prompt.columns.get(COLUMN)
    rows = list(given) if isinstance(given, list | tuple) else []
    pairs = [row for row in rows if _is_pair(row)]
    if not pairs or len(pairs) < len(rows):
        raise Refusal(
            f"reward {name!r}: the column {COLUMN} of the prompt {quoted(prompt.text)} must be a list of questions and"
            f' answers, such as [["How many dogs are in the image?", "two"]], not {quoted(given)}'
        )
    return [(question, answer) for question, answer in pairs]


def _is_pair(row: object) -> bool:
    return isinstance(row, list | tuple) and len(row) == 2 and all(isinstance(text, str) for text in row)
