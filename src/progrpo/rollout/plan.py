"""Plans: the size of a group, its prune points, and their cost. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TypedDict

from progrpo.types import Cost


@dataclass(frozen=True)
class PrunePoint:
    """A prune point: after the network call of zero-based `step`, `keep` members of each group take the step."""

    step: int
    keep: int


@dataclass(frozen=True)
class Plan:
    """The path of a group: it starts with `group_size` members, and prune points and `final_keep` reduce them.

    `final_keep` selects by final rewards. A point that keeps all living members does nothing, and needs no previews.
    With `keep_groups` the first point also stops whole groups: so many of an iteration's groups go on. The members of a
    `recorded` group are pictures that exist already: nothing is sampled, decoded or rewarded.
    """

    group_size: int
    prune: tuple[PrunePoint, ...] = ()
    final_keep: int | None = None
    keep_groups: int | None = None
    recorded: bool = False

    def validate(self, num_inference_steps: int) -> None:
        """Raise ValueError, in one sentence, if the plan cannot be run in that many steps."""
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, not {num_inference_steps}")
        _require_keep("group_size", self.group_size, None)
        living, previous = self.group_size, -1
        for point in self.prune:
            _require_step(point.step, previous, num_inference_steps)
            _require_keep(f"prune keep at step {point.step}", point.keep, living)
            living, previous = point.keep, point.step
        if self.final_keep is not None:
            _require_keep("final_keep", self.final_keep, living)
        if self.keep_groups is not None:
            _require_keep_groups(self.keep_groups, self.prune)

    @property
    def finalists(self) -> int:
        """The number of members that are denoised to the end, decoded and rewarded."""
        return self.prune[-1].keep if self.prune else self.group_size

    @property
    def survivors(self) -> int:
        """The number of members that are trained on."""
        return self.finalists if self.final_keep is None else self.final_keep

    def living_at(self, step: int) -> int:
        """The number of members for which the network call of zero-based `step` is made."""
        return next((point.keep for point in reversed(self.prune) if point.step < step), self.group_size)

    def groups_left(self, prompts: int) -> int:
        """The number of an iteration's groups that go on to the end."""
        return prompts if self.keep_groups is None else min(self.keep_groups, prompts)

    def rows_at(self, step: int, prompts: int) -> int:
        """The number of trajectories in an iteration of so many prompts at the network call of zero-based `step`."""
        none_stopped = self.keep_groups is not None and step <= self.prune[0].step
        return (prompts if none_stopped else self.groups_left(prompts)) * self.living_at(step)

    def trained(self, prompts: int) -> int:
        """The number of trajectories in an iteration of so many prompts that are trained on."""
        return self.groups_left(prompts) * self.survivors

    def stops_groups_after(self, step: int) -> bool:
        """Whether whole groups stop after the network call of `step`."""
        return self.keep_groups is not None and self.prune[0].step == step

    def active_points(self) -> tuple[PrunePoint, ...]:
        """The points that remove members or groups; the others decide nothing and cost nothing."""
        return tuple(
            point
            for point in self.prune
            if point.keep < self.living_at(point.step) or self.stops_groups_after(point.step)
        )

    def keep_after(self, step: int) -> int | None:
        """The number of members to keep after the network call of `step`; None without an active point there."""
        return next((point.keep for point in self.active_points() if point.step == step), None)

    def predict(
        self,
        num_inference_steps: int,
        trained_steps: int,
        guidance: bool,
        ode_steps: int = 1,
        probed: frozenset[int] = frozenset(),
        prompts: int = 1,
    ) -> Cost:
        """The cost of an iteration's prompts, as a run counts it; ValueError if the plan cannot be run.

        NFE: with `guidance` a network call is a CFG pair and counts two. Decodes: all living members at each active
        point (previews), and the finalists. Each decoded picture is rewarded once. A preview needs a network call for
        each of `ode_steps` after the first. At the steps of `probed` a probe needs none of that, and with `ode_steps` 0
        a latent reward head nowhere does. A trajectory is trained on `trained_steps`.
        """
        self.validate(num_inference_steps)
        trained = self.trained(prompts) * trained_steps
        if self.recorded:
            return Cost(trained_steps=trained)
        ranked = {point.step: self.rows_at(point.step, prompts) for point in self.active_points()}
        by_probe = sum(living for step, living in ranked.items() if step in probed or ode_steps == 0)
        previews = sum(ranked.values()) - by_probe
        calls = sum(self.rows_at(step, prompts) for step in range(num_inference_steps)) + previews * (ode_steps - 1)
        decodes = previews + self.rows_at(num_inference_steps, prompts)
        return Cost(calls * (2 if guidance else 1), decodes, decodes, trained, previews, by_probe)


@dataclass(frozen=True)
class UnitCosts:
    """The seconds of one sample's network call, one preview, one finished picture, and one trained step.

    A finished picture is decoded and rewarded. A trained step is one that a plan predicts: those of members without an
    advantage, which are not computed, count too.
    """

    call: float
    preview: float
    finish: float
    train: float

    def seconds(self, cost: Cost) -> float:
        """The seconds of a cost; a probe's ranking takes next to none."""
        finished = cost.decodes - cost.previews
        return (
            cost.nfe * self.call
            + cost.previews * self.preview
            + finished * self.finish
            + cost.trained_steps * self.train
        )


def unit_costs(counted: Cost, seconds: Mapping[str, float], preview: float | None = None) -> UnitCosts:
    """The unit costs of counted work whose stages took these seconds; both must hold a finished iteration.

    Its trained steps are those that the plan predicted. Without previews, one is taken to cost `preview`, or without
    that as much as a finished picture. Scoring that `overlapped` the sampling of others (`reward.waves`) cost no time.
    """
    waited = seconds["preview"] + seconds["reward"]
    own = max(0.0, 1 - seconds.get("overlapped", 0.0) / waited) if waited else 1.0
    finish = own * seconds["reward"] / (counted.decodes - counted.previews)
    if counted.previews:
        preview = own * seconds["preview"] / counted.previews
    return UnitCosts(
        call=seconds["sample"] / counted.nfe,
        preview=finish if preview is None else preview,
        finish=finish,
        train=seconds["update"] / max(1, counted.trained_steps),
    )


def _require_keep(name: str, keep: int, living: int | None) -> None:
    if keep < 2:
        raise ValueError(f"{name} must be at least 2, not {keep}: a group of one has no variance to learn from")
    if living is not None and keep > living:
        raise ValueError(f"{name} must be at most the {living} members that still live there, not {keep}")


def _require_keep_groups(keep_groups: int, prune: tuple[PrunePoint, ...]) -> None:
    if keep_groups < 1:
        raise ValueError(f"keep_groups must be at least 1, not {keep_groups}: no group would be trained on")
    if not prune:
        raise ValueError(
            "keep_groups must go with a prune point, at which the other groups stop; add one, or leave it out"
        )


def _require_step(step: int, previous: int, num_inference_steps: int) -> None:
    if step < 0:
        raise ValueError(f"prune step must be at least 0, not {step}; steps count from zero")
    if step <= previous:
        raise ValueError(f"prune steps must increase: step {step} comes after step {previous}")
    if step > num_inference_steps - 2:
        raise ValueError(
            f"prune step {step} saves no network call of num_inference_steps={num_inference_steps}:"
            f" use a step of at most {num_inference_steps - 2}, or final_keep to select on final rewards"
        )


# A plan and the number of steps it was made for. `late` is ours: on a toy flow under GRPO on all steps it beat the best
# plain group whatever training cost (docs/results/when_pruning_pays.md). From Pro-GRPO (arXiv 2512.15347): standard and
# flash for SD3.5-M, against a group of 24 (`none`), and sd14 for SD1.4, against 16. The control `posthoc` prunes after
# sampling. A run with `auto` begins as `none`.
PRESETS: dict[str, tuple[Plan, int]] = {
    "late": (Plan(12, (PrunePoint(8, 6),)), 10),
    "standard": (Plan(48, (PrunePoint(5, 24), PrunePoint(7, 12))), 10),
    "flash": (Plan(24, (PrunePoint(5, 16), PrunePoint(7, 12))), 10),
    "posthoc": (Plan(24, final_keep=12), 10),
    "none": (Plan(24), 10),
    "sd14": (Plan(48, (PrunePoint(30, 32), PrunePoint(40, 8))), 50),
    "auto": (Plan(24), 10),
}


_MOST_STEPS = 9


def _moved(point: PrunePoint, from_steps: int, to_steps: int) -> PrunePoint:
    calls = min(max(1, round((point.step + 1) * to_steps / from_steps)), to_steps - 1)
    return replace(point, step=calls - 1)


def preset(name: str, num_inference_steps: int) -> Plan:
    """The plan of that name, each point moved to the same share of the network calls.

    The share is rounded, to one call or more, and short of the last. Raises ValueError for an unknown name, and where
    the steps are so few that points meet or no call is left to save.
    """
    if name not in PRESETS:
        raise ValueError(f"plan preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    plan, steps = PRESETS[name]
    plan = replace(plan, prune=tuple(_moved(point, steps, num_inference_steps) for point in plan.prune))
    try:
        plan.validate(num_inference_steps)
    except ValueError as error:
        raise ValueError(
            f"num_inference_steps={num_inference_steps} is too few for the plan preset {name!r} ({error}): raise it, or"
            " write a custom plan"
        ) from error
    return plan


def path(plan: Plan) -> list[int]:
    """The numbers of members at the start, after each active point, and after a choice by final rewards."""
    last = [plan.survivors] if plan.survivors < plan.finalists else []
    return [plan.group_size, *(point.keep for point in plan.active_points()), *last]


def point_steps(plan: Plan) -> list[int]:
    """The steps after which choices by previews come."""
    return [point.step for point in plan.active_points()]


def _spread_steps(num_inference_steps: int) -> list[int]:
    """The steps of candidates' points, whose pairs grow with the square of their number."""
    last = num_inference_steps - 2
    parts = min(_MOST_STEPS - 1, last)
    return [round(last * part / parts) for part in range(parts + 1)] if parts > 0 else list(range(last + 1))


def plans(group_size: int, survivors: int, num_inference_steps: int, most_points: int = 2) -> Iterator[Plan]:
    """The plans from a group to at least so many survivors.

    They have up to `most_points` prune points, and some of them a choice by final rewards. Points lie after up to nine
    steps, from the first to the last that saves a call: every one of 10 steps, every sixth of 50.
    """
    keeps = sorted({round(survivors + (group_size - survivors) * part / 3) for part in range(4)} - {group_size})
    for count in range(most_points + 1):
        for steps in combinations(_spread_steps(num_inference_steps), count):
            for falling in combinations(reversed(keeps), count):
                points = tuple(PrunePoint(step, keep) for step, keep in zip(steps, falling, strict=True))
                left = points[-1].keep if points else group_size
                yield Plan(group_size, points)
                yield from (Plan(group_size, points, keep) for keep in keeps if keep < left)


class PlanCosts(TypedDict):
    """The path of a plan, its cost per prompt that goes on to the end, and the cost of an iteration.

    `groups` are an iteration's prompts, and under `keep_groups` those that go on.
    """

    group_size: int
    survivors: int
    path: list[int]
    groups: list[int]
    prune_steps: list[int]
    num_inference_steps: int
    nfe_per_prompt: int
    decodes_per_prompt: int
    reward_calls_per_prompt: int
    trained_steps_per_prompt: int
    nfe_per_iteration: int
    decodes_per_iteration: int
    reward_calls_per_iteration: int
    trained_steps_per_iteration: int
    nfe_full_group: int
    nfe_saved: float
    nfe_ratio_to_none: float


def summary(
    plan: Plan, num_inference_steps: int, guidance: bool, per_prompt: Cost, per_iteration: Cost, prompts: int = 1
) -> PlanCosts:
    """The path and cost of a plan, ready for JSON.

    The costs are those of a prompt that goes on to the end, and of the `prompts` of an iteration.
    `nfe_saved` is the share of the full groups' network calls that pruning avoids; `nfe_ratio_to_none` compares with
    the preset `none`, groups of 24 without pruning, and is above 1 where a larger start costs more than pruning saves.
    """
    go_on = [plan.groups_left(prompts)] if plan.keep_groups is not None else []
    full = Plan(plan.group_size, recorded=plan.recorded).predict(num_inference_steps, 0, guidance)
    none = preset("none", num_inference_steps).predict(num_inference_steps, 0, guidance)
    return {
        "group_size": plan.group_size,
        "survivors": plan.survivors,
        "path": path(plan),
        "groups": [prompts, *go_on],
        "prune_steps": point_steps(plan),
        "num_inference_steps": num_inference_steps,
        "nfe_per_prompt": per_prompt.nfe,
        "decodes_per_prompt": per_prompt.decodes,
        "reward_calls_per_prompt": per_prompt.reward_calls,
        "trained_steps_per_prompt": per_prompt.trained_steps,
        "nfe_per_iteration": per_iteration.nfe,
        "decodes_per_iteration": per_iteration.decodes,
        "reward_calls_per_iteration": per_iteration.reward_calls,
        "trained_steps_per_iteration": per_iteration.trained_steps,
        "nfe_full_group": full.nfe,
        "nfe_saved": 0.0 if plan.recorded else 1 - per_iteration.nfe / (full.nfe * prompts),
        "nfe_ratio_to_none": per_iteration.nfe / (none.nfe * prompts),
    }
