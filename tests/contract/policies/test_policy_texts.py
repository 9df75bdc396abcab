"""Texts: encoded once and alone, cut at a length, released with their encoders, and absent encoders."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
)

from progrpo.policies.load import policy_from_pipeline
from progrpo.policies.settings import ModelSettings
from progrpo.types import Prompt
from tests.support.policies import (
    PROMPTS,
    SOURCES,
    TOKENS,
    load,
    noise,
    sample_by_diffusers,
    sample_without_noise,
    untouched_pipeline,
)


def test_a_text_is_encoded_once_and_alone(own_policy):
    calls = []
    handle = own_policy.pipeline.text_encoder.register_forward_hook(
        lambda module, inputs, named, output: calls.append(len([*inputs, *named.values()][0])), with_kwargs=True
    )
    first, second, nothing = (Prompt(text, PROMPTS[0].columns) for text in ("a b", "c d", ""))
    together = own_policy.encode([first, second, first, nothing])
    again = own_policy.encode([second])
    handle.remove()
    assert calls == [1, 1, 1]
    for name, rows in together.tensors.items():
        assert torch.equal(rows[0], rows[2]) and torch.equal(again.tensors[name][0], rows[1])
        assert not rows.requires_grad


def test_what_texts_become_is_known_without_encoding_them(policy):
    tensors = policy.encode(PROMPTS[:1]).tensors
    assert policy.family.condition_shapes() == {name: tuple(rows.shape[1:]) for name, rows in tensors.items()}


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        ("tiny_sd3", 256),
        *((model, 512) for model in ("tiny_flux", "tiny_kontext", "tiny_flux2_klein", "tiny_qwen_image", "tiny_wan")),
    ],
)
def test_a_text_is_as_long_as_the_models_pipeline_takes_it_unless_the_settings_differ(request, model, tokens):
    folder = request.getfixturevalue(model)
    own, short = (load(folder, "lora", max_sequence_length=length) for length in (None, TOKENS))
    assert (
        own.family.condition_shapes()["prompt_embeds"][0] - short.family.condition_shapes()["prompt_embeds"][0]
        == tokens - TOKENS
    )
    long = [Prompt("red cat " * 12 + end, PROMPTS[0].columns) for end in ("red cat " * 6, "blue dog " * 6)]
    for policy, distinct in ((own, True), (short, False)):
        x, condition = noise(policy, 1).expand(2, *policy.latent_shape), policy.encode(long)
        assert condition.tensors["prompt_embeds"].shape[1:] == policy.family.condition_shapes()["prompt_embeds"]
        v = policy.predict(x, torch.tensor(600.0), condition)
        assert ((v[0] - v[1]).abs().max() > 1e-4) == distinct


def test_the_built_in_model_takes_as_many_tokens_as_it_was_made_for():
    shapes = [
        load("shapes-flow", "lora", max_sequence_length=n, resolution=None).family.condition_shapes()
        for n in (None, 16)
    ]
    assert shapes[0] == shapes[1]


def test_text_encoders_can_be_released(own_policy):
    before = own_policy.encode(PROMPTS)
    own_policy.release_text_encoders()
    after = own_policy.encode(PROMPTS)
    assert all(torch.equal(rows, after.tensors[name]) for name, rows in before.tensors.items())
    assert own_policy.predict(noise(own_policy), torch.tensor(600.0), after, 3.0).isfinite().all()
    with pytest.raises(ValueError, match=r"'a new one' is new and the text encoders are released"):
        own_policy.encode([Prompt("a new one", PROMPTS[0].columns)])


def test_guidance_goes_on_after_the_text_encoders_where_python_leaves_out_asserts(tiny_sd):
    policy = load(tiny_sd, "lora")
    condition = policy.encode(PROMPTS)
    names: dict[str, Any] = {}
    source = textwrap.dedent(inspect.getsource(type(policy).release_text_encoders))
    exec(compile(source, "<as python -O>", "exec", optimize=1), names)
    names["release_text_encoders"](policy)
    assert policy.predict(noise(policy), torch.tensor(600.0), condition, 3.0).isfinite().all()


def test_qwen_image_takes_a_mask_of_the_text_whatever_it_is_padded_to(tiny_qwen_image):
    prompts = [Prompt("red"), Prompt("red cat")]
    long, short = (load(tiny_qwen_image, "lora", max_sequence_length=tokens) for tokens in (40, TOKENS))
    tensors = short.encode(prompts).tensors
    # 3 letters and " cat", and five tokens of the chat's
    assert tensors["prompt_embeds_mask"].sum(1).tolist() == [8, 9]
    assert not tensors["prompt_embeds"][0, 8:].any() and tensors["prompt_embeds"][0, :8].any()
    outputs = [p.predict(noise(p), torch.tensor(600.0), p.encode(prompts), 3.0) for p in (long, short)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    cut = load(tiny_qwen_image, "lora", max_sequence_length=4).encode(prompts).tensors
    assert cut["prompt_embeds_mask"].all() and torch.equal(cut["prompt_embeds"], tensors["prompt_embeds"][:, :4])


def _without_t5(folder: Path) -> Any:
    pipeline = untouched_pipeline(folder)
    pipeline.text_encoder_3 = None
    return pipeline


def test_the_t5_may_be_absent(tiny_sd3):
    pipeline = DiffusionPipeline.from_pretrained(tiny_sd3, text_encoder_3=None, tokenizer_3=None)
    policy = policy_from_pipeline(pipeline, ModelSettings(lora_rank=2, lora_alpha=2, max_sequence_length=TOKENS))
    expected = sample_by_diffusers(_without_t5(tiny_sd3), policy, 1.0, "latent")
    torch.testing.assert_close(sample_without_noise(policy, 1.0), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "absent", [("",), ("_2",), ("", "_2"), ("_2", "_3"), ("", "_3")], ids=lambda absent: "+".join(map(str, absent))
)
def test_what_an_absent_encoder_of_sd3_would_say_is_zeros(tiny_sd3, absent):
    settings = ModelSettings(lora_rank=2, lora_alpha=2, max_sequence_length=TOKENS)
    whole = dict(policy_from_pipeline(untouched_pipeline(tiny_sd3), settings).encode([PROMPTS[0]]).tensors)
    without = {f"{part}{n}": None for n in absent for part in ("text_encoder", "tokenizer")}
    policy = policy_from_pipeline(DiffusionPipeline.from_pretrained(tiny_sd3, **without), settings)
    encoded = dict(policy.encode([PROMPTS[0]]).tensors)
    expected = {name: rows.clone() for name, rows in whole.items()}
    half, clip = whole["pooled_prompt_embeds"].shape[1] // 2, whole["prompt_embeds"].shape[1] - TOKENS
    for n, columns in (("", slice(0, half)), ("_2", slice(half, 2 * half))):
        if n in absent:
            expected["pooled_prompt_embeds"][:, columns] = 0
            expected["prompt_embeds"][:, :clip, columns] = 0
    if "_3" in absent:
        expected["prompt_embeds"][:, clip:] = 0
    if {"", "_2"} <= set(absent):  # 77 places of zeros, whatever the tokenizer that is not there had
        encoded["prompt_embeds"] = torch.cat(
            [encoded["prompt_embeds"][:, :clip], encoded["prompt_embeds"][:, -TOKENS:]], 1
        )
    for name, rows in expected.items():
        assert torch.equal(encoded[name], rows), name
    policy.release_text_encoders()
    assert torch.equal(policy.encode([PROMPTS[0]]).tensors["pooled_prompt_embeds"], encoded["pooled_prompt_embeds"])
    with pytest.raises(ValueError, match="released"):
        policy.encode([Prompt("another")])


def test_a_model_that_was_saved_without_a_text_encoder_is_loaded_without_it(tiny_sd3, tmp_path):
    lacking = DiffusionPipeline.from_pretrained(tiny_sd3, text_encoder_3=None, tokenizer_3=None)
    lacking.save_pretrained(tmp_path / "lacking")
    policy, whole = load(tmp_path / "lacking", "lora"), load(tiny_sd3, "lora")
    without, of_all = (p.encode(PROMPTS).tensors["prompt_embeds"] for p in (policy, whole))
    assert torch.equal(without[:, :-TOKENS], of_all[:, :-TOKENS]) and not without[:, -TOKENS:].any()


def test_texts_are_said_to_become_equal_exactly_where_the_networks_inputs_are_equal(case, own_policy):
    """Pairs that differ in their last letter, longer by one letter each: what the tensors say is the truth."""
    if case.weights == "full":
        pytest.skip("as with a LoRA")
    equal, cut = [], []
    for count in range(1, 2 * TOKENS):
        texts = [f"{'a' * count}{end}" for end in "bc"]
        encoded = own_policy.encode([Prompt(text, {"image": SOURCES[0]}) for text in texts]).tensors
        truncation = own_policy.truncation(texts)
        assert truncation.count == 2 and set(truncation.cut) <= set(texts) and truncation.equal in (0, 2)
        equal.append(truncation.equal == 2)
        cut.append(len(truncation.cut) == 2)
        assert equal[-1] == all(torch.equal(*rows) for name, rows in encoded.items() if name != "image_latents")
    assert equal == sorted(equal) and equal[-1] and cut == sorted(cut)
    assert all(cut[i] for i in range(len(cut)) if equal[i])
    own_policy.release_text_encoders()
    assert own_policy.truncation(["a" * 4 * TOKENS + end for end in "bc"]).equal == 2


def test_a_text_that_fits_is_not_said_to_be_cut(tiny_sd, tiny_flux):
    for folder, name, fits in ((tiny_sd, "text_encoder", 14), (tiny_flux, "text_encoder_2", TOKENS - 2)):
        policy = load(folder, "lora")
        (reader,) = (r for r in policy.texts.readers if r.name == name)
        assert [len(ids) - reader.limit for ids in reader.tokens(["a" * fits, "a" * (fits + 1)])] == [0, 1], name
