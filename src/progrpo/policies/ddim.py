"""The base of diffusion models in diffusers' format: DDIM's grid on the noise schedule of the pipeline's scheduler."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from progrpo.diffusion.levels import Levels, between_diffusion_levels, diffusion_levels
from progrpo.diffusion.prediction import PREDICTIONS
from progrpo.policies.family import GRIDS, ModelFamily, unused_settings


class DiffusionFamily(ModelFamily):
    """A pipeline whose network was trained on a schedule of betas.

    It is sampled on DDIM's grid, with the noise schedule, prediction type and spacing of the pipeline's own scheduler.
    Steps end where those of diffusers' DDIM do, or (`step_ends` next) where the next ones begin.
    """

    @cached_property
    def scheduler(self) -> DDIMScheduler:
        """The pipeline's noise as DDIM's scheduler. Latents are never clipped: they are no pictures."""
        # the list of what was left to a scheduler's own defaults, which diffusers would have DDIM replace by its own
        own = {name: value for name, value in self.pipeline.scheduler.config.items() if name != "_use_default_values"}
        return DDIMScheduler.from_config(own, clip_sample=False, thresholding=False)

    @property
    def prediction(self) -> str:
        prediction: str = self.scheduler.config.prediction_type
        return prediction

    def check_noise(self) -> None:
        """ValueError for a scheduler whose noise DDIM has no steps for."""
        own = self.pipeline.scheduler.config
        if "beta_schedule" not in own or own.prediction_type not in PREDICTIONS:
            raise ValueError(
                f"model.path: the scheduler is a {type(self.pipeline.scheduler).__name__}, for whose noise DDIM has no"
                " steps; use a model that says epsilon, v_prediction or sample on a schedule of betas"
            )
        if self.prediction == "epsilon" and self.scheduler.alphas_cumprod[-1] == 0:
            raise ValueError(
                "model.path: a model that predicts noise has nothing to say of pure noise; set the scheduler's"
                " rescale_betas_zero_snr to false"
            )

    def ignored(self) -> str:
        names = (*GRIDS, "clip_sample", "thresholding")
        return unused_settings(
            self.pipeline.scheduler, names, "steps are DDIM's, on its spacing's grid, and latents are not clipped"
        )

    def levels(self, num_inference_steps: int, shift: float | None = None) -> Levels:
        if shift is not None:
            raise ValueError("sampling.shift: this is a diffusion model, whose grid has no shift; leave it empty")
        scheduler, count = self.scheduler, self.scheduler.config.num_train_timesteps
        if num_inference_steps > count:
            raise ValueError(
                f"sampling.num_inference_steps: {num_inference_steps} is more than the {count} timesteps of the model"
            )
        scheduler.set_timesteps(num_inference_steps)
        timesteps = scheduler.timesteps[:num_inference_steps]  # the rounding of some trailing grids gives one too many
        if timesteps[0] >= count:  # as many steps as timesteps, on a grid that is offset by one
            raise ValueError(
                f"sampling.num_inference_steps: {num_inference_steps} steps begin beyond the {count} timesteps of the"
                " model; use fewer"
            )
        end_T = timesteps - count // num_inference_steps  # as in DDIMScheduler.step
        alphas = scheduler.alphas_cumprod
        signal_T = torch.where(end_T >= 0, alphas[end_T.clamp(min=0)], scheduler.final_alpha_cumprod)
        levels = diffusion_levels(timesteps, alphas, signal_T[-1])
        if self.settings.step_ends == "next" or torch.equal(end_T[:-1], timesteps[1:]):
            return levels
        ends = Levels(signal_T.sqrt(), (1 - signal_T).sqrt(), end_T.clamp(min=0).to(signal_T.dtype))
        return replace(levels, ends=ends)

    def levels_between(self, levels_T1: Levels, place_B: Tensor) -> Levels:
        return between_diffusion_levels(levels_T1, place_B, self.scheduler.alphas_cumprod)
