"""Pipelines and torch as their owners left them: undone for the run, or refused before anything is drawn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import accelerate
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

import progrpo
from progrpo.policies.load import policy_from_pipeline
from progrpo.policies.settings import ModelSettings
from progrpo.training.torch_state import default_torch_state
from progrpo.types import Prompt

SETTINGS = ModelSettings(lora_rank=2)
PROMPTS = [Prompt("red cat", {}), Prompt("blue dog", {})]


def velocity(policy: Any) -> torch.Tensor:
    """With gradients, as in training."""
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    output = policy.predict(x, torch.tensor(500.0), policy.encode(PROMPTS))
    output.square().mean().backward()
    assert all(p.grad is not None for name, p in policy.trainable.items() if name.endswith("lora_B.default.weight"))
    return output.detach()


def compiled(pipeline: Any) -> None:
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    pipeline.text_encoder = torch.compile(pipeline.text_encoder, backend="eager")


def compiled_within(pipeline: Any) -> None:
    pipeline.unet.mid_block = torch.compile(pipeline.unet.mid_block, backend="eager")
    pipeline.vae.compile(backend="eager")


def offloaded(pipeline: Any) -> None:
    accelerate.cpu_offload(pipeline.unet, execution_device="cpu")  # as enable_sequential_cpu_offload
    accelerate.cpu_offload(pipeline.text_encoder, execution_device="cpu")


def whole_offloaded(pipeline: Any) -> None:
    accelerate.cpu_offload_with_hook(pipeline.unet, execution_device="cpu")  # as enable_model_cpu_offload


@pytest.mark.parametrize("change", [compiled, compiled_within, offloaded, whole_offloaded])
def test_what_was_done_for_speed_or_memory_is_undone(tiny_sd, tiny_pipeline, change):
    plain, changed = tiny_pipeline(tiny_sd), tiny_pipeline(tiny_sd)
    change(changed)
    expected, policy = policy_from_pipeline(plain, SETTINGS), policy_from_pipeline(changed, SETTINGS)
    torch.testing.assert_close(velocity(policy), velocity(expected), rtol=1e-5, atol=1e-6)
    assert list(policy.trainable) == list(expected.trainable)
    policy.decode(torch.ones(1, *policy.latent_shape))


def test_a_pipeline_of_inference_mode_is_trained_in_full(tiny_sd, tiny_pipeline):
    with torch.inference_mode():
        pipeline = tiny_pipeline(tiny_sd)
    policy: Any = policy_from_pipeline(pipeline, replace(SETTINGS, weights="full"))
    plain: Any = policy_from_pipeline(tiny_pipeline(tiny_sd), replace(SETTINGS, weights="full"))
    for one in (policy, plain):
        x = torch.ones(1, *one.latent_shape)
        one.predict(x, torch.tensor(500.0), one.encode(PROMPTS[:1])).square().mean().backward()
    for mine, theirs in zip(policy.trainable.values(), plain.trainable.values(), strict=True):
        assert torch.equal(mine, theirs) and mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_undone_is_refused(tiny_sd, tiny_pipeline):
    pipeline = tiny_pipeline(tiny_sd)
    pipeline.unet.fuse_qkv_projections()
    with pytest.raises(
        ValueError, match=r"^the pipeline's unet has fused projections.* without fuse_qkv_projections\(\)$"
    ):
        policy_from_pipeline(pipeline, SETTINGS)


def test_a_shift_that_was_set_on_the_scheduler_is_the_one_that_is_stepped_on(tiny_sd3, tiny_pipeline):
    pipeline = tiny_pipeline(tiny_sd3)
    pipeline.scheduler.set_shift(6.0)
    policy = policy_from_pipeline(pipeline, SETTINGS)
    for count in (4, 10):
        pipeline.scheduler.set_timesteps(count)
        assert torch.equal(policy.levels(count).sigma, pipeline.scheduler.sigmas)
    plain = policy_from_pipeline(tiny_pipeline(tiny_sd3), SETTINGS)
    assert torch.equal(policy.levels(4, shift=2.0).sigma, plain.levels(4, shift=2.0).sigma)


@pytest.mark.parametrize(
    "setting",
    [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}, {"shift_terminal": 0.1}],
)
def test_what_a_flow_scheduler_makes_of_its_grid_is_stepped_on(tiny_sd3, tiny_pipeline, setting):
    pipeline = tiny_pipeline(tiny_sd3)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **setting)
    policy = policy_from_pipeline(pipeline, SETTINGS)
    pipeline.scheduler.set_timesteps(5)
    assert torch.equal(policy.levels(5).sigma, pipeline.scheduler.sigmas)


@pytest.mark.parametrize("setting", ["stochastic_sampling", "invert_sigmas"])
def test_a_flow_scheduler_that_steps_otherwise_is_refused(tiny_sd3, tiny_pipeline, setting):
    pipeline = tiny_pipeline(tiny_sd3)
    pipeline.scheduler.register_to_config(**{setting: True})
    with pytest.raises(ValueError, match=rf"^model\.path: the scheduler has {setting}, which .*register_to_config\("):
        policy_from_pipeline(pipeline, SETTINGS)


def test_what_a_diffusion_scheduler_would_do_otherwise_is_said(tiny_sd, tiny_pipeline):
    def said(kind: Any, **settings: Any) -> str:
        pipeline = tiny_pipeline(tiny_sd)
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **settings)
        return policy_from_pipeline(pipeline, SETTINGS).ignored

    assert (
        said(DDIMScheduler, clip_sample=False) == ""
        and policy_from_pipeline(tiny_pipeline(tiny_sd), SETTINGS).ignored == ""
    )
    assert said(EulerDiscreteScheduler, use_karras_sigmas=True).startswith(
        "the EulerDiscreteScheduler's use_karras_sigmas is not used: steps are DDIM's"
    )
    assert "DDIMScheduler's clip_sample and thresholding are not used" in said(
        DDIMScheduler, clip_sample=True, thresholding=True
    )


def test_a_unet_that_is_shown_a_picture_is_refused(tiny_sd, tiny_pipeline):
    pipeline = tiny_pipeline(tiny_sd)
    pipeline.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")  # as load_ip_adapter()
    with pytest.raises(ValueError, match=r"by an IP-Adapter; take it off with unload_ip_adapter\(\)$"):
        policy_from_pipeline(pipeline, SETTINGS)


def test_torch_is_as_usual_within_and_as_it_was_after():
    @default_torch_state()
    def seen() -> tuple[Any, ...]:
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch.get_default_device().type,
            torch.is_autocast_enabled("cpu"),
            torch.ones(1).is_inference(),
        )

    usual = (True, False, torch.float32, "cpu", False, False)
    assert seen() == usual
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            assert seen() == usual
            assert (torch.is_grad_enabled(), torch.get_default_device().type) == (False, "meta")
            assert torch.is_autocast_enabled("cpu") and torch.is_inference_mode_enabled()
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(before)


def test_a_run_is_the_same_whatever_its_caller_left(tiny_pipeline, tiny_config, prompts, redness, tmp_path):
    config = replace(tiny_config(), iterations=1)
    plain = progrpo.train(tiny_pipeline(), prompts, redness, out=tmp_path / "plain", config=config)
    pipeline = tiny_pipeline()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            left = progrpo.train(pipeline, prompts, redness, out=tmp_path / "left", config=config)
    finally:
        torch.set_default_dtype(torch.float32)
    mine, theirs = (run.summary.read()["reward_after"] for run in (plain, left))
    assert mine == pytest.approx(theirs, abs=1e-4)
