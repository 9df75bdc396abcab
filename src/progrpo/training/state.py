"""The state of a run in its checkpoints. A checkpoint of an older progrpo may lack entries that were added since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from progrpo.rollout.probe import ProbeState
from progrpo.training.loss_scale import LossScaleState
from progrpo.training.noise_scale import NoiseScaleState
from progrpo.training.plan_judge import JudgeState, PlanState
from progrpo.training.totals import TotalsState, WorkState
from progrpo.training.watch import HackingWatchState, SelfChecksState

State = Mapping[str, Any]
"""The nested state of a policy, an optimizer, an order or a probe, which only its owner reads."""


class PlanMonitorState(TypedDict):
    """The plan in force, the judge of plans, the probe, and the value of the plan that was judged last."""

    plan: PlanState
    judge: JudgeState
    probe: ProbeState | None
    plan_value: float | None
    left_out: NotRequired[WorkState]
    """The work by which no plan is priced."""


class LearnerState(TypedDict):
    """The weights, and what the optimizer and the updates know of them."""

    policy: State
    optimizer: State
    loss_scale: LossScaleState
    noise_scale: NoiseScaleState


class TrainerState(LearnerState, PlanMonitorState):
    """The state of a trainer: all of it that changes."""

    iteration: int
    order: State
    totals: TotalsState
    checks: SelfChecksState


class EvaluatorState(TypedDict):
    """The results of evaluations on the way: the best one, and the watch for hacking."""

    best: State | None
    hacking: HackingWatchState
    hacked: bool


class RunState(TrainerState, EvaluatorState):
    """The state of a run after an iteration, with what a resumed run is compared by."""

    wall_seconds: float
    warnings: Sequence[str]
    prompts: NotRequired[Mapping[str, str]]
    """Digests of the prompts."""
    weights: NotRequired[Mapping[str, str]]
    """Fingerprints of the model's weights as it was loaded."""


class SavedState(RunState):
    """A checkpoint as it is read: the run's state, its configuration, and the versions that wrote it."""

    config: State
    versions: Mapping[str, str]
