"""The base of flow models whose transformer takes a patch of a latent as one token."""

from __future__ import annotations

import numpy as np
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from progrpo.policies.flow import FlowFamily
from progrpo.policies.geometry import Geometry

PATCH = 2
"""The rows and columns of a latent that are one token."""


def packed(x_BCHW: Tensor) -> Tensor:
    """Pack latents into tokens, row by row: (B, H W / 4, 4 C), a channel's four places side by side."""
    return pixel_unshuffle(x_BCHW, PATCH).flatten(2).transpose(1, 2)


def unpacked(tokens_BLD: Tensor, height: int, width: int) -> Tensor:
    """Unpack tokens of so many rows and columns into latents, (B, D / 4, 2 height, 2 width)."""
    return pixel_shuffle(tokens_BLD.transpose(1, 2).unflatten(2, (height, width)), PATCH)


class PackedFlowFamily(FlowFamily):
    """A flow model of packed latents, which are tokens within the network only."""

    def check(self) -> None:
        super().check()
        channels, expected = self.denoiser.config.in_channels, self.latent_channels * PATCH**2
        if channels != expected:
            raise ValueError(
                f"model.path: the transformer takes {channels} channels where tokens of latents have {expected}; use a"
                " model that takes text alone, not one for editing or control"
            )

    def geometry(self) -> Geometry:
        scale: int = self.pipeline.vae_scale_factor
        side = self.pipeline.default_sample_size * scale
        return Geometry(self.latent_channels, scale, (side, side), PATCH)

    def grid_options(self, num_inference_steps: int) -> dict[str, np.ndarray | float]:
        """A grid that is even from 1 to 1/T, and the `mu` of a scheduler that shifts by picture size."""
        height, width = self.latent_shape[1:]
        mu = self.grid_shift(height * width // PATCH**2, num_inference_steps)
        return {"sigmas": np.linspace(1.0, 1 / num_inference_steps, num_inference_steps), "mu": mu}

    def grid_shift(self, tokens: int, num_inference_steps: int) -> float:
        """The shift of a grid for pictures of so many tokens, which diffusers calls `mu`."""
        config = self.pipeline.scheduler.config
        shift: float = calculate_shift(
            tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        return shift
