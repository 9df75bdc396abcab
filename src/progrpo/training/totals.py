"""Totals of a run so far, over all processes: costs, seconds, missing scores and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TypedDict, cast

import torch

from progrpo.rewards.mixture import Failures, RewardMixture
from progrpo.training import checks
from progrpo.training.distributed import Ranks
from progrpo.types import Cost


class TotalsState(TypedDict):
    """The totals in a checkpoint. Those of an older progrpo lack `unpruned`, `lost` and `fault`."""

    counted: dict[str, int]
    predicted: dict[str, int]
    audited: dict[str, int]
    unpruned: int
    seconds: dict[str, float]
    asked: dict[str, int]
    missing: dict[str, int]
    last_error: str | None
    lost: int
    fault: str


class WorkState(TypedDict):
    """Work in a checkpoint."""

    cost: dict[str, int]
    seconds: dict[str, float]


@dataclass
class Totals:
    """The costs, seconds and failures of the run so far. Audits have a line of their own."""

    counted: Cost = field(default_factory=Cost)
    predicted: Cost = field(default_factory=Cost)
    """The sum of what the plan in force predicted for each iteration."""
    audited: Cost = field(default_factory=Cost)
    unpruned: int = 0
    """The NFE of these iterations, had their plans pruned nothing and no network call been shared."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by stage."""
    asked: dict[str, int] = field(default_factory=dict)
    """The number of scores asked of each reward, evaluations and audits included."""
    missing: dict[str, int] = field(default_factory=dict)
    """The number of scores of each reward that are missing."""
    last_error: str | None = None
    """The last error of a reward."""
    lost: int = 0
    """The number of pictures that are not finite, previews, evaluations and audits included."""
    fault: str = ""
    """The reason why the last of these pictures is none."""

    def add_failures(self, failures: Sequence[Failures]) -> None:
        """Add the failures of all processes."""
        for failed in failures:
            for name, asked in failed.asked.items():
                self.asked[name] = self.asked.get(name, 0) + asked
                self.missing[name] = self.missing.get(name, 0) + failed.missing[name]
            self.last_error = failed.last_error or self.last_error
            self.lost += failed.lost
            self.fault = failed.fault or self.fault

    def add_seconds(self, spent: Mapping[str, float]) -> None:
        """Add seconds by stage."""
        for stage, seconds in spent.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @property
    def work(self) -> Work:
        """The work of these iterations, and its seconds by stage."""
        # members without an advantage are not trained on: by the predicted steps, updates cost what they took
        return Work(replace(self.counted, trained_steps=self.predicted.trained_steps), dict(self.seconds))

    def state_dict(self) -> TotalsState:
        return cast(TotalsState, asdict(self))

    def load_state_dict(self, state: TotalsState) -> None:
        self.counted = Cost(**state["counted"])
        self.predicted = Cost(**state["predicted"])
        self.audited = Cost(**state["audited"])
        self.unpruned = state.get("unpruned", 0)
        self.seconds = dict(state["seconds"])
        self.asked = dict(state["asked"])
        self.missing = dict(state["missing"])
        self.last_error = state["last_error"]
        self.lost = state.get("lost", 0)
        self.fault = state.get("fault", "")


@dataclass(frozen=True)
class Work:
    """Work and its seconds by stage."""

    cost: Cost
    seconds: Mapping[str, float]

    @classmethod
    def of(cls, state: WorkState) -> Work:
        return cls(Cost(**state["cost"]), dict(state["seconds"]))

    def state_dict(self) -> WorkState:
        return {"cost": asdict(self.cost), "seconds": dict(self.seconds)}

    def __add__(self, other: Work) -> Work:
        stages = dict.fromkeys([*self.seconds, *other.seconds])
        seconds = {stage: self.seconds.get(stage, 0.0) + other.seconds.get(stage, 0.0) for stage in stages}
        return Work(self.cost + other.cost, seconds)

    def since(self, earlier: Work) -> Work:
        """The work after an earlier moment."""
        seconds = {stage: spent - earlier.seconds.get(stage, 0.0) for stage, spent in self.seconds.items()}
        return Work(self.cost - earlier.cost, seconds)


class FailureCounter:
    """The failures of the trained reward over all processes, added to the run's totals and limited.

    An audit trains nothing, so that the failures of what it scores by `reward_of_audits` stop nothing.
    """

    def __init__(self, reward: RewardMixture, totals: Totals, ranks: Ranks, max_missing: float) -> None:
        self.reward_of_audits = reward.counted_apart()
        self._reward = reward
        self._totals = totals
        self._ranks = ranks
        self._max_missing = max_missing

    def collect_of_audits(self) -> None:
        """Add the failures of audits since the last call to the totals."""
        self._collect(self.reward_of_audits)

    def check(self, when: str) -> dict[str, int]:
        """The missing scores of each reward since the last call. MissingScoresError for more than are allowed."""
        failures = self._collect(self._reward)
        checks.check_failures(failures, self._max_missing, when)
        return {name: sum(failed.missing[name] for failed in failures) for name in self._reward.weights}

    def _collect(self, reward: RewardMixture) -> list[Failures]:
        """The failures of all processes since the last call, added to the totals."""
        failures = self._ranks.gather([reward.failures()])
        self._totals.add_failures(failures)
        return failures


def summed_over(ranks: Ranks, cost: Cost) -> Cost:
    """The sum of a cost over all processes."""
    fields = asdict(cost)
    total = ranks.sum(torch.tensor(list(fields.values()), dtype=torch.int64)).tolist()
    return Cost(**dict(zip(fields, total, strict=True)))
