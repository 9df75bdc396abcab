"""What flow models share whose transformer takes a patch of a latent as one token."""

from __future__ import annotations

from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from progrpo.policies.flow import FlowPolicy

PATCH = 2
"""Rows and columns of a latent that are one token."""


def packed(x_BCHW: Tensor) -> Tensor:
    """Latents as tokens, row by row: (B, H W / 4, 4 C), a channel's four places side by side."""
    return pixel_unshuffle(x_BCHW, PATCH).flatten(2).transpose(1, 2)


def unpacked(tokens_BLD: Tensor, height: int, width: int) -> Tensor:
    """Tokens of so many rows and columns as latents, (B, D / 4, 2 height, 2 width)."""
    return pixel_shuffle(tokens_BLD.transpose(1, 2).unflatten(2, (height, width)), PATCH)


class PackedFlowPolicy(FlowPolicy):
    """A flow model of packed latents: they are tokens within the network only."""

    @classmethod
    def _check(cls, pipeline: DiffusionPipeline) -> None:
        super()._check(pipeline)
        takes, tokens = pipeline.transformer.config.in_channels, cls._latent_channels(pipeline) * PATCH**2
        if takes != tokens:
            raise ValueError(
                f"model.path: the transformer takes {takes} channels where tokens of latents have {tokens}; use a model"
                " that takes text alone, not one for editing or control"
            )

    @classmethod
    def _patch(cls, pipeline: DiffusionPipeline) -> int:
        return PATCH

    @classmethod
    def _own_size(cls, pipeline: DiffusionPipeline) -> tuple[int, int]:
        side: int = pipeline.default_sample_size * cls._vae_scale(pipeline)
        return side, side

    def _grid(self, num_inference_steps: int) -> dict[str, Any]:
        """Even from 1 to 1/T; a scheduler that shifts by picture size is told `mu`."""
        height, width = self.latent_shape[1:]
        mu = self._mu(height * width // PATCH**2, num_inference_steps)
        return {"sigmas": np.linspace(1.0, 1 / num_inference_steps, num_inference_steps), "mu": mu}

    def _mu(self, tokens: int, num_inference_steps: int) -> float:
        """How far the grid of so many tokens is shifted."""
        config = self._pipeline.scheduler.config
        shift: float = calculate_shift(
            tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        return shift
