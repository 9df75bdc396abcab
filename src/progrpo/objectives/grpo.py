"""GRPO on the steps of a flow model's SDE (Flow-GRPO, arXiv 2505.05470): clipped ratios and a KL term to the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from progrpo.diffusion.flow import sde_mean_std
from progrpo.diffusion.gaussian import kl, log_prob
from progrpo.objectives.base import Experience, Loss
from progrpo.objectives.surrogate import clipped_surrogate, outside_clip, ratio
from progrpo.policies.base import Policy


@dataclass(frozen=True)
class GRPO:
    """`clip_range` belongs to a latent size, since log-probs are means over dims.

    `kl_form` is `exact` (the Gaussian KL of the step, 2 s^2 h below) or `flow_grpo` (2 s^2): their betas differ tenfold.
    """

    needs: ClassVar[Literal["transitions", "latents"]] = "transitions"
    clip_range: float
    kl_beta: float = 0.0
    kl_form: Literal["exact", "flow_grpo"] = "exact"

    def items_per_trajectory(self, experience: Experience) -> int:
        return len(experience.trajectories.path)

    def loss(self, policy: Policy, experience: Experience, items_B: Tensor) -> Loss:
        """Item i is transition i // N of trajectory i % N, so a microbatch mixes steps where it must and no more."""
        step = _Steps.gather(policy, experience, items_B)
        if self.kl_beta > 0:  # before the current weights' graph is built
            with torch.no_grad(), policy.weights("reference"):
                mean_ref, _ = step.mean_std(policy)
        mean, std = step.mean_std(policy)
        log_prob_B = log_prob(step.x_next, mean, std)
        loss_B = clipped_surrogate(log_prob_B, step.log_prob, step.advantages, self.clip_range)
        sums = {"clip_fraction": outside_clip(log_prob_B, step.log_prob, self.clip_range).float().sum()}
        if self.kl_beta > 0:
            kl_B = kl(mean, mean_ref, std if self.kl_form == "exact" else step.rate.reshape(std.shape))
            loss_B = loss_B + self.kl_beta * kl_B
            sums["kl"] = kl_B.detach().sum()
        deviation = (ratio(log_prob_B, step.log_prob) - 1).abs().max()
        sums["loss"] = loss_B.detach().sum()
        return Loss(loss_B.sum(), sums, {"ratio_max_deviation": deviation.detach()})


@dataclass(frozen=True)
class _Steps:
    """B transitions side by side, each with its own step's numbers."""

    experience: Experience
    rows: Tensor
    x: Tensor
    x_next: Tensor
    log_prob: Tensor
    advantages: Tensor
    sigma: Tensor
    sigma_next: Tensor
    rate: Tensor

    @classmethod
    def gather(cls, policy: Policy, experience: Experience, items_B: Tensor) -> _Steps:
        path, device = experience.trajectories.path, policy.device
        items_B = items_B.sort().values  # below, parts come by transition; the loss is a sum over items
        which, rows = items_B // len(experience), items_B % len(experience)
        step = torch.tensor([t.step for t in path])[which]
        parts = [(path[w], rows[which == w]) for w in which.unique().tolist()]
        return cls(
            experience=experience,
            rows=rows,
            x=torch.cat([t.x_NCHW[r] for t, r in parts]),
            x_next=torch.cat([t.x_next_NCHW[r] for t, r in parts]),
            log_prob=torch.cat([t.log_prob_N[r] for t, r in parts]),
            advantages=experience.advantages_N[rows].to(device),
            sigma=experience.sigmas_T1[step].to(device),
            sigma_next=experience.sigmas_T1[step + 1].to(device),
            rate=experience.rates_T[step].to(device),
        )

    def mean_std(self, policy: Policy) -> tuple[Tensor, Tensor]:
        """Of x_next under the policy's weights in force."""
        told = self.experience.condition.take(self.experience.trajectories.group_N[self.rows].to(policy.device))
        v = policy.predict(self.x, self.sigma, told, self.experience.guidance_scale)
        return sde_mean_std(self.x, v, self.sigma, self.sigma_next, self.rate)
