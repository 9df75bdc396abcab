"""Does a picture show the text that its prompt asks for? Read by PP-OCRv6 (Apache-2.0), which comes with rapidocr's package."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from progrpo.prompts.texts import folded
from progrpo.rewards.base import Refusal, Reward, Score
from progrpo.rewards.hub import require
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

_DOUBLE = {  # what opens a quotation, and what may close it
    '"': '"',
    "\N{FULLWIDTH QUOTATION MARK}": "\N{FULLWIDTH QUOTATION MARK}",
    "“": '”“"',
    "„": '“”"',
    "”": "”",
    "«": "»",
    "»": "«",
    "「": "」",
    "『": "』",
    "〝": "〞〟",
}
_SINGLE = {"'": "'", "‘": "’'", "‚": "‘’", "‹": "›", "›": "‹"}
_FRACTIONS = "¼½¾⅛⅜⅝⅞"


class OCR(Reward):
    """max(1 - N_e / N_ref, 0), Flow-GRPO's reward for text (arXiv 2505.05470): 0..1, passed if it is 1.

    N_ref is the length of the text asked for, the target, and N_e the least number of insertions, deletions and substitutions
    between it and the text read: all lines joined, from the top down. As in the published code both are compared without case
    and spaces, N_e is 0 if the target is part of the text read, and a picture without text has 0. What differs:

    - Letters, quotation marks and dashes that Unicode has in several forms are compared in one (`progrpo.prompts.texts.folded`).
    - The target is the prompt's column `target` if it has one, else what the prompt has in quotes: in double ones ("", “”, „“,
      «», 「」), or in single ones ('', ‘’) if there are none; the published code takes the first "" alone. A mark after a number
      (12" pizza) is one of inches or feet, where it can be.
    - There may be several targets (a list in the column, several quotes). Then each is compared with that part of the text
      read that is nearest to it, for the rest may belong to the others, and N_e and N_ref are sums over them.
    - The reader is PP-OCRv6 (small), not PaddleOCR's English model, and pictures below 256 on their shorter side are enlarged
      to it before text is looked for. Where reading raises an error, the score is missing, and not 0.

    On a CPU, by one thread; processes make it faster.
    """

    def __init__(self, reader: Callable[[np.ndarray], Any]) -> None:
        """`reader`: what is read in a picture (uint8, (H, W, 3), blue first), its lines as `txts`, None if none."""
        self._reader = reader

    @classmethod
    def make(cls, term: RewardTerm) -> Self:
        """With the models in rapidocr's package; they are loaded at the first score."""
        require("ocr", "rapidocr", "onnxruntime", extra="ocr")
        from rapidocr import RapidOCR

        return cls(
            RapidOCR(
                params={
                    "Global.log_level": "error",
                    "Global.use_cls": False,  # no turning of lines that lie upside down: as published
                    "Det.limit_side_len": 256,  # its own 736 reads no better and takes up to 5 times as long
                    "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                }
            )
        )

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        wanted = [targets(prompt) for prompt in prompts]
        values = [similarity(w, self._read(p)) for w, p in zip(wanted, pictures_NHWC, strict=True)]
        return [Score(value, value == 1) for value in values]

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            targets(prompt)

    def _read(self, picture_HWC: np.ndarray) -> str:
        blue_first = np.ascontiguousarray(picture_HWC[..., ::-1])
        return plain("".join(self._reader(blue_first).txts or ()))


def plain(text: str) -> str:
    """In the form that is compared, without white space."""
    return folded(text).replace(" ", "")


def targets(prompt: Prompt) -> list[str]:
    """The texts that a prompt asks for, plain; empty ones do not count, and there must be another."""
    given = prompt.columns.get("target")
    if given is None:
        given = quoted(prompt.text)
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise Refusal(
            f"reward 'ocr': `target` of the prompt {prompt.text!r} is {given!r}, not a text or a list of texts"
        )
    if not (wanted := [plain(text) for text in texts if plain(text)]):
        raise Refusal(
            f"reward 'ocr': the prompt {prompt.text!r} asks for no text: put it in \"quotes\", or in a column `target`"
        )
    return wanted


def quoted(text: str) -> list[str]:
    """What stands in double quotes; if nothing does, in single ones."""
    for marks in (_DOUBLE, _SINGLE):
        if found := [inside for inside in _between(text, marks) if inside.strip()]:
            return found
    return []


def _between(text: str, marks: Mapping[str, str]) -> list[str]:
    found, place = [], 0
    while place < len(text):
        end = _end(text, place, marks) if _opens(text, place, marks) else None
        if end is not None:
            found.append(text[place + 1 : end])
            place = end
        place += 1
    return found


def _opens(text: str, place: int, marks: Mapping[str, str]) -> bool:
    """Not where it is an apostrophe, a plural's end or a mark of inches."""
    if text[place] not in marks:
        return False
    return not (_in_word(text[place - 1 : place]) if text[place] in "'”" else _measures(text, place))


def _end(text: str, start: int, marks: Mapping[str, str]) -> int | None:
    """Where the quotation that begins at `start` ends."""
    closing = marks[text[start]]
    places = [i for i in range(start + 1, len(text)) if text[i] in closing]
    for number, i in enumerate(places, 1):
        if text[i] in "'’" and _in_word(text[i + 1 : i + 2]):
            if i > start + 1 and _in_word(text[i - 1]):
                continue  # an apostrophe
            return None
        if not (_measures(text, i) and any(_closes(text, after) for after in places[number : number + 1])):
            return i
    return None


def _in_word(letter: str) -> bool:
    """Whether an apostrophe can be beside it; scripts without case, such as Chinese, have none and often no spaces."""
    return letter.isalnum() and unicodedata.category(letter) != "Lo"


def _measures(text: str, place: int) -> bool:
    """Whether a mark may be one of inches or feet: it follows a number."""
    return place > 0 and (text[place - 1].isdigit() or text[place - 1] in _FRACTIONS) and text[place] in "\"'”’"


def _closes(text: str, place: int) -> bool:
    """Whether a mark can be nothing but the end of a quotation: it follows a letter, and none follows it."""
    before, after = text[place - 1 : place], text[place + 1 : place + 2]
    return not (before.isspace() or _in_word(after) or _measures(text, place))


def similarity(wanted: Sequence[str], read: str) -> float:
    """1 - N_e / N_ref of the plain texts that are wanted, see OCR."""
    edits = sum(_edits(target, read, anywhere=len(wanted) > 1) for target in wanted)
    return 1 - edits / sum(map(len, wanted))


def _edits(target: str, read: str, anywhere: bool) -> int:
    """Fewest edits from the text read, or from the nearest part of it, to the target; at most its length."""
    if target in read:
        return 0
    # row[j]: from what is read up to its letter j to the first i letters of the target; a part may begin at any j.
    row = [0] * (len(read) + 1) if anywhere else [*range(len(read) + 1)]
    for i, letter in enumerate(target, 1):
        above, row = row, [i]
        for j, other in enumerate(read, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other)))
    return min(len(target), min(row) if anywhere else row[-1])
