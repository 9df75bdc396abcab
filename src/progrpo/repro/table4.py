"""Table 4 of the paper, the cost of an epoch: the plans' own counts, times the cost of each call. Standard library
only.

    total = P (S nfe + m S trained_steps + V decodes + R reward_calls)

The counts are `Plan.predict`'s. The paper prints V and R. It does not print S, m and P: they were fitted to its three
totals, so that equal totals prove nothing. The fit shows the structure. Round constants explain all three totals, if a
plan prunes after its sixth and eighth network call and takes its previews from calls that it makes anyway. Pruning
after the fifth and seventh call fits as well, with S = 4.565 and m = 3.25; there Flash is 5.4 % cheaper than filtering
after sampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from progrpo.rollout.plan import Plan, PrunePoint, preset

STEPS = 10
PRINTED_TFLOPS = {"flow-grpo": 453_474.18, "standard": 335_626.82, "flash": 267_365.79}
PRINTED_SPEED = {"flow-grpo": 1.0, "standard": 1.26, "flash": 1.41}

PLANS = {
    name: preset(ours, STEPS) for name, ours in (("flow-grpo", "none"), ("standard", "standard"), ("flash", "flash"))
}
NOT_PRINTED = {
    "posthoc 24->12": preset("posthoc", STEPS),
    "posthoc 48->12": Plan(48, final_keep=12),
    "early 48->24->12": Plan(48, (PrunePoint(1, 24), PrunePoint(3, 12))),
    "early 24->12": Plan(24, (PrunePoint(2, 12),)),
}
BASELINES = ((10, 4.0), (10, 3.0), (3, 3.0), (2, 3.0), (1, 3.0))
"""Trained steps, and the cost of a training step in forward passes: 3, or 4 with a reference pass for the KL term."""


@dataclass(frozen=True)
class UnitCosts:
    """The cost of each part of an epoch: TFLOPs of a call, a decode and a reward, and a training step in calls."""

    call: float = 3.880
    decode: float = 2.49
    reward: float = 0.34
    train: float = 4.0
    prompts: int = 96

    def by_stage(self, plan: Plan, trained_steps: int) -> dict[str, float]:
        """The TFLOPs of an epoch by stage."""
        cost = plan.predict(STEPS, trained_steps, guidance=False)
        return {
            "sampling": self.prompts * self.call * cost.nfe,
            "training": self.prompts * self.train * self.call * cost.trained_steps,
            "decodes and rewards": self.prompts * (self.decode * cost.decodes + self.reward * cost.reward_calls),
        }

    def total(self, plan: Plan, trained_steps: int) -> float:
        return sum(self.by_stage(plan, trained_steps).values())


class Table4(TypedDict):
    """The table, each entry by plan, with the costs and counts behind it."""

    totals_tflops: dict[str, float]
    printed_tflops: dict[str, float]
    old_over_new: dict[str, float]
    saved: dict[str, float]
    printed_speed: dict[str, float]
    unit_costs: UnitCostRecord
    counts_per_prompt: dict[str, dict[str, int]]
    shares: dict[str, dict[str, float]]
    old_over_new_by_trained_steps: list[dict[str, float]]
    """One row per baseline: its trained steps, the cost of its training step, and the ratio of each plan."""


class UnitCostRecord(TypedDict):
    """The unit costs, and which of them are fitted."""

    network_call_tflops: float
    decode_tflops: float
    reward_tflops: float
    training_step_in_network_calls: float
    prompts: int
    fitted: list[str]


def table4() -> Table4:
    """Compute the table and the counts behind it, ready for JSON."""
    units = UnitCosts()
    totals = {name: units.total(plan, STEPS) for name, plan in PLANS.items()}
    base = totals["flow-grpo"]
    everything = {**PLANS, **NOT_PRINTED}
    counts = {name: plan.predict(STEPS, STEPS, guidance=False) for name, plan in everything.items()}
    return {
        "totals_tflops": totals,
        "printed_tflops": PRINTED_TFLOPS,
        "old_over_new": {name: base / total for name, total in totals.items()},
        "saved": {name: 1 - total / base for name, total in totals.items()},
        "printed_speed": PRINTED_SPEED,
        "unit_costs": {
            "network_call_tflops": units.call,
            "decode_tflops": units.decode,
            "reward_tflops": units.reward,
            "training_step_in_network_calls": units.train,
            "prompts": units.prompts,
            "fitted": ["network_call_tflops", "training_step_in_network_calls", "prompts"],
        },
        "counts_per_prompt": {
            name: {"network_calls": c.nfe, "trained_steps": c.trained_steps, "decodes": c.decodes}
            for name, c in counts.items()
        },
        "shares": {name: _shares(units.by_stage(plan, STEPS)) for name, plan in PLANS.items()},
        "old_over_new_by_trained_steps": [
            {"trained_steps": steps, "training_step_in_network_calls": train, **_ratios(everything, steps, train)}
            for steps, train in BASELINES
        ],
    }


def _shares(by_stage: dict[str, float]) -> dict[str, float]:
    return {name: tflops / sum(by_stage.values()) for name, tflops in by_stage.items()}


def _ratios(plans: dict[str, Plan], trained_steps: int, train: float) -> dict[str, float]:
    """The cost of plain GRPO over each plan's cost, both with so many trained steps."""
    units = UnitCosts(train=train)
    base = units.total(PLANS["flow-grpo"], trained_steps)
    return {name: base / units.total(plan, trained_steps) for name, plan in plans.items() if name != "flow-grpo"}


def in_words(table: Table4) -> str:
    """The table as a page of text."""
    lines = ["Cost of an epoch, SD3.5-M, 10 steps (Pro-GRPO, arXiv 2512.15347, table 4)", ""]
    lines += [f"  {'':<12}{'TFLOPs':>12}{'printed':>12}{'old/new':>9}{'saved':>8}{'printed speed':>15}"]
    for name, total in table["totals_tflops"].items():
        ratio, saved = table["old_over_new"][name], table["saved"][name]
        printed, speed = table["printed_tflops"][name], table["printed_speed"][name]
        lines.append(f"  {name:<12}{total:>12,.0f}{printed:>12,.0f}{ratio:>8.2f}x{saved:>8.1%}{speed:>14.2f}x")
    units = table["unit_costs"]
    lines += [
        "",
        f"  Unit costs: a network call {units['network_call_tflops']} TFLOPs, {units['prompts']} prompts and a training"
        f" step of {units['training_step_in_network_calls']:g} calls",
        f"  are fitted to the printed totals. A decode ({units['decode_tflops']}) and a reward"
        f" ({units['reward_tflops']}) are printed in the paper. So equal totals",
        "  prove nothing; the counts of calls, decodes and trained steps are the plans' own.",
        "  The paper's 1.26x and 1.41x are 1 + the share saved. Old cost over new cost is 1.35x and 1.70x.",
        "  Nearly all of the saving is training 12 of 24: filtering after sampling (posthoc 24->12) has 1.65x.",
        "",
        "Shares of the cost",
        "",
    ]
    lines += [
        f"  {name:<12}" + ", ".join(f"{stage} {share:.1%}" for stage, share in shares.items())
        for name, shares in table["shares"].items()
    ]
    names = [n for n in table["old_over_new_by_trained_steps"][0] if "->" in n or n in PLANS]
    lines += [
        "",
        "Old cost over new, by the steps that the baseline trains (each at its own cost of a training step)",
        "",
    ]
    lines += ["  steps  calls/step  " + "".join(f"{name:>18}" for name in names)]
    lines += [
        f"  {row['trained_steps']:>5}{row['training_step_in_network_calls']:>14g}"
        + "".join(f"{row[name]:>17.2f}x" for name in names)
        for row in table["old_over_new_by_trained_steps"]
    ]
    return "\n".join(lines)
