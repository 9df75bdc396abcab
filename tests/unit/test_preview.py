"""Where the ODE leads to from an unfinished trajectory, by hand on known networks; and who is asked for its score."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from progrpo.diffusion.levels import flow_levels
from progrpo.diffusion.process import Process
from progrpo.policies.base import PolicyContext
from progrpo.policies.load import load_policy
from progrpo.policies.settings import ModelSettings
from progrpo.rewards.base import Reward, Score
from progrpo.rollout.denoise import Denoiser, denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan, PrunePoint
from progrpo.rollout.preview import preview, projected
from progrpo.rollout.probe import Probe, ProbeExample, latent_features, text_features
from progrpo.rollout.rollout import rollout
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sampling import Record, Sampling
from progrpo.rollout.settings import PreviewSettings, SamplingSettings
from progrpo.types import Condition, Cost, Prompt, Trajectories
from tests.support.grids import SAMPLERS
from tests.support.rewards import mixture_of_one

ROWS = 5
PROMPTS = [Prompt("red cat"), Prompt("blue dog")]
CONDITION = Condition({"c": torch.tensor([1.0, -2.0], dtype=torch.float64)})
GROUPS = torch.tensor([0, 0, 0, 1, 1])
GRID = torch.tensor([1.0, 0.8, 0.5, 0.0], dtype=torch.float64)


def flow(guidance_scale: float = 1.0, microbatch: int = 2) -> Sampling:
    process = Process("flow", SAMPLERS["flow_grpo"], flow_levels(GRID), (0.7, 0.7, 0.7))
    return Sampling(process, SamplingSettings(guidance_scale=guidance_scale, microbatch=microbatch))


def called(policy: Any, sampling: Sampling, step: int) -> Trajectories:
    """Trajectories in float64 between the network call of a step and the step."""
    x = torch.randn(ROWS, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    condition = CONDITION.take(GROUPS)
    with torch.no_grad():
        output = policy.predict(x, sampling.process.timestep(step, x), condition, sampling.guidance_scale)
    return Trajectories(GROUPS, GROUPS, torch.arange(ROWS), x, output)


def seen(policy: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each network call from now on."""
    rows, predict = [], policy.predict

    def watched(x: torch.Tensor, *args: Any) -> torch.Tensor:
        rows.append(len(x))
        return predict(x, *args)

    monkeypatch.setattr(policy, "predict", watched)
    return rows


def c_of() -> torch.Tensor:
    return CONDITION.tensors["c"][GROUPS].reshape(-1, 1, 1, 1)


# --- flow models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 2])
def test_one_step_is_the_projection_and_calls_no_network(linear_policy, monkeypatch, step):
    sampling, meter = flow(), Meter()
    batch = called(linear_policy, sampling, step)
    rows = seen(linear_policy, monkeypatch)
    x0 = projected(Denoiser(linear_policy, CONDITION, sampling), batch, step, 1, meter)
    torch.testing.assert_close(x0, batch.x_NCHW - GRID[step] * (0.3 * batch.x_NCHW - 0.2 * c_of()))
    assert rows == [] and meter.cost == Cost()


def euler(x: torch.Tensor, sigmas: list[float], guidance_scale: float) -> torch.Tensor:
    for sigma, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        x = x + (after - sigma) * (0.3 * x - 0.2 * guidance_scale * c_of())
    return x


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    ("step", "ode_steps", "sigmas"),
    [
        (0, 2, [1.0, 0.65]),  # half of three intervals is the middle of the second
        (0, 3, [1.0, 0.8, 0.5]),
        (1, 2, [0.8, 0.5]),
        (1, 4, [0.8, 0.65, 0.5, 0.25]),
        (2, 2, [0.5, 0.25]),
    ],
)
def test_several_steps_are_eulers_on_equal_parts_of_the_grid_that_is_left(
    linear_policy, monkeypatch, step, ode_steps, sigmas, guidance_scale
):
    sampling, meter = flow(guidance_scale), Meter()
    batch = called(linear_policy, sampling, step)
    rows = seen(linear_policy, monkeypatch)
    x0 = projected(Denoiser(linear_policy, CONDITION, sampling), batch, step, ode_steps, meter)
    torch.testing.assert_close(x0, euler(batch.x_NCHW, sigmas, guidance_scale), rtol=1e-12, atol=1e-12)
    per_call = 2 if guidance_scale > 1 else 1
    assert meter.cost == Cost(nfe=(ode_steps - 1) * ROWS * per_call)
    assert rows == [2, 2, 2] * (ode_steps - 1)  # five rows in microbatches of one shape
    assert set(meter.seconds) == {"sample"}


def test_the_network_takes_the_timestep_of_the_level_between_steps(linear_policy, monkeypatch):
    sampling, timesteps = flow(microbatch=64), []
    batch, predict = called(linear_policy, sampling, 0), linear_policy.predict

    def watched(x: torch.Tensor, timestep: torch.Tensor, *more: Any) -> torch.Tensor:
        timesteps.append(timestep.item())
        return predict(x, timestep, *more)

    monkeypatch.setattr(linear_policy, "predict", watched)
    projected(Denoiser(linear_policy, CONDITION, sampling), batch, 0, 2, Meter())
    assert timesteps == pytest.approx([650])


def test_very_many_steps_reach_the_end_of_the_ode(linear_policy):
    sampling = flow(microbatch=64)
    batch = called(linear_policy, sampling, 1)
    # dx/dsigma = a x + b c, from sigma .8 to 0
    a, bc = 0.3, -0.2 * c_of()
    end = (batch.x_NCHW + bc / a) * math.exp(-a * 0.8) - bc / a
    errors = [
        (projected(Denoiser(linear_policy, CONDITION, sampling), batch, 1, k, Meter()) - end).abs().max().item()
        for k in (1, 10, 100, 1000)
    ]
    assert errors[0] > 0.01 and errors[-1] < 1e-4
    assert errors[2] == pytest.approx(10 * errors[3], rel=0.05)  # of first order


def test_a_projection_keeps_no_graph(linear_policy):
    sampling = flow()
    assert not projected(
        Denoiser(linear_policy, CONDITION, sampling), called(linear_policy, sampling, 0), 0, 3, Meter()
    ).requires_grad


# --- diffusion models -------------------------------------------------------------------------------------------------


def ddim(policy: Any, x: torch.Tensor, output: torch.Tensor, timesteps: list[int]) -> torch.Tensor:
    """DDIM with eta 0, written out for a network that says noise (arXiv 2010.02502, eq. 12)."""
    x0 = x
    for place, t in enumerate(timesteps):
        if place:
            output = 0.3 * x - 0.2 * c_of() + t / 100
        a = policy.signal[t]
        x0 = (x - (1 - a).sqrt() * output) / a.sqrt()
        if place + 1 < len(timesteps):
            after = policy.signal[timesteps[place + 1]]
            x = after.sqrt() * x0 + (1 - after).sqrt() * output
    return x0


@pytest.mark.parametrize(
    ("step", "timesteps"),
    [
        (0, [9]),
        (0, [9, 4]),  # place 1.5 is timestep 3.5, whose nearest even one is 4
        (0, [9, 5, 2]),
        (1, [5, 2]),
        (1, [5, 4, 2, 1]),
    ],
)
def test_steps_of_a_diffusion_model_are_ddims_without_noise(linear_diffusion_policy, step, timesteps):
    policy, meter = linear_diffusion_policy("epsilon"), Meter()
    sampling = Sampling(policy.process("ddim", 0.7), SamplingSettings(microbatch=2))
    batch = called(policy, sampling, step)
    assert batch.output_NCHW is not None
    x0 = projected(Denoiser(policy, CONDITION, sampling), batch, step, len(timesteps), meter)
    expected = ddim(policy, batch.x_NCHW, batch.output_NCHW, timesteps)
    torch.testing.assert_close(x0, expected, rtol=1e-12, atol=1e-12)
    assert meter.cost == Cost(nfe=(len(timesteps) - 1) * ROWS)


def test_as_many_steps_as_are_left_are_the_samplers_own_ode(family, tiny_policy, prompts_of):
    policy, key = tiny_policy(moved=0.1, folder=family), NoiseKey(5, 2)
    process = Process(policy.prediction, SAMPLERS["ddim"], policy.levels(4), (0.0,) * 4)
    sampling, condition = (
        Sampling(process, SamplingSettings(microbatch=4)),
        policy.encode(prompts_of(*(p.text for p in PROMPTS))),
    )
    batch, previews = expand(policy, torch.tensor([0, 1]), 2, sampling, key), []

    def watch(step: int, living: Trajectories) -> Trajectories:
        previews.append(projected(Denoiser(policy, condition, sampling), living, step, 4 - step, Meter()))
        return living

    end = denoise(Denoiser(policy, condition, sampling), batch, key, Meter(), watch).x_NCHW
    if policy.prediction == "flow":
        assert all(torch.equal(x0, end) for x0 in previews)
        return
    # a diffusion model's previews end in clean data, its grid just before it
    for x0 in previews:
        torch.testing.assert_close(x0, previews[-1], rtol=1e-4, atol=1e-3 * previews[-1].abs().max().item())


# --- who is asked -----------------------------------------------------------------------------------------------------


@dataclass
class Counted(Reward):
    """Mean brightness of each picture; it notes how many it was shown."""

    shown: list[int] = field(default_factory=list)

    def score(self, pictures_NHWC, prompts):
        self.shown.append(len(pictures_NHWC))
        return [Score(float(np.mean(p))) for p in pictures_NHWC]


def trusted_at(steps: int, *good: int, shape: tuple[int, ...] = (1, 2, 2), text: tuple[int, ...] = (1, 1)) -> Probe:
    """A probe of latents and texts of these shapes that was right at the steps named alone."""
    generator = torch.Generator().manual_seed(0)
    probe, rewards = Probe(steps), torch.arange(3.0)
    seen, embeds = (torch.randn(*size, generator=generator).half() for size in ((steps, 3, *shape), text))
    probe.learn([ProbeExample(seen, embeds, rewards, rewards.expand(steps, -1))])
    for _ in range(3):
        probe.watch([0.9 if step in good else 0.1 for step in range(steps)])
    return probe


def test_a_trusted_probe_is_asked_and_nothing_is_decoded(linear_policy):
    sampling, meter, reward = flow(), Meter(), Counted()
    features = tuple(torch.randn(ROWS, 1, 2, 2, generator=torch.Generator().manual_seed(s)).half() for s in range(2))
    batch = replace(called(linear_policy, sampling, 1), latent_features=features)
    embeds = torch.ones(len(PROMPTS), 1, 1)
    probe, condition = trusted_at(3, 1), Condition({**CONDITION.tensors, "prompt_embeds": embeds})
    settings = PreviewSettings(ode_steps=3)  # a linear policy has no decoder, and further steps would be counted
    sampler = Sampler(linear_policy, mixture_of_one(reward), sampling, preview_settings=settings, probe=probe)
    pictures, scores = preview(sampler, PROMPTS, condition, batch, 1, meter)
    right, wrong = (probe.score(step, features[step], embeds, batch.group_N) for step in (1, 0))
    assert torch.equal(scores, right) and not torch.equal(scores, wrong)
    assert pictures is None and meter.cost == Cost(probed=ROWS) and reward.shown == []
    assert set(meter.seconds) == {"preview"}


def test_where_the_probe_is_not_trusted_pictures_are_looked_at(tiny_policy):
    policy, meter, reward = tiny_policy(moved=0.1), Meter(), Counted()
    process = Process(policy.prediction, SAMPLERS["ddim"], policy.levels(3), (0.0,) * 3)
    sampling, condition = Sampling(process, SamplingSettings(microbatch=2)), policy.encode(PROMPTS)
    settings, probe, key = PreviewSettings(ode_steps=2), trusted_at(3, 1), NoiseKey(0, 0)
    sampler = Sampler(policy, mixture_of_one(reward), sampling, preview_settings=settings, probe=probe)
    batch = expand(policy, torch.tensor([0, 1]), 2, sampling, key)
    scores = []

    def watch(step: int, living: Trajectories) -> Trajectories:
        if step == 0:
            scores.append(preview(sampler, PROMPTS, condition, living, 0, meter)[1])
            x0 = projected(Denoiser(policy, condition, sampling), living, 0, 2, Meter())
            scores.append(torch.tensor([p.float().mean() for p in policy.decode(x0).images_NHWC], dtype=torch.float64))
        return living

    denoise(Denoiser(policy, condition, sampling), batch, key, Meter(), watch)
    torch.testing.assert_close(scores[0], scores[1])
    assert meter.cost == Cost(nfe=4, decodes=4, reward_calls=4, previews=4) and reward.shown == [4]


def test_the_steps_that_are_probed_are_those_that_reach_the_threshold(linear_policy):
    probe = trusted_at(4, 1, 3)
    sampler = Sampler(linear_policy, mixture_of_one(Counted()), flow(), probe=probe)
    assert sampler.probed_steps == {1, 3}
    assert replace(sampler, preview_settings=PreviewSettings(probe_threshold=0.1)).probed_steps == set(range(4))
    assert replace(sampler, preview_settings=PreviewSettings(probe_threshold=0.95)).probed_steps == frozenset()
    assert replace(sampler, probe=None).probed_steps == frozenset()


def test_a_rollout_counts_what_its_plan_says_of_probes_and_further_steps(tiny_policy):
    policy, meter, reward = tiny_policy(moved=0.1), Meter(), Counted()
    text_shape = text_features(policy.encode(PROMPTS)).shape[1:]
    probe = trusted_at(
        4, 2, shape=tuple(latent_features(torch.zeros(1, *policy.latent_shape)).shape[1:]), text=tuple(text_shape)
    )
    process = Process(policy.prediction, SAMPLERS["flow_grpo"], policy.levels(4), (0.7,) * 4)
    record = Record(frozenset({0, 1}), latent_features=True)
    sampling = Sampling(process, SamplingSettings(guidance_scale=3.0), record)
    plan, settings = Plan(5, (PrunePoint(0, 4), PrunePoint(2, 3))), PreviewSettings(ode_steps=3)
    sampler = Sampler(policy, mixture_of_one(reward), sampling, plan, preview_settings=settings, probe=probe)
    rolled = rollout(sampler, PROMPTS, torch.tensor([0, 1]), NoiseKey(0, 0), meter)
    assert meter.cost == plan.predict(4, 0, True, 3, frozenset({2})) * 2
    assert meter.cost.probed == 8 and meter.cost.previews == 10 and reward.shown == [10, 6]
    assert len(rolled.trajectories.latent_features) == 4 and all(
        len(g) == 6 for g in rolled.trajectories.latent_features
    )


def test_the_tiny_decoder_is_used_where_it_is_asked_for(tiny_sd3, tmp_path):
    torch.manual_seed(0)
    channels = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(latent_channels=4, **channels, **blocks).save_pretrained(tmp_path)
    policy = load_policy(
        ModelSettings(str(tiny_sd3), lora_rank=2, max_sequence_length=8),
        PolicyContext(decoder_for_previews=str(tmp_path)),
    )
    x = torch.randn(4, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    group, process = torch.tensor([0, 0, 1, 1]), Process("flow", SAMPLERS["ddim"], policy.levels(2), (0.0, 0.0))
    batch, condition = Trajectories(group, group, torch.arange(4), x, -x), policy.encode(PROMPTS)
    x0 = process.x0(0, x, -x)
    for tiny, expected in ((True, policy.preview(x0).images_NHWC), (False, policy.decode(x0).images_NHWC)):
        settings = PreviewSettings(decoder="tiny" if tiny else "full")
        sampling = Sampling(process, SamplingSettings(microbatch=3))
        sampler = Sampler(policy, mixture_of_one(Counted()), sampling, preview_settings=settings)
        images, values = preview(sampler, PROMPTS, condition, batch, 0, Meter())
        assert images is not None
        assert torch.equal(images, expected)
        assert values.tolist() == pytest.approx([p.float().mean().item() for p in expected])
    assert not torch.equal(policy.preview(x0).images_NHWC, policy.decode(x0).images_NHWC)
