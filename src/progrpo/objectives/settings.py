"""The settings of objectives: the part `objective` of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from progrpo.settings import FRACTION, SHARE, above, at_least, setting


@dataclass(frozen=True)
class GRPOSettings:
    clip_range: float | None = setting(None, above(0).or_empty(" for the published one"))
    """On ratios of mean-over-dims log-probs, so it belongs to a latent size: 1e-4 at 16x64x64 is 3.2e-3 at 8x16x16. Empty: what
    was published with the sampler, or with the guarded ratio, for this model's latents."""
    adv_clip_max: float = setting(5.0, above(0))
    ratio: Literal["plain", "guard"] = "plain"
    """guard: GRPO-Guard's normalised ratio (arXiv 2510.22319), whose clip range is smaller."""
    step_weights: Literal["equal", "noise", "inverse_h"] = "equal"
    """Weigh steps by their std (TempFlow-GRPO, arXiv 2508.04324) or by 1 over their length (GRPO-Guard); mean 1."""
    kl_beta: float = setting(0.0, at_least(0))
    kl_form: Literal["exact", "flow_grpo", "latent", "velocity"] = "exact"
    """exact: 2 s^2 h below the squared distance of means; flow_grpo: 2 s^2, and its betas are about ten times larger. latent and
    velocity: the plain mean square distance of the steps' means, or of the network's velocities."""


@dataclass(frozen=True)
class NFTSettings:
    draws: int = setting(4, at_least(1))
    """Noise levels a trajectory that are trained."""
    time_fraction: float = setting(0.99, SHARE)
    """They lie in this share of the sampling grid, from its noisy end."""
    beta: float = setting(1.0, above(0))
    """How far the positive and the negative policy lie from the old one."""
    adv_clip_max: float = setting(5.0, above(0))
    kl_beta: float = setting(1e-4, at_least(0))
    """On the mean square distance of velocities to the reference."""


@dataclass(frozen=True)
class AWMSettings:
    draws: int = setting(6, at_least(1))
    """Noise levels a trajectory that are trained."""
    time_fraction: float = setting(0.9, SHARE)
    """They lie in this share of the sampling grid, from its noisy end."""
    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "uniform"
    """The flow-matching loss by its noise level t, or a root of it times t. ghuber is the authors' and Flow-Factory's."""
    huber_power: float = setting(0.25, SHARE)
    """The power of ghuber alone: t (loss ** power) / power. huber is half of it at the power 0.5."""
    clip_range: float = setting(1.0, above(0))
    adv_clip_max: float = setting(1.0, above(0))
    """Flow-Factory's; the authors' is 5, with an `adv_scale` of 0.2."""
    adv_scale: float = setting(1.0, above(0))
    """Clipped advantages are multiplied by it."""
    kl_beta: float = setting(1e-4, at_least(0))
    """On the mean square distance of velocities to the reference."""
    average_beta: float = setting(1.0, at_least(0))
    """The same to an average of the weights over time."""
    average_ramp: float = setting(3e-4, at_least(0))
    """The average's decay is min(average_ramp n, average_limit) after the n-th iteration. Flow-Factory's; the authors' is 0.001."""
    average_limit: float = setting(0.3, FRACTION)


@dataclass(frozen=True)
class DGPOSettings:
    draws: int = setting(4, at_least(1))
    """Noise levels a trajectory that are trained; a group shares them and its noise."""
    time_fraction: float = setting(0.6, SHARE)
    """They lie in this share of the sampling grid, from its noisy end."""
    dpo_beta: float = setting(100.0, above(0))
    clip_range: float = setting(0.05, above(0))
    """How far the flow-matching loss may go from that of an average of the weights over time."""
    adv_clip_max: float = setting(5.0, above(0))
    kl_beta: float = setting(1e-3, at_least(0))
    """On the mean square distance of velocities to the reference."""


@dataclass(frozen=True)
class ObjectiveSettings:
    name: Literal["grpo", "nft", "awm", "dgpo"] = "grpo"
    """What to learn from rewards; its own settings are the part of that name, the others are not read."""
    advantage: Literal["group", "batch", "gdpo"] = "group"
    """Divide by the std of the survivors of the group (the paper's) or of the whole batch (flow_grpo's global_std). `gdpo`: each reward
    for itself by its group's, then their weighted sum by the whole batch's (arXiv 2601.05242), so that no reward drowns another."""
    baseline: Literal["survivors", "group"] = "survivors"
    """Take mean and std over the survivors (the paper's), or over the full group where its final rewards exist (post-hoc)."""
    adv_eps: float = setting(1e-4, above(0))
    grpo: GRPOSettings = field(default_factory=GRPOSettings)
    """GRPO on the SDE's steps (Flow-GRPO, arXiv 2505.05470)."""
    nft: NFTSettings = field(default_factory=NFTSettings)
    """DiffusionNFT (arXiv 2509.16117)."""
    awm: AWMSettings = field(default_factory=AWMSettings)
    """Advantage weighted matching (arXiv 2509.25050). Defaults are Flow-Factory's for SD3.5 but for the weighting; recipe sd35m-awm has the authors'."""
    dgpo: DGPOSettings = field(default_factory=DGPOSettings)
    """Direct group preference optimisation (arXiv 2510.08425)."""

    def check(self) -> None:
        """ValueError for a baseline that the advantage does not have."""
        if self.advantage == "gdpo" and self.baseline == "group":
            raise ValueError("objective.baseline must be survivors for objective.advantage gdpo, not group")
