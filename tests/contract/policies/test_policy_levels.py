"""A policy's noise levels are those of its pipeline's scheduler."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    LCMScheduler,
)

from progrpo.policies.load import policy_from_pipeline
from progrpo.policies.settings import ModelSettings
from tests.support.policies import (
    STEPS,
    load,
    sample_by_diffusers,
    untouched_pipeline,
)


def test_a_flow_models_levels_are_the_schedulers_own_or_shifted(tiny_sd3):
    policy, pipeline = load(tiny_sd3, "lora"), untouched_pipeline(tiny_sd3)
    levels = policy.levels(STEPS)
    sigmas = levels.sigma
    pipeline.scheduler.set_timesteps(STEPS)
    assert torch.equal(sigmas, pipeline.scheduler.sigmas)
    assert torch.equal(levels.timestep[:-1], pipeline.scheduler.timesteps) and levels.timestep[-1] == 0
    assert torch.equal(levels.alpha, 1 - sigmas)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (STEPS + 1,) and sigmas.device.type == "cpu"
    torch.testing.assert_close(
        policy.levels(STEPS, shift=1.0).sigma, torch.tensor([*torch.linspace(1, 0.001, STEPS).tolist(), 0.0])
    )
    assert torch.equal(policy.levels(STEPS).sigma, sigmas)


@pytest.mark.parametrize("model", ["tiny_flux", "tiny_flux_schnell", "tiny_flux2_klein", "tiny_qwen_image"])
def test_a_packed_model_has_the_levels_that_its_pipeline_sampled_on(request, model):
    folder = request.getfixturevalue(model)
    pipeline = untouched_pipeline(folder)
    for resolution in (8, 16, (8, 24)):  # 4 tokens, 16 and 12, where the scheduler's base is 9
        policy = load(folder, "lora", resolution=resolution)
        sample_by_diffusers(pipeline, policy, 1.0, "latent")
        levels = policy.levels(STEPS)
        assert torch.equal(levels.sigma, pipeline.scheduler.sigmas)
        assert torch.equal(levels.timestep[:-1], pipeline.scheduler.timesteps) and levels.timestep[-1] == 0
        even = torch.linspace(1, 0, STEPS + 1)
        shifted = 3 * even / (1 + 2 * even)
        if model == "tiny_qwen_image":  # stretched to end at 0.02
            shifted[:-1] = 1 - (1 - shifted[:-1]) * (1 - 0.02) / (1 - shifted[-2])
        torch.testing.assert_close(policy.levels(STEPS, shift=3.0).sigma, shifted)
    assert torch.equal(levels.sigma, even) == (model == "tiny_flux_schnell")


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd_v", "tiny_sdxl"])
def test_a_diffusion_models_levels_are_ddims(request, model):
    folder = request.getfixturevalue(model)
    policy, pipeline = load(folder, "lora"), untouched_pipeline(folder)
    levels, scheduler = policy.levels(STEPS), pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    assert levels.timestep.tolist() == [*scheduler.timesteps.tolist(), 0]
    signal = torch.stack([*scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod])
    assert torch.equal(levels.alpha, signal.sqrt()) and torch.equal(levels.sigma, (1 - signal).sqrt())
    assert policy.prediction == scheduler.config.prediction_type
    with pytest.raises(ValueError, match=r"sampling\.shift: this is a diffusion model"):
        policy.levels(STEPS, shift=3.0)
    with pytest.raises(ValueError, match=r"sampling\.num_inference_steps: 1001 is more than the 1000 timesteps"):
        policy.levels(1001)
    with pytest.raises(ValueError, match=r"sampling\.num_inference_steps: 1000 steps begin beyond the 1000 timesteps"):
        policy.levels(1000)


def test_levels_between_the_grids_are_on_the_way(policy):
    grid = policy.levels(STEPS)
    for step in range(STEPS):
        at = policy.levels_between(grid, torch.tensor([step, step + 0.5, step + 1.0], dtype=torch.float64))
        assert at.timestep[0] == grid.timestep[step] and at.timestep[2] == grid.timestep[step + 1]
        torch.testing.assert_close(at.alpha[0], grid.alpha[step])
        assert at.sigma[0] > at.sigma[1] >= at.sigma[2] and at.timestep[0] > at.timestep[1] >= at.timestep[2]
        halfway = (grid.timestep[step] + grid.timestep[step + 1]) / 2
        assert (at.timestep[1] - halfway).abs() <= 0.5  # a diffusion model was trained at whole timesteps only


def test_wan_is_sampled_on_eulers_grid_of_its_unipcs_shift(tiny_wan):
    policy, pipeline = load(tiny_wan, "lora"), untouched_pipeline(tiny_wan)
    pipeline.scheduler.set_timesteps(STEPS)
    assert torch.equal(policy.levels(STEPS).sigma, pipeline.scheduler.sigmas)
    assert torch.equal(policy.levels(STEPS).timestep[:-1], pipeline.scheduler.timesteps)
    assert pipeline.scheduler.config.shift == 3


@pytest.mark.parametrize("scheduler", [LCMScheduler, EulerDiscreteScheduler])
def test_what_a_scheduler_has_by_default_stays_when_its_noise_is_sampled_by_ddim(tiny_sd, tmp_path, scheduler):
    pipeline = untouched_pipeline(tiny_sd)
    pipeline.scheduler = scheduler()
    pipeline.scheduler.save_pretrained(tmp_path)  # a file says every default, where an object lists those it was left
    own, settings = pipeline.scheduler, ModelSettings(lora_rank=2)
    levels = policy_from_pipeline(pipeline, settings).levels(STEPS)
    signal = own.alphas_cumprod[levels.timestep[:-1].long()]
    assert torch.equal(levels.alpha[:-1], signal.sqrt())
    pipeline = untouched_pipeline(tiny_sd)
    pipeline.scheduler = scheduler.from_pretrained(tmp_path)
    assert torch.equal(policy_from_pipeline(pipeline, settings).levels(STEPS).timestep, levels.timestep)
