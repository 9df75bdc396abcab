"""Low precision: what stays in float32, and how near the pictures are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from progrpo.policies.load import load_policy
from progrpo.policies.settings import ModelSettings
from tests.support.policies import (
    CASES,
    FRAMES,
    FULL_CASES,
    PROMPTS,
    TOKENS,
    Case,
    load,
    noise,
    untouched_pipeline,
    velocity,
)


@pytest.fixture(scope="module", params=[*CASES.values(), *FULL_CASES.values()], ids=[*CASES, *FULL_CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_low_precision_keeps_trained_weights_and_velocities_in_float32(case, folder, policy):
    low = load(folder, case.weights, dtype="bfloat16")
    assert {p.dtype for p in low.trainable.values()} == {torch.float32}
    if case.weights == "lora":
        frozen = [(name, p) for name, p in low.frozen() if p.dim() == 2 and "rope" not in name]
        wide = {name for name, p in frozen if any(part in name for part in case.always_float32)}
        assert {p.dtype for name, p in frozen if name not in wide} == {torch.bfloat16}
        assert {p.dtype for name, p in frozen if name in wide} == ({torch.float32} if case.always_float32 else set())
    v = low.predict(noise(low), torch.tensor(600.0), low.encode(PROMPTS), 3.0)
    assert v.dtype == torch.float32
    v.square().mean().backward()
    unused = {name for name in low.trainable if any(part in name for part in case.without_gradient)}
    for name, p in low.trainable.items():
        assert name in unused if p.grad is None else p.grad.isfinite().all(), name
    expected = policy.predict(noise(policy), torch.tensor(600.0), policy.encode(PROMPTS), 3.0)
    assert (v - expected).abs().max() < 0.1 * expected.abs().max()
    assert low.decode(noise(low)).images_NHWC.dtype == torch.uint8


def test_low_precision_without_training_is_near_the_float32_pictures(case, folder, policy):
    low = load(folder, case.weights, dtype="bfloat16")
    x0 = noise(policy)
    assert (low.decode(x0).images_NHWC.int() - policy.decode(x0).images_NHWC.int()).abs().float().mean() < 3


@pytest.mark.parametrize("model", ["tiny_sd3", "tiny_wan"])
def test_a_saved_denoiser_takes_the_models_place_in_low_precision_as_it_is(request, tmp_path, model):
    folder = request.getfixturevalue(model)
    load(folder, "full").save(tmp_path / "saved")
    settings = ModelSettings(lora_rank=2, max_sequence_length=TOKENS, resolution=16, dtype="bfloat16")
    settings = replace(settings, frames=FRAMES if model == "tiny_wan" else None)
    own, taken = (
        load_policy(replace(settings, path=str(folder))),
        load_policy(replace(settings, path=str(folder)), trained=tmp_path / "saved"),
    )
    frozen = dict(taken.frozen())
    for name, tensor in own.frozen():  # of Wan some in float32
        assert frozen[name].dtype == tensor.dtype and torch.equal(frozen[name], tensor), name
    assert torch.equal(velocity(taken), velocity(own))


def test_wans_autoencoder_is_float32_whatever_the_rest_is(tiny_wan):
    saved = untouched_pipeline(tiny_wan).vae.state_dict()
    for dtype in ("bfloat16", "float16"):
        weights = load(tiny_wan, "lora", dtype=dtype).pipeline.vae.state_dict()
        assert all(torch.equal(weight, saved[name]) for name, weight in weights.items())


def test_sdxls_autoencoder_stays_in_float32_where_float16_would_overflow(tiny_sdxl, tiny_sd):
    assert load(tiny_sdxl, "lora", dtype="float16").pipeline.vae.dtype == torch.float32
    assert load(tiny_sdxl, "lora", dtype="bfloat16").pipeline.vae.dtype == torch.bfloat16
    assert load(tiny_sd, "lora", dtype="float16").pipeline.vae.dtype == torch.float16
