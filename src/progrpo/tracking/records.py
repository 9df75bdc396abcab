"""The records that a run keeps, with the types of their fields.

An older run's record may lack fields that were added since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict, cast

MetricValue = float | list[int] | None
"""A number, or None where there is none. Only a plan's path and steps are lists."""

Metrics = dict[str, MetricValue]
"""One iteration's record in metrics.jsonl, flat `stage/name` keys (docs/metrics.md)."""


def metric(record: Mapping[str, MetricValue], name: str) -> float | None:
    """The number of a metric; None where the record has none."""
    value = record.get(name)
    return None if isinstance(value, list) else value


def iteration_of(record: Mapping[str, MetricValue]) -> int:
    """The zero-based iteration that a record is of."""
    iteration = record["iteration"]
    assert isinstance(iteration, int)  # `MetricsFile.read` refuses others
    return iteration


def number_of(record: Mapping[str, MetricValue]) -> int:
    """The number of a record's iteration, from 1 on, as console and pages count them."""
    return iteration_of(record) + 1


def before_and_after(summary: Summary, name: str) -> tuple[float | None, float | None]:
    """The summary's two values of a figure, such as `reward`."""
    figures = cast(Mapping[str, float | None], summary)
    return figures.get(f"{name}_before"), figures.get(f"{name}_after")


class EvaluationRecord(TypedDict, total=False):
    """One picture of an evaluation, in evaluation/before.json and after.json. None is a value that is missing."""

    prompt: str
    kind: str | None
    graded: float | None
    strict: bool | None
    judge: bool | None
    held_out: dict[str, float | None]
    sharpness: float | None
    saturation: float | None
    diversity: float | None
    picture: str | None


class AuditRecord(TypedDict, total=False):
    """One audit group of G members, in audit/*.json: scores by step (T lists of G numbers) and who would be let go.

    `used` are the scores that the run decides on. `stopped_at` has for each member the step after whose network call
    the plan lets it go: T for those dropped on final rewards, None for survivors. `variance` has for each step the
    variance of the final rewards of the `keep` members that the run's selector takes from the whole group by `used`, in
    units of the variance of all; `variance_final` that of the best choice of as many. None: all rewards are equal.
    """

    iteration: int
    prompt: str
    steps: list[int]
    scores: Sequence[Sequence[float | None]]
    used: Sequence[Sequence[float | None]]
    final: Sequence[float | None]
    stopped_at: list[int | None]
    kept_uniform: list[int]
    kept_ovf: list[int]
    keep: list[int]
    variance: Sequence[float | None]
    variance_final: Sequence[float | None]
    strip: str


class CostSummary(TypedDict):
    """The costs that the plan predicted, those that were counted, and those of audits, each by the fields of `Cost`."""

    predicted: dict[str, int]
    counted: dict[str, int]
    audit: dict[str, int]


class PlanSummary(TypedDict):
    """The plan in force when the summary was written.

    `groups` are an iteration's prompts, and those that go on where whole groups stop; older runs have none.
    """

    value: float | None
    path: list[int]
    groups: NotRequired[list[int]]
    prune_steps: list[int]
    selector: str
    num_inference_steps: int


class RewardSummary(TypedDict):
    """The rewards by name: their weights, how many scores were asked for, and how many are missing."""

    weights: dict[str, float]
    selected_on: str
    asked: dict[str, int]
    missing: dict[str, int]
    last_error: str | None


class MeasuredSummary(TypedDict, total=False):
    """The means of the evaluations before and after training."""

    reward_before: float | None
    reward_after: float | None
    accuracy_before: float | None
    accuracy_after: float | None
    judge_before: float | None
    judge_after: float | None
    diversity_before: float | None
    diversity_after: float | None
    held_out_before: dict[str, float | None]
    held_out_after: dict[str, float | None]
    accuracy_by_kind_before: dict[str, float]
    accuracy_by_kind_after: dict[str, float]


class Summary(MeasuredSummary, total=False):
    """The results of a run, in summary.json."""

    recipe: str
    seed: int
    iterations: int
    wall_seconds: float
    status: str
    best_iterations: int | None
    nfe: int
    nfe_saved: float | None
    nfe_ratio_to_none: float | None
    preview_rank_correlation: dict[str, float | None]
    preview_rank_correlation_by_step: dict[str, float | None]
    preview_variance: dict[str, float]
    preview_variance_by_step: dict[str, float]
    preview_variance_final_by_step: dict[str, float]
    cost: CostSummary
    plan: PlanSummary
    rewards: RewardSummary
    missing_pictures: int
    warnings: list[str]
    seconds_by_stage: dict[str, float]
    versions: dict[str, str]
    device: str
    processes: int
    command: str
