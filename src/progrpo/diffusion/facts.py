"""The facts of a stochastic step that settings check, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepFacts:
    """The facts of a stochastic step.

    With `flow_only` it is an SDE of flow models and has a diffusion rate. A step of more noise than `max_noise_level`
    does not exist. Without `has_density` its log-prob is a stand-in for a density.
    """

    flow_only: bool = False
    max_noise_level: float = math.inf
    has_density: bool = True


SDE = StepFacts(flow_only=True)
PRESERVING = StepFacts(max_noise_level=1.0)
REDUCED = StepFacts(max_noise_level=1.0, has_density=False)
