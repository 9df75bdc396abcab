"""GRPO on stochastic steps (Flow-GRPO, arXiv 2505.05470; DDPO's on diffusion models): clipped ratios and a KL term."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from progrpo.diffusion.gaussian import kl, mean_square
from progrpo.objectives.base import Experience, Loss
from progrpo.objectives.settings import GRPOSettings
from progrpo.objectives.surrogate import clipped_surrogate, guarded_log_ratio, outside_clip
from progrpo.packing import update_batches
from progrpo.policies.base import Policy


@dataclass(frozen=True)
class GRPO:
    """The clipped loss of density ratios of stochastic steps, with a KL term to the reference.

    `clip_range` belongs to a latent size, since log-probs are means over dims.

    `ratio`: `plain`, or `guard`, GRPO-Guard's normalised ratio (arXiv 2510.22319), whose spread is the same at every
    step.

    `step_weights`: `equal`; `noise`, in proportion to a step's std (TempFlow-GRPO, arXiv 2508.04324); `inverse_h`, to 1
    over its length (GRPO-Guard). Both have mean 1 over the trained steps, so that the learning rate keeps its meaning.

    `kl_form`: `exact`, the Gaussian KL of the step (the squared distance of means over twice its variance, 2 s^2 h);
    `flow_grpo`, the same distance over twice the squared rate of an SDE's sampler, 2 s^2; `latent`, the plain mean
    square distance of means; `velocity`, that of the network's outputs. Their betas differ by orders of magnitude.
    """

    settings: GRPOSettings
    Settings: ClassVar = GRPOSettings

    @property
    def clip_range(self) -> float:
        assert self.settings.clip_range is not None, "settings take the sampler's clip range first (`for_sampler`)"
        return self.settings.clip_range

    def prepare(self, policy: Policy, experience: Experience, microbatch: int, updates: int) -> Experience:
        """Compute the old log-probs, and means.

        With one update they equal the current ones without gradient. With more they are the stored ones of sampling,
        or, where sampling and training round differently, the training network's own before the first update.
        """
        if updates == 1:
            return experience
        path = experience.trajectories.path
        old_ND = torch.stack([t.log_prob_N for t in path], dim=1)
        if policy.batch_invariant:
            return experience.with_prepared(old_ND)
        means = [None if t.mean_NCHW is None else torch.empty_like(t.mean_NCHW) for t in path]
        for items_B in update_batches(old_ND.numel(), microbatch, policy.compiled):
            batch = _TransitionBatch.gather(policy, experience, items_B)
            # a compiled network with gradients is another network, and the loss sees its rounding
            with torch.set_grad_enabled(policy.compiled):
                current = batch.distribution(policy)
            log_prob_B = experience.process.log_prob(batch.x_next, current.mean, current.std)
            old_ND[batch.rows, batch.place] = log_prob_B.detach()
            for d, mean_NCHW in enumerate(means):
                if mean_NCHW is not None:
                    own = batch.place == d
                    mean_NCHW[batch.rows.to(own.device)[own]] = current.mean.detach()[own]
        own_path = tuple(replace(t, mean_NCHW=mean) for t, mean in zip(path, means, strict=True))
        trajectories = replace(experience.trajectories, path=own_path)
        return replace(experience, trajectories=trajectories).with_prepared(old_ND)

    def loss(self, policy: Policy, experience: Experience, items_B: Tensor) -> Loss:
        batch = _TransitionBatch.gather(policy, experience, items_B)
        if self.settings.kl_beta > 0:  # before the current weights' graph is built
            with torch.no_grad(), policy.weights("reference"):
                reference = batch.distribution(policy)
        current = batch.distribution(policy, batch.attached)
        log_prob_B = experience.process.log_prob(batch.x_next, current.mean, current.std)
        old_ND = experience.prepared_ND
        # true of the only update, and of the first of several where it goes back through sampling's graphs
        if old_ND is None or batch.attached is not None:
            log_ratio_B = self._log_ratio(log_prob_B, current, log_prob_B.detach(), current.mean.detach())
        else:
            log_ratio_B = self._log_ratio(log_prob_B, current, old_ND[batch.rows, batch.place], batch.mean)
        sampled_log_ratio_B = self._log_ratio(log_prob_B, current, batch.log_prob, batch.mean).detach()
        weights_B = _STEP_WEIGHTS[self.settings.step_weights](experience)[batch.place]
        loss_B = weights_B * clipped_surrogate(log_ratio_B, batch.advantages, self.clip_range)
        means = {"clip_fraction": outside_clip(log_ratio_B.detach(), self.clip_range).float()}
        if self.settings.kl_beta > 0:
            kl_B = _KL_FORMS[self.settings.kl_form](current, reference, batch)
            loss_B = loss_B + self.settings.kl_beta * kl_B
            means["kl"] = kl_B.detach()
        return Loss(loss_B, means, {"ratio_max_deviation": sampled_log_ratio_B.expm1().abs()})

    def _log_ratio(
        self, log_prob_B: Tensor, current: _StepDistribution, old_B: Tensor, old_mean: Tensor | None
    ) -> Tensor:
        if self.settings.ratio == "plain":
            return log_prob_B - old_B
        assert old_mean is not None
        return guarded_log_ratio(log_prob_B - old_B, current.mean, old_mean, current.std)


@dataclass(frozen=True)
class _StepDistribution:
    """The network's output at B transitions, with the mean and std of x_next that follow from it."""

    output: Tensor
    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class _TransitionBatch:
    """B transitions, each with the values of its own step; `place` is the transition's index in the path."""

    experience: Experience
    rows: Tensor
    place: Tensor
    x: Tensor
    x_next: Tensor
    log_prob: Tensor
    mean: Tensor | None
    attached: Tensor | None
    advantages: Tensor
    step: Tensor

    @classmethod
    def gather(cls, policy: Policy, experience: Experience, items_B: Tensor) -> _TransitionBatch:
        path = experience.trajectories.path
        items_B = items_B.sort().values  # transitions are gathered place by place; the loss is a sum over items
        place = items_B // len(experience)
        rows = items_B % len(experience)
        step = torch.tensor([t.step for t in path])[place]
        transitions = [path[p].take(rows[place == p]) for p in place.unique().tolist()]
        log_prob = torch.cat([t.log_prob_N for t in transitions])
        return cls(
            experience=experience,
            rows=rows,
            place=place.to(policy.device),
            x=torch.cat([t.x_NCHW for t in transitions]).to(log_prob),  # latents may be stored in low precision
            x_next=torch.cat([t.x_next_NCHW for t in transitions]).to(log_prob),
            log_prob=log_prob,
            mean=_concatenated([t.mean_NCHW for t in transitions]),
            attached=_concatenated([t.attached_NCHW for t in transitions]),
            advantages=experience.advantages_N[rows].to(policy.device),
            step=step,
        )

    @property
    def scale(self) -> Tensor:
        """The diffusion rate of each transition's step."""
        return self.experience.process.scales_T[self.step].to(self.x)

    def distribution(self, policy: Policy, output: Tensor | None = None) -> _StepDistribution:
        """The distribution of x_next with the active weights, whose `output` may be known already."""
        process = self.experience.process
        if output is None:
            output = self._predict(policy)
        return _StepDistribution(output, *process.mean_std(self.step, self.x, output))

    def _predict(self, policy: Policy) -> Tensor:
        group = self.experience.trajectories.group_N[self.rows].to(policy.device)
        condition = self.experience.condition.take(group)
        timestep = self.experience.process.timestep(self.step, self.x)
        return policy.predict(self.x, timestep, condition, self.experience.guidance_scale)


def _concatenated(tensors: list[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


def _normalised(weights_D: Tensor) -> Tensor:
    return weights_D / weights_D.mean()


def _at_path_steps(values_T: Tensor, experience: Experience) -> Tensor:
    """The values of the path's D steps, on the trajectories' device."""
    step = torch.tensor([t.step for t in experience.trajectories.path])
    return values_T[step].to(experience.trajectories.x_NCHW.device)


def _equal_weights(experience: Experience) -> Tensor:
    return torch.ones_like(_noise_weights(experience))


def _noise_weights(experience: Experience) -> Tensor:
    return _normalised(_at_path_steps(experience.process.stds_T, experience))


def _inverse_h_weights(experience: Experience) -> Tensor:
    return _normalised(1 / _at_path_steps(experience.process.lengths_T, experience))


_STEP_WEIGHTS: dict[str, Callable[[Experience], Tensor]] = {
    "equal": _equal_weights,
    "noise": _noise_weights,
    "inverse_h": _inverse_h_weights,
}

_KL_FORMS: dict[str, Callable[[_StepDistribution, _StepDistribution, _TransitionBatch], Tensor]] = {
    "exact": lambda current, reference, batch: kl(current.mean, reference.mean, current.std),
    "flow_grpo": lambda current, reference, batch: kl(
        current.mean, reference.mean, batch.scale.reshape(current.std.shape)
    ),
    "latent": lambda current, reference, batch: mean_square(current.mean - reference.mean),
    "velocity": lambda current, reference, batch: mean_square(current.output - reference.output),
}
