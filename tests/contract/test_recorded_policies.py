"""Pipelines that have no family of their own: what is learnt from their call is what they do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from progrpo.config import ObjectiveSettings, PlanSettings, SamplingSettings
from progrpo.diffusion.process import Process
from progrpo.objectives.grpo import GRPO
from progrpo.objectives.settings import GRPOSettings
from progrpo.policies.base import PolicyContext
from progrpo.policies.load import policy_from_pipeline
from progrpo.policies.settings import ModelSettings
from progrpo.rewards.frames import FrameAverageReward
from progrpo.rewards.function import FunctionReward
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan, PrunePoint
from progrpo.rollout.rollout import rollout
from progrpo.rollout.sampler import Sampler
from progrpo.training.build import sampling_from
from progrpo.types import Prompt
from tests.support.grids import SAMPLERS
from tests.support.recorded_pipelines import RECORDED_PIPELINES, build
from tests.support.rewards import mixture_of_one

TEXTS = ("red cat", "a blue dog")
SOURCES = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)) for i in range(2)]
PROMPTS = tuple(Prompt(text, {"image": source}) for text, source in zip(TEXTS, SOURCES, strict=True))
QUICK = ("z-image", "lumina2", "pixart-sigma", "cogview4", "hunyuan-video-1.5", "qwen-image-edit")  # one of each kind
STEPS = 3
NEGATIVE = "green bird"
GUIDED_BY_AN_INPUT = ("flux2", "hunyuan-video")


def load(name: str, context: PolicyContext | None = None, **changes: Any) -> Any:
    case = RECORDED_PIPELINES[name]
    settings = {"resolution": case.resolution, "frames": case.frames, "max_sequence_length": case.tokens, **changes}
    return policy_from_pipeline(build(name), ModelSettings(name, lora_rank=2, lora_alpha=6, **settings), context)


@pytest.fixture(
    scope="module",
    params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECORDED_PIPELINES],
)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def policy(name: str) -> Any:
    """A policy for tests that leave it as it is. Guidance leads it away from `NEGATIVE`."""
    context = PolicyContext(guide_away_from="" if name in GUIDED_BY_AN_INPUT else NEGATIVE)
    return load(name, context)


@pytest.fixture(scope="module")
def moved(name: str) -> Any:
    """One whose LoRA has learnt something, for tests that leave it so."""
    policy = load(name)
    move(policy)
    return policy


def untouched(name: str) -> Any:
    """The pipeline as a user has it, with Euler's or DDIM's steps."""
    pipeline = build(name)
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.scheduler.config
    if config.get("use_flow_sigmas"):
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=config.flow_shift)
    elif "beta_schedule" in config and "snr_shift_scale" not in config:  # CogVideoX's is DDIM with a shift
        own = {key: value for key, value in config.items() if key != "_use_default_values"}  # for which it has others
        pipeline.scheduler = DDIMScheduler.from_config(own, clip_sample=False)
    return pipeline


def move(policy: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in policy.trainable.values():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)


def noise(policy: Any, count: int = len(TEXTS)) -> Tensor:
    return torch.randn(count, *policy.latent_shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def sample(policy: Any, guidance_scale: float = 1.0) -> Tensor:
    """The policy's latents at the end of its loop without noise."""
    x, condition = noise(policy), policy.encode(PROMPTS)
    process = Process(policy.prediction, SAMPLERS["ddim"], policy.levels(STEPS), (0.0,) * STEPS)
    for step in range(STEPS):
        x = process.deterministic(step, x, policy.predict(x, process.timestep(step, x), condition, guidance_scale))
    return x


def pipelines_pictures(pipeline: Any, policy: Any, guidance_scale: float = 1.0, **more: Any) -> Tensor:
    """The pipeline's own pictures of the same texts and noise, each by a call of its own; 0 to 255."""
    case = RECORDED_PIPELINES[policy.family.settings.path]
    call = policy.family.call
    starts = policy.family.to_pipeline(noise(policy)).reshape(-1, *policy.family.learnt.shape)
    pictures = []
    if call.guiders:
        pipeline.register_modules(**dict.fromkeys(call.guiders, ClassifierFreeGuidance(guidance_scale=guidance_scale)))
    else:
        more[(call.embedded_scale_name if policy.embeds_guidance else call.scale_name) or ""] = guidance_scale
    for text, source, latents in zip(TEXTS, SOURCES, starts, strict=True):
        options: dict[str, Any] = {"height": case.resolution, "width": case.resolution, "num_frames": case.frames}
        options |= {"max_sequence_length": case.tokens, **more}
        options = {option: value for option, value in options.items() if value is not None}
        options |= {name: False for name in ("use_resolution_binning", "use_kv_cache") if name in call.parameters}
        if policy.edits:
            options["image"] = source
        made = pipeline(
            prompt=text, latents=case.start(latents[None]), num_inference_steps=STEPS, output_type="np", **options
        )[0]
        pictures.append(torch.as_tensor(np.asarray(made))[0])
    return torch.stack(pictures) * 255


def test_without_noise_its_pictures_are_the_pipelines(policy, name):
    form = policy.family.learnt.guidance
    negative = {} if name in GUIDED_BY_AN_INPUT else {"negative_prompt": NEGATIVE}
    for ours, own, more in (
        (1.0, policy.family.call.unguided, {}),
        (4.0, 4.0 - (form.offset if form else 0), negative),
    ):
        pictures = policy.decode(sample(policy, ours)).images_NHWC.float()
        expected = pipelines_pictures(untouched(name), policy, own, **more)
        assert (pictures - expected).abs().max() <= 1.01, ours
        assert pictures.std() > 5 and (pictures[0] - pictures[1]).abs().max() > 1


def test_a_row_does_not_depend_on_the_texts_beside_it(policy):
    x, condition = noise(policy), policy.encode(PROMPTS)
    for guidance_scale in (1.0, 4.0):
        both = policy.predict(x, torch.tensor([600.0, 200.0]), condition, guidance_scale)
        for row, timestep in enumerate((600.0, 200.0)):
            alone = torch.tensor([row])
            one = policy.predict(x[alone], torch.tensor(timestep), condition.take(alone), guidance_scale)
            torch.testing.assert_close(one[0], both[row], rtol=1e-4, atol=1e-4)


def test_a_saved_lora_gives_the_pipeline_the_trained_pictures(moved, name, tmp_path):
    moved.save(tmp_path)
    pipeline = untouched(name)
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(tmp_path, local_files_only=True)
    else:  # diffusers has no loader for it, and peft has one for every network
        load_by_peft(getattr(pipeline, moved.denoiser_name), tmp_path / "pytorch_lora_weights.safetensors")
    own = moved.family.call.unguided
    pictures = moved.decode(sample(moved)).images_NHWC.float()
    assert (pictures - pipelines_pictures(pipeline, moved, own)).abs().max() <= 1.01
    assert (pictures - pipelines_pictures(untouched(name), moved, own)).abs().max() > 2
    again = load(name, lora=str(tmp_path))
    torch.testing.assert_close(sample(again), sample(moved), rtol=0, atol=1e-4)  # alpha / rank is 3


def load_by_peft(network: Any, file: Any) -> None:
    weights = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}
    layers = sorted({key.partition(".lora_")[0] for key in weights})
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=layers), network)
    network.peft_config = {"default": LoraConfig(r=2, lora_alpha=2, target_modules=layers)}
    set_peft_model_state_dict(network, weights)


def test_gradients_reach_what_is_trained_and_nothing_else(moved):
    before = {key: tensor.clone() for key, tensor in moved.frozen()}
    moved.predict(noise(moved), torch.tensor(600.0), moved.encode(PROMPTS), 4.0).square().mean().backward()
    reached = [p.grad is not None and bool(p.grad.any()) for p in moved.trainable.values()]
    assert sum(reached) > 0.7 * len(reached)  # the last block of two streams throws one away
    assert all(t.grad is None and torch.equal(t, before[key]) for key, t in moved.frozen())
    for p in moved.trainable.values():
        p.grad = None


PLANS = Plan(4), Plan(4, (PrunePoint(0, 3), PrunePoint(1, 2)))


def drawn(policy: Any, tiny_config: Any, redness: Any, plan: Plan) -> Any:
    settings = SamplingSettings(num_inference_steps=3, microbatch=1)
    sampling = sampling_from(tiny_config(sampling=settings), policy, "transitions", 0)
    sampler = Sampler(policy, mixture_of_one(FrameAverageReward(FunctionReward(redness), 2)), sampling, plan)
    return rollout(sampler, PROMPTS, torch.arange(2), NoiseKey(3, 1), Meter())


def test_survivors_are_bitwise_what_they_are_without_pruning(moved, tiny_config, redness):
    full, pruned = (drawn(moved, tiny_config, redness, plan).trajectories for plan in PLANS)
    places = {who: i for i, who in enumerate(zip(full.slot_N.tolist(), full.member_N.tolist(), strict=True))}
    rows = [places[who] for who in zip(pruned.slot_N.tolist(), pruned.member_N.tolist(), strict=True)]
    assert len(rows) == 4 and torch.equal(full.x_NCHW[rows], pruned.x_NCHW)
    for one, other in zip(full.path, pruned.path, strict=True):
        assert torch.equal(one.log_prob_N[rows], other.log_prob_N)


def test_the_ratio_is_one_before_any_update(moved, tiny_trainer, tiny_config, first_experience):
    sampling = SamplingSettings(num_inference_steps=3, microbatch=3)
    plan = PlanSettings(preset="custom", group_size=3)
    settings = GRPOSettings(clip_range=3e-3)
    config = tiny_config(sampling=sampling, plan=plan, objective=ObjectiveSettings(grpo=settings))
    experience = first_experience(tiny_trainer(config, moved))
    items = torch.arange(len(experience) * len(experience.trajectories.path))
    with torch.no_grad():
        loss = GRPO(settings).loss(moved, experience, items)
    assert loss.maxima["ratio_max_deviation"] <= 1e-3 and loss.sums["clip_fraction"] == 0


def test_a_preview_decodes_unfinished_latents(policy):
    pictures = policy.preview(noise(policy))
    assert pictures.images_NHWC.shape[0] == 2 and bool(pictures.there_N.all())


def test_latents_of_pictures_are_those_that_are_decoded(policy):
    x0 = noise(policy)
    torch.testing.assert_close(policy.family.scale(policy.family.unscale(x0)), x0, rtol=1e-4, atol=1e-4)
