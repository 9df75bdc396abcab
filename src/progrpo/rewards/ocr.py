"""OCR: whether a picture shows the text that its prompt asks for, by PP-OCRv6 (Apache-2.0) in rapidocr's package."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, Self, cast

import numpy as np

from progrpo.prompts.texts import folded
from progrpo.rewards.base import Refusal, Reward, Score
from progrpo.rewards.hub import require
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

_DOUBLE = {  # the mark that opens a quotation, and those that may close it
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


class Lines(Protocol):
    """The text read in a picture."""

    @property
    def txts(self) -> Sequence[str] | None:
        """The lines; None where there is no text."""
        ...


class OCR(Reward):
    """max(1 - N_e / N_ref, 0), Flow-GRPO's reward for text (arXiv 2505.05470): 0..1, passed if it is 1.

    N_ref is the length of the target, the text that the prompt asks for. N_e is the edit distance (insertions,
    deletions and substitutions) from the text read: all lines joined, from the top down. As in the published code, case
    and spaces do not count, N_e is 0 if the target is part of the text read, and a picture without text scores 0. There
    are four differences:

    - Letters, quotation marks and dashes that Unicode has in several forms are compared in one form
      (`progrpo.prompts.texts.folded`).
    - The target is the prompt's column `target`, if it has one. Otherwise it is the text in double quotes
      ("", “”, „“, «», 「」), or in single ones ('', ‘’) if there are no double ones.
      The published code takes the first "" alone. A mark after a number (12" pizza) is read as inches or feet, where
      it can be.
    - There may be several targets (a list in the column, several quotes). Then each is compared with the nearest part
      of the text read, and N_e and N_ref are sums over the targets.
    - The reader is PP-OCRv6 (small), not PaddleOCR's English model. Pictures below 256 on their shorter side are
      enlarged to 256 first. Where the reader raises an error, the score is missing, and not 0.

    It runs on a CPU, in one thread; processes make it faster.
    """

    def __init__(self, reader: Callable[[np.ndarray], Lines]) -> None:
        """`reader` reads a picture (uint8, (H, W, 3), blue first)."""
        self._reader = reader

    @classmethod
    def make(cls, term: RewardTerm) -> Self:
        return cls.load()

    @classmethod
    def load(cls) -> Self:
        """Take the models of rapidocr's package. Refusal where it is not installed."""
        # the default 736 reads no better and takes up to 5 times as long
        return cls(load_reader("ocr", {"Det.limit_side_len": 256}))

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        targets = [targets_of(prompt) for prompt in prompts]  # all of them before a picture is read
        values = [similarity(t, self._read(p)) for t, p in zip(targets, pictures_NHWC, strict=True)]
        return [Score(value, value == 1) for value in values]

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            targets_of(prompt)

    def _read(self, picture_HWC: np.ndarray) -> str:
        blue_first = np.ascontiguousarray(picture_HWC[..., ::-1])
        return normalised("".join(self._reader(blue_first).txts or ()))


def load_reader(reward: str, options: Mapping[str, object]) -> Callable[[np.ndarray], Lines]:
    """The reader of rapidocr's package, in one thread, with these options. Refusal where it is not installed."""
    require(reward, "rapidocr", "onnxruntime", extra="ocr")
    from rapidocr import RapidOCR

    params = {
        "Global.log_level": "error",
        "Global.use_cls": False,  # lines upside down are not turned, as in the published code
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    return cast("Callable[[np.ndarray], Lines]", RapidOCR(params={**params, **options}))


def normalised(text: str) -> str:
    """A text in the form that is compared, without white space."""
    return folded(text).replace(" ", "")


def targets_of(prompt: Prompt) -> list[str]:
    """The normalised texts that a prompt asks for, without empty ones. Refusal where there is none."""
    column = prompt.columns.get("target")
    if column is None:
        column = quotations(prompt.text)
    texts = [column] if isinstance(column, str) else column
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise Refusal(
            f"reward 'ocr': `target` of the prompt {prompt.text!r} is {column!r}, not a text or a list of texts"
        )
    targets = [text for text in map(normalised, texts) if text]
    if not targets:
        raise Refusal(
            f"reward 'ocr': the prompt {prompt.text!r} asks for no text: put it in \"quotes\", or in a column `target`"
        )
    return targets


def quotations(text: str) -> list[str]:
    """The quotations in double quotes; if there are none, those in single quotes."""
    for marks in (_DOUBLE, _SINGLE):
        inside = [quotation for quotation in _between(text, marks) if quotation.strip()]
        if inside:
            return inside
    return []


def _between(text: str, marks: Mapping[str, str]) -> list[str]:
    quotations: list[str] = []
    place = 0
    while place < len(text):
        end = _end(text, place, marks) if _opens(text, place, marks) else None
        if end is not None:
            quotations.append(text[place + 1 : end])
            place = end
        place += 1
    return quotations


def _opens(text: str, place: int, marks: Mapping[str, str]) -> bool:
    """Whether a quotation begins here. An apostrophe, a plural's end and a mark of inches begin none."""
    if text[place] not in marks:
        return False
    return not (_in_word(text[place - 1 : place]) if text[place] in "'”" else _measures(text, place))


def _end(text: str, start: int, marks: Mapping[str, str]) -> int | None:
    """The place where the quotation that begins at `start` ends."""
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
    """Whether an apostrophe can stand beside a letter. Scripts without case, such as Chinese, have no apostrophes."""
    return letter.isalnum() and unicodedata.category(letter) != "Lo"


def _measures(text: str, place: int) -> bool:
    """Whether a mark may stand for inches or feet: it follows a number."""
    return place > 0 and (text[place - 1].isdigit() or text[place - 1] in _FRACTIONS) and text[place] in "\"'”’"


def _closes(text: str, place: int) -> bool:
    """Whether a mark can only be the end of a quotation: it follows a letter, and no letter follows it."""
    before, after = text[place - 1 : place], text[place + 1 : place + 2]
    return not (before.isspace() or _in_word(after) or _measures(text, place))


def similarity(targets: Sequence[str], read: str) -> float:
    """1 - N_e / N_ref of normalised targets, see OCR."""
    edits = sum(_edits(target, read, anywhere=len(targets) > 1) for target in targets)
    return 1 - edits / sum(map(len, targets))


def _edits(target: str, read: str, anywhere: bool) -> int:
    """The edit distance of the target from the text read, or from the nearest part of it; at most the target's
    length.
    """
    if target in read:
        return 0
    # row[j] is the distance of the target's first i letters from the text read up to its letter j, or from a part of it
    row = [0] * (len(read) + 1) if anywhere else [*range(len(read) + 1)]
    for i, letter in enumerate(target, 1):
        above, row = row, [i]
        for j, other in enumerate(read, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other)))
    return min(len(target), min(row) if anywhere else row[-1])
