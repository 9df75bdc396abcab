"""Trained and frozen weights: gradients, the reference, saving, and which layers a LoRA adapts."""

from __future__ import annotations

import pytest
import torch

from progrpo.policies.base import PolicyContext
from progrpo.storage import load_state, save_state
from tests.support.policies import (
    CASES,
    FULL_CASES,
    PROMPTS,
    Case,
    load,
    noise,
    perturb,
    pixels,
    sample_by_diffusers,
    sample_without_noise,
    untouched_pipeline,
    velocity,
)


@pytest.fixture(scope="module", params=[*CASES.values(), *FULL_CASES.values()], ids=[*CASES, *FULL_CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_gradient_reaches_every_trained_weight_and_no_frozen_one(own_policy, case):
    perturb(own_policy)
    before = {name: t.clone() for name, t in own_policy.frozen()}
    own_policy.predict(noise(own_policy), torch.tensor(600.0), own_policy.encode(PROMPTS)).square().mean().backward()
    for name, p in own_policy.trainable.items():
        reached = p.grad is not None and bool(p.grad.any())
        assert reached != any(part in name for part in case.without_gradient), name
    assert not set(before) & set(own_policy.trainable)
    assert all(t.grad is None and not t.requires_grad for _, t in own_policy.frozen())
    torch.optim.SGD(own_policy.trainable.values(), lr=0.1).step()
    assert all(torch.equal(t, before[name]) for name, t in own_policy.frozen())


def test_reference_is_the_base_model_after_training(own_policy, pipeline):
    perturb(own_policy)
    trained = sample_without_noise(own_policy, 1.0)
    base = sample_by_diffusers(pipeline, own_policy, 1.0, "latent", **own_policy.encode(PROMPTS).tensors)
    assert (trained - base).abs().max() > 1e-2
    with own_policy.weights("reference"):
        assert torch.equal(sample_without_noise(own_policy, 1.0), base)
    assert torch.equal(sample_without_noise(own_policy, 1.0), trained)


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_current_weights_come_back_after_an_exception(tiny_sd3, weights):
    policy = load(tiny_sd3, weights)
    perturb(policy)
    before = velocity(policy)
    with pytest.raises(RuntimeError, match="inside"), policy.weights("reference"):
        raise RuntimeError("inside")
    assert torch.equal(velocity(policy), before)


def test_state_goes_through_storage_to_a_new_policy(own_policy, case, folder, tmp_path):
    own_policy.named_weights.snapshot("ema")
    perturb(own_policy)
    own_policy.named_weights.update("ema", 0.9)
    save_state(tmp_path / "state", own_policy.named_weights.state_dict())
    other = load(folder, case.weights, PolicyContext(lora_seed=1))
    other.named_weights.load_state_dict(load_state(tmp_path / "state"))
    stored, loaded = own_policy.named_weights.state_dict(), other.named_weights.state_dict()
    torch.testing.assert_close(loaded, stored, rtol=0, atol=0)
    for name in ("current", "reference", "ema"):
        with own_policy.weights(name), other.weights(name):
            # some processors' kernels round by how the weights lie in memory
            torch.testing.assert_close(velocity(other), velocity(own_policy), rtol=1e-4, atol=1e-5)


def test_saved_weights_give_diffusers_the_trained_pictures(own_policy, case, folder, tmp_path):
    own_policy.named_weights.snapshot("ema")
    perturb(own_policy)
    own_policy.named_weights.update("ema", 0.5)
    for weights in ("current", "ema"):
        pipeline = untouched_pipeline(folder)
        own_policy.save(tmp_path / weights, weights)
        if case.weights == "lora":
            pipeline.load_lora_weights(tmp_path / weights, local_files_only=True)
        else:
            denoiser = type(getattr(pipeline, own_policy.denoiser_name)).from_pretrained(tmp_path / weights)
            setattr(pipeline, own_policy.denoiser_name, denoiser)
        with own_policy.weights(weights):
            pictures = own_policy.decode(sample_without_noise(own_policy, 1.0)).images_NHWC
        expected = torch.stack([pixels(picture) for picture in sample_by_diffusers(pipeline, own_policy, 1.0, "pil")])
        assert (pictures.int() - expected).abs().max() <= 1, weights


def test_lora_starts_from_its_seed_alone(tiny_sd3):
    state = torch.get_rng_state()
    one = load(tiny_sd3, "lora", PolicyContext(lora_seed=5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(999)
    same, other = load(tiny_sd3, "lora", PolicyContext(lora_seed=5)), load(tiny_sd3, "lora", PolicyContext(lora_seed=6))
    assert all(torch.equal(p, same.trainable[name]) for name, p in one.trainable.items())
    for name, p in one.trainable.items():
        assert torch.equal(p, other.trainable[name]) == ("lora_B" in name), name


def test_lora_adapts_both_streams_of_every_block_by_default(tiny_sd3):
    names = load(tiny_sd3, "lora").trainable
    adapted = {name.split(".lora_")[0].removeprefix("transformer_blocks.") for name in names}
    image = {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"}
    text = {"attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"}
    last_only_absent = {"attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2"}
    assert adapted == {f"0.{n}" for n in image | text | last_only_absent} | {f"1.{n}" for n in image | text}


def test_a_lora_of_flux_adapts_both_kinds_of_blocks_and_nothing_else_by_default(tiny_flux):
    adapted = {name.split(".lora_")[0] for name in load(tiny_flux, "lora").trainable}
    query_key_value = {"attn.to_q", "attn.to_k", "attn.to_v"}
    text = {"attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"}
    feed_forward = {f"{ff}.{name}" for ff in ("ff", "ff_context") for name in ("net.0.proj", "net.2")}
    of_two = {f"transformer_blocks.0.{n}" for n in query_key_value | text | feed_forward | {"attn.to_out.0"}}
    single = query_key_value | {"proj_mlp", "proj_out"}
    assert adapted == of_two | {f"single_transformer_blocks.{i}.{n}" for i in range(2) for n in single}


def test_a_lora_of_flux2_klein_adapts_both_kinds_of_blocks_by_default(tiny_flux2_klein):
    adapted = {name.split(".lora_")[0] for name in load(tiny_flux2_klein, "lora").trainable}
    attention = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    feed_forward = {f"{ff}.{name}" for ff in ("ff", "ff_context") for name in ("linear_in", "linear_out")}
    of_two = {f"transformer_blocks.0.{name}" for name in {f"attn.{name}" for name in attention} | feed_forward}
    of_one = {f"single_transformer_blocks.{i}.attn.{name}" for i in range(2) for name in ("to_qkv_mlp_proj", "to_out")}
    assert adapted == of_two | of_one


def test_a_lora_of_qwen_image_adapts_both_streams_of_every_block_by_default(tiny_qwen_image):
    adapted = {name.split(".lora_")[0] for name in load(tiny_qwen_image, "lora").trainable}
    attention = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    feed_forward = {f"{mlp}.{name}" for mlp in ("img_mlp", "txt_mlp") for name in ("net.0.proj", "net.2")}
    modules = {f"attn.{name}" for name in attention} | feed_forward
    assert adapted == {f"transformer_blocks.{i}.{name}" for i in range(2) for name in modules}


def test_a_lora_of_wan_adapts_both_attentions_and_the_feed_forward_by_default(tiny_wan):
    adapted = {name.split(".lora_")[0] for name in load(tiny_wan, "lora").trainable}
    attention = {f"{attn}.{name}" for attn in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")}
    assert adapted == {f"blocks.{i}.{n}" for i in range(2) for n in attention | {"ffn.net.0.proj", "ffn.net.2"}}


def test_a_unets_lora_adapts_the_transformer_blocks_by_default(tiny_sd):
    adapted = {
        name.split(".lora_")[0].rpartition("transformer_blocks.0.")[2] for name in load(tiny_sd, "lora").trainable
    }
    attention = {f"{attn}.{name}" for attn in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")}
    assert adapted == attention | {"ff.net.0.proj", "ff.net.2"}


def test_lora_targets_can_be_chosen(tiny_sd3):
    adapted = {name.split(".lora_")[0] for name in load(tiny_sd3, "lora", lora_targets=("attn.to_q",)).trainable}
    assert adapted == {f"transformer_blocks.{i}.attn.to_q" for i in range(2)}
    adapted = {name.split(".lora_")[0] for name in load(tiny_sd3, "lora", lora_targets=("*blocks.1.ff.*",)).trainable}
    assert adapted == {f"transformer_blocks.1.ff.{name}" for name in ("net.0.proj", "net.2")}


@pytest.mark.parametrize("target", ["attn.to_z", "attn", "o_q"])
def test_an_unknown_lora_target_is_named(tiny_sd3, target):
    with pytest.raises(ValueError, match=rf"model.lora_targets: .* '{target}'"):
        load(tiny_sd3, "lora", lora_targets=("attn.to_q", target))


def test_unknown_kind_of_weights_is_refused(tiny_sd3):
    with pytest.raises(ValueError, match=r"model\.weights: 'dora' is not known"):
        load(tiny_sd3, "dora")
