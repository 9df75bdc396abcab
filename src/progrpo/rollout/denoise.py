"""The only denoising loop. Sampling, training rollouts, audits and evaluation differ in what they do between steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from progrpo.diffusion.flow import flow_grpo_rate, ode_step, sde_mean_std
from progrpo.diffusion.gaussian import log_prob
from progrpo.policies.base import Policy
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import INITIAL, NoiseKey
from progrpo.types import Condition, Trajectories, Transition


@dataclass(frozen=True)
class Sampling:
    """How to denoise. `noise_levels` has one entry a step: 0 is the ODE, above 0 Flow-GRPO's SDE of that level.

    Transitions of `stored_steps` are kept with their log-probs, and with `stored_means` their means; only stochastic
    steps have them.
    """

    sigmas_T1: Tensor
    noise_levels: tuple[float, ...]
    stored_steps: frozenset[int] = frozenset()
    stored_means: bool = False
    guidance_scale: float = 1.0
    microbatch: int = 64

    def __post_init__(self) -> None:
        assert len(self.sigmas_T1) == len(self.noise_levels) + 1
        assert all(self.noise_levels[step] > 0 for step in self.stored_steps), "an ODE step has no log-prob"

    @property
    def num_inference_steps(self) -> int:
        return len(self.noise_levels)

    @property
    def nfe_per_call(self) -> int:
        return 2 if self.guidance_scale > 1 else 1

    def rate(self, step: int) -> Tensor:
        """Diffusion rate of a step, shape ()."""
        return flow_grpo_rate(self.sigmas_T1[step], self.noise_levels[step], self.sigmas_T1[1])


Between = Callable[[int, Trajectories], Trajectories]


def expand(policy: Policy, slot_P: Tensor, group_size: int, key: NoiseKey) -> Trajectories:
    """P groups of `group_size` trajectories at sigma 1, each with noise of its own."""
    group_N = torch.arange(len(slot_P)).repeat_interleave(group_size)
    member_N = torch.arange(group_size).repeat(len(slot_P))
    x_NCHW = key.draw(slot_P[group_N], member_N, INITIAL, policy.latent_shape).to(policy.device)
    return Trajectories(group_N, slot_P[group_N], member_N, x_NCHW)


def denoise(
    policy: Policy,
    condition: Condition,
    batch: Trajectories,
    sampling: Sampling,
    key: NoiseKey,
    meter: Meter,
    between: Between = lambda step, batch: batch,
) -> Trajectories:
    """Take trajectories from sigma 1 to 0. `between(step, batch)` sees each network call's outcome and may drop rows.

    `condition` has one row a prompt. Steps and log-probs are float32, whatever the network runs in.
    """
    for step in range(sampling.num_inference_steps):
        with meter.stage("sample"):
            batch = _call(policy, condition, batch, step, sampling)
            meter.count(nfe=len(batch) * sampling.nfe_per_call)
        batch = between(step, batch)
        with meter.stage("sample"):
            batch = _advance(batch, step, sampling, key)
    return batch


@torch.no_grad()
def _call(policy: Policy, condition: Condition, batch: Trajectories, step: int, sampling: Sampling) -> Trajectories:
    sigma = sampling.sigmas_T1[step].to(policy.device)
    parts = []
    for rows in torch.arange(len(batch)).split(sampling.microbatch):
        told = condition.take(batch.group_N[rows].to(policy.device))
        parts.append(policy.predict(batch.x_NCHW[rows], sigma, told, sampling.guidance_scale))
    return replace(batch, v_NCHW=torch.cat(parts) if parts else torch.empty_like(batch.x_NCHW))


def _advance(batch: Trajectories, step: int, sampling: Sampling, key: NoiseKey) -> Trajectories:
    assert batch.v_NCHW is not None
    x, v = batch.x_NCHW, batch.v_NCHW
    sigma, sigma_next = (s.to(x.device) for s in sampling.sigmas_T1[step : step + 2])
    if sampling.noise_levels[step] == 0:
        return replace(batch, x_NCHW=ode_step(x, v, sigma, sigma_next), v_NCHW=None)
    mean, std = sde_mean_std(x, v, sigma, sigma_next, sampling.rate(step).to(x.device))
    x_next = mean + std * key.draw(batch.slot_N, batch.member_N, step, x.shape[1:]).to(x.device)
    path = batch.path
    if step in sampling.stored_steps:
        kept = mean if sampling.stored_means else None
        path = (*path, Transition(step, x, x_next, log_prob(x_next, mean, std), kept))
    return replace(batch, x_NCHW=x_next, v_NCHW=None, path=path)
