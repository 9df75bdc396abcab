"""Sizes of pictures and lengths of videos."""

from __future__ import annotations

import pytest

from tests.support.policies import (
    load,
    noise,
)


@pytest.mark.parametrize("model", ["tiny_sd3", "tiny_flux", "tiny_flux2_klein", "tiny_qwen_image"])
def test_resolution_sets_the_latent_and_must_fit(request, model):
    folder = request.getfixturevalue(model)
    policy = load(folder, "lora", resolution=8)
    assert policy.latent_shape == (4, 4, 4)
    assert policy.decode(noise(policy, 1)).images_NHWC.shape == (1, 8, 8, 3)
    for resolution, message in (
        (10, r"10 is not a multiple of 4; 8 or 12 would do"),
        (2, r"2 is not a multiple of 4; 4 would do"),
        ((8, 10), r"8 10 \(height and width\) are not both multiples of 4; 8 8 or 8 12 would do"),
        ((3, 9), r"3 9 \(height and width\) are not both multiples of 4; 4 8 or 4 12 would do"),
    ):
        with pytest.raises(ValueError, match=rf"^model\.resolution: {message}$"):
            load(folder, "lora", resolution=resolution)


def test_a_size_beyond_the_embedding_of_places_is_refused(tiny_sd3):
    assert load(tiny_sd3, "lora", resolution=(8, 32)).latent_shape == (4, 4, 16)
    with pytest.raises(
        ValueError, match=r"^model\.resolution: 36 is more than 32 pixels a side, .* leave it empty for .* own size$"
    ):
        load(tiny_sd3, "lora", resolution=(8, 36))


@pytest.mark.parametrize(
    ("model", "side"), [("tiny_sd3", 8), ("tiny_sdxl", 8), ("tiny_flux", 128), ("tiny_qwen_image", 128)]
)
def test_without_a_resolution_it_is_the_models_own(request, model, side):
    assert load(request.getfixturevalue(model), "lora", resolution=None).latent_shape == (4, side, side)


def test_videos_are_decoded_one_at_a_time(tiny_wan):
    policy, rows = load(tiny_wan, "lora"), []
    policy.pipeline.vae.decoder.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    assert len(policy.decode(noise(policy, 3)).images_NHWC) == 3
    assert rows == [1] * 3 * 2  # and a latent's frame at a time


def test_frames_set_the_length_of_a_video_and_must_fit(tiny_wan, tiny_sd3):
    for frames, latents in ((1, 1), (7, 4)):
        policy = load(tiny_wan, "lora", resolution=8, frames=frames)
        assert policy.latent_shape == (4, latents, 4, 4)
        assert policy.decode(noise(policy, 2)).images_NHWC.shape == (2, frames, 8, 8, 3)
    assert load(tiny_wan, "lora", resolution=None, frames=None).latent_shape == (4, 41, 240, 416)
    with pytest.raises(ValueError, match=r"^model\.frames: 8 is not one more than a multiple of 2; .* 7 and 9$"):
        load(tiny_wan, "lora", frames=8)
    with pytest.raises(ValueError, match=r"^model\.frames: this model makes pictures, not videos; leave it empty$"):
        load(tiny_sd3, "lora", frames=9)
