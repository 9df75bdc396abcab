"""The words world: splits, drawn words, tokenizers."""

from __future__ import annotations

import hashlib
from itertools import combinations, pairwise

import numpy as np
import pytest
from transformers import CLIPTokenizer, T5Tokenizer

from progrpo.prompts.load import load_prompts
from progrpo.rewards.ocr import OCR
from progrpo.rewards.settings import RewardTerm
from progrpo.training.build import eval_prompts
from progrpo.zoo.splits import SPLITS
from progrpo.zoo.words import world
from progrpo.zoo.words.tokens import CLIP_LENGTH, clip_tokenizer, t5_tokenizer


def words_of(split: str) -> list[str]:
    return [p.columns["target"] for kind in world.prompts(split).values() for p in kind]


def test_no_word_is_in_two_splits():
    for a, b in combinations(SPLITS, 2):
        assert not set(words_of(a)) & set(words_of(b))


def test_consonants_and_vowels_alternate():
    words = [word for split in SPLITS for word in words_of(split)]
    assert len(words) == len(set(words)) > 20_000
    assert all((a in world.VOWELS) != (b in world.VOWELS) for word in words for a, b in pairwise(word))
    assert not {word for word in words if hashlib.sha256(word.encode()).hexdigest()[:8] in world._LEFT_OUT}


def test_every_kind_is_asked_for_in_turn():
    prompts = eval_prompts("words", "test", 9)
    assert [p.columns["kind"] for p in prompts] == list(world.KINDS) * 3
    assert all(p.text == f'the word "{p.columns["target"]}"' for p in prompts)
    assert all(len(p.columns["target"]) == int(p.columns["kind"][0]) for p in prompts)
    assert load_prompts("words", "test") == world.prompts("test")


def test_pictures_follow_from_the_seed_and_have_a_margin_of_ground():
    prompts, pictures = world.examples("train", 6, seed=3)
    again = world.examples("train", 6, seed=3)
    assert prompts == again[0] and np.array_equal(pictures, again[1])
    assert pictures.shape == (6, 64, 64, 3) and pictures.dtype == np.uint8
    assert not np.array_equal(pictures, world.examples("train", 6, seed=4)[1])
    assert all(len({tuple(pixel) for pixel in picture[:20].reshape(-1, 3)}) == 1 for picture in pictures)


def test_drawn_words_are_read():
    pytest.importorskip("rapidocr")
    prompts, pictures = world.examples("test", 18, seed=0)
    scores = OCR.make(RewardTerm("ocr")).score(pictures, prompts)
    assert np.mean([score.passed is True for score in scores]) > 0.9


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_a_letter_is_a_token():
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    assert clip.tokenize('the word "CAT"')[-5:] == ['"</w>', "c", "a", "t</w>", '"</w>']
    assert t5.tokenize('the word "CAT"') == ["▁the", "▁word", '▁"', "C", "A", "T", '"']


def test_every_prompt_fits_and_is_distinct():
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    texts = [p.text for kind in world.prompts("test").values() for p in kind]
    for tokenizer, length in ((clip, CLIP_LENGTH), (t5, 16)):
        ids = tokenizer(texts)["input_ids"]
        assert max(map(len, ids)) <= length and len({tuple(i) for i in ids}) == len(texts)
    assert t5.unk_token_id not in {token for ids in t5(texts)["input_ids"] for token in ids}


@pytest.mark.parametrize(("build", "kind"), [(clip_tokenizer, CLIPTokenizer), (t5_tokenizer, T5Tokenizer)])
def test_a_saved_tokenizer_is_the_same(build, kind, tmp_path):
    build().save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    texts = ['the word "CAT"', "", "a dog's 12"]
    assert loaded.get_vocab() == build().get_vocab()
    options = {"padding": "max_length", "max_length": 16, "truncation": True}
    assert loaded(texts, **options)["input_ids"] == build()(texts, **options)["input_ids"]
