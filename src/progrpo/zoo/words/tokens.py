"""The tokenizers of the words world, in the standard classes. A letter is one token."""

from __future__ import annotations

import string

from transformers import CLIPTokenizer, T5Tokenizer

CLIP_LENGTH = 16
_MARKS = string.digits + ".,'-\""


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding without a merge; 16 tokens a prompt. As all of CLIP's, it reads small letters."""
    letters = string.ascii_lowercase + _MARKS
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=CLIP_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces: the words that every prompt has, and letters for the rest, capital and small."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [("▁the", -3.0), ("▁word", -3.0), ('▁"', -3.0), ("▁", -2.0)]
    letters = [(letter, -9.0) for letter in string.ascii_letters + _MARKS]
    return T5Tokenizer(vocab=special + words + letters, extra_ids=0, model_max_length=256)
