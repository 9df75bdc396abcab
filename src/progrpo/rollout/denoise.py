"""The only denoising loop. Sampling, training rollouts, audits and evaluation differ in what they do between steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from progrpo.diffusion.process import Process
from progrpo.packing import evenly, of_one_shape
from progrpo.policies.base import Policy
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import INITIAL, NoiseKey
from progrpo.rollout.probe import latent_features
from progrpo.types import WHOLE_GROUP, Condition, Trajectories, Transition


@dataclass(frozen=True)
class Sampling:
    """How to denoise. Transitions of `stored_steps` are kept with their log-probs, and with `stored_means` their means.

    Only stochastic steps have them. Latents are rounded to `latent_dtype` before their log-probs are taken and so may be
    stored in it. With `same_latent` the members of a group begin at one noise. With `attached` the outputs of stored steps
    keep their graphs, with `latent_features` what a probe sees is kept of every step. With `embedded_guidance` the network is told
    the guidance scale, else guidance takes a pair of calls.
    """

    process: Process
    stored_steps: frozenset[int] = frozenset()
    stored_means: bool = False
    guidance_scale: float = 1.0
    embedded_guidance: bool = False
    microbatch: int = 64
    same_latent: bool = False
    latent_dtype: torch.dtype = torch.float32
    attached: bool = False
    latent_features: bool = False

    def __post_init__(self) -> None:
        assert all(self.process.noise_levels[step] > 0 for step in self.stored_steps), "an ODE step has no log-prob"

    @property
    def num_inference_steps(self) -> int:
        return self.process.num_steps

    @property
    def nfe_per_call(self) -> int:
        return 2 if self.guidance_scale > 1 and not self.embedded_guidance else 1

    def with_max_batch(self, rows: int) -> Sampling:
        """With calls of so many rows at most, where no more are begun."""
        return replace(self, microbatch=min(self.microbatch, max(rows, 1)))

    def rounded(self, x: Tensor) -> Tensor:
        """x as it is stored, in its own dtype again: a log-prob of anything else would not be that of what is trained."""
        return x if x.dtype == self.latent_dtype else x.to(self.latent_dtype).to(x.dtype)


def call_size(policy: Policy, rows: int, sampling: Sampling) -> int:
    """Rows of each of the network calls for so many: equal ones, or what a compiled network was compiled for."""
    return sampling.microbatch if policy.compiled else evenly(rows, sampling.microbatch)


Between = Callable[[int, Trajectories], Trajectories]


def expand(policy: Policy, slot_P: Tensor, group_size: int, sampling: Sampling, key: NoiseKey) -> Trajectories:
    """P groups of `group_size` trajectories of pure noise, each with noise of its own or all with their group's."""
    group_N = torch.arange(len(slot_P)).repeat_interleave(group_size)
    member_N = torch.arange(group_size).repeat(len(slot_P))
    whose_N = torch.full_like(member_N, WHOLE_GROUP) if sampling.same_latent else member_N
    x_NCHW = key.draw(slot_P[group_N], whose_N, INITIAL, policy.latent_shape).to(policy.device)
    return Trajectories(group_N, slot_P[group_N], member_N, sampling.rounded(x_NCHW))


def denoise(
    policy: Policy,
    condition: Condition,
    batch: Trajectories,
    sampling: Sampling,
    key: NoiseKey,
    meter: Meter,
    between: Between = lambda step, batch: batch,
) -> Trajectories:
    """Take trajectories from noise to data. `between(step, batch)` sees each network call's outcome and may drop rows.

    `condition` has one row a prompt. Steps and log-probs are float32, whatever the network runs in.
    """
    sampling = sampling.with_max_batch(len(batch))
    for step in range(sampling.num_inference_steps):
        shape = call_size(policy, len(batch), sampling)
        with meter.stage("sample"):
            called = _call(policy, condition, batch, step, sampling, shape)
            meter.count(nfe=len(called) * sampling.nfe_per_call)
            noise = _noise(called, step, sampling, key)  # drawn on the CPU while a GPU is still at the call
        batch = between(step, called)
        with meter.stage("sample"):
            if batch is not called:
                noise = _noise(batch, step, sampling, key)
            batch = _advance(batch, step, sampling, noise)
    return batch


def _noise(batch: Trajectories, step: int, sampling: Sampling, key: NoiseKey) -> Tensor | None:
    """Of every row at a stochastic step."""
    if sampling.process.noise_levels[step] == 0:
        return None
    return key.draw(batch.slot_N, batch.member_N, step, batch.x_NCHW.shape[1:])


def _call(
    policy: Policy, condition: Condition, batch: Trajectories, step: int, sampling: Sampling, shape: int
) -> Trajectories:
    """The network at every row's x, in microbatches of `shape` rows."""
    if not len(batch):
        return replace(batch, output_NCHW=torch.empty_like(batch.x_NCHW))
    timestep = sampling.process.timestep(step, batch.x_NCHW)
    attached = sampling.attached and step in sampling.stored_steps
    outputs = []
    with torch.set_grad_enabled(attached):
        for rows in of_one_shape(len(batch), shape):
            told = condition.take(batch.group_N[rows].to(policy.device))
            outputs.append(policy.predict(batch.x_NCHW[rows], timestep, told, sampling.guidance_scale))
        output = torch.cat(outputs)[: len(batch)]
    batch = replace(batch, output_NCHW=output.detach(), attached_NCHW=output if attached else None)
    if sampling.latent_features:
        seen = latent_features(sampling.process.x0(step, batch.x_NCHW, output.detach()))
        batch = replace(batch, latent_features=(*batch.latent_features, seen))
    return batch


def _advance(batch: Trajectories, step: int, sampling: Sampling, noise_NCHW: Tensor | None) -> Trajectories:
    assert batch.output_NCHW is not None
    x, output, attached, process = batch.x_NCHW, batch.output_NCHW, batch.attached_NCHW, sampling.process
    batch = replace(batch, output_NCHW=None, attached_NCHW=None)
    if noise_NCHW is None:
        return replace(batch, x_NCHW=sampling.rounded(process.deterministic(step, x, output)))
    mean, std = process.mean_std(step, x, output)
    x_next, path = sampling.rounded(mean + std * noise_NCHW.to(x.device)), batch.path
    if step in sampling.stored_steps:
        log_prob, dtype = process.log_prob(x_next, mean, std), sampling.latent_dtype
        kept = mean if sampling.stored_means else None
        # after a stored step x is what that transition ended at, and is not kept twice
        start = path[-1].x_next_NCHW if path and path[-1].step == step - 1 else x.to(dtype)
        path = (*path, Transition(step, start, x_next.to(dtype), log_prob, kept, attached))
    return replace(batch, x_NCHW=x_next, path=path)
