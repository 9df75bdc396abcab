"""The runs of the paper's experiments (Pro-GRPO, arXiv 2512.15347) as configurations, by name.

An arm is one configuration, whatever table it stands in, so that it runs once. Reduced arms train the built-in models
in minutes on a CPU. Arms of the scale `paper` train the paper's models with its plans, and want GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from progrpo.config import (
    AuditSettings,
    CheckpointSettings,
    Config,
    DGPOSettings,
    EvalSettings,
    ObjectiveSettings,
    PlanSettings,
    PromptSettings,
    RewardSettings,
    RewardTerm,
)
from progrpo.prompts.order import InTurn
from progrpo.recipes import quickstart, sd14_hpsv2, sd35m_pickscore

Scale = Literal["reduced", "paper"]
MATCH, TASTE = RewardTerm("shapes_match"), RewardTerm("shapes_taste", weight=0.5)
HELD_OUT_KINDS = ("colours", "position", "binding")
"""The kinds of built-in prompts that the arms of table 3 are not trained on."""


@dataclass(frozen=True)
class OtherKinds(InTurn):
    """The built-in prompts in turn, without those of `HELD_OUT_KINDS`."""

    def __post_init__(self) -> None:
        trained = {kind: prompts for kind, prompts in self.prompts.items() if kind not in HELD_OUT_KINDS}
        object.__setattr__(self, "prompts", trained)


def arms(scale: Scale) -> dict[str, Config]:
    """All arms of a scale."""
    return _reduced() if scale == "reduced" else _paper()


_FLOW_PLANS: Mapping[str, PlanSettings] = {
    "baseline": PlanSettings(preset="none"),
    "flash": PlanSettings(preset="flash"),
    "standard": PlanSettings(preset="standard"),
}


def _reduced() -> dict[str, Config]:
    # a row of the diffusion model takes twice as long as one of the flow model
    flow, diffusion = _built_in("shapes-flow", prompts=6), _built_in("shapes-diffusion", prompts=4)
    by_kind = replace(flow, prompts=replace(flow.prompts, order=f"{__name__}:OtherKinds"))
    configs = {
        **_by_plan(flow, diffusion, RewardSettings((MATCH, TASTE)), ((1, 3), (3, 5), (5, 7))),
        **{f"other kinds {name}": replace(by_kind, plan=plan) for name, plan in _FLOW_PLANS.items()},
    }
    return _named(configs)


def _paper() -> dict[str, Config]:
    flow, diffusion = sd35m_pickscore(), sd14_hpsv2()
    judged = (RewardTerm("imagereward"), RewardTerm("aesthetic"))
    flow = replace(flow, eval=replace(flow.eval, every=50, rewards=(*judged, RewardTerm("hpsv2"))))
    diffusion = replace(diffusion, eval=replace(diffusion.eval, every=50, rewards=(RewardTerm("pickscore"), *judged)))
    two = RewardSettings((RewardTerm("hpsv2"), RewardTerm("clipscore")))
    return _named(_by_plan(flow, diffusion, two, ((10, 20), (20, 30), (30, 40))))


def _by_plan(
    flow: Config, diffusion: Config, two: RewardSettings, points: Sequence[tuple[int, int]]
) -> dict[str, Config]:
    """The arms that both scales have. `points` are the steps of the two prune points: early, in the middle, late."""

    def expanded(size: int, steps: tuple[int, int]) -> PlanSettings:
        return _custom(size, (steps[0], 2 * size // 3), (steps[1], 8))

    early, middle, late = points
    both = replace(diffusion, reward=two)
    return {
        **{f"flow {name}": replace(flow, plan=plan) for name, plan in _FLOW_PLANS.items()},
        "flow uniform 12 of 24": replace(flow, plan=_after_sampling("uniform")),
        "flow OVF 12 of 24": replace(flow, plan=_after_sampling("ovf")),
        "diffusion baseline": replace(diffusion, plan=_custom(16)),
        **{f"diffusion {size} -> 8": replace(diffusion, plan=expanded(size, late)) for size in (32, 48, 64)},
        **{
            f"diffusion {size} -> 8 {when}": replace(diffusion, plan=expanded(size, steps))
            for size in (32, 48)
            for when, steps in (("early", early), ("middle", middle))
        },
        "two rewards baseline": replace(both, plan=_custom(16)),
        "two rewards 48 -> 8": replace(both, plan=expanded(48, late)),
    }


def _built_in(model: str, prompts: int) -> Config:
    """The paper's ten steps and groups on a built-in model, under the objective that learns there in minutes."""
    base = quickstart()
    return replace(
        base,
        iterations=40,
        model=replace(base.model, path=model),
        prompts=PromptSettings(per_iteration=prompts),
        sampling=replace(base.sampling, num_inference_steps=10),
        reward=RewardSettings((MATCH,)),
        objective=ObjectiveSettings(name="dgpo", dgpo=DGPOSettings(draws=2, kl_beta=0.01)),
        optim=replace(base.optim, lr=2e-4),
        audit=AuditSettings(every=0),
        eval=EvalSettings(every=10, pictures=192, rewards=(RewardTerm("shapes_strict"), RewardTerm("shapes_taste"))),
        checkpoint=CheckpointSettings(every=10),
    )


def _custom(group_size: int, *prune: tuple[int, int]) -> PlanSettings:
    return PlanSettings(preset="custom", group_size=group_size, prune=prune)


def _after_sampling(selector: str) -> PlanSettings:
    return PlanSettings(preset="custom", group_size=24, final_keep=12, selector=selector)


def _named(configs: Mapping[str, Config]) -> dict[str, Config]:
    """The configurations with their arm's name as label, in letters that a folder's name may have."""
    return {name: replace(config, recipe=folder_of(name)) for name, config in configs.items()}


def folder_of(arm: str) -> str:
    """The name of an arm's folder."""
    return arm.lower().replace(" -> ", "-to-").replace(" ", "-")
