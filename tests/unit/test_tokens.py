"""The tokenizers, and that pretraining reads texts as StableDiffusion3Pipeline does."""

import json

import pytest
import torch
from transformers import CLIPTokenizer, T5Tokenizer

from progrpo.zoo.networks import TextStack, assemble, build_transformer, build_vae, load_parts
from progrpo.zoo.shapes.models import build_text
from progrpo.zoo.shapes.tokens import CLIP_LENGTH, clip_tokenizer, lexicon, t5_tokenizer
from progrpo.zoo.shapes.world import prompts
from progrpo.zoo.splits import SPLITS

TEXTS = ["a red circle", "four crosses", "an orange square left of a blue diamond", "", "a zebra"]


@pytest.fixture(scope="module")
def clip() -> CLIPTokenizer:
    return clip_tokenizer()


@pytest.fixture(scope="module")
def t5() -> T5Tokenizer:
    return t5_tokenizer()


@pytest.fixture(scope="module")
def stack() -> TextStack:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_text().eval()


def every_text() -> list[str]:
    return [p.text for split in SPLITS for kind in prompts(split).values() for p in kind]


# --- words ------------------------------------------------------------------------------------------------------------


def test_every_word_is_one_token(clip, t5):
    words = lexicon()
    assert {"a", "an", "orange", "crosses", "left", "of", "below"} <= set(words)
    for tokenizer in (clip, t5):
        ids = tokenizer(words, add_special_tokens=False)["input_ids"]
        assert {len(i) for i in ids} == {1}
        assert len({i[0] for i in ids}) == len(words)


def test_every_prompt_is_its_words_and_fits(clip, t5):
    texts = every_text()
    counts = [len(t.split()) for t in texts]
    assert [len(i) for i in clip(texts)["input_ids"]] == [n + 2 for n in counts]  # start and end
    assert [len(i) for i in t5(texts)["input_ids"]] == [n + 1 for n in counts]  # end
    assert max(counts) + 2 <= CLIP_LENGTH


def test_unknown_words_are_spelt(clip, t5):
    assert clip.decode(clip("a zebra")["input_ids"], skip_special_tokens=True).strip() == "a zebra"
    assert t5.decode(t5("a zebra")["input_ids"], skip_special_tokens=True) == "a zebra"
    for tokenizer in (clip, t5):
        assert len(tokenizer("zebra", add_special_tokens=False)["input_ids"]) >= 5
        assert tokenizer("zebra")["input_ids"] != tokenizer("zebras")["input_ids"]


def test_special_tokens(clip, t5):
    assert (clip.bos_token, clip.eos_token, clip.pad_token) == ("<|startoftext|>", "<|endoftext|>", "<|endoftext|>")
    assert (clip.bos_token_id, clip.eos_token_id) == (len(clip) - 2, len(clip) - 1)  # the end has the largest id
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id) == (0, 1, 2)
    padded = clip("a circle", padding="max_length")["input_ids"]
    assert len(padded) == CLIP_LENGTH
    assert padded[0] == clip.bos_token_id
    assert padded[3:] == [clip.eos_token_id] * (CLIP_LENGTH - 3)
    assert t5("a circle", padding="max_length", max_length=6)["input_ids"][2:] == [1, 0, 0, 0]


@pytest.mark.parametrize(("build", "kind"), [(clip_tokenizer, CLIPTokenizer), (t5_tokenizer, T5Tokenizer)])
def test_a_saved_tokenizer_is_the_same(build, kind, tmp_path):
    tokenizer = build()
    tokenizer.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    texts = TEXTS + every_text()[::97]
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.model_max_length == tokenizer.model_max_length
    assert loaded.all_special_ids == tokenizer.all_special_ids
    for options in ({}, {"padding": "max_length", "max_length": 16, "truncation": True}):
        assert loaded(texts, **options)["input_ids"] == tokenizer(texts, **options)["input_ids"]


def test_tokenizers_are_made_alike_each_time(clip, t5):
    assert clip_tokenizer().get_vocab() == clip.get_vocab()
    assert t5_tokenizer().get_vocab() == t5.get_vocab()


# --- the text encoders ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("length", [16, 64])
def test_the_stack_reads_as_the_pipeline_does(stack, length):
    pipeline = assemble(build_vae(), stack, build_transformer())
    tokens, pooled = stack(*stack.tokenize(TEXTS, length))
    their_tokens, _, their_pooled, _ = pipeline.encode_prompt(
        TEXTS, TEXTS, TEXTS, max_sequence_length=length, do_classifier_free_guidance=False
    )
    assert tokens.shape == (len(TEXTS), CLIP_LENGTH + length, 128)
    assert torch.equal(tokens, their_tokens)
    assert torch.equal(pooled, their_pooled)


@torch.no_grad()
def test_the_pooled_embedding_depends_on_the_prompt(stack):
    """With eos_token_id at its default, 49407, it would be that of the first position, equal for all prompts."""
    _, pooled = stack(*stack.tokenize(TEXTS, 16))
    halves = pooled.chunk(2, dim=-1)
    for half in halves:
        distance = torch.cdist(half, half) + torch.eye(len(TEXTS)) * 1e9
        assert distance.min() > 1e-2 * half.norm(dim=-1).mean()


@torch.no_grad()
def test_padding_changes_neither_the_pooled_embedding_nor_the_clip_tokens(stack):
    short, long = (stack(*stack.tokenize(TEXTS, length)) for length in (16, 64))
    assert torch.equal(short[1], long[1])
    assert torch.equal(short[0][:, :CLIP_LENGTH], long[0][:, :CLIP_LENGTH])
    assert torch.equal(
        torch.as_tensor(stack.tokenize(TEXTS, 64)[1][:, 16:]), torch.zeros(len(TEXTS), 48, dtype=torch.long)
    )


def test_tokens_keep_their_embeddings_where_a_folder_numbers_them_otherwise(stack, tmp_path):
    pipeline = assemble(build_vae(), stack, build_transformer())
    tokenizer = stack.clip_tokenizer
    vocab = tokenizer.get_vocab()
    words = [token for token in vocab if not token.startswith("<|")]
    turned = vocab | {token: vocab[other] for token, other in zip(words, reversed(words), strict=True)}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in backend["merges"]]
    pipeline.tokenizer = CLIPTokenizer(vocab=turned, merges=merges, model_max_length=CLIP_LENGTH)
    pipeline.save_pretrained(tmp_path)
    loaded = build_text().eval()
    load_parts(tmp_path, loaded, build_transformer())
    text = ["a red circle"]
    theirs = stack.clip_1(torch.tensor(pipeline.tokenizer(text)["input_ids"])).text_embeds
    ours = loaded.clip_1(torch.tensor(loaded.clip_tokenizer(text)["input_ids"])).text_embeds
    assert pipeline.tokenizer(text)["input_ids"] != loaded.clip_tokenizer(text)["input_ids"]
    torch.testing.assert_close(ours, theirs)
