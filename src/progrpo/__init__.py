"""Pro-GRPO: online reinforcement learning of text-to-image models with pruning inside the sampling process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from progrpo.threads import set_wait_policy

if TYPE_CHECKING:
    from progrpo.training.library import train

__all__ = ["__version__", "train"]
__version__ = "0.1.0"

set_wait_policy(os.environ)


def __getattr__(name: str) -> object:
    """Import `progrpo.train` on its first use: importing progrpo imports no torch."""
    if name == "train":
        from progrpo.training.library import train

        return train
    raise AttributeError(f"module 'progrpo' has no attribute {name!r}")
