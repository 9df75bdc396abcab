"""The base of flow models in diffusers' format: Euler's scheduler and its grid, and how latents are scaled."""

from __future__ import annotations

from copy import deepcopy
from typing import ClassVar

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from progrpo.diffusion.levels import Levels, between_flow_levels, flow_levels
from progrpo.policies.family import ModelFamily

_UNSUPPORTED = {
    "stochastic_sampling": "draws noise at every step, where sampling.noise_level says how much a step draws",
    "invert_sigmas": "counts noise from data to noise",
}


class FlowFamily(ModelFamily):
    """A pipeline whose transformer predicts a velocity, on the grid of a `FlowMatchEulerDiscreteScheduler`."""

    denoiser_name: ClassVar[str] = "transformer"

    @property
    def prediction(self) -> str:
        return "flow"

    def check(self) -> None:
        scheduler = self.pipeline.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            kind = type(scheduler).__name__
            raise ValueError(f"model.path: the scheduler is a {kind}; replace it by a FlowMatchEulerDiscreteScheduler")
        for setting, effect in _UNSUPPORTED.items():
            if scheduler.config[setting]:
                raise ValueError(
                    f"model.path: the scheduler has {setting}, which {effect}; set it to false in"
                    f" scheduler/scheduler_config.json, or by pipeline.scheduler.register_to_config({setting}=False)"
                )

    def levels(self, num_inference_steps: int, shift: float | None = None) -> Levels:
        return flow_levels(self.scheduler_at(num_inference_steps, shift).sigmas, self._num_train_timesteps)

    def scheduler_at(self, num_inference_steps: int, shift: float | None) -> FlowMatchEulerDiscreteScheduler:
        """The scheduler with its grid laid."""
        scheduler = deepcopy(self.pipeline.scheduler)  # a set_shift() of its owner is in no configuration
        if shift is not None:
            changes = {"shift": shift, "use_dynamic_shifting": False}
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **changes)
        scheduler.set_timesteps(num_inference_steps, **self.grid_options(num_inference_steps))
        return scheduler

    def grid_options(self, num_inference_steps: int) -> dict[str, np.ndarray | float]:
        """The options that the pipeline gives its scheduler's `set_timesteps` beside the number of steps."""
        return {}

    def levels_between(self, levels_T1: Levels, place_B: Tensor) -> Levels:
        return between_flow_levels(levels_T1, place_B, self._num_train_timesteps)

    @property
    def _num_train_timesteps(self) -> int:
        number: int = self.pipeline.scheduler.config.num_train_timesteps
        return number

    def unscale(self, x0_BCHW: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        latents: Tensor = x0_BCHW / config.scaling_factor + config.shift_factor
        return latents
