"""The protocol of backbones, which turn pictures and their prompts into the features that a head sees.

Dimension letters: N pictures, each with its prompt, and D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from progrpo.types import Prompt


@dataclass(frozen=True)
class Features:
    """The features of N pictures with their prompts, in blocks.

    A block's features have one penalty. A block is used where that helps beside the blocks before it, so the first
    ones should be few features that say much.
    """

    blocks: tuple[Tensor, ...]
    """Float32, (N, D) each."""
    prior_N: Tensor | None = None
    """The score from which a head starts, such as a CLIP's cosine: a feature without a penalty."""

    @classmethod
    def cat(cls, parts: Sequence[Features]) -> Features:
        blocks = tuple(torch.cat(block) for block in zip(*(part.blocks for part in parts), strict=True))
        priors = [part.prior_N for part in parts if part.prior_N is not None]
        return cls(blocks, torch.cat(priors) if priors else None)


class Backbone(Protocol):
    """A network, frozen or tuned, that turns pictures and prompts into features."""

    def features(self, pictures: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> Features:
        """Compute the features of uint8 pictures (H, W, 3), without gradients. ValueError for pictures that it cannot
        see.
        """
        ...

    def lora(self) -> Mapping[str, Tensor]:
        """The tensors of its LoRA; empty where it has none."""
        ...

    def load_lora(self, tensors: Mapping[str, Tensor]) -> None:
        """Add a LoRA. ValueError where the tensors are none of this network's."""
        ...
