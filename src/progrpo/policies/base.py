"""What a policy is: a denoiser that can be told a prompt, stepped, decoded, trained and saved. Nothing here runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from progrpo.policies.weights import NamedWeights
from progrpo.types import Condition


class Policy(Protocol):
    """A text-to-image flow model whose denoiser is trained; one file per model family implements it.

    Everything outside the denoiser is frozen, and there is no dropout anywhere: the same inputs give the same velocity
    in sampling and in training.
    """

    latent_shape: tuple[int, int, int]
    """(C, H, W) of one latent."""
    device: torch.device
    trainable: Mapping[str, Parameter]
    """The parameters that the optimizer may change, by their name in the denoiser."""
    named_weights: NamedWeights
    """Copies of the trainable weights: `reference` from the start; the trainer adds `old` or `ema` if it needs them."""

    def sigmas(self, num_inference_steps: int, shift: float | None = None) -> Tensor:
        """The model's own time grid, float32 (T+1,) on the CPU, falling to 0; `shift` replaces the model's own."""
        ...

    def encode(self, texts: Sequence[str]) -> Condition:
        """One row a text, on the policy's device. ValueError for a new text after `release_text_encoders`."""
        ...

    def release_text_encoders(self) -> None:
        """Free the text encoders; texts that were encoded before can still be asked for."""
        ...

    def predict(self, x_BCHW: Tensor, sigma: Tensor, condition: Condition, guidance_scale: float = 1.0) -> Tensor:
        """The velocity dx/dsigma at x, float32 (B, C, H, W); x0 is x - sigma v.

        `sigma` is () or (B,), row b of `condition` belongs to row b of x. A `guidance_scale` w other than 1 is
        classifier-free guidance, v_u + w (v_c - v_u), with gradients through both branches and twice the cost.
        """
        ...

    def decode(self, x0_BCHW: Tensor) -> Tensor:
        """Pictures, uint8 (B, H, W, 3) on the CPU, without gradient."""
        ...

    def weights(self, name: str) -> AbstractContextManager[None]:
        """Run the block with the weights of that name: `current`, or one of `named_weights`."""
        ...

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        """The denoiser's tensors that training must not move, with their names."""
        ...

    def save(self, folder: Path, weights: str = "current") -> None:
        """Write what was trained in a format that diffusers loads without progrpo."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Current and named weights. The frozen ones are not in it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
