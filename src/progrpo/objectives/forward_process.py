"""What objectives share that need no trajectory: final latents are noised anew, and velocities compared with the truth.

Only the network's own velocity is trained here, without classifier-free guidance, whatever sampled the latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from progrpo.diffusion.gaussian import mean_square
from progrpo.objectives.base import Experience
from progrpo.policies.base import Policy
from progrpo.types import Condition

_FIRST_STEP = -2  # of the noise keys: -1 is a trajectory's initial noise, steps from 0 on are the sampler's
_WHOLE_GROUP = -1  # the member whose noise a group shares


@dataclass(frozen=True)
class Draws:
    """Times of D draws a trajectory: one in each D-th of the first `time_fraction` of the sampling grid, noisiest first.

    So times follow the model's own grid and shift. With `shared`, members of a group get the same times and noise.
    """

    count: int
    time_fraction: float
    shared: bool = False

    def times(self, normal_B: Tensor, draw_B: Tensor, sigmas_T1: Tensor) -> Tensor:
        """Noise levels (B,) from standard normal numbers: sigmas between the grid's, in proportion."""
        uniform_B = torch.special.ndtr(normal_B.double())
        place_B = (draw_B + uniform_B) / self.count * self.time_fraction * (len(sigmas_T1) - 1)
        below_B = place_B.long().clamp(max=len(sigmas_T1) - 2)
        sigmas = sigmas_T1.double()
        return torch.lerp(sigmas[below_B], sigmas[below_B + 1], place_B - below_B)


@dataclass(frozen=True)
class Noised:
    """B items side by side: item i is draw i // N of trajectory i % N, x = (1 - sigma) x0 + sigma eps."""

    rows: Tensor
    draw: Tensor
    x0: Tensor
    x: Tensor
    velocity: Tensor
    sigma: Tensor
    advantages: Tensor
    condition: Condition

    @classmethod
    def gather(cls, policy: Policy, experience: Experience, items_B: Tensor, draws: Draws) -> Noised:
        items_B = items_B.sort().values
        draw, rows = items_B // len(experience), items_B % len(experience)
        living, device = experience.trajectories, policy.device
        slot, member = living.slot_N[rows], living.member_N[rows]
        if draws.shared:
            member = torch.full_like(member, _WHOLE_GROUP)
        x0 = living.x_NCHW[rows]
        normal, eps = torch.empty(len(rows)), torch.empty(x0.shape)
        for d in draw.unique().tolist():
            of_draw, step = draw == d, _FIRST_STEP - 2 * d
            normal[of_draw] = experience.noise.draw(slot[of_draw], member[of_draw], step, ())
            eps[of_draw] = experience.noise.draw(slot[of_draw], member[of_draw], step - 1, x0.shape[1:])
        eps = eps.to(x0)
        sigma = draws.times(normal, draw, experience.sigmas_T1).to(x0)
        return cls(
            rows=rows,
            draw=draw,
            x0=x0,
            x=torch.lerp(x0, eps, sigma.reshape(-1, 1, 1, 1)),
            velocity=eps - x0,
            sigma=sigma,
            advantages=experience.advantages_N[rows].to(device),
            condition=experience.condition.take(living.group_N[rows].to(device)),
        )

    def predict(self, policy: Policy) -> Tensor:
        """Velocities of the weights in force."""
        return policy.predict(self.x, self.sigma, self.condition)

    @torch.no_grad()
    def predict_with(self, policy: Policy, weights: str) -> Tensor:
        """Velocities of the weights of that name, without gradient."""
        with policy.weights(weights):
            return self.predict(policy)

    def error(self, v: Tensor) -> Tensor:
        """The flow-matching loss of each item (arXiv 2210.02747), mean over dims: (B,)."""
        return mean_square(v - self.velocity)


@torch.no_grad()
def noted(
    policy: Policy, experience: Experience, draws: Draws, microbatch: int, note: Callable[[Noised], Tensor]
) -> Tensor:
    """`note` of every item, in microbatches as the update makes them: (N, D)."""
    items = torch.arange(len(experience) * draws.count)
    values = torch.empty(len(items), dtype=experience.trajectories.x_NCHW.dtype)
    for items_B in items.tensor_split(-(-len(items) // microbatch)) if len(items) else ():
        values[items_B] = note(Noised.gather(policy, experience, items_B, draws)).to(values)
    return values.reshape(draws.count, len(experience)).T.contiguous()
