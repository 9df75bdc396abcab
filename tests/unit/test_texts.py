"""One form for all ways to write a text."""

import random
import string

import pytest

from progrpo.prompts.texts import folded, matching_texts


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("  A  Red\tCat \n", "a red cat"),
        ("It\u2019s `so` ''good''", "it's 'so' \"good\""),
        ("\u00abCaf\u0065\u0301\u00bb \u2014 \u00bd", '"caf\u00e9" - 1/2'),
        ("\u212b\u2126", "\u00e5\u03c9"),  # the signs of Angstrom and Ohm are letters
        ("\u1e9eTRA\u00dfE", "sstrasse"),
        ("\u0130\u0131I", "iii"),
        ("", ""),
        ("\u200b\ufeff", ""),
    ],
)
def test_forms_by_hand(text, form):
    assert folded(text) == form


def test_folding_twice_is_folding_once_and_ascii_has_no_rule_of_its_own():
    generator = random.Random(0)
    letters = "\u00e9\u0301\u00df\u0130\u0131\ufb01\uff21"
    others = letters + "\u2019\u201c\u00b4\u2032\u2033\u2013\u00a0\u200d\u00bd\u03a3\u03c2\ufe0f"
    for _ in range(500):
        text = "".join(generator.choices(string.printable + others * 3, k=generator.randint(0, 12)))
        assert folded(folded(text)) == folded(text) == folded(text.upper().lower()), ascii(text)
        plain = "".join(c for c in text if c.isascii())
        assert folded(f"{plain} \u00e9") == f"{folded(plain)} \u00e9".strip(), ascii(plain)


def test_shared_texts_keep_their_own_form():
    assert matching_texts(["A red  cat", "a dog", "\uff41 bird"], ["a red cat", "A BIRD", "birds"]) == [
        "A red  cat",
        "\uff41 bird",
    ]
    assert matching_texts([], ["a"]) == matching_texts(["a"], []) == []
