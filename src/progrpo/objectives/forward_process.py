"""The forward process, for objectives without trajectories: final latents are noised anew.

The network predicts the target of pretraining: a flow model's velocity, a diffusion model's noise, velocity or data.
Only the network's own output is trained here, without classifier-free guidance, whatever guidance sampled the latents.
A network with embedded guidance gets the guidance scale of sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from progrpo.diffusion.gaussian import mean_square
from progrpo.diffusion.levels import Levels
from progrpo.diffusion.prediction import PREDICTIONS, Prediction
from progrpo.objectives.base import Experience
from progrpo.packing import update_batches
from progrpo.policies.base import Policy
from progrpo.types import WHOLE_GROUP, Condition

_MIN_SIZE = 1e-5  # the least value that an error is divided by when it normalises itself
_FIRST_STEP = -2  # of the noise keys: -1 is a trajectory's initial noise, steps from 0 on are the sampler's


@dataclass(frozen=True)
class Draws:
    """D noise levels per trajectory: one in each D-th of the first `time_fraction` of the sampling grid, noisiest
    first.

    Levels therefore follow the model's own grid and shift. With `shared`, the members of a group get the same levels
    and noise.
    """

    count: int
    time_fraction: float
    shared: bool = False

    def places(self, normal_B: Tensor, draw_B: Tensor, num_steps: int) -> Tensor:
        """Places (B,) on the grid, in [0, num_steps], float64, from standard normal numbers."""
        uniform_B = torch.special.ndtr(normal_B.double())
        return (draw_B + uniform_B) / self.count * self.time_fraction * num_steps


@dataclass(frozen=True)
class NoisedLatents:
    """B noised items, x = alpha x0 + sigma eps: item i is draw i // N of trajectory i % N.

    `target` is what the network is to predict at x.
    """

    rows: Tensor
    draw: Tensor
    x0: Tensor
    x: Tensor
    target: Tensor
    levels: Levels
    prediction: Prediction
    advantages: Tensor
    condition: Condition
    guidance_scale: float

    @classmethod
    def gather(cls, policy: Policy, experience: Experience, items_B: Tensor, draws: Draws) -> NoisedLatents:
        """Noise the final latents of the items, at the levels and with the noise that belong to each."""
        items_B = items_B.sort().values
        draw = items_B // len(experience)
        rows = items_B % len(experience)
        trajectories = experience.trajectories
        slot = trajectories.slot_N[rows]
        member = trajectories.member_N[rows]
        if draws.shared:
            member = torch.full_like(member, WHOLE_GROUP)
        x0 = trajectories.x_NCHW[rows]
        normal = torch.empty(len(rows))
        eps = torch.empty(x0.shape)
        for d in draw.unique().tolist():
            own = draw == d
            step = _FIRST_STEP - 2 * d
            normal[own] = experience.noise.draw(slot[own], member[own], step, ())
            eps[own] = experience.noise.draw(slot[own], member[own], step - 1, x0.shape[1:])
        eps = eps.to(x0)
        process = experience.process
        places = draws.places(normal, draw, process.num_steps)
        levels = policy.levels_between(process.levels_T1, places).to(x0)
        prediction = PREDICTIONS[process.prediction]
        return cls(
            rows=rows,
            draw=draw,
            x0=x0,
            x=prediction.mix(x0, eps, levels),
            target=prediction.target(x0, eps, levels),
            levels=levels,
            prediction=prediction,
            advantages=experience.advantages_N[rows].to(policy.device),
            condition=experience.condition.take(trajectories.group_N[rows].to(policy.device)),
            guidance_scale=experience.guidance_scale if policy.embeds_guidance else 1.0,
        )

    def predict(self, policy: Policy) -> Tensor:
        """The network's outputs with the active weights."""
        return policy.predict(self.x, self.levels.timestep, self.condition, self.guidance_scale)

    @torch.no_grad()
    def predict_with(self, policy: Policy, weights: str) -> Tensor:
        """The network's outputs with the weights of that name, without gradient."""
        with policy.weights(weights):
            return self.predict(policy)

    def error(self, output: Tensor) -> Tensor:
        """The pretraining loss of each item, mean over dims: (B,).

        Sources: flow matching (arXiv 2210.02747), DDPM (arXiv 2006.11239).
        """
        return mean_square(output - self.target)

    def normalised_error(self, output: Tensor) -> Tensor:
        """The mean square error (B,) of the predicted x0 over its own mean absolute value, which is held constant.

        Source: DiffusionNFT (arXiv 2509.16117).
        """
        difference = self.denoised(output) - self.x0
        size_B = difference.detach().abs().flatten(1).mean(1).clamp(min=_MIN_SIZE)
        return mean_square(difference) / size_B

    @property
    def velocity_weight(self) -> Tensor:
        """The factor (B,) that turns an item's error into the error of its velocity.

        Constants of flow models are published in units of the latter.
        """
        return self.prediction.velocity_weight(self.levels)

    def denoised(self, output: Tensor) -> Tensor:
        """The data x0 that outputs predict."""
        return self.prediction.x0(self.x, output, self.levels)


@torch.no_grad()
def evaluate_items(
    policy: Policy, experience: Experience, draws: Draws, microbatch: int, evaluate: Callable[[NoisedLatents], Tensor]
) -> Tensor:
    """The values of `evaluate` for all items, in the microbatches of the update: (N, D)."""
    items = len(experience) * draws.count
    values = torch.empty(items, dtype=experience.trajectories.x_NCHW.dtype)
    for items_B in update_batches(items, microbatch, policy.compiled):
        values[items_B] = evaluate(NoisedLatents.gather(policy, experience, items_B, draws)).to(values)
    return values.reshape(draws.count, len(experience)).T.contiguous()
