"""The judge of plans: the value of the run's plan by the run's own measurements, and the plan of highest value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypedDict, cast

from progrpo.config import Config, resolve_plan, trained_items
from progrpo.rollout.plan import Plan, PrunePoint, UnitCosts, path, preset, unit_costs
from progrpo.rollout.plan_value import Simulation, plans
from progrpo.rollout.prune import Selector
from progrpo.types import Cost

_AUDITS = 3  # before a plan is judged; the agreement of a single group of 24 is a guess
_REMEMBERED = 8  # the policy changes, and with it what previews can tell
_WORTH_A_CHANGE = 1.02  # below that the simulation's own noise would choose


def prompt_cost(config: Config, plan: Plan, probed_steps: frozenset[int] = frozenset()) -> Cost:
    """The cost of a plan for one prompt of the run."""
    steps, pairs = config.sampling.num_inference_steps, config.sampling.in_pairs
    return plan.predict(steps, trained_items(config), pairs, config.preview.ode_steps, probed_steps)


class JudgeState(TypedDict):
    """The state of a judge in a checkpoint: the unit costs, None before a verdict, and the last audits' agreement."""

    units: dict[str, float] | None
    agreement: list[list[float | None]]


class PlanState(TypedDict):
    """The state of a plan in a checkpoint."""

    group_size: int
    prune: Sequence[dict[str, int]]
    final_keep: int | None


def plan_state(plan: Plan) -> PlanState:
    """The state of a plan."""
    return cast(PlanState, asdict(plan))


def plan_from(state: PlanState) -> Plan:
    """The plan of a state."""
    points = tuple(PrunePoint(**point) for point in state["prune"])
    return Plan(state["group_size"], points, state["final_keep"])


@dataclass(frozen=True)
class Verdict:
    """The judgement of a plan, and the `plan` to go on with.

    `plan_value` is the judged plan's expected signal per second, over plain GRPO's (preset none).
    """

    plan_value: float
    plan: Plan
    path: list[int]


class PlanJudge:
    """A memory of agreements and, from the first verdict on, of the costs then: later timings change no decision.

    `recorded` costs, which an earlier part of the run has written down, take the place of measured ones.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.units: UnitCosts | None = None
        self.recorded: UnitCosts | None = None
        self._agreement: list[list[float | None]] = []

    def watch(self, agreement_T: Sequence[float | None], counted: Cost, seconds: Mapping[str, float]) -> None:
        """Note an audit's agreement by step; with the first audit that is enough for a verdict also the unit costs."""
        self._agreement = [*self._agreement, list(agreement_T)][-_REMEMBERED:]
        if self.units is None and len(self._agreement) >= _AUDITS:
            self.units = self.recorded or unit_costs(counted, seconds)

    def verdict(self, plan: Plan, selector: Selector, probed_steps: frozenset[int]) -> Verdict | None:
        """The judgement of a plan, None before enough audits; a probe ranks at the `probed_steps`."""
        if self.units is None:
            return None
        steps = self.config.sampling.num_inference_steps
        none = preset("none", steps)
        simulation = Simulation.of(self._means(), max(plan.group_size, none.group_size))
        plain = self._signal_per_second(simulation, none, selector, probed_steps)
        now = self._signal_per_second(simulation, plan, selector, probed_steps)
        best = plan
        if self.config.plan.adaptive:
            least = resolve_plan(self.config).survivors
            rates = {
                p: self._signal_per_second(simulation, p, selector, probed_steps)
                for p in plans(plan.group_size, least, steps)
            }
            leader = max(rates, key=lambda p: rates[p])
            best = leader if rates[leader] > _WORTH_A_CHANGE * now else plan
        return Verdict(now / plain, best, path(best))

    def _signal_per_second(
        self, simulation: Simulation, plan: Plan, selector: Selector, probed_steps: frozenset[int]
    ) -> float:
        assert self.units is not None
        return simulation.signal(plan, selector) / self.units.seconds(prompt_cost(self.config, plan, probed_steps))

    def _means(self) -> list[float]:
        return [_mean(step) for step in zip(*self._agreement, strict=True)]

    def state_dict(self) -> JudgeState:
        return {"units": None if self.units is None else asdict(self.units), "agreement": self._agreement}

    def load_state_dict(self, state: JudgeState) -> None:
        self.units = None if state["units"] is None else UnitCosts(**state["units"])
        self._agreement = [list(audit) for audit in state["agreement"]]


def _mean(values: Iterable[float | None]) -> float:
    """The mean of the known values; 0 for a step without an agreement in any audit: nothing is known of it."""
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else 0.0
