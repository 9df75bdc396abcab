"""Guidance and negative prompts."""

from __future__ import annotations

import pytest
import torch

from progrpo.policies.base import PolicyContext
from progrpo.policies.load import policy_from_pipeline
from progrpo.policies.qwen_image import QwenImage
from progrpo.policies.settings import ModelSettings
from progrpo.types import Prompt
from tests.support.policies import (
    PROMPTS,
    TEXTS,
    TOKENS,
    load,
    noise,
    perturb,
    sample_by_diffusers,
    sample_without_noise,
    untouched_pipeline,
)


@pytest.mark.parametrize(
    "model", ["tiny_sd3", "tiny_sd", "tiny_sdxl", "tiny_flux_schnell", "tiny_qwen_image", "tiny_wan"]
)
def test_guidance_leads_away_from_the_negative_prompt_as_the_diffusers_pipeline_does(request, model):
    folder = request.getfixturevalue(model)
    policy, plain = (load(folder, "lora", PolicyContext(guide_away_from=text)) for text in ("green bird", ""))
    expected = sample_by_diffusers(
        untouched_pipeline(folder), policy, 3.5, "latent", negative_prompt=["green bird"] * len(TEXTS)
    )
    size = max(1.0, expected.abs().max().item())
    policy.encode(PROMPTS)
    policy.release_text_encoders()
    torch.testing.assert_close(sample_without_noise(policy, 3.5), expected, rtol=0, atol=1e-5 * size)
    assert (sample_without_noise(plain, 3.5) - expected).abs().max() > 1e-3 * size


def test_a_model_with_embedded_guidance_leads_away_from_no_text(tiny_flux):
    with pytest.raises(ValueError, match=r"^sampling\.negative_prompt: this model takes the .* leave it empty$"):
        load(tiny_flux, "lora", PolicyContext(guide_away_from="green bird"))


def test_guidance_is_taken_between_prompt_and_empty_prompt_with_gradients_through_both(own_policy):
    if own_policy.embeds_guidance:
        pytest.skip("the network takes the guidance as an input")
    perturb(own_policy)
    x, timestep, w = noise(own_policy), torch.tensor(600.0), 3.0
    v = own_policy.predict(x, timestep, own_policy.encode(PROMPTS), w)
    v_c = own_policy.predict(x, timestep, own_policy.encode(PROMPTS))
    nothing = own_policy.texts.unconditional.take(torch.tensor([0, 0]))  # SDXL has zeros for the empty prompt
    v_u = own_policy.predict(x, timestep, nothing)
    expected = v_u + w * (v_c - v_u)
    if isinstance(own_policy.family, QwenImage):  # of the conditional's length, in each patch of 2x2
        lengths = [torch.nn.functional.avg_pool2d(v.square().sum(1, True), 2).sqrt() for v in (v_c, expected)]
        expected = expected * (lengths[0] / lengths[1]).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-5)
    parameter = next(iter(own_policy.trainable.values()))
    (gradient,), (expected_gradient,) = (torch.autograd.grad(out.square().mean(), parameter) for out in (v, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-6)


def test_embedded_guidance_is_an_input_of_one_call(tiny_flux, tiny_flux_schnell):
    for folder, rows in ((tiny_flux, [2, 2]), (tiny_flux_schnell, [2, 4])):
        policy, calls = load(folder, "lora"), []
        policy.denoiser.register_forward_pre_hook(lambda m, a, k: calls.append(k), with_kwargs=True)  # noqa: B023
        outputs = [policy.predict(noise(policy), torch.tensor(600.0), policy.encode(PROMPTS), w) for w in (1.0, 3.0)]
        assert [len(inputs["hidden_states"]) for inputs in calls] == rows
        assert (outputs[0] - outputs[1]).abs().max() > 1e-3
        embedded = folder == tiny_flux
        assert policy.embeds_guidance == embedded
        given = [inputs["guidance"] if inputs["guidance"] is None else inputs["guidance"].tolist() for inputs in calls]
        assert given == ([[1.0, 1.0], [3.0, 3.0]] if embedded else [None, None])


def test_a_distilled_flux2_klein_is_sampled_without_guidance(tiny_flux2_klein):
    pipeline = untouched_pipeline(tiny_flux2_klein)
    pipeline.register_to_config(is_distilled=True)
    policy = policy_from_pipeline(
        pipeline, ModelSettings(lora_rank=2, lora_alpha=6, max_sequence_length=TOKENS, resolution=16)
    )
    with pytest.raises(ValueError, match=r"sampling\.guidance_scale: 3\.5 would guide a distilled model, .* use 1"):
        sample_without_noise(policy, 3.5)
    own = sample_by_diffusers(pipeline, policy, 3.5, "latent")  # which ignores it
    torch.testing.assert_close(sample_without_noise(policy, 1.0), own, rtol=0, atol=1e-5)


def test_a_pair_of_calls_shows_the_source_in_both(tiny_kontext):
    pipeline = untouched_pipeline(tiny_kontext)
    config = {**pipeline.transformer.config, "guidance_embeds": False}
    pipeline.transformer = type(pipeline.transformer).from_config(config)
    settings = ModelSettings(lora_rank=2, max_sequence_length=TOKENS, resolution=16)
    policy = policy_from_pipeline(pipeline, settings)
    x, condition, w = noise(policy), policy.encode(PROMPTS), 3.0
    nothing = policy.encode([Prompt("", prompt.columns) for prompt in PROMPTS])
    v_u, v_c = (policy.predict(x, torch.tensor(600.0), texts) for texts in (nothing, condition))
    v = policy.predict(x, torch.tensor(600.0), condition, w)
    torch.testing.assert_close(v, v_u + w * (v_c - v_u), rtol=1e-4, atol=1e-5)
