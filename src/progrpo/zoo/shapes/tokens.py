"""Word-level tokenizers of the shapes world in the standard classes: a word of the lexicon is one token, others are spelt."""

from __future__ import annotations

import json
import string

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from progrpo.zoo.shapes.world import SPLITS, prompts

CLIP_LENGTH = 16
_LETTERS = string.ascii_lowercase + string.digits + ".,'-"


def lexicon() -> list[str]:
    """Every word of every prompt, sorted."""
    return sorted({w for split in SPLITS for kind in prompts(split).values() for p in kind for w in p.text.split()})


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding learned on the lexicon until every word is one token; 16 tokens a prompt."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([" ".join(lexicon())], trainer)
    merges = _merges(bpe)
    pieces = [c for c in _LETTERS] + [c + "</w>" for c in _LETTERS] + ["".join(m) for m in merges]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    vocab["<|startoftext|>"], vocab["<|endoftext|>"] = len(vocab), len(vocab) + 1
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def _merges(bpe: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]


def t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces: the lexicon's words, and letters for the rest."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{w}", -3.0) for w in lexicon() if len(w) > 1]
    letters = [("▁", -2.0)] + [(c, -9.0) for c in _LETTERS] + [("▁a", -3.0)]
    return T5Tokenizer(vocab=special + words + letters, extra_ids=0, model_max_length=256)
