"""The paper's figures and tables (Pro-GRPO, arXiv 2512.15347) that are training runs: arms, printed numbers, limits.

Standard library only. Printed numbers were taken from public notes on the paper, since its own text was not at hand:
where notes differ, `limits` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_FLOW = ("flow baseline", "flow flash", "flow standard")
_OTHER_KINDS = ("other kinds baseline", "other kinds flash", "other kinds standard")
_EXPANDED = ("diffusion 32 -> 8", "diffusion 48 -> 8", "diffusion 64 -> 8")


_KINDS = ("flow", "diffusion", "two rewards", "other kinds")
"""The first words of arms whose models, prompts and rewards are the same, so that their rewards can be compared."""


def kind_of(arm: str) -> str:
    """The kind of an arm."""
    return next(kind for kind in _KINDS if arm.startswith(kind))


@dataclass(frozen=True)
class Experiment:
    """A figure or table: what the paper shows by it, the arms that show it here, and what it printed."""

    title: str
    claim: str
    """The paper's finding, in a sentence."""
    arms: Sequence[str]
    printed: Mapping[str, Mapping[str, str]]
    """The printed numbers by arm and column; empty for a figure, whose numbers are not printed."""
    limits: Sequence[str]
    """The limits of the comparison, a sentence each."""
    curve: str = "eval/graded"
    """The metric that is drawn."""
    by_kind: bool = False
    """Whether the table has the accuracy by kind of prompt."""


_MODELS = (
    "The paper trains SD 3.5 Medium or SD 1.4 by GRPO on 24 or 8 A100; ours are the built-in models of 2 to 4 million"
    " parameters under DGPO, since plain GRPO learns little on them in minutes ([the road](road_to_reward.md))."
)
_REWARD = (
    "The paper's reward is PickScore or HPSv2.1; ours is `shapes_match`, continuous and different for every prompt."
    " The strict verdict, a taste and a second detector judge from outside."
)
_EQUAL = (
    "All arms make the same number of iterations, as in the paper, so that they cost differently: seconds stand beside."
)

EXPERIMENTS: dict[str, Experiment] = {
    "fig2": Experiment(
        "Figure 2: training on the full group, on a uniform half, and on the half that OVF keeps",
        "OVF keeps the spread of rewards higher through training and ends above the full group of 24, while a uniform"
        ' half follows the full group ("less is more").',
        ("flow baseline", "flow uniform 12 of 24", "flow OVF 12 of 24"),
        {},
        (_MODELS, _REWARD, "The figure's numbers are not printed."),
    ),
    "fig5": Experiment(
        "Figure 5: rewards while training, by plan, on a flow and a diffusion model",
        "Standard and Flash rise faster and end higher than the baseline on both families.",
        (*_FLOW, "diffusion baseline", "diffusion 48 -> 8"),
        {},
        (_MODELS, _REWARD, _EQUAL, "The figure's numbers are not printed."),
    ),
    "table1": Experiment(
        "Table 1: a flow model by plan",
        "Both plans beat Flow-GRPO in the trained and in every held-out reward, at 1.26 and 1.41 times its speed.",
        _FLOW,
        {
            "the base": {"Aesthetic": "5.408", "ImageReward": "0.852", "PickScore, other prompts": "22.425"},
            "flow baseline": {
                "speed": "1.00x",
                "PickScore": "23.322",
                "Aesthetic": "5.912",
                "ImageReward": "1.298",
                "PickScore, other prompts": "23.599",
                "HPSv2.1": "0.316",
            },
            "flow flash": {
                "speed": "1.41x",
                "PickScore": "23.722",
                "Aesthetic": "6.030",
                "ImageReward": "1.381",
                "PickScore, other prompts": "23.868",
                "HPSv2.1": "0.319",
            },
            "flow standard": {
                "speed": "1.26x",
                "PickScore": "24.008",
                "Aesthetic": "6.046",
                "ImageReward": "1.397",
                "PickScore, other prompts": "24.108",
                "HPSv2.1": "0.322",
            },
        },
        (_MODELS, _REWARD, _EQUAL, "The paper's speed is 1 + the share of cost saved ([table 4](table4.md))."),
    ),
    "table2": Experiment(
        "Table 2: a diffusion model, one reward and two",
        "48 -> 32 -> 8 beats DanceGRPO's group of 16, with HPSv2.1 and with HPSv2.1 and CLIP together.",
        ("diffusion baseline", "diffusion 48 -> 8", "two rewards baseline", "two rewards 48 -> 8"),
        {
            "diffusion baseline": {"HPSv2.1": "0.369", "ImageReward, other prompts": "1.079"},
            "diffusion 48 -> 8": {"HPSv2.1": "0.391", "ImageReward, other prompts": "1.114"},
            "two rewards 48 -> 8": {"ImageReward, other prompts": "1.140", "Aesthetic, other prompts": "5.852"},
        },
        (_MODELS, _REWARD, _EQUAL, "The second reward here is half of the taste."),
    ),
    "table3": Experiment(
        "Table 3: kinds of prompts that were never trained on",
        "A model trained towards PickScore gains on GenEval, which it was never trained on, most of it under Pro-GRPO.",
        _OTHER_KINDS,
        {
            "the base": {"overall": "0.696 or 0.700", "two objects": ".869", "colours": ".817", "position": ".248"},
            "other kinds baseline": {"overall": "0.719", "two objects": ".942", "colours": ".851", "position": ".288"},
            "other kinds standard": {"overall": "0.726", "two objects": ".947", "colours": ".867", "position": ".323"},
        },
        (
            _MODELS,
            _REWARD,
            "Here the prompts of colours, position and binding are left out of training; the paper trains on general"
            " prompts.",
            "Others report 0.63 for the base of SD 3.5 Medium on GenEval, so that the paper's protocol differs.",
        ),
        by_kind=True,
    ),
    "table5": Experiment(
        "Table 5: the size of the initial group, 32, 48 or 64 -> 8",
        "A larger initial group ends higher in the trained reward, and saturates elsewhere.",
        ("diffusion baseline", *_EXPANDED),
        {
            "diffusion 32 -> 8": {"HPSv2.1": "0.386"},
            "diffusion 48 -> 8": {"HPSv2.1": "0.391"},
            "diffusion 64 -> 8": {"HPSv2.1": "0.393"},
        },
        (_MODELS, _REWARD, _EQUAL),
    ),
    "table6": Experiment(
        "Table 6: prune points early, in the middle and late",
        "Late points end higher, since previews rank better there; early ones barely beat the baseline of 0.369.",
        (
            *(f"diffusion {path} {when}" for path in ("48 -> 8", "32 -> 8") for when in ("early", "middle")),
            "diffusion 48 -> 8",
            "diffusion 32 -> 8",
        ),
        {
            "diffusion 48 -> 8 early": {"HPSv2.1": "0.373", "PickScore, other prompts": "21.711"},
            "diffusion 48 -> 8 middle": {"HPSv2.1": "0.382"},
            "diffusion 48 -> 8": {"HPSv2.1": "0.391", "PickScore, other prompts": "22.075"},
        },
        (
            _MODELS,
            _REWARD,
            _EQUAL,
            "The sources give the path as 32 -> 8, and a number that table 5 has for 48 -> 8: both are run here.",
            "Points after (10, 20), (20, 30) and (30, 40) of 50 steps are after (1, 3), (3, 5) and (5, 7) of ten here.",
        ),
    ),
}
