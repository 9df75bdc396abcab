"""The judge of plans: the value of the run's plan by the run's own measurements, and the plan of highest value."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NotRequired, TypedDict, cast

import numpy as np

from progrpo.config import Config, compares_equal_members, prompt_cost, shared_calls
from progrpo.rollout.plan import Plan, PrunePoint, UnitCosts, path, point_steps, preset, unit_costs
from progrpo.rollout.plan_value import Simulation, prompt_signal
from progrpo.rollout.prune import Selector
from progrpo.tracking.decisions import PlanDecision
from progrpo.tracking.statistics import standardised
from progrpo.types import Cost

_AUDITS = 3  # before a plan is judged; the agreement of a single group of 24 is a guess
_REMEMBERED = 8  # what is older would weigh less than a twelfth of the newest
_HALF_LIFE = 2  # audits, after which one weighs half
"""A policy learns first what is decided early, so that previews tell less and less of what is left: on the built-in
model the agreement falls by about .01 from audit to audit, where a policy learns fast by .1 and more. A single audit of
24 members is off by .2 or so. Halved every two, the mean is as exact as one of six audits and lags two and a half
behind: .02 to .3 too high, where an even mean over eight would be three and a half behind."""
_LEAST_NOISE = 1e-6  # prompts: without any, no prompt would be worth its time
_WORTH_A_CHANGE = 1.02  # below that the simulation's own noise would choose


def iteration_cost(config: Config, plan: Plan, probed_steps: frozenset[int] = frozenset(), iteration: int = 0) -> Cost:
    """The cost of a plan for a zero-based iteration of the run."""
    return prompt_cost(config, plan, probed_steps, config.prompts.per_iteration, iteration)


def nfe_of_full_groups(config: Config, group_size: int) -> int:
    """The NFE of an iteration with groups of so many members, each of which makes every network call."""
    sampling = config.sampling
    per_member = sampling.num_inference_steps * (2 if sampling.in_pairs else 1)
    return config.prompts.per_iteration * group_size * per_member


class JudgeState(TypedDict):
    """The state of a judge in a checkpoint: the unit costs, None before a verdict, and what the last audits found."""

    units: dict[str, float] | None
    agreement: list[list[float]]
    finals: NotRequired[list[list[float]]]
    stds: NotRequired[list[float]]


class PlanState(TypedDict):
    """The state of a plan in a checkpoint."""

    group_size: int
    prune: Sequence[dict[str, int]]
    final_keep: int | None
    keep_groups: NotRequired[int | None]
    recorded: NotRequired[bool]


def plan_state(plan: Plan) -> PlanState:
    """The state of a plan."""
    return cast(PlanState, asdict(plan))


def plan_from(state: PlanState) -> Plan:
    """The plan of a state."""
    points = tuple(PrunePoint(**point) for point in state["prune"])
    keep_groups, recorded = state.get("keep_groups"), state.get("recorded", False)
    return Plan(state["group_size"], points, state["final_keep"], keep_groups, recorded)


@dataclass(frozen=True)
class Verdict:
    """The `plan` to go on with, the decision as a run records it, and what becomes of the gradient noise scale.

    `signal_ratio` is the signal k V of a prompt's members under the next plan over that under the judged one.
    """

    plan: Plan
    decision: PlanDecision
    signal_ratio: float


class PlanJudge:
    """A memory of audits and, from the first verdict on, of the costs then: later timings change no decision.

    Of each audit it holds the agreement of previews by step, and the final rewards in units of their standard
    deviation, with that deviation. An audit whose final rewards are all equal is not remembered: a group of this kind
    teaches under no plan. `recorded` costs, which an earlier part of the run has written down, take the place of
    measured ones.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.units: UnitCosts | None = None
        self.recorded: UnitCosts | None = None
        self._agreement: list[list[float]] = []
        self._finals: list[list[float]] = []
        self._stds: list[float] = []
        shared = {i: shared_calls(config, i) for i in range(config.iterations)}
        first = {calls: i for i, calls in reversed(shared.items())}
        self._shares = {first[calls]: n / len(shared) for calls, n in Counter(shared.values()).items()}
        """An iteration of each number of network calls that a group shares, and the share of the run that has it."""

    def watch(
        self,
        agreement_T: Sequence[float | None],
        final_G: np.ndarray,
        counted: Cost,
        seconds: Mapping[str, float],
        preview_seconds: float | None = None,
    ) -> None:
        """Note an audit's agreement by step and its final rewards, of which some may be missing (NaN).

        With the first audit that is enough for a verdict, also note the unit costs. An agreement of None is 0: previews
        that are all alike, or have no scores, tell nothing. `preview_seconds` are those of the audit's previews, for a
        plan that makes none.
        """
        standard_G = standardised(final_G)
        if standard_G is None:
            return
        self._agreement = [*self._agreement, [value or 0.0 for value in agreement_T]][-_REMEMBERED:]
        present_G = ~np.isnan(standard_G)
        self._finals = [*self._finals, standard_G[present_G].tolist()][-_REMEMBERED:]
        self._stds = [*self._stds, float(final_G[present_G].std())][-_REMEMBERED:]
        if self.units is None and len(self._finals) >= _AUDITS:
            self.units = self.recorded or unit_costs(counted, seconds, preview_seconds)

    def forget(self) -> None:
        """Forget the audits, and the costs, of which rewards and previews are a part."""
        self.units = None
        self._agreement, self._finals, self._stds = [], [], []

    def verdict(
        self,
        plan: Plan,
        selector: Selector,
        probed_steps: frozenset[int],
        noise_scale: float | None = None,
        own_direction: float | None = None,
    ) -> Verdict | None:
        """The judgement of a plan, None before enough audits; a probe ranks at the `probed_steps`.

        None also where whole groups stop: an audit has one, and does not say how groups differ. None as well where
        advantages are taken over the full group, or each reward has its own std (gdpo): V is that of survivors, in the
        sum of rewards.

        `noise_scale` is that of gradients under this plan, in prompts; None, where it is not known, is a large one.
        `own_direction` is the noise of prompts' own directions over that of their members under this plan, 0 where it
        is not known. Neither is of use where the plan is expected to teach nothing.
        """
        objective = self.config.objective
        if plan.keep_groups is not None or objective.baseline == "group" or objective.advantage == "gdpo":
            return None
        if self.units is None or len(self._finals) < _AUDITS:
            return None
        steps = self.config.sampling.num_inference_steps
        none = preset("none", steps)
        simulation = self._simulation(max(plan.group_size, none.group_size))
        members = simulation.signal(plan, selector)
        own = (own_direction or 0.0) / members if members else 0.0

        def signal(candidate: Plan) -> float:
            return prompt_signal(simulation.signal(candidate, selector), own)

        noise = math.inf
        if noise_scale is not None and members:
            noise = max(noise_scale, _LEAST_NOISE) * signal(plan)

        def rate(candidate: Plan) -> float:
            return self._progress_per_second(signal(candidate), candidate, probed_steps, noise)

        plain, now = rate(none), rate(plan)
        rates = {candidate: rate(candidate) for candidate in self._candidates(plan)} or {plan: now}
        leader = max(rates, key=lambda candidate: rates[candidate])
        best, value = (leader, rates[leader]) if rates[leader] > _WORTH_A_CHANGE * now else (plan, now)
        kept, whole = (simulation.signal(chosen, selector) for chosen in (best, Plan(best.group_size)))
        decision = PlanDecision(
            value=now / plain,
            path=path(plan),
            steps=point_steps(plan),
            next_value=value / plain,
            next_path=path(best),
            next_steps=point_steps(best),
            training_ratio=self._training_ratio(none),
            noise_scale=noise_scale,
            own_direction=own_direction,
            next_variance=kept / best.survivors / (whole / best.group_size) if whole else None,
        )
        return Verdict(best, decision, kept / members if members else 1.0)

    def _candidates(self, plan: Plan) -> Iterator[Plan]:
        """The plans that may take the place of `plan`, none of which compares equal members."""
        candidates = self.config.plan.candidates(plan, self.config.sampling.num_inference_steps)
        return (candidate for candidate in candidates if not compares_equal_members(self.config, candidate))

    def _training_ratio(self, plain: Plan) -> float:
        """The seconds of training a member over those of sampling it unpruned."""
        assert self.units is not None
        training = self.units.seconds(Cost(trained_steps=prompt_cost(self.config, plain).trained_steps))
        return training / (self._seconds(plain) - training)

    def _seconds(self, plan: Plan, probed_steps: frozenset[int] = frozenset()) -> float:
        """The seconds of a prompt under a plan, the mean over the run: its windows share different numbers of calls."""
        assert self.units is not None
        costs = {i: prompt_cost(self.config, plan, probed_steps, iteration=i) for i in self._shares}
        return sum(share * self.units.seconds(costs[i]) for i, share in self._shares.items())

    def _progress_per_second(self, signal: float, plan: Plan, probed_steps: frozenset[int], noise: float) -> float:
        """The progress of a second under a plan with this signal per prompt, up to a factor.

        An update of P prompts makes a progress in proportion to 1 / (1 + noise / (P signal)): the critical-batch law
        (arXiv 1812.06162), with the noise scale in units of signal.
        """
        progress = signal / (1 + self.config.prompts.per_iteration * signal / noise)
        return progress / self._seconds(plan, probed_steps)

    def _simulation(self, group_size: int) -> Simulation:
        """Groups like those of the audits, the newer ones more than the older."""
        weights = [0.5 ** (age / _HALF_LIFE) for age in reversed(range(len(self._finals)))]
        agreement_T = np.average(self._agreement, axis=0, weights=weights).tolist()
        simulation = Simulation.of(agreement_T, self._finals, group_size, weights)
        has_one_std = self.config.objective.advantage == "batch"
        return simulation.of_batch(self._stds, weights) if has_one_std else simulation

    def state_dict(self) -> JudgeState:
        units = None if self.units is None else asdict(self.units)
        return {"units": units, "agreement": self._agreement, "finals": self._finals, "stds": self._stds}

    def load_state_dict(self, state: JudgeState) -> None:
        self.units = None if state["units"] is None else UnitCosts(**state["units"])
        self._finals = [list(audit) for audit in state.get("finals", [])]
        self._stds = list(state.get("stds", [1.0] * len(self._finals)))
        # an older progrpo remembered no final rewards: without them an agreement is of no use
        self._agreement = [list(audit) for audit in state["agreement"]] if self._finals else []
