"""The settings of objectives, with the facts that others ask of an objective before it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, Self

from progrpo.registry import choices_of, load_named, one_of
from progrpo.settings import (
    FRACTION,
    SHARE,
    Rule,
    Values,
    above,
    at_least,
    between,
    check_rules,
    read_settings,
    setting,
)

OBJECTIVES: dict[str, str] = {
    "grpo": "progrpo.objectives.grpo:GRPO",
    "nft": "progrpo.objectives.nft:NFT",
    "awm": "progrpo.objectives.awm:AWM",
    "dgpo": "progrpo.objectives.dgpo:DGPO",
    "elbo": "progrpo.objectives.elbo:ELBO",
    "dpo": "progrpo.objectives.dpo:DPO",
    "sft": "progrpo.objectives.sft:SFT",
}
if TYPE_CHECKING:
    from progrpo.objectives.base import Objective

    ObjectiveName = str
else:
    ObjectiveName = choices_of(OBJECTIVES)

Stored = Literal["latents", "transitions", "means"]
"""The parts of a trajectory that sampling keeps.

Final latents alone, stochastic transitions with log-probs, or these with their means.
"""


@dataclass(frozen=True)
class Average:
    """An average of the weights over iterations: after the n-th, average <- decay average + (1 - decay) current.

    The decay min(`ramp` n, `limit`) lets it follow closely at first.
    """

    ramp: float
    limit: float

    def decay(self, iteration: int) -> float:
        return min(self.ramp * iteration, self.limit)


_GUARD_CLIP_TIMES_DIMS = 2e-6 * 16 * 64 * 64  # GRPO-Guard's clip range on SD3.5 (arXiv 2510.22319) times latent dims


class SamplerFacts(Protocol):
    """The facts about a stochastic sampler that settings need."""

    @property
    def flow_only(self) -> bool:
        """Whether the sampler has a flow model's diffusion rate."""
        ...

    def clip_range_for(self, dims: int) -> float:
        """The published clip range, for latents of so many dims."""
        ...


@dataclass(frozen=True)
class LossSettings:
    """The base of an objective's own settings.

    Its properties are facts that a plan, an estimate or a trainer asks for.
    """

    adv_clip_max: float = setting(5.0, above(0))
    """Advantages are clipped to plus and minus this number."""
    kl_beta: float = setting(0.0, at_least(0))
    """The weight of the distance to the reference: the mean square difference of velocities, unless the objective has
    another distance."""
    negative_weight: float = setting(1.0, between(0, 1))
    """The factor of negative advantages when a run begins.
    At 0 the members below the mean are not trained on."""
    final_negative_weight: float | None = setting(None, between(0, 1).or_empty(" for no change"))
    """The factor of negative advantages when the run ends; it changes evenly from one to the other.
    Empty: it stays the same."""

    whole_groups: ClassVar[bool] = False
    """Whether the loss of an item depends on the other members of its group."""
    group_size: ClassVar[int | None] = None
    """The number of members of every group that is trained on; None for any number."""
    rollout_weights: ClassVar[str] = "current"
    """The weights that sample: `current`, or a name of `averages`."""

    def negative_weight_at(self, progress: float) -> float:
        """The factor of negative advantages after a share of the run's iterations."""
        last = self.negative_weight if self.final_negative_weight is None else self.final_negative_weight
        return self.negative_weight + progress * (last - self.negative_weight)

    @property
    def stores(self) -> Stored:
        """The parts of a trajectory that sampling must keep for the loss."""
        return "latents"

    @property
    def trains_transitions(self) -> bool:
        """Whether the loss trains stochastic steps, and not only final latents."""
        return self.stores != "latents"

    def items_per_trajectory(self, num_trained_steps: int) -> int:
        """The number of items that a trajectory is trained on: its transitions, or draws of a noise level."""
        return num_trained_steps

    @property
    def uses_reference(self) -> bool:
        """Whether the loss compares the policy with the weights that training began with."""
        return self.kl_beta > 0

    @property
    def averages(self) -> Mapping[str, Average]:
        """Named averages of the weights that the run keeps for the loss, beside `reference`."""
        return {}

    @property
    def extra_forwards(self) -> int:
        """The forward passes of a trained item with other weights than the current ones."""
        return int(self.uses_reference)

    def for_sampler(self, sampler: SamplerFacts, latent_dims: int) -> Self:
        """The settings, completed by what follows from the sampler and the number of a latent's dims.

        ValueError for a sampler that the loss cannot work with.
        """
        return self


@dataclass(frozen=True)
class GRPOSettings(LossSettings):
    """GRPO on stochastic steps (Flow-GRPO, arXiv 2505.05470)."""

    clip_range: float | None = setting(None, above(0).or_empty(" for the published one"))
    """The range around 1 that ratios of mean-over-dims log-probs are clipped to.
    It belongs to a latent size: 1e-4 at 16x64x64 corresponds to 3.2e-3 at 8x16x16.
    Empty: the value published with the sampler, or with the guarded ratio, for this model's latents."""
    ratio: Literal["plain", "guard"] = "plain"
    """The ratio of densities.
    `guard` is GRPO-Guard's normalised ratio (arXiv 2510.22319), whose clip range is smaller."""
    step_weights: Literal["equal", "noise", "inverse_h"] = "equal"
    """The weights of steps, with mean 1.
    `noise` weighs steps by their std (TempFlow-GRPO, arXiv 2508.04324), `inverse_h` by 1 over their length
    (GRPO-Guard)."""
    kl_form: Literal["exact", "flow_grpo", "latent", "velocity"] = "exact"
    """The distance to the reference.
    `exact`: the squared distance of means over 2 s^2 h.
    `flow_grpo`: the same over 2 s^2, so that its betas are about ten times larger.
    `latent` and `velocity`: the plain mean square distance of the steps' means, or of the network's velocities."""

    @property
    def stores(self) -> Stored:
        return "means" if self.ratio == "guard" else "transitions"

    def for_sampler(self, sampler: SamplerFacts, latent_dims: int) -> Self:
        if self.kl_form == "flow_grpo" and not sampler.flow_only:
            raise ValueError(
                "objective.grpo.kl_form: flow_grpo needs a flow model's diffusion rate; take exact for this sampler"
            )
        if self.clip_range is not None:
            return self
        guarded = _GUARD_CLIP_TIMES_DIMS / latent_dims
        clip_range = guarded if self.ratio == "guard" else sampler.clip_range_for(latent_dims)
        return replace(self, clip_range=clip_range)


@dataclass(frozen=True)
class DrawnSettings(LossSettings):
    """The base of objectives that noise final latents anew and train draws of a noise level."""

    draws: int = setting(4, at_least(1))
    """The number of noise levels that are trained per trajectory."""
    time_fraction: float = setting(0.99, SHARE)
    """The share of the sampling grid, from its noisy end, in which these levels lie."""

    def items_per_trajectory(self, num_trained_steps: int) -> int:
        return self.draws


@dataclass(frozen=True)
class OldPolicySettings(DrawnSettings):
    """The base of objectives that sample by `old`, an average of the weights, and compare the current ones with it.

    Its decay is the same in the public configurations of DiffusionNFT and of the ELBO policy gradient.
    """

    rollout_weights: ClassVar[str] = "old"

    @property
    def averages(self) -> Mapping[str, Average]:
        return {"old": Average(ramp=1e-3, limit=0.5)}

    @property
    def extra_forwards(self) -> int:
        return 1 + self.uses_reference


@dataclass(frozen=True)
class NFTSettings(OldPolicySettings):
    """DiffusionNFT (arXiv 2509.16117)."""

    kl_beta: float = setting(1e-4, at_least(0))
    beta: float = setting(1.0, above(0))
    """The distance of the positive and the negative policy from the old one."""


@dataclass(frozen=True)
class AWMSettings(DrawnSettings):
    """Advantage weighted matching (arXiv 2509.25050). Defaults are Flow-Factory's for SD3.5, except the weighting."""

    adv_clip_max: float = setting(1.0, above(0))
    """Advantages are clipped to plus and minus this number.
    Flow-Factory takes 1. The authors take 5 with `adv_scale` 0.2."""
    kl_beta: float = setting(1e-4, at_least(0))
    draws: int = setting(6, at_least(1))
    time_fraction: float = setting(0.9, SHARE)
    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "uniform"
    """The weight of the flow-matching loss by its noise level t, or a root of the loss times t.
    The authors and Flow-Factory take ghuber."""
    huber_power: float = setting(0.25, SHARE)
    """The power of ghuber: t (loss ** power) / power.
    huber is half of it at power 0.5."""
    clip_range: float = setting(1.0, above(0))
    """The range around 1 that ratios are clipped to."""
    adv_scale: float = setting(1.0, above(0))
    """The factor of the clipped advantages."""
    average_beta: float = setting(1.0, at_least(0))
    """The weight of the mean square distance of velocities to an average of the weights over time."""
    average_ramp: float = setting(3e-4, at_least(0))
    """The average's decay is min(average_ramp n, average_limit) after the n-th iteration.
    Flow-Factory takes 0.0003. The authors take 0.001."""
    average_limit: float = setting(0.3, FRACTION)
    """The largest decay of that average."""

    @property
    def averages(self) -> Mapping[str, Average]:
        return {"average": Average(self.average_ramp, self.average_limit)}

    @property
    def extra_forwards(self) -> int:
        return (self.average_beta > 0) + self.uses_reference


@dataclass(frozen=True)
class DGPOSettings(DrawnSettings):
    """Direct group preference optimisation (arXiv 2510.08425). The members of a group share noise levels and noise."""

    kl_beta: float = setting(1e-3, at_least(0))
    time_fraction: float = setting(0.6, SHARE)
    dpo_beta: float = setting(100.0, above(0))
    """The sharpness of a group's weight: how strongly it follows the difference of losses to the reference."""
    clip_range: float = setting(0.05, above(0))
    """The largest difference of the flow-matching loss to that of an average of the weights over time."""

    whole_groups: ClassVar[bool] = True

    @property
    def uses_reference(self) -> bool:
        return True

    @property
    def averages(self) -> Mapping[str, Average]:
        return {"average": Average(ramp=1e-3, limit=0.3)}

    @property
    def extra_forwards(self) -> int:
        return 2


@dataclass(frozen=True)
class ELBOSettings(OldPolicySettings):
    """The ELBO policy gradient (EPG, arXiv 2602.04663): no ratio is clipped."""

    kl_beta: float = setting(1e-3, at_least(0))
    """The weight of the mean square distance of velocities to the reference.
    The authors take 1e-4 with advantages of a tenth of the reward less its mean, which is 1e-3 per unit of reward."""
    weighting: Literal["adaptive", "simple", "path_kl"] = "adaptive"
    """The weight of the squared error of velocities by its noise level t, in the log-likelihood.
    `adaptive`: t^2 over the mean absolute error of the predicted picture (the authors' choice). `simple`: 1.
    `path_kl`: (1 - t) / (t + 0.001), the weight of the bound itself, with which the authors found training unstable."""


@dataclass(frozen=True)
class DPOSettings(DrawnSettings):
    """Diffusion-DPO (arXiv 2311.12908), on pairs: groups of which two members survive, or the pairs of a file."""

    negative_weight: float = setting(1.0, Rule(lambda weight: weight == 1, "1, since a pair needs both of its members"))
    final_negative_weight: float | None = setting(
        None, Rule(lambda weight: weight is None, "empty, since a pair needs both of its members")
    )
    beta: float = setting(1000.0, above(0))
    """The strength of the pull to the reference: how strongly the loss follows the margin between winner and loser.
    Published code halves the loss beforehand, so that its beta of 5000 for SDXL is 2500 here."""
    label_smoothing: float = setting(0.0, Rule(lambda share: 0 <= share < 0.5, "at least 0 and below 0.5"))
    """The share of labels that are expected to be flipped (conservative DPO, arXiv 2305.18290)."""

    whole_groups: ClassVar[bool] = True
    group_size: ClassVar[int | None] = 2

    @property
    def uses_reference(self) -> bool:
        return True

    @property
    def extra_forwards(self) -> int:
        return 1


@dataclass(frozen=True)
class SFTSettings(DrawnSettings):
    """Supervised fine-tuning on chosen pictures: the control of preference optimisation."""

    negative_weight: float = setting(
        0.0, Rule(lambda weight: weight == 0, "0, since only chosen pictures are trained on")
    )
    final_negative_weight: float | None = setting(
        None, Rule(lambda weight: weight is None, "empty, since only chosen pictures are trained on")
    )


@dataclass(frozen=True)
class ObjectiveSettings:
    """The settings of learning from rewards."""

    name: ObjectiveName = setting("grpo", one_of(OBJECTIVES, "Class"))  # noqa: RUF009 (a field)
    """The objective.
    Its own settings are the part of that name; the other parts are not read.
    `module:Class` is an objective of yours, with its settings in `custom`."""
    advantage: Literal["group", "batch", "gdpo"] = "group"
    """The std that advantages are divided by.
    `group`: that of the group's survivors (the paper's).
    `batch`: that of the whole batch (flow_grpo's global_std). Recorded pairs keep their own.
    `gdpo` normalises each reward by its group, then the weighted sum by the batch (arXiv 2601.05242), so that no
    reward drowns another."""
    baseline: Literal["survivors", "group"] = "survivors"
    """The members that mean and std are taken over.
    `survivors`: the paper's. `group`: the full group, where all members have final rewards (post-hoc selection)."""
    adv_eps: float = setting(1e-4, above(0))
    """The number added to the std that advantages are divided by."""
    grpo: GRPOSettings = field(default_factory=GRPOSettings)
    nft: NFTSettings = field(default_factory=NFTSettings)
    awm: AWMSettings = field(default_factory=AWMSettings)
    dgpo: DGPOSettings = field(default_factory=DGPOSettings)
    elbo: ELBOSettings = field(default_factory=ELBOSettings)
    dpo: DPOSettings = field(default_factory=DPOSettings)
    sft: SFTSettings = field(default_factory=SFTSettings)
    custom: Values = field(default_factory=Values)
    """The settings of an objective of yours: a JSON object with the fields of its class's `Settings`."""

    @property
    def loss(self) -> LossSettings:
        """The settings of the named objective: its own section, or `custom` for a class that has no section."""
        section = getattr(self, self.name, None)
        if isinstance(section, LossSettings):
            return section
        settings: LossSettings = read_settings(load_objective(self.name).Settings, self.custom, "objective.custom.")
        check_rules(settings, "objective.custom.")
        return settings

    def check(self) -> None:
        """Raise ValueError for a baseline that the advantage does not have, and for settings that nothing reads."""
        if self.advantage == "gdpo" and self.baseline != "survivors":
            raise ValueError(f"objective.baseline must be survivors for objective.advantage gdpo, not {self.baseline}")
        if self.custom and self.loss is getattr(self, self.name, None):
            raise ValueError(
                f"objective.custom must be empty for objective.name {self.name}; give objective.{self.name}"
            )
        self.loss  # noqa: B018 (reading the user's own settings checks them)


class ObjectiveClass(Protocol):
    """The class of an objective, made from settings of its own kind."""

    Settings: type[LossSettings]

    def __call__(self, settings: LossSettings) -> Objective: ...


def load_objective(name: str) -> ObjectiveClass:
    """Find the class of an objective.

    Raises ValueError for a class of the user's own without `Settings`.
    """
    kind: ObjectiveClass = load_named(name, OBJECTIVES, "objective.name", "Class")
    own = getattr(kind, "Settings", None)
    if not (isinstance(own, type) and issubclass(own, LossSettings)):
        raise ValueError(
            f"objective.name {name} must be a class with `Settings`, a frozen dataclass derived from"
            " progrpo.objectives.settings.LossSettings"
        )
    return kind
