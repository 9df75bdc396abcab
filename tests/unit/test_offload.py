"""Parts that take turns on the device, and pictures that are decoded one at a time: less memory, the same results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import VQModel
from torch import nn

from progrpo.policies.decoding import tile_side
from progrpo.policies.load import policy_from_pipeline
from progrpo.policies.settings import ModelSettings
from progrpo.policies.sizes import sizes
from progrpo.rewards.function import FunctionReward
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan, PrunePoint
from progrpo.rollout.rollout import rollout
from progrpo.rollout.sampler import Sampler
from progrpo.training.build import sampling_from
from progrpo.types import Prompt
from tests.support.recorded_pipelines import build
from tests.support.rewards import mixture_of_one


@pytest.fixture
def made(tiny_sd3, tiny_pipeline):
    def make(**more: Any) -> Any:
        settings = ModelSettings(lora_rank=2, lora_alpha=4, max_sequence_length=8, resolution=16, **more)
        return policy_from_pipeline(tiny_pipeline(tiny_sd3), settings)

    return make


@pytest.fixture
def moves(monkeypatch):
    """Classes of the modules that are moved, and whereto; both are the CPU here, so that names must do."""
    seen: list[tuple[str, str]] = []
    original = nn.Module.to

    def to(module: nn.Module, *args: Any, **more: Any) -> nn.Module:
        if args and isinstance(args[0], str | torch.device):
            seen.append((type(module).__name__, "off" if args[0] == "cpu" else "on"))
        return original(module, *args, **more)

    monkeypatch.setattr(nn.Module, "to", to)
    return seen


def test_one_part_at_a_time_is_on_the_device_and_nothing_changes(made, moves):
    plain, turns = made(), made(offload=True)
    moves.clear()
    x, at = torch.randn(2, *plain.latent_shape), torch.tensor(500.0)
    condition = turns.encode([Prompt("red cat"), Prompt("blue dog")])
    network, encoders = "SD3Transformer2DModel", ["CLIPTextModelWithProjection"] * 2 + ["T5EncoderModel"]
    assert moves == [(network, "off"), *((name, "on") for name in encoders)]  # for both texts
    moves.clear()
    turns.release_text_encoders()
    assert moves == [*((name, "off") for name in encoders), (network, "on")]  # after the empty text was encoded
    velocity = turns.predict(x, at, condition, 3.0)
    assert torch.equal(velocity, plain.predict(x, at, plain.encode([Prompt("red cat"), Prompt("blue dog")]), 3.0))
    velocity.square().mean().backward()
    with turns.weights("reference"):
        moves.clear()
        assert torch.equal(turns.predict(x, at, condition), plain.predict(x, at, condition)) and moves == []


def test_a_learnt_pipeline_takes_turns_too(moves):
    settings = ModelSettings(lora_rank=2, lora_alpha=4, max_sequence_length=64, resolution=16)
    plain, turns = (policy_from_pipeline(build("z-image"), replace(settings, offload=on)) for on in (False, True))
    network, encoder = "ZImageTransformer2DModel", "Qwen3Model"
    moves.clear()
    condition = turns.encode([Prompt("red cat")])
    assert moves == [(network, "off"), (encoder, "on")]
    moves.clear()
    turns.release_text_encoders()
    assert moves == [(encoder, "off"), (network, "on")]
    x, at = torch.randn(1, *plain.latent_shape), torch.tensor(500.0)
    assert torch.equal(turns.predict(x, at, condition), plain.predict(x, at, plain.encode([Prompt("red cat")])))
    assert np.array_equal(turns.decode(x).images_NHWC, plain.decode(x).images_NHWC)


@pytest.fixture
def large(tiny_sd3, tiny_pipeline):
    """A policy of pictures of 32 pixels, whose latents of 16 are tiled by eights."""

    def make(**more: Any) -> Any:
        settings = ModelSettings(lora_rank=2, lora_alpha=4, max_sequence_length=8, resolution=32, **more)
        return policy_from_pipeline(tiny_pipeline(tiny_sd3), settings)

    return make


def decoded_sizes(policy: Any) -> list[tuple[int, ...]]:
    """The shapes of latents that the decoder is called with from now on."""
    sizes: list[tuple[int, ...]] = []
    policy.pipeline.vae.decoder.register_forward_hook(
        lambda module, inputs, output: sizes.append(tuple(inputs[0].shape))
    )
    return sizes


def test_sliced_decoding_gives_the_same_pictures(made):
    plain, parts = made(), made(decoding="sliced")
    sizes = decoded_sizes(parts)
    latents = torch.randn(3, *plain.latent_shape)
    difference = parts.decode(latents).images_NHWC.int() - plain.decode(latents).images_NHWC.int()
    assert sizes == [(1, *plain.latent_shape)] * 3 and difference.abs().max() <= 1


def test_tiles_are_half_as_wide_as_the_picture_and_join_to_one_of_its_size(large):
    plain, tiled = large(), large(decoding="tiled")
    sizes = decoded_sizes(tiled)
    latents = torch.randn(2, *plain.latent_shape)
    whole, parts = plain.decode(latents).images_NHWC, tiled.decode(latents).images_NHWC
    # tiles begin at 0, 6 and 12 of 16 rows and columns
    assert sizes == 2 * [(1, 4, rows, columns) for rows in (8, 8, 4) for columns in (8, 8, 4)]
    assert parts.shape == whole.shape


def local(policy: Any) -> Any:
    """The policy with a decoder whose pixels depend on latents nearby alone: without norms and attention."""
    decoder = policy.pipeline.vae.decoder
    for parent in list(decoder.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.GroupNorm):
                setattr(parent, name, nn.Identity())
    decoder.mid_block.attentions = nn.ModuleList([None])  # type: ignore[list-item]
    return policy


def test_a_local_decoder_in_tiles_differs_at_their_seams_alone(large):
    plain, tiled = local(large()), local(large(decoding="tiled"))
    latents = torch.randn(1, *plain.latent_shape)
    whole, parts = (policy.decode(latents).images_NHWC.int() for policy in (plain, tiled))
    # 32 rows: no neighbour of the first 4 lies beyond the first tile, which ends at 16 and is blended from 12 on
    assert (whole - parts)[:, :4, :4].abs().max() <= 1


@pytest.mark.parametrize("shorter", [5, 8, 16, 33, 64, 66, 90, 128, 160, 512])
@pytest.mark.parametrize("pixels", [2, 8, 16])
def test_the_overlap_of_tiles_is_a_whole_number_of_latents(shorter, pixels):
    side = tile_side(shorter, pixels)
    # as diffusers computes the steps from tile to tile, of latents and of pixels
    assert int(side * 0.75) * pixels == side * pixels - int(side * pixels * 0.25)
    assert side * pixels <= 512 and (side <= shorter / 2 or side == 4)


@pytest.mark.slow
def test_tiles_take_less_memory(tiny_sd3):
    whole, sliced, tiled = (
        sizes(ModelSettings(str(tiny_sd3), resolution=32, decoding=decoding), 1, 1, 4).decode_bytes
        for decoding in ("whole", "sliced", "tiled")
    )
    assert tiled < 0.6 * sliced < 0.3 * whole


def test_previews_in_tiles_choose_the_same_survivors_where_no_seam_is_rewarded(large, tiny_config):
    def corner(images: Any, prompts: Any) -> list[float]:
        return [float(np.asarray(image)[:4, :4].mean()) for image in images]

    def survivors(policy: Any) -> list[int]:
        sampling = sampling_from(tiny_config(), policy, "transitions", 0)
        plan = Plan(12, (PrunePoint(1, 6), PrunePoint(2, 4)))
        sampler = Sampler(policy, mixture_of_one(FunctionReward(corner)), sampling, plan)
        rolled = rollout(sampler, [Prompt("red cat")], torch.zeros(1, dtype=torch.int64), NoiseKey(0, 0), Meter())
        return rolled.trajectories.member_N.tolist()

    assert survivors(local(large(decoding="tiled"))) == survivors(local(large()))


@pytest.mark.parametrize("decoding", ["sliced", "tiled"])
def test_an_autoencoder_that_has_no_parts_is_refused(tiny_sd3, tiny_pipeline, decoding):
    pipeline = tiny_pipeline(tiny_sd3)
    pipeline.register_modules(vae=VQModel(latent_channels=4, norm_num_groups=4, block_out_channels=(8,)))
    settings = ModelSettings(max_sequence_length=8, resolution=16, decoding=decoding)
    with pytest.raises(ValueError, match=f"model.decoding: the VQModel of this model cannot decode {decoding}"):
        policy_from_pipeline(pipeline, settings)
