"""Policies that are learnt from the call of a pipeline that has a family: the family's policy, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from progrpo.policies.base import PolicyContext
from progrpo.policies.learnt.call import CallOptions, PipelineCall
from progrpo.policies.learnt.family import denoiser_of, is_diffusion, recorded_kind
from progrpo.policies.load import policy_from_pipeline
from progrpo.policies.pipeline import PipelinePolicy
from progrpo.policies.prepare import prepare
from progrpo.policies.settings import ModelSettings
from tests.support.pipelines import TINY_PIPELINES, frames_of
from tests.support.policies import PROMPTS, TOKENS, load, perturb, sample_without_noise, untouched_pipeline
from tests.support.recorded_pipelines import build

SETTINGS = ModelSettings(lora_rank=2, lora_alpha=6, max_sequence_length=TOKENS, resolution=16)


def recorded(pipeline: Any, context: PolicyContext | None = None, **changes: Any) -> Any:
    """The policy of a pipeline as it were without a family."""
    denoiser_name = denoiser_of(pipeline.components)
    assert denoiser_name is not None
    kind = recorded_kind(type(pipeline).__name__, denoiser_name, is_diffusion(pipeline))
    assert kind is not None
    return PipelinePolicy(prepare(kind, pipeline, replace(SETTINGS, **changes), context or PolicyContext()))


QUICK = ("tiny_sd3", "tiny_flux", "tiny_qwen_image", "tiny_sd")  # packed or not, padded or not, flow or diffusion


@pytest.mark.parametrize(
    "model", [model if model in QUICK else pytest.param(model, marks=pytest.mark.slow) for model in TINY_PIPELINES]
)
def test_it_is_the_hand_written_policy(request, model):
    folder: Path = request.getfixturevalue(model)
    pipeline = untouched_pipeline(folder)
    unet = {"max_sequence_length": None} if hasattr(pipeline, "unet") else {}
    qwen = {"context": PolicyContext(guide_away_from=" ")} if model == "tiny_qwen_image" else {}
    ours, hand = recorded(pipeline, frames=frames_of(folder), **unet, **qwen), load(folder, "lora")
    assert ours.latent_shape == hand.latent_shape and ours.trainable.keys() == hand.trainable.keys()
    assert ours.embeds_guidance == hand.embeds_guidance and ours.prediction == hand.prediction
    for steps in (3, 7):
        for one, other in zip(vars(ours.levels(steps)).values(), vars(hand.levels(steps)).values(), strict=True):
            assert one is other is None or torch.equal(one, other)
    # it pads texts, which the pipeline does not; and it resizes sources by diffusers' code, which is not Pillow's
    rounding = {"tiny_qwen_image": 1e-5, "tiny_kontext": 0.02}.get(model, 0.0)
    for guidance_scale in (1.0, 3.5):
        x0, expected = (sample_without_noise(policy, guidance_scale) for policy in (ours, hand))
        torch.testing.assert_close(x0, expected, rtol=0, atol=rounding)
    assert torch.equal(ours.decode(expected).images_NHWC, hand.decode(expected).images_NHWC)


def test_a_network_that_answers_otherwise_each_time_is_refused_at_its_first_step():
    pipeline, calls = build("chroma"), list[int]()

    def drift(module: Any, inputs: Any, output: Any) -> Any:
        calls.append(len(calls))
        return (output[0] + 0.1 * len(calls),)

    pipeline.transformer.register_forward_hook(drift)
    with pytest.raises(ValueError, match=r"a ChromaPipeline has no family .* call: the output at step 0 differs from"):
        policy_from_pipeline(pipeline, SETTINGS)


def test_a_pipeline_that_makes_another_size_than_was_asked_for_is_refused():
    with pytest.raises(ValueError, match=r"LTXPipeline .*: `height` and `width` have to be divisible by 32"):
        policy_from_pipeline(build("ltx"), replace(SETTINGS, resolution=48, frames=9))


def test_a_pipeline_that_decodes_frames_as_pictures_is_refused():
    with pytest.raises(ValueError, match=r"a LattePipeline .*: its autoencoder decodes a video's frames as pictures"):
        policy_from_pipeline(build("latte"), replace(SETTINGS, frames=2, max_sequence_length=None))


def test_a_text_that_the_network_never_gets_is_refused():
    with pytest.raises(ValueError, match=r"its transformer gets nothing that depends on the text, .* may be needed"):
        policy_from_pipeline(build("lumina2"), replace(SETTINGS, resolution=64))


def test_a_pipeline_without_a_text_is_refused():
    network = UNet2DModel(
        8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    with pytest.raises(ValueError, match=r"a DDPMPipeline .*: it has no encode_prompt to encode a text by"):
        policy_from_pipeline(DDPMPipeline(network, DDPMScheduler()), SETTINGS)


def test_an_option_that_the_pipeline_does_not_take_is_refused(tiny_sd):
    with pytest.raises(ValueError, match=r"model\.max_sequence_length: a StableDiffusionPipeline takes none; leave it"):
        recorded(untouched_pipeline(tiny_sd))


Z_IMAGE = replace(SETTINGS, max_sequence_length=64)


def test_its_call_takes_another_device_for_that_of_networks_that_wait():
    pipeline, away = build("z-image"), torch.device("meta")
    call = PipelineCall(pipeline, "transformer", CallOptions((16, 16)), lambda inputs: inputs, away)
    call.unguided = 0.0
    (inputs,) = call.record(call.options("a cat"), encoded=[([torch.zeros(3, 8)], [])], output=None).calls[0]
    assert inputs["x"][0].device == inputs["t"].device == away and pipeline.device.type == "cpu"


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"quantize": "int8"}])
def test_it_is_trained_in_fewer_bits(changes):
    policy = policy_from_pipeline(build("z-image"), replace(Z_IMAGE, **changes))
    x0 = sample_without_noise(policy, 4.0)
    assert x0.dtype == torch.float32 and bool(x0.isfinite().all())
    policy.predict(x0, torch.tensor(600.0), policy.encode(PROMPTS)).square().mean().backward()
    assert sum(bool(p.grad.any()) for p in policy.trainable.values() if p.grad is not None) > 10


def test_all_of_its_weights_are_trained_and_saved(tmp_path):
    policy = policy_from_pipeline(build("z-image"), replace(Z_IMAGE, weights="full"))
    assert len(policy.trainable) == len(list(policy.denoiser.parameters()))
    before = sample_without_noise(policy, 4.0)
    perturb(policy, 0.02)
    moved = sample_without_noise(policy, 4.0)
    assert (moved - before).abs().max() > 0.01
    policy.save(tmp_path)
    pipeline = build("z-image")
    pipeline.transformer = type(pipeline.transformer).from_pretrained(tmp_path)
    again = policy_from_pipeline(pipeline, Z_IMAGE)  # whose pictures are checked to be that pipeline's
    torch.testing.assert_close(sample_without_noise(again, 4.0), moved, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_compiled_it_is_what_it_is(monkeypatch):
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(  # the graphs as they are: what users have takes minutes
        torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend="eager", **options)
    )
    plain = sample_without_noise(policy_from_pipeline(build("z-image"), Z_IMAGE), 4.0)
    torch._dynamo.reset()
    compiled = policy_from_pipeline(build("z-image"), replace(Z_IMAGE, compile=True))
    torch.testing.assert_close(sample_without_noise(compiled, 4.0), plain, rtol=0, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
