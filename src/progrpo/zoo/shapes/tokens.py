"""The tokenizers of the shapes world, in the standard classes. A word of the lexicon is one token; others are spelt."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from transformers import CLIPTokenizer, T5Tokenizer

from progrpo.zoo.shapes.world import prompts
from progrpo.zoo.splits import SPLITS

CLIP_LENGTH = 16
_LETTERS = string.ascii_lowercase + string.digits + ".,'-"


def lexicon() -> list[str]:
    """All words of all prompts, sorted."""
    return sorted({w for split in SPLITS for kind in prompts(split).values() for p in kind for w in p.text.split()})


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding learned on the lexicon until every word is one token; 16 tokens a prompt."""
    merges = _learn_merges(lexicon())
    pieces = [*_LETTERS, *(c + "</w>" for c in _LETTERS), *("".join(m) for m in merges)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    vocab["<|startoftext|>"], vocab["<|endoftext|>"] = len(vocab), len(vocab) + 1
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def _learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Join the most frequent pair of pieces until every word is one piece, ties in alphabetical order.

    The trainer of `tokenizers` breaks ties by the order of a hash map, so that two processes would number words
    differently.
    """
    spelt = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for pieces in spelt for pair in pairwise(pieces)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelt = [_joined(pieces, best) for pieces in spelt]
    return merges


def _joined(pieces: Sequence[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces: the lexicon's words, and letters for the rest."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{w}", -3.0) for w in lexicon() if len(w) > 1]
    letters = [("▁", -2.0)] + [(c, -9.0) for c in _LETTERS] + [("▁a", -3.0)]
    return T5Tokenizer(vocab=special + words + letters, extra_ids=0, model_max_length=256)
