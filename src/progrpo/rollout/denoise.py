"""The only denoising loop. Training rollouts, audits and evaluations differ in what they do between steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from progrpo.packing import balanced_size, fixed_size_batches
from progrpo.policies.base import Policy
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import INITIAL, NoiseKey
from progrpo.rollout.probe import latent_features
from progrpo.rollout.sampling import Sampling
from progrpo.types import WHOLE_GROUP, Condition, Trajectories, Transition

OnStep = Callable[[int, Trajectories], Trajectories]
"""A callback `on_step(step, batch)` after each network call; the loop goes on with the rows that it returns."""


@dataclass(frozen=True)
class Denoiser:
    """A policy with the condition of P prompts and the way to sample: what a network call needs besides x and time."""

    policy: Policy
    condition: Condition
    sampling: Sampling

    def call_size(self, rows: int) -> int:
        """The size of each network call for `rows` rows: equal calls, or a compiled network's one size."""
        microbatch = self.sampling.microbatch
        return microbatch if self.policy.compiled else balanced_size(rows, microbatch)

    def predict(self, x_NCHW: Tensor, timestep: Tensor, group_N: Tensor, size: int) -> Tensor:
        """The network's output at x, in calls of `size` rows; `group_N` says which prompt each row is of."""
        outputs = []
        for rows in fixed_size_batches(len(x_NCHW), size):
            condition = self.condition.take(group_N[rows].to(self.policy.device))
            outputs.append(self.policy.predict(x_NCHW[rows], timestep, condition, self.sampling.guidance_scale))
        return torch.cat(outputs)[: len(x_NCHW)]


def expand(policy: Policy, slot_P: Tensor, group_size: int, sampling: Sampling, key: NoiseKey) -> Trajectories:
    """P groups of `group_size` trajectories of pure noise: own noise for each member, or one noise for a group."""
    group_N = torch.arange(len(slot_P)).repeat_interleave(group_size)
    member_N = torch.arange(group_size).repeat(len(slot_P))
    drawn_for_N = torch.full_like(member_N, WHOLE_GROUP) if sampling.settings.same_latent else member_N
    x_NCHW = key.draw(slot_P[group_N], drawn_for_N, INITIAL, policy.latent_shape).to(policy.device)
    return Trajectories(group_N, slot_P[group_N], member_N, sampling.rounded(x_NCHW))


def denoise(
    denoiser: Denoiser,
    batch: Trajectories,
    key: NoiseKey,
    meter: Meter,
    on_step: OnStep = lambda step, batch: batch,
) -> Trajectories:
    """Take trajectories from noise to data. `on_step` sees the batch after each network call and may drop rows.

    Steps and log-probs are computed in float32, whatever the network's dtype.
    """
    sampling = denoiser.sampling.with_max_batch(len(batch))
    denoiser = replace(denoiser, sampling=sampling)
    for step in range(sampling.num_inference_steps):
        with meter.stage("sample"):
            called = _call(denoiser, batch, step, meter)
            noise = _noise(called, step, sampling, key)  # drawn on the CPU while a GPU is still at the call
        batch = on_step(step, called)
        with meter.stage("sample"):
            if batch is not called:
                noise = _noise(batch, step, sampling, key)
            batch = _advance(batch, step, sampling, noise)
    return batch


def _noise(batch: Trajectories, step: int, sampling: Sampling, key: NoiseKey) -> Tensor | None:
    """The noise of every row at a stochastic step, None at a deterministic one."""
    if sampling.process.noise_levels[step] == 0:
        return None
    return key.draw(batch.slot_N, batch.member_N, step, batch.x_NCHW.shape[1:])


def _call(denoiser: Denoiser, batch: Trajectories, step: int, meter: Meter) -> Trajectories:
    """The batch with the network's output at every row's x, which is computed once where a group's rows are equal."""
    if not len(batch):
        return replace(batch, output_NCHW=torch.empty_like(batch.x_NCHW))
    sampling = denoiser.sampling
    attached = sampling.record.graphs and step in sampling.record.steps
    called_M, place_N = _different_rows(batch, step < sampling.shared_calls)
    x_MCHW = batch.x_NCHW[called_M]
    timestep = sampling.process.timestep(step, x_MCHW)
    with torch.set_grad_enabled(attached):
        output = denoiser.predict(x_MCHW, timestep, batch.group_N[called_M], denoiser.call_size(len(x_MCHW)))[place_N]
    meter.count(nfe=len(x_MCHW) * sampling.nfe_per_call)
    batch = replace(batch, output_NCHW=output.detach(), attached_NCHW=output if attached else None)
    if sampling.record.latent_features:
        features = latent_features(sampling.process.x0(step, batch.x_NCHW, output.detach()))
        batch = replace(batch, latent_features=(*batch.latent_features, features))
    return batch


def _different_rows(batch: Trajectories, equal_in_group: bool) -> tuple[Tensor | slice, Tensor | slice]:
    """The M rows whose x differ, the first of each group or all; and for each of N rows the place of its equal."""
    if not equal_in_group:
        return slice(None), slice(None)
    _, place_N, sizes_M = batch.group_N.unique_consecutive(return_inverse=True, return_counts=True)
    return sizes_M.cumsum(0) - sizes_M, place_N


def _advance(batch: Trajectories, step: int, sampling: Sampling, noise_NCHW: Tensor | None) -> Trajectories:
    """The batch after the step, with its transition if that is stored."""
    assert batch.output_NCHW is not None
    x, output, process = batch.x_NCHW, batch.output_NCHW, sampling.process
    stepped = replace(batch, output_NCHW=None, attached_NCHW=None)
    if noise_NCHW is None:
        return replace(stepped, x_NCHW=sampling.rounded(process.deterministic(step, x, output)))
    mean, std = process.mean_std(step, x, output)
    x_next = sampling.rounded(mean + std * noise_NCHW.to(x.device))
    if step not in sampling.record.steps:
        return replace(stepped, x_NCHW=x_next)
    path, dtype = batch.path, sampling.latent_dtype
    # after a stored step x is what that transition ended at, and is not stored twice
    start = path[-1].x_next_NCHW if path and path[-1].step == step - 1 else x.to(dtype)
    transition = Transition(
        step=step,
        x_NCHW=start,
        x_next_NCHW=x_next.to(dtype),
        log_prob_N=process.log_prob(x_next, mean, std),
        mean_NCHW=mean if sampling.record.means else None,
        attached_NCHW=batch.attached_NCHW,
    )
    return replace(stepped, x_NCHW=x_next, path=(*path, transition))
