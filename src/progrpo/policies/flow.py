"""What flow models in diffusers' format share: Euler's scheduler and its grid, and how latents are scaled."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from progrpo.diffusion.levels import Levels, between_flow_levels, flow_levels
from progrpo.policies.pipeline import PipelinePolicy

_NOT_HERE = {
    "stochastic_sampling": "draws noise at every step, where sampling.noise_level says how much a step draws",
    "invert_sigmas": "counts noise from data to noise",
}


class FlowPolicy(PipelinePolicy):
    """A pipeline whose transformer says a velocity, on the grid of a `FlowMatchEulerDiscreteScheduler`."""

    denoiser_name: ClassVar[str] = "transformer"
    prediction = "flow"

    @classmethod
    def _check(cls, pipeline: DiffusionPipeline) -> None:
        if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            kind = type(pipeline.scheduler).__name__
            raise ValueError(f"model.path: the scheduler is a {kind}; replace it by a FlowMatchEulerDiscreteScheduler")
        for setting, does in _NOT_HERE.items():
            if pipeline.scheduler.config[setting]:
                raise ValueError(
                    f"model.path: the scheduler has {setting}, which {does}; set it to false in scheduler/scheduler_config.json, or by"
                    f" pipeline.scheduler.register_to_config({setting}=False)"
                )

    @property
    def _num_train_timesteps(self) -> int:
        number: int = self._pipeline.scheduler.config.num_train_timesteps
        return number

    def levels(self, num_inference_steps: int, shift: float | None = None) -> Levels:
        scheduler = deepcopy(self._pipeline.scheduler)  # a set_shift() of its owner is in no configuration
        if shift is not None:
            changes = {"shift": shift, "use_dynamic_shifting": False}
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **changes)
        scheduler.set_timesteps(num_inference_steps, **self._grid(num_inference_steps))
        return flow_levels(scheduler.sigmas, self._num_train_timesteps)

    def _grid(self, num_inference_steps: int) -> dict[str, Any]:
        """What the family's pipeline tells the scheduler beside the number of steps."""
        return {}

    def levels_between(self, levels_T1: Levels, place_B: Tensor) -> Levels:
        return between_flow_levels(levels_T1, place_B, self._num_train_timesteps)

    def _unscaled(self, x0_BCHW: Tensor) -> Tensor:
        config = self._pipeline.vae.config
        latents: Tensor = x0_BCHW / config.scaling_factor + config.shift_factor
        return latents
