"""Encoding: pictures become latents, by the model's autoencoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from progrpo.policies.family import ModelFamily


@torch.no_grad()
def latents_of(family: ModelFamily, pictures: Sequence[Image.Image]) -> Tensor:
    """The latents of RGB pictures, float32 (N, *latent_shape) on the model's device: the modes of their posteriors.

    A picture is resized until it covers the model's size and cropped at its middle. ValueError for a model of videos.
    """
    if len(family.latent_shape) != 3:
        raise ValueError("a model of videos has no latents of single pictures; take a model of pictures")
    vae, (height, width) = family.pipeline.vae, family.size
    fitted = [np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)) for picture in pictures]
    pixels_BCHW = torch.as_tensor(np.stack(fitted)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    as_video = family.unscale(pixels_BCHW.new_zeros(1, *family.latent_shape)).ndim == 5
    if as_video:  # the autoencoder takes a picture as a video of one frame
        pixels_BCHW = pixels_BCHW.unsqueeze(2)
    latents_BCHW = vae.encode(pixels_BCHW.to(family.device, family.loaded_vae_dtype)).latent_dist.mode().float()
    return family.scale(latents_BCHW)
