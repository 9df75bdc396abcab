"""The settings of objectives: the section `objective` of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from progrpo.settings import FRACTION, SHARE, above, at_least, setting


@dataclass(frozen=True)
class GRPOSettings:
    clip_range: float | None = setting(None, above(0).or_empty(" for the published one"))
    """The clip range of the ratios. Ratios are of log-probs averaged over dimensions, so it depends on the latent
    size.
    For example, 1e-4 at 16x64x64 corresponds to 3.2e-3 at 8x16x16.
    Empty: the range published with the sampler, or with the guarded ratio, converted to this model's latents."""
    adv_clip_max: float = setting(5.0, above(0))
    """Advantages are clipped to this absolute value."""
    ratio: Literal["plain", "guard"] = "plain"
    """The form of the ratio.
    `guard`: the normalised ratio of GRPO-Guard (arXiv 2510.22319), which has a smaller clip range."""
    step_weights: Literal["equal", "noise", "inverse_h"] = "equal"
    """The weights of steps, with mean 1. `equal`: all the same.
    `noise`: their std (TempFlow-GRPO, arXiv 2508.04324). `inverse_h`: 1 / their length (GRPO-Guard)."""
    kl_beta: float = setting(0.0, at_least(0))
    """The weight of the KL to the reference; 0: none."""
    kl_form: Literal["exact", "flow_grpo", "latent", "velocity"] = "exact"
    """The form of the KL. `exact`: the squared distance of the steps' means over 2 s^2 h.
    `flow_grpo`: over 2 s^2; its betas are about ten times larger.
    `latent`: the plain mean square distance of the steps' means. `velocity`: that of the network's velocities."""


@dataclass(frozen=True)
class NFTSettings:
    draws: int = setting(4, at_least(1))
    """The number of noise levels that are trained for each trajectory."""
    time_fraction: float = setting(0.99, SHARE)
    """The share of the sampling grid, from its noisy end, in which these noise levels lie."""
    beta: float = setting(1.0, above(0))
    """How far the positive and the negative policy lie from the old policy."""
    adv_clip_max: float = setting(5.0, above(0))
    """Advantages are clipped to this absolute value."""
    kl_beta: float = setting(1e-4, at_least(0))
    """The weight of the mean square distance between the network's velocities and the reference's."""


@dataclass(frozen=True)
class AWMSettings:
    draws: int = setting(6, at_least(1))
    """The number of noise levels that are trained for each trajectory."""
    time_fraction: float = setting(0.9, SHARE)
    """The share of the sampling grid, from its noisy end, in which these noise levels lie."""
    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "uniform"
    """The weight of the flow-matching loss at noise level t.
    `uniform`: 1. `t` and `t2`: t and its square. `huber` and `ghuber`: a root of the loss times t.
    The authors and Flow-Factory use `ghuber`."""
    huber_power: float = setting(0.25, SHARE)
    """The power of `ghuber`, which is t (loss ** power) / power; the others do not read it.
    `huber` is half of `ghuber` at the power 0.5."""
    clip_range: float = setting(1.0, above(0))
    """The clip range of the ratio of an item's log-probs."""
    adv_clip_max: float = setting(1.0, above(0))
    """Advantages are clipped to this absolute value. This is Flow-Factory's value; the authors use 5 and an
    `adv_scale` of 0.2."""
    adv_scale: float = setting(1.0, above(0))
    """Clipped advantages are multiplied by this factor."""
    kl_beta: float = setting(1e-4, at_least(0))
    """The weight of the mean square distance between the network's velocities and the reference's."""
    average_beta: float = setting(1.0, at_least(0))
    """The weight of the same distance to an average of the weights over time."""
    average_ramp: float = setting(3e-4, at_least(0))
    """The average's decay after the n-th iteration is min(average_ramp * n, average_limit).
    This is Flow-Factory's value; the authors use 0.001."""
    average_limit: float = setting(0.3, FRACTION)
    """The upper limit of the average's decay."""


@dataclass(frozen=True)
class DGPOSettings:
    draws: int = setting(4, at_least(1))
    """The number of noise levels that are trained for each trajectory. A group shares the levels and the noise."""
    time_fraction: float = setting(0.6, SHARE)
    """The share of the sampling grid, from its noisy end, in which these noise levels lie."""
    dpo_beta: float = setting(100.0, above(0))
    """The factor of loss differences in the sigmoid that weights each group, as beta in DPO."""
    clip_range: float = setting(0.05, above(0))
    """How far the flow-matching loss may move from the loss of an average of the weights over time."""
    adv_clip_max: float = setting(5.0, above(0))
    """Advantages are clipped to this absolute value."""
    kl_beta: float = setting(1e-3, at_least(0))
    """The weight of the mean square distance between the network's velocities and the reference's."""


@dataclass(frozen=True)
class ObjectiveSettings:
    name: Literal["grpo", "nft", "awm", "dgpo"] = "grpo"
    """The objective. Its own settings are in the section of its name; the other sections are not read."""
    advantage: Literal["group", "batch", "gdpo"] = "group"
    """How advantages are scaled. `group`: divide by the std of the group's survivors (the paper's).
    `batch`: divide by the std of the whole batch (flow_grpo's global_std).
    `gdpo`: scale each reward by its group's std, sum them with their weights, and scale by the whole batch's
    (arXiv 2601.05242), so that no reward drowns another."""
    baseline: Literal["survivors", "group"] = "survivors"
    """Which members give the mean and std. `survivors`: those that are trained (the paper's).
    `group`: the full group, if all its members have final rewards (post-hoc selection)."""
    adv_eps: float = setting(1e-4, above(0))
    """A small number that is added to the std by which advantages are divided."""
    grpo: GRPOSettings = field(default_factory=GRPOSettings)
    """GRPO on the steps of an SDE (Flow-GRPO, arXiv 2505.05470)."""
    nft: NFTSettings = field(default_factory=NFTSettings)
    """DiffusionNFT (arXiv 2509.16117)."""
    awm: AWMSettings = field(default_factory=AWMSettings)
    """Advantage weighted matching (arXiv 2509.25050).
    Defaults are Flow-Factory's for SD3.5, except the weighting; the recipe sd35m-awm has the authors'."""
    dgpo: DGPOSettings = field(default_factory=DGPOSettings)
    """Direct group preference optimisation (arXiv 2510.08425)."""

    def check(self) -> None:
        """Raise ValueError for a baseline that the advantage does not have."""
        if self.advantage == "gdpo" and self.baseline == "group":
            raise ValueError("objective.baseline must be survivors for objective.advantage gdpo, not group")
