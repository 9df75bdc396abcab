"""Grids of flow models as diffusers makes them, and the built-in samplers and selectors by name."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from progrpo.rollout.prune import Selector
from progrpo.rollout.sampling import load_sampler
from progrpo.rollout.settings import SAMPLERS as NAMES
from progrpo.rollout.settings import SELECTORS as SELECTOR_NAMES
from progrpo.rollout.settings import PlanSettings

SAMPLERS = {name: load_sampler(name) for name in NAMES}
SELECTORS: dict[str, Selector] = {name: PlanSettings(selector=name).load_selector() for name in SELECTOR_NAMES}


def sigma_grid(num_inference_steps: int, shift: float = 1.0) -> torch.Tensor:
    """The T+1 sigmas of T steps, float32, from 1 to 0."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_inference_steps)
    sigmas: torch.Tensor = scheduler.sigmas
    return sigmas
