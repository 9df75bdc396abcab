"""T steps from noise to data: the levels that they pass, the meaning of the network's output, and how noise enters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from progrpo.diffusion.levels import Levels, end_of, stacked
from progrpo.diffusion.prediction import PREDICTIONS, Prediction
from progrpo.diffusion.samplers import StochasticStep


@dataclass(frozen=True)
class Process:
    """T steps: their levels, a parametrisation by its name, and a stochastic step with a noise level for each of T.

    A noise level of 0 is the deterministic step.
    `prediction` is a name of `PREDICTIONS`. A `step` below is an int, or an int64 (B,) tensor on
    the CPU with one for each row of x. Steps are computed in the dtype of x.
    """

    prediction: str
    sampler: StochasticStep
    levels_T1: Levels
    noise_levels: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.levels_T1) == len(self.noise_levels) + 1
        assert self.prediction == "flow" or not self.sampler.flow_only, "an SDE of flow models"

    @property
    def num_steps(self) -> int:
        return len(self.noise_levels)

    @property
    def _prediction(self) -> Prediction:
        return PREDICTIONS[self.prediction]

    @cached_property
    def scales_T(self) -> Tensor:
        """The diffusion rate (of an SDE) or std (of others) of each step; 0 where it is deterministic."""
        scales = {level: self._scale(level) for level in set(self.noise_levels) if level > 0}
        nothing = torch.zeros_like(self.levels_T1.sigma[0])
        return torch.stack([scales[a][step] if a > 0 else nothing for step, a in enumerate(self.noise_levels)])

    def _scale(self, noise_level: float) -> Tensor:
        grid = self.levels_T1
        if grid.ends is None:
            return self.sampler.scale(grid, noise_level)
        steps = [stacked(grid[step], end_of(grid, step)) for step in range(self.num_steps)]
        return torch.cat([self.sampler.scale(step, noise_level) for step in steps])

    @property
    def lengths_T(self) -> Tensor:
        """The length of each step, in units of the whole range of timesteps."""
        timestep = self.levels_T1.timestep
        return (timestep[:-1] - timestep[1:]) / timestep[0]

    @property
    def stds_T(self) -> Tensor:
        """The std of each step's fresh noise."""
        if not self.sampler.flow_only:
            return self.scales_T
        sigma = self.levels_T1.sigma
        return self.scales_T * (sigma[:-1] - sigma[1:]).sqrt()

    def timestep(self, step: int | Tensor, x: Tensor) -> Tensor:
        """The network's timestep at a step, () or (B,)."""
        return self.levels_T1.timestep[step].to(x)

    def x0(self, step: int | Tensor, x: Tensor, output: Tensor) -> Tensor:
        """The data that the output at x points to: the one-step projection that previews decode."""
        return self._prediction.x0(x, output, self.levels_T1[step].to(x))

    def deterministic(self, step: int | Tensor, x: Tensor, output: Tensor) -> Tensor:
        """The x_next without fresh noise."""
        return self._prediction.step(x, output, self.levels_T1[step].to(x), end_of(self.levels_T1, step).to(x))

    def mean_std(self, step: int | Tensor, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """The Gaussian of x_next: mean in x's shape and std of shape () or (B, 1, ...)."""
        at, after = self.levels_T1[step].to(x), end_of(self.levels_T1, step).to(x)
        return self.sampler.mean_std(self._prediction, x, output, at, after, self.scales_T[step].to(x))

    def log_prob(self, x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """The log-prob of x_next under that Gaussian, mean over dims: (B,), as of `diffusion.gaussian.log_prob`."""
        return self.sampler.log_prob(x_next, mean, std)
