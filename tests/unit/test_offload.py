"""Parts that take turns on the device, and pictures that are decoded one at a time: less memory, the same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from progrpo.policies.load import policy_from_pipeline
from progrpo.policies.settings import ModelSettings
from progrpo.types import Prompt


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
    told = turns.encode([Prompt("red cat"), Prompt("blue dog")])
    network, encoders = "SD3Transformer2DModel", ["CLIPTextModelWithProjection"] * 2 + ["T5EncoderModel"]
    assert moves == [(network, "off"), *((name, "on") for name in encoders)]  # for both texts
    moves.clear()
    turns.release_text_encoders()
    assert moves == [*((name, "off") for name in encoders), (network, "on")]  # after the empty text was encoded
    found = turns.predict(x, at, told, 3.0)
    assert torch.equal(found, plain.predict(x, at, plain.encode([Prompt("red cat"), Prompt("blue dog")]), 3.0))
    found.square().mean().backward()
    with turns.weights("reference"):
        moves.clear()
        assert torch.equal(turns.predict(x, at, told), plain.predict(x, at, told)) and moves == []


@pytest.mark.parametrize("decoding", ["sliced", "tiled"])
def test_decoding_in_parts_gives_the_same_pictures(made, decoding):
    plain, parts = made(), made(decoding=decoding)
    sizes: list[int] = []
    parts.pipeline.vae.decoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    latents = torch.randn(3, *plain.latent_shape)
    difference = parts.decode(latents).images_NHWC.int() - plain.decode(latents).images_NHWC.int()
    assert sizes == [1, 1, 1] and difference.abs().max() <= 1
