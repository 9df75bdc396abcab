"""Pictures become the latents that a pipeline's autoencoder gives, in the model's own scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.policies import noise


def pictures(policy, side: int = 16):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(2)]


def test_scaling_undoes_what_decoding_does_to_latents(policy):
    x0 = noise(policy)
    scaled = policy.family.scale(policy.family.unscale(x0))
    torch.testing.assert_close(scaled, x0, rtol=1e-5, atol=1e-5)


def test_the_latents_of_pictures_are_the_modes_of_the_autoencoders_posterior(policy):
    if len(policy.latent_shape) != 3:
        with pytest.raises(ValueError, match="a model of videos has no latents of single pictures"):
            policy.encode_pictures(pictures(policy))
        return
    vae, images = policy.pipeline.vae, pictures(policy)
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).movedim(-1, 1) / 127.5 - 1
    latents = policy.encode_pictures(images)
    assert latents.shape == (2, *policy.latent_shape) and latents.dtype == torch.float32
    unscaled = policy.family.unscale(latents)
    pixels = pixels.unsqueeze(2) if unscaled.ndim == 5 else pixels
    with torch.no_grad():
        expected = vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float()
    torch.testing.assert_close(unscaled, expected.reshape(unscaled.shape), rtol=1e-4, atol=1e-4)


def test_a_picture_of_another_size_covers_the_models_size_and_is_cropped_at_its_middle(policy):
    if len(policy.latent_shape) != 3:
        return
    middle = pictures(policy)[0]
    wide = Image.new("RGB", (48, 16), "red")
    wide.paste(middle, (16, 0))
    torch.testing.assert_close(policy.encode_pictures([wide]), policy.encode_pictures([middle]))
