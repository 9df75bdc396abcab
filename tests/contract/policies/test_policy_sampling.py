"""Without noise, a policy samples and decodes as its diffusers pipeline does."""

from __future__ import annotations

import pytest
import torch

from tests.support.policies import (
    CASES,
    PROMPTS,
    load,
    noise,
    perturb,
    pixels,
    sample_by_diffusers,
    sample_without_noise,
    untouched_pipeline,
    velocity,
)


def test_without_noise_it_is_the_diffusers_pipeline_bit_for_bit(policy, pipeline):
    embeddings = policy.encode(PROMPTS).tensors  # each text alone: the pipeline's batch of two gives other last bits
    assert torch.equal(
        sample_without_noise(policy, 1.0), sample_by_diffusers(pipeline, policy, 1.0, "latent", **embeddings)
    )


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
def test_without_noise_it_is_the_diffusers_pipeline_from_text_to_latent(policy, pipeline, guidance_scale):
    expected = sample_by_diffusers(pipeline, policy, guidance_scale, "latent")
    size = max(1.0, expected.abs().max().item())  # an untrained network that says noise ends far from 1
    torch.testing.assert_close(sample_without_noise(policy, guidance_scale), expected, rtol=0, atol=1e-5 * size)


def test_pictures_are_the_diffusers_pipelines(policy, pipeline):
    pictures = policy.decode(sample_without_noise(policy, 1.0)).images_NHWC
    expected = torch.stack([pixels(picture) for picture in sample_by_diffusers(pipeline, policy, 1.0, "pil")])
    assert pictures.dtype == torch.uint8 and pictures.shape == expected.shape
    assert (pictures.int() - expected).abs().max() <= 1
    assert pictures.float().std() > 5  # not one grey


@pytest.mark.parametrize("model", sorted({case.model for case in CASES.values()} - {"tiny_sd_v", "tiny_flux_schnell"}))
def test_without_noise_it_is_the_diffusers_pipeline_where_pictures_are_not_square(request, model):
    folder = request.getfixturevalue(model)
    policy, pipeline = load(folder, "lora", resolution=(16, 32)), untouched_pipeline(folder)
    assert policy.latent_shape[-2:] == (8, 16)
    embeddings = policy.encode(PROMPTS).tensors
    latents = sample_without_noise(policy, 1.0)
    assert torch.equal(latents, sample_by_diffusers(pipeline, policy, 1.0, "latent", **embeddings))
    pictures = policy.decode(latents).images_NHWC
    expected = torch.stack([pixels(picture) for picture in sample_by_diffusers(pipeline, policy, 1.0, "pil")])
    assert pictures.shape == expected.shape and pictures.shape[-3:] == (16, 32, 3)
    assert (pictures.int() - expected).abs().max() <= 1


def test_a_timestep_for_all_is_a_timestep_for_each(policy):
    condition, x = policy.encode(PROMPTS), noise(policy)
    for guidance_scale in (1.0, 3.5):
        one = policy.predict(x, torch.tensor(600.0), condition, guidance_scale)
        each = policy.predict(x, torch.tensor([600.0, 600.0]), condition, guidance_scale)
        assert torch.equal(one, each)
    mixed = policy.predict(x, torch.tensor([600.0, 200.0]), condition)
    torch.testing.assert_close(mixed[1:], policy.predict(x[1:], torch.tensor(200.0), condition.take(torch.tensor([1]))))


def test_each_row_has_its_own_prompt(policy):
    x = noise(policy, 1).expand(2, *policy.latent_shape)
    v = policy.predict(x, torch.tensor(600.0), policy.encode(PROMPTS))
    assert (v[0] - v[1]).abs().max() > 1e-2
    back = policy.predict(x, torch.tensor(600.0), policy.encode(PROMPTS[::-1]))
    torch.testing.assert_close(back.flip(0), v)


def test_nothing_is_random_in_the_network(own_policy):
    modules = [m for m in own_policy.pipeline.components.values() if isinstance(m, torch.nn.Module)]
    assert not any(m.training for module in modules for m in module.modules())
    perturb(own_policy)
    assert torch.equal(velocity(own_policy), velocity(own_policy))


def test_sdxl_takes_the_pictures_size_and_zeros_for_no_prompt(tiny_sdxl):
    policy, calls = load(tiny_sdxl, "lora", resolution=(8, 12)), []
    policy.denoiser.register_forward_pre_hook(lambda m, a, k: calls.append(k["added_cond_kwargs"]), with_kwargs=True)
    policy.predict(noise(policy), torch.tensor(600.0), policy.encode(PROMPTS), 2.0)
    (added,) = calls
    assert added["time_ids"].tolist() == [[8, 12, 0, 0, 8, 12]] * 4
    assert not added["text_embeds"][:2].any() and added["text_embeds"][2:].all()


def test_latents_with_a_mean_and_std_of_their_own_are_decoded_as_sdxls_pipeline_does(tiny_sdxl):
    policy, pipeline = load(tiny_sdxl, "lora"), untouched_pipeline(tiny_sdxl)
    for vae in (policy.pipeline.vae, pipeline.vae):
        vae.register_to_config(latents_mean=[0.3, -0.2, 0.1, 0.0], latents_std=[1.5, 0.8, 1.0, 2.0])
    pictures = policy.decode(sample_without_noise(policy, 1.0)).images_NHWC
    expected = torch.stack([pixels(picture) for picture in sample_by_diffusers(pipeline, policy, 1.0, "pil")])
    assert (pictures.int() - expected).abs().max() <= 1
