"""The reward for text: targets, the published formula by other means, and PP-OCRv6 on pictures drawn with PIL."""

import functools
import importlib.util
import logging
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from progrpo.rewards.base import Refusal, Score
from progrpo.rewards.ocr import OCR, quotations
from progrpo.rewards.ocr_line import OCRLine, ink
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

BLANK = np.zeros((1, 32, 32, 3), np.uint8)


def asks_for(*texts: str) -> Prompt:
    return Prompt("a sign", {"target": list(texts)})


def score(prompt: Prompt, *lines: str) -> Score:
    """Of a picture in which those lines are read."""
    return OCR(lambda picture: SimpleNamespace(txts=lines or None)).score(BLANK, [prompt])[0]


# --- the formula ------------------------------------------------------------------------------------------------------


@functools.cache
def levenshtein(a: str, b: str) -> int:
    """By the definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(levenshtein(a[1:], b) + 1, levenshtein(a, b[1:]) + 1, levenshtein(a[1:], b[1:]) + (a[0] != b[0]))


def published(target: str, lines: tuple[str, ...]) -> float:
    """The published code's reward for one target."""
    target, read = target.replace(" ", "").lower(), "".join(lines).replace(" ", "").lower()
    return 1 - (0 if target in read else min(levenshtein(target, read), len(target))) / len(target)


def words(generator: random.Random, count: int, longest: int, shortest: int = 0) -> tuple[str, ...]:
    return tuple("".join(generator.choices("aAbc ", k=generator.randint(shortest, longest))) for _ in range(count))


def test_one_target_is_scored_by_the_published_formula():
    generator, seen = random.Random(0), set()
    for _ in range(400):
        target, lines = f"c{words(generator, 1, 7)[0]}", words(generator, generator.randint(1, 3), 6)
        result = score(asks_for(target), *lines)
        assert result.value == pytest.approx(published(target, lines), abs=1e-12)
        assert result.passed == (result.value == 1)
        seen.add(result.value)
    assert len(seen) > 15 and {0.0, 1.0} <= seen


def test_several_targets_are_each_compared_with_the_nearest_part_of_the_text():
    generator, seen = random.Random(1), set()
    for _ in range(150):
        targets, lines = words(generator, generator.randint(2, 3), 5, shortest=3), words(generator, 2, 5)
        targets = tuple(f"b{w}" for w in targets)
        read = "".join(lines).replace(" ", "").lower()
        parts = {read[i:j] for i in range(len(read) + 1) for j in range(i, len(read) + 1)}
        plain = [w.replace(" ", "").lower() for w in targets]
        edits = sum(min(levenshtein(w, part) for part in parts) for w in plain)
        result = score(asks_for(*targets), *lines)
        assert result.value == pytest.approx(1 - edits / sum(map(len, plain)), abs=1e-12)
        assert result.passed == (result.value == 1) == all(w in read for w in plain)
        seen.add(result.value)
    assert len(seen) > 15


@pytest.mark.parametrize(
    ("prompt", "lines", "value"),
    [
        (asks_for("Hello"), ("HELLO",), 1),
        (asks_for("New\u00a0York\n City"), ("NEW Y", "ORK\tCITY"), 1),
        (asks_for("hello"), ("he says hello to all of us",), 1),  # as published
        (asks_for("hello"), ("hullo",), 0.8),
        (asks_for("hello"), ("a hullo in a long text",), 0),  # as published: what is around counts
        (asks_for("hello"), (), 0),
        (asks_for("hello"), ("",), 0),
        (asks_for("OPEN", "daily"), ("daily", "open"), 1),
        (asks_for("OPEN", "daily"), ("opon", "daily"), 8 / 9),
        (asks_for("OPEN", "charts"), ("open",), 0.4),  # a mean by length, not 1/2
        (asks_for("OPEN", "daily"), (), 0),
        (asks_for("OPEN", "daily"), ("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",), 0),
        (asks_for("", " ", "hello"), ("hullo",), 0.8),  # empty ones do not count, and one is left
    ],
)
def test_scores_by_hand(prompt, lines, value):
    result = score(prompt, *lines)
    assert type(result.value) is float and type(result.passed) is bool
    assert result.value == pytest.approx(value, abs=1e-12)
    assert result.passed == (value == 1)


# --- one text in several forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "read"),
    [
        ("caf\u00e9", "cafe\u0301"),  # an accent of its own
        ("Cr\u00e8me Br\u00fbl\u00e9e", "CRE\u0300ME BRU\u0302LE\u0301E"),
        ("\u1ec7", "e\u0323\u0302"),  # two of them, in either order
        ("Stra\u00dfe", "STRASSE"),
        ("\u1e9e", "ss"),
        ("\u0130stanbul", "istanbul"),  # dotted I
        ("D\u0131\u015f", "DI\u015e"),  # dotless i
        ("\u039f\u0394\u039f\u03a3", "\u03bf\u03b4\u03bf\u03c2"),  # a sigma at the end of a word
        ("\ufb01ne o\ufb03ce", "FINE OFFICE"),  # ligatures
        ("OPEN 24", "\uff2f\uff30\uff25\uff2e\u3000\uff12\uff14"),  # full width
        ("\u30ac\u30e9\u30b9", "\uff76\uff9e\uff97\uff7d"),  # half-width katakana with its mark
        ("\ud55c\uae00", "\u1112\u1161\u11ab\u1100\u1173\u11af"),  # hangul in its parts
        ("don't", "don\u2019t"),
        ("don\u2019t", "DON\u00b4T"),
        ('the "best"', "the \u201cbest\u201d"),
        ('the "best"', "the ''best''"),
        ("well-known", "well\u2013known"),
        ("well\u2011known", "WELL-KNOWN"),
        ("3 \u2212 2", "3-2"),
        ("10\u00a0000", "10 000"),
        ("wait\u2026", "wait..."),
        ("x\u00b2", "x2"),
        ("\u2167", "VIII"),
        ("co\u00adop", "coop"),  # a soft hyphen
        ("zero\u200bwidth", "zero width"),
        ("I \u2665\ufe0f NY", "I \u2665 NY"),
    ],
)
def test_equal_texts_in_unequal_strings_are_equal(target, read):
    for asked, seen in ((target, read), (read, target)):
        assert score(asks_for(asked), seen) == Score(1.0, True)
        assert score(Prompt(f'a sign that says "{asked}"', {"target": None}), seen).passed or '"' in asked + seen
        assert score(asks_for(asked, "more"), f"{seen} more") == Score(1.0, True)


@pytest.mark.parametrize(
    ("target", "read", "value"),
    [
        ("caf\u00e9", "cafe", 0.75),  # an accent that is not there is missing
        ("cafe\u0301", "cafe", 0.75),  # and is one letter's, however it is written
        ("na\u00efve", "naive", 0.8),
        ("Stra\u00dfe", "Strase", 6 / 7),
        ("well-known", "wellknown", 0.9),
        ("O", "0", 0.0),
    ],
)
def test_other_texts_are_other_texts(target, read, value):
    assert score(asks_for(target), read).value == pytest.approx(value)


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ('a sign that says "Open 24 hours"', ["Open 24 hours"]),
        ('"A" over "B", "" and " "', ["A", "B"]),
        (
            "a sign “Ouvert” by a door „Offen“ or „Otwarte” or « Aperto »",
            ["Ouvert", "Offen", "Otwarte", " Aperto "],
        ),
        ("a sign that says 'OPEN'", ["OPEN"]),
        ("'A', 'B c' and ‘D’.", ["A", "B c", "D"]),
        ("the dogs' sign: 'Don't bark', it's rude", ["Don't bark"]),
        ("'tis the sign 'OPEN'", ["OPEN"]),
        ("it’s ‘Don’t bark’, the dogs’ rule", ["Don’t bark"]),
        ("""a 'big' sign that says "DON'T" """, ["DON'T"]),  # single ones only where there are no double ones
        ("""an empty "" and a 'full' one""", ["full"]),
        ("the dogs' and the cats' house, it's John's", []),
        ('an open " mark', []),
        ("nothing", []),
        ("", []),
        ("""a 12" pizza with the word "HOT" on the box""", ["HOT"]),
        ("""a 12” pizza with the word “HOT” on the box""", ["HOT"]),
        ("""a 12" pizza and a 14" pizza, the sign says "HOT" """, ["HOT"]),
        ("""a 24"x36" poster that reads "ART" """, ["ART"]),
        ("""a man of 6'2" with a shirt that says "TALL" """, ["TALL"]),
        ("""a man of 6' with a shirt that says 'TALL'""", ["TALL"]),
        ("""a 12" pizza with the word 'HOT'""", ["HOT"]),
        ("""a 2½" badge that says "HI" """, ["HI"]),
        ('a 12" pizza', []),
        ('a sign that says "24"', ["24"]),
        ('signs "Route 66" and "Motel 6"', ["Route 66", "Motel 6"]),
        ('a sign "Route 66", 12" wide', ["Route 66"]),
        ('the menu says "a 12" pizza"', ['a 12" pizza']),
        ("the '90s sign says 'DISCO'", ["DISCO"]),
        ("a sign that says 'the 90's'", ["the 90's"]),
        ("»Offen« und «Ouvert»", ["Offen", "Ouvert"]),
        ("‚Offen‘ und ‹Ouvert›", ["Offen", "Ouvert"]),
        ("en skylt ”Öppet” här", ["Öppet"]),
        ("「営業中」と『休業』の看板", ["営業中", "休業"]),
        ('牌子上写着"你好"的店', ["你好"]),
        ("牌子上写着'你好'的店", ["你好"]),
        ('a sign with “mixed" marks', ["mixed"]),
    ],
)
def test_quotes(text, quoted):
    assert quotations(text) == quoted


def test_a_column_comes_before_quotes_and_may_be_one_text_or_several():
    for given, value in [("abcd", 1), (["ab", "cd"], 1), (("ab", "zz"), 0.5), (None, 0)]:
        assert score(Prompt('a sign "xyz"', {"target": given}), "abcd").value == value


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt("a sign"),
        Prompt('a sign ""'),
        Prompt('"A"', {"target": " "}),
        Prompt('"A"', {"target": []}),
        Prompt("", {"target": None}),
    ],
)
def test_a_prompt_that_asks_for_no_text_is_refused(prompt):
    with pytest.raises(Refusal, match=r"'ocr'.*asks for no text.*quotes.*`target`"):
        score(prompt, "text")


@pytest.mark.parametrize("given", [1984, 1.5, [1, 2], ["A", None], {"A": "B"}])
def test_a_target_that_is_no_text_is_refused(given):
    with pytest.raises(Refusal, match=r"`target` of the prompt 'a sign' is .*not a text or a list of texts"):
        score(Prompt("a sign", {"target": given}), "text")


def test_prompts_are_refused_before_any_picture_is_read():
    def reader(picture):
        raise AssertionError("read")

    with pytest.raises(Refusal):
        OCR(reader).score(np.repeat(BLANK, 2, 0), [asks_for("A"), Prompt("a sign")])


# --- pictures ---------------------------------------------------------------------------------------------------------

WORDS = ["OPEN", "Hello", "Bakery", "Jazz Club", "GRPO 2025"]


def draw(text: str, size: int, height: float, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """Draw dark text in the middle of a light picture, a word in a line. The height is a share of the picture's."""
    generator = np.random.default_rng(seed)
    ground, ink = (tuple(int(v) for v in generator.integers(*r, 3)) for r in ((150, 256), (0, 90)))
    picture = Image.new("RGB", (size, size), ground)
    drawing, font = ImageDraw.Draw(picture), ImageFont.load_default(size=height * size)
    drawing.multiline_text((size / 2, size / 2), text.replace(" ", "\n"), ink, font, anchor="mm", align="center")
    return np.clip(np.asarray(picture) + generator.normal(0, noise, (size, size, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def reward():
    """Made, and its models loaded, without a network."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((socket, "getaddrinfo"), (socket.socket, "connect")):
            patch.setattr(owner, name, lambda *a, **k: pytest.fail("the network was asked for"))
        ocr = OCR.make(RewardTerm("ocr"))
        ocr.score(draw("text", 64, 0.2)[None], [asks_for("text")])
    return ocr


@pytest.mark.parametrize(
    "size", [64, pytest.param(128, marks=pytest.mark.slow), 256, pytest.param(512, marks=pytest.mark.slow)]
)
def test_drawn_text_is_read(reward, size):
    drawn = np.stack([draw(word, size, 0.17, noise=15, seed=i) for i, word in enumerate(WORDS)])
    right = reward.score(drawn, [Prompt(f'a sign that says "{word.upper()}"') for word in WORDS])
    wrong = reward.score(drawn, [asks_for(word) for word in reversed(["Quarry", "Midwife", "Fly", "Church", "Zoo"])])
    assert [s.value for s in right] == [1.0] * len(WORDS) and all(s.passed is True for s in right)
    assert all(s.value < 0.5 and s.passed is False for s in wrong)


def test_small_pictures_are_enlarged_and_so_read(reward):
    small = ["Bakery", "Hello", "coffee", "Hotel"]
    drawn = np.stack([draw(word, 64, 0.11, noise=20, seed=i) for i, word in zip([0, 1, 2, 4], small, strict=True)])
    assert (
        np.mean([s.value for s in reward.score(drawn, [asks_for(word) for word in small])]) > 0.75
    )  # as they are, 0.4


def test_a_misspelt_word_scores_by_its_letters(reward):
    (result,) = reward.score(draw("Bakary", 256, 0.17)[None], [asks_for("Bakery")])
    assert result.value == pytest.approx(5 / 6) and result.passed is False


def test_several_texts_in_one_picture(reward):
    picture = draw("Fresh Bread Daily", 256, 0.15)[None]
    assert reward.score(picture, [Prompt('signs "Bread" and "FRESH"')]) == [Score(1.0, True)]
    assert reward.score(picture, [asks_for("daily", "bread", "fresh", "today")])[0].passed is False


@pytest.mark.parametrize("shape", [(64, 64), (1, 1), (20, 300), (60, 9)])
def test_a_picture_without_text_has_zero_and_says_nothing(reward, shape, monkeypatch):
    logged = []
    monkeypatch.setattr(logging.Logger, "handle", lambda logger, record: logged.append(record))
    assert reward.score(np.full((1, *shape, 3), 128, np.uint8), [asks_for("A")]) == [Score(0.0, False)]
    assert logged == []


def test_pictures_do_not_see_each_other_and_threads_agree(reward):
    drawn = np.stack([draw(word, 128, 0.17, noise=40, seed=i) for i, word in enumerate([*WORDS, ""])])
    prompts = [asks_for(f"{word}s") for word in [*WORDS, "?"]]
    together = reward.score(drawn, prompts)
    with ThreadPoolExecutor(4) as pool:
        alone = list(pool.map(lambda i: reward.score(drawn[i : i + 1], prompts[i : i + 1]), [*range(6), *range(6)]))
    assert [score for scores in alone for score in scores] == together * 2
    assert len({s.value for s in together}) > 2
    assert reward.score(drawn[:0], []) == []


def test_strided_and_read_only_pictures(reward):
    wide = np.repeat(draw("Bakery", 128, 0.17)[None], 2, axis=2)
    before, strided = wide.copy(), wide[:, :, ::2]
    wide.flags.writeable = strided.flags.writeable = False
    assert not strided.flags.c_contiguous and not strided.flags.writeable
    assert reward.score(strided, [asks_for("Bakery")]) == [Score(1.0, True)]
    assert np.array_equal(wide, before)


def test_the_reader_gets_blue_first_and_an_array_of_its_own():
    seen = []

    def reader(picture):
        seen.append(picture)
        return SimpleNamespace(txts=None)

    picture = np.zeros((1, 4, 5, 3), np.uint8)
    picture[..., 0] = 200
    OCR(reader).score(picture, [asks_for("A")])
    assert seen[0].tolist() == [[[0, 0, 200]] * 5] * 4
    assert seen[0].flags.c_contiguous and not np.shares_memory(seen[0], picture)


def test_one_thread(reward):
    for part in (reward._reader.text_det, reward._reader.text_rec):
        options = part.session.session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    assert reward._reader.text_cls is None


# --- one line ---------------------------------------------------------------------------------------------------------


def test_a_line_is_read_without_a_search_for_it():
    line = OCRLine.make(RewardTerm("ocr_line"))
    drawn = np.stack([draw(word, 64, 0.25) for word in ("Hello", "Zoo", "Zoo")])
    scores = line.score(drawn, [asks_for("hello"), asks_for("ZOO"), asks_for("zip")])
    assert [score.passed for score in scores] == [True, True, False]


def test_a_picture_without_ink_scores_0_and_is_not_read():
    line = OCRLine(lambda picture: pytest.fail("a picture without ink was read"))
    assert line.score(np.full((1, 8, 8, 3), 200, np.uint8), [asks_for("zoo")]) == [Score(0.0, False)]


def test_the_ink_is_cut_out_with_a_margin():
    picture = np.full((20, 30, 3), 230, np.uint8)
    picture[8:11, 12:20, 0] = 10
    assert ink(picture).shape == (3 + 8, 8 + 8, 3)
    picture[0, 0] = 0
    assert ink(picture).shape == (11 + 4, 20 + 4, 3)


@pytest.mark.parametrize("lacking", ["rapidocr", "onnxruntime"])
def test_a_missing_package_is_refused_with_the_way_to_install_it(lacking, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == lacking else there(name))
    with pytest.raises(Refusal, match=rf"'ocr' needs {lacking}.*pip install 'progrpo\[ocr\]'"):
        OCR.make(RewardTerm("ocr"))
