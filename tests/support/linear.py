"""A policy of two weights in float64, and transitions of it: objectives and updates can be computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch


class LinearPolicy:
    """v = a x + b c in float64, c being the prompt's number: all that objectives and updates ask of a policy."""

    prediction = "flow"
    embeds_guidance = False
    compiled = compiled_decoder = False
    batch_invariant = True
    drain_peer_calls = None
    latent_shape = (1, 2, 2)
    device = torch.device("cpu")

    def __init__(self, a: float, b: float) -> None:
        from progrpo.policies.weights import NamedWeights

        self.a, self.b = (torch.nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (a, b))
        self.trainable = {"a": self.a, "b": self.b}
        self.named_weights = NamedWeights(self.trainable)

    def predict(self, x_BCHW: Any, timestep: Any, condition: Any, guidance_scale: float = 1.0) -> Any:
        """The empty prompt's number is 0, so guidance scales c."""
        return self.a * x_BCHW + guidance_scale * self.b * condition.tensors["c"].reshape(-1, 1, 1, 1)

    def levels_between(self, levels_T1: Any, place_B: Any) -> Any:
        from progrpo.diffusion.levels import between_flow_levels

        return between_flow_levels(levels_T1, place_B)

    def weights(self, name: str) -> AbstractContextManager[None]:
        return self.named_weights.swapped(name)


class LinearDiffusionPolicy(LinearPolicy):
    """A diffusion model of ten levels of noise, on an uneven grid of 3 steps that ends before clean data.

    A hundredth of the timestep is added to its output, so that a wrong one would show.
    """

    signal = torch.tensor([0.98, 0.95, 0.9, 0.82, 0.71, 0.58, 0.44, 0.3, 0.18, 0.08], dtype=torch.float64)

    def __init__(self, a: float, b: float, prediction: str) -> None:
        super().__init__(a, b)
        self.prediction = prediction

    def predict(self, x_BCHW: Any, timestep: Any, condition: Any, guidance_scale: float = 1.0) -> Any:
        return super().predict(x_BCHW, timestep, condition, guidance_scale) + timestep.reshape(-1, 1, 1, 1) / 100

    def process(self, sampler: str, noise_level: float) -> Any:
        from progrpo.diffusion.levels import diffusion_levels
        from progrpo.diffusion.process import Process
        from tests.support.grids import SAMPLERS

        levels = diffusion_levels(torch.tensor([9, 5, 2]), self.signal, torch.tensor(0.99, dtype=torch.float64))
        return Process(self.prediction, SAMPLERS[sampler], levels, (noise_level,) * 3)

    def levels_between(self, levels_T1: Any, place_B: Any) -> Any:
        from progrpo.diffusion.levels import between_diffusion_levels

        return between_diffusion_levels(levels_T1, place_B, self.signal)


def linear_experience(
    policy: Any,
    advantages: Sequence[float],
    off: float = 0.0,
    guidance_scale: float = 1.0,
    process: Any = None,
    steps: Sequence[int] = (0, 1),
) -> Any:
    """Transitions of the linear policy's shape on a grid of 3 steps, drawn anywhere: 2 groups, of 3 and 2 members.

    Their log-probs are those of `policy`, give or take `off`. The process is Flow-GRPO's if no other is given.
    """
    from progrpo.diffusion.levels import flow_levels
    from progrpo.diffusion.process import Process
    from progrpo.objectives.base import Experience
    from progrpo.rollout.noise import NoiseKey
    from progrpo.types import Condition, Trajectories, Transition
    from tests.support.grids import SAMPLERS

    if process is None:
        flow = flow_levels(torch.tensor([1.0, 0.8, 0.5, 0.0], dtype=torch.float64))
        process = Process("flow", SAMPLERS["flow_grpo"], flow, (0.7, 0.7, 0.7))
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    group, slot = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 5, 5])
    condition = Condition({"c": torch.tensor([1.0, -2.0], dtype=torch.float64)})
    path = []
    for step in steps:
        x = draw(5, 1, 2, 2)
        with torch.no_grad():
            output = policy.predict(x, process.timestep(step, x), condition.take(group), guidance_scale)
        mean, std = process.mean_std(step, x, output)
        x_next = mean + std * draw(*x.shape)
        path.append(Transition(step, x, x_next, process.log_prob(x_next, mean, std) + off * draw(5), mean))
    living = Trajectories(group, slot, torch.tensor([0, 2, 3, 0, 1]), draw(5, 1, 2, 2), None, tuple(path))
    advantages_N = torch.tensor(advantages, dtype=torch.float64)
    return Experience(living, advantages_N, condition, process, NoiseKey(3, 1), guidance_scale)


def linear_transitions(policy: Any, *args: Any, **named: Any) -> Any:
    """The same as GRPO has it before the first of two updates: the old log-probs are those that were stored."""
    from progrpo.objectives.grpo import GRPO
    from progrpo.objectives.settings import GRPOSettings

    return GRPO(GRPOSettings(clip_range=0.05)).prepare(policy, linear_experience(policy, *args, **named), 64, 2)


@torch.no_grad()
def shift(policy: LinearPolicy, a: float = 0.0, b: float = 0.0) -> None:
    """Add to the policy's weights."""
    policy.a.add_(a)
    policy.b.add_(b)


def numbers(policy: LinearPolicy, weights: str = "current") -> tuple[float, float]:
    """The two weights of that name."""
    with policy.weights(weights):
        return policy.a.item(), policy.b.item()
