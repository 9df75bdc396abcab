"""GRPO on stochastic steps (Flow-GRPO, arXiv 2505.05470; DDPO's on diffusion models): clipped ratios and a KL term to the reference."""

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
from progrpo.packing import of_update
from progrpo.policies.base import Policy


@dataclass(frozen=True)
class GRPO:
    """`clip_range` belongs to a latent size, since log-probs are means over dims.

    `ratio`: `plain`, or `guard`, GRPO-Guard's normalised ratio (arXiv 2510.22319), whose spread is the same at every step.
    `step_weights`: `equal`; `noise`, in proportion to a step's std (TempFlow-GRPO, arXiv 2508.04324); `inverse_h`, to 1 over
    its length (GRPO-Guard). Both have mean 1 over the trained steps, so that the learning rate keeps its meaning.
    `kl_form`: `exact` (the Gaussian KL of the step: twice its variance below the squared distance of means), `flow_grpo` (twice
    the squared rate of an SDE's sampler, 2 s^2 where the variance is s^2 h), or the plain mean square distance of means,
    `latent`, or of the network's outputs, `velocity`. Their betas differ by orders.
    """

    settings: GRPOSettings
    Settings: ClassVar = GRPOSettings

    @property
    def clip_range(self) -> float:
        assert self.settings.clip_range is not None, "the sampler's clip range is filled in first (`for_sampler`)"
        return self.settings.clip_range

    def prepare(self, policy: Policy, experience: Experience, microbatch: int, updates: int) -> Experience:
        """The old log-probs, and means. With one update they are the current ones without gradient. With more they are those that
        sampling stored, or, where what samples and what trains round differently, the network's own before the first update."""
        if updates == 1:
            return experience
        path = experience.trajectories.path
        old_ND = torch.stack([t.log_prob_N for t in path], dim=1)
        if policy.batch_invariant:
            return experience.noting(old_ND)
        means = [None if t.mean_NCHW is None else torch.empty_like(t.mean_NCHW) for t in path]
        for items_B in of_update(old_ND.numel(), microbatch, policy.compiled):
            step = _Steps.gather(policy, experience, items_B)
            # compiled, the network with gradients is another one, whose rounding is asked for
            with torch.set_grad_enabled(policy.compiled):
                now = step.outcome(policy)
            old_ND[step.rows, step.place] = experience.process.log_prob(step.x_next, now.mean, now.std).detach()
            for d, mean_NCHW in enumerate(means):
                if mean_NCHW is not None:
                    own = step.place == d
                    mean_NCHW[step.rows.to(own.device)[own]] = now.mean.detach()[own]
        own_path = tuple(replace(t, mean_NCHW=mean) for t, mean in zip(path, means, strict=True))
        return replace(experience, trajectories=replace(experience.trajectories, path=own_path)).noting(old_ND)

    def loss(self, policy: Policy, experience: Experience, items_B: Tensor) -> Loss:
        step = _Steps.gather(policy, experience, items_B)
        if self.settings.kl_beta > 0:  # before the current weights' graph is built
            with torch.no_grad(), policy.weights("reference"):
                reference = step.outcome(policy)
        now = step.outcome(policy, step.attached)
        log_prob_B = experience.process.log_prob(step.x_next, now.mean, now.std)
        before = experience.before_ND
        # it is the only update, or the first of several that goes back through sampling's graphs
        if before is None or step.attached is not None:
            log_ratio_B = self._log_ratio(log_prob_B, now, log_prob_B.detach(), now.mean.detach())
        else:
            log_ratio_B = self._log_ratio(log_prob_B, now, before[step.rows, step.place], step.mean)
        of_sampled_B = self._log_ratio(log_prob_B, now, step.log_prob, step.mean).detach()
        weights_B = _STEP_WEIGHTS[self.settings.step_weights](experience)[step.place]
        loss_B = weights_B * clipped_surrogate(log_ratio_B, step.advantages, self.clip_range)
        means = {"clip_fraction": outside_clip(log_ratio_B.detach(), self.clip_range).float()}
        if self.settings.kl_beta > 0:
            kl_B = _KL_FORMS[self.settings.kl_form](now, reference, step)
            loss_B = loss_B + self.settings.kl_beta * kl_B
            means["kl"] = kl_B.detach()
        return Loss(loss_B, means, {"ratio_max_deviation": of_sampled_B.expm1().abs()})

    def _log_ratio(self, log_prob_B: Tensor, now: _Outcome, old_B: Tensor, old_mean: Tensor | None) -> Tensor:
        if self.settings.ratio == "plain":
            return log_prob_B - old_B
        assert old_mean is not None
        return guarded_log_ratio(log_prob_B - old_B, now.mean, old_mean, now.std)


@dataclass(frozen=True)
class _Outcome:
    """Of some weights, at B transitions: the network's output, and mean and std of x_next."""

    output: Tensor
    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class _Steps:
    """B transitions side by side, each with its own step's numbers; `place` is that of the transition in the path."""

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
    def gather(cls, policy: Policy, experience: Experience, items_B: Tensor) -> _Steps:
        path, device = experience.trajectories.path, policy.device
        items_B = items_B.sort().values  # below, parts come by transition; the loss is a sum over items
        which, rows = items_B // len(experience), items_B % len(experience)
        step = torch.tensor([t.step for t in path])[which]
        parts = [path[w].take(rows[which == w]) for w in which.unique().tolist()]
        log_prob = torch.cat([t.log_prob_N for t in parts])
        return cls(
            experience=experience,
            rows=rows,
            place=which.to(device),
            x=torch.cat([t.x_NCHW for t in parts]).to(log_prob),  # latents may be stored in low precision
            x_next=torch.cat([t.x_next_NCHW for t in parts]).to(log_prob),
            log_prob=log_prob,
            mean=_joined([t.mean_NCHW for t in parts]),
            attached=_joined([t.attached_NCHW for t in parts]),
            advantages=experience.advantages_N[rows].to(device),
            step=step,
        )

    @property
    def scale(self) -> Tensor:
        """Diffusion rate of each transition's step."""
        return self.experience.process.scales_T[self.step].to(self.x)

    def outcome(self, policy: Policy, output: Tensor | None = None) -> _Outcome:
        """Under the policy's weights in force, of whose network the `output` may be known already."""
        process = self.experience.process
        if output is None:
            output = self._predict(policy)
        return _Outcome(output, *process.mean_std(self.step, self.x, output))

    def _predict(self, policy: Policy) -> Tensor:
        told = self.experience.condition.take(self.experience.trajectories.group_N[self.rows].to(policy.device))
        timestep = self.experience.process.timestep(self.step, self.x)
        return policy.predict(self.x, timestep, told, self.experience.guidance_scale)


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def _normalised(weights_D: Tensor) -> Tensor:
    return weights_D / weights_D.mean()


def _of_path(values_T: Tensor, experience: Experience) -> Tensor:
    """Values of the D steps of the path, on the trajectories' device."""
    step = torch.tensor([t.step for t in experience.trajectories.path])
    return values_T[step].to(experience.trajectories.x_NCHW.device)


def _equal(experience: Experience) -> Tensor:
    return torch.ones_like(_noise(experience))


def _noise(experience: Experience) -> Tensor:
    return _normalised(_of_path(experience.process.stds_T, experience))


def _inverse_h(experience: Experience) -> Tensor:
    return _normalised(1 / _of_path(experience.process.lengths_T, experience))


_STEP_WEIGHTS: dict[str, Callable[[Experience], Tensor]] = {"equal": _equal, "noise": _noise, "inverse_h": _inverse_h}

_KL_FORMS: dict[str, Callable[[_Outcome, _Outcome, _Steps], Tensor]] = {
    "exact": lambda now, ref, step: kl(now.mean, ref.mean, now.std),
    "flow_grpo": lambda now, ref, step: kl(now.mean, ref.mean, step.scale.reshape(now.std.shape)),
    "latent": lambda now, ref, step: mean_square(now.mean - ref.mean),
    "velocity": lambda now, ref, step: mean_square(now.output - ref.output),
}
