"""What objectives share that need no trajectory: final latents are noised anew, and predictions compared with the truth.

The truth is what the model was pretrained on: a flow model's velocity, a diffusion model's noise, velocity or data. Only
the network's own output is trained here, without classifier-free guidance, whatever sampled the latents. A network that is
told its guidance is told what sampled them.
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
from progrpo.packing import of_update
from progrpo.policies.base import Policy
from progrpo.types import WHOLE_GROUP, Condition

_FIRST_STEP = -2  # of the noise keys: -1 is a trajectory's initial noise, steps from 0 on are the sampler's


@dataclass(frozen=True)
class Draws:
    """Times of D draws a trajectory: one in each D-th of the first `time_fraction` of the sampling grid, noisiest first.

    So times follow the model's own grid and shift. With `shared`, members of a group get the same times and noise.
    """

    count: int
    time_fraction: float
    shared: bool = False

    def places(self, normal_B: Tensor, draw_B: Tensor, num_steps: int) -> Tensor:
        """Places (B,) on the grid, in [0, num_steps], float64, from standard normal numbers."""
        uniform_B = torch.special.ndtr(normal_B.double())
        return (draw_B + uniform_B) / self.count * self.time_fraction * num_steps


@dataclass(frozen=True)
class Noised:
    """B items side by side: item i is draw i // N of trajectory i % N, x = alpha x0 + sigma eps.

    `target` is what the network is to say of x.
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
    def gather(cls, policy: Policy, experience: Experience, items_B: Tensor, draws: Draws) -> Noised:
        items_B = items_B.sort().values
        draw, rows = items_B // len(experience), items_B % len(experience)
        living, device = experience.trajectories, policy.device
        slot, member = living.slot_N[rows], living.member_N[rows]
        if draws.shared:
            member = torch.full_like(member, WHOLE_GROUP)
        x0 = living.x_NCHW[rows]
        normal, eps = torch.empty(len(rows)), torch.empty(x0.shape)
        for d in draw.unique().tolist():
            of_draw, step = draw == d, _FIRST_STEP - 2 * d
            normal[of_draw] = experience.noise.draw(slot[of_draw], member[of_draw], step, ())
            eps[of_draw] = experience.noise.draw(slot[of_draw], member[of_draw], step - 1, x0.shape[1:])
        eps = eps.to(x0)
        process = experience.process
        places = draws.places(normal, draw, process.num_steps)
        levels, prediction = policy.levels_between(process.levels_T1, places).to(x0), PREDICTIONS[process.prediction]
        return cls(
            rows=rows,
            draw=draw,
            x0=x0,
            x=prediction.mix(x0, eps, levels),
            target=prediction.target(x0, eps, levels),
            levels=levels,
            prediction=prediction,
            advantages=experience.advantages_N[rows].to(device),
            condition=experience.condition.take(living.group_N[rows].to(device)),
            guidance_scale=experience.guidance_scale if policy.embeds_guidance else 1.0,
        )

    def predict(self, policy: Policy) -> Tensor:
        """The network's outputs with the weights in force."""
        return policy.predict(self.x, self.levels.timestep, self.condition, self.guidance_scale)

    @torch.no_grad()
    def predict_with(self, policy: Policy, weights: str) -> Tensor:
        """The network's outputs with the weights of that name, without gradient."""
        with policy.weights(weights):
            return self.predict(policy)

    def error(self, output: Tensor) -> Tensor:
        """The pretraining loss of each item, mean over dims: (B,). Flow matching's (arXiv 2210.02747), or DDPM's (2006.11239)."""
        return mean_square(output - self.target)

    @property
    def velocity_weight(self) -> Tensor:
        """Of each item: times an error, the error of the velocity, in which constants of flow models are published; (B,)."""
        return self.prediction.velocity_weight(self.levels)

    def denoised(self, output: Tensor) -> Tensor:
        """The data that outputs point to."""
        return self.prediction.x0(self.x, output, self.levels)


@torch.no_grad()
def noted(
    policy: Policy, experience: Experience, draws: Draws, microbatch: int, note: Callable[[Noised], Tensor]
) -> Tensor:
    """`note` of every item, in microbatches as the update makes them: (N, D)."""
    items = len(experience) * draws.count
    values = torch.empty(items, dtype=experience.trajectories.x_NCHW.dtype)
    for items_B in of_update(items, microbatch, policy.compiled):
        values[items_B] = note(Noised.gather(policy, experience, items_B, draws)).to(values)
    return values.reshape(draws.count, len(experience)).T.contiguous()
