"""Models that edit: the source picture beside the noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from progrpo.types import Prompt
from tests.support.policies import (
    PROMPTS,
    SOURCES,
    load,
    noise,
    untouched_pipeline,
)


def test_a_model_that_edits_takes_the_source_beside_the_noise_and_not_in_its_prompt(tiny_kontext):
    policy, calls = load(tiny_kontext, "lora"), []
    policy.denoiser.register_forward_pre_hook(lambda m, a, k: calls.append(k), with_kwargs=True)
    one, other = (policy.encode([Prompt("red cat", prompt.columns)]) for prompt in PROMPTS)
    assert torch.equal(one.tensors["prompt_embeds"], other.tensors["prompt_embeds"])
    x = noise(policy, 1)
    v = [policy.predict(x, torch.tensor(600.0), condition) for condition in (one, other)]
    assert v[0].shape == x.shape and (v[0] - v[1]).abs().max() > 1e-2
    assert calls[0]["hidden_states"].shape == (1, 2 * 16, 16)
    assert calls[0]["img_ids"][:, 0].tolist() == [0.0] * 16 + [1.0] * 16
    assert torch.equal(calls[0]["img_ids"][:16, 1:], calls[0]["img_ids"][16:, 1:])


def test_a_source_is_encoded_once_as_its_pipeline_does(tiny_kontext, tmp_path):
    policy, pipeline, encoded = load(tiny_kontext, "lora"), untouched_pipeline(tiny_kontext), []
    policy.pipeline.vae.encoder.register_forward_hook(lambda *args: encoded.append(1))
    SOURCES[0].save(tmp_path / "source.png")
    path = str(tmp_path / "source.png")
    asked = [Prompt("red cat", {"image": path}), Prompt("blue dog", {"image": path}), PROMPTS[0]]
    rows = policy.encode(asked).tensors["image_latents"]
    assert len(encoded) == 2 and torch.equal(rows[0], rows[1])  # by its path, and by its pixels
    (tmp_path / "source.png").unlink()
    assert torch.equal(policy.encode(asked).tensors["image_latents"], rows) and len(encoded) == 2
    pixels = pipeline.image_processor.preprocess(SOURCES[0], 16, 16, "crop")
    expected = pipeline._encode_vae_image(pixels, None)
    for row in (rows[0], rows[2]):
        torch.testing.assert_close(row[None], expected, rtol=0, atol=1e-6)


def test_a_source_of_another_shape_covers_the_size_that_is_sampled_and_is_cropped_at_its_middle(tiny_kontext):
    middle = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
    edge = np.zeros((16, 8, 3), np.uint8)
    wide = np.concatenate([edge, middle, edge], axis=1)
    tall = np.concatenate([edge.reshape(4, 32, 3), middle, edge.reshape(4, 32, 3)])
    large = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 96, 3), np.uint8))
    reduced = large.resize((48, 16), Image.Resampling.LANCZOS).crop((8, 0, 40, 16))
    policy = load(tiny_kontext, "lora", resolution=(16, 32))
    sources = [*map(Image.fromarray, (middle, wide, tall)), large, reduced]
    rows = policy.encode([Prompt("red cat", {"image": source}) for source in sources]).tensors["image_latents"]
    assert rows.shape == (5, *policy.latent_shape)
    assert torch.equal(rows[1], rows[0]) and torch.equal(rows[2], rows[0])
    assert torch.equal(rows[3], rows[4])


def test_a_prompt_without_a_source_is_named(tiny_kontext):
    policy = load(tiny_kontext, "lora")
    for columns, message in (
        ({}, r"the prompt 'red cat' has no column image: this model changes a picture"),
        ({"image": 3}, r"column image of the prompt 'red cat' must be a picture or the path of one, not 3"),
        ({"image": "none.png"}, r"column image of the prompt 'red cat': none\.png cannot be read .*: no such file"),
        ({"image": b"text"}, r"column image of the prompt 'red cat': its content cannot be read as a picture"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.encode([Prompt("red cat", columns)])
