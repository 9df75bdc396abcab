"""Sentences about texts that are longer than their encoders read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from progrpo.policies.tokens import Reader, truncation


def letters(name: str, limit: int, settable: bool = False) -> Reader:
    """A tokenizer of a token a letter, with one before and one after them, both of which are kept."""

    def tokens(text: str, limit: int | None = None) -> list[int]:
        return [0, *list(map(ord, text))[: None if limit is None else limit - 2], 1]

    def tokenizer(given, truncation=False, max_length=None, verbose=True):
        rows = [
            tokens(text, max_length if truncation else None) for text in ([given] if isinstance(given, str) else given)
        ]
        return SimpleNamespace(input_ids=rows[0] if isinstance(given, str) else rows)

    return Reader(name, tokenizer, limit, settable)


def test_each_encoder_has_its_own_count_and_a_text_counts_once():
    cut = truncation(
        [letters("text_encoder", 6), letters("text_encoder_3", 9, True)], ["abcd", "abcde", "abcdefgh", "abcd"]
    )
    assert (cut.count, cut.cut) == (3, ("abcde", "abcdefgh"))
    assert {reader.name: count for reader, count in cut.by_reader.items()} == {"text_encoder": 2, "text_encoder_3": 1}
    assert cut.equal == 0  # the second encoder tells them apart
    assert cut.in_words() == (
        "2 of 3 prompts are longer than the text encoders read, and cut (text_encoder reads 6 tokens: 2, text_encoder_3"
        " 9: 1), though a reward may read them whole; shorten them or raise model.max_sequence_length; the first is"
        " 'abcde'"
    )


def test_what_cuts_make_equal_is_counted_and_what_was_equal_before_is_not():
    one = [letters("text_encoder", 6)]
    cut = truncation(one, ["abcde", "abcdf", "abcd", "xyz", "xyz"])
    assert cut.cut == ("abcde", "abcdf") and cut.equal == 3  # the third is what is left of the first two
    assert cut.in_words() == (
        "2 of 4 prompts are longer than the text encoders read, and cut (text_encoder reads 6 tokens: 2), so that 3 are"
        " read like another one, though a reward may read them whole; shorten them; the first is 'abcde'"
    )


@pytest.mark.parametrize("texts", [[], ["abcd"], ["abcd", "abc"]])
def test_nothing_is_said_where_nothing_is_cut(texts):
    assert truncation([letters("text_encoder", 6)], texts).in_words() is None
    assert truncation([], [*texts, "a" * 100]).in_words() is None


def test_one_is_one():
    assert (truncation([letters("text_encoder", 6)], ["abcdefg"]).in_words() or "").startswith(
        "1 of 1 prompts is longer"
    )


def test_many_texts_are_read_in_parts():
    texts = [str(i) for i in range(3000)]
    assert [len(ids) for ids in letters("one", 6).tokens(texts)] == [len(text) + 2 for text in texts]
