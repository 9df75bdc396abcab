"""Signs that a run learns nothing, watched at each iteration, and signs of reward hacking, watched at evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from progrpo.tracking.records import MetricValue, metric
from progrpo.training.errors import SelfCheckError
from progrpo.training.settings import WatchSettings

_RECENT = 20  # updates over which skipped ones are a share
_AUDITS = 5
_AGREED = 0.3  # an agreement that was never higher has not collapsed


class SelfChecksState(TypedDict):
    skipped: list[bool]
    flat: list[float]
    still: int
    weights: float | None
    agreements: list[float]


class SelfChecks:
    """The checks that stop a run which goes on without learning.

    Every process passes the same values, and so decides the same.
    """

    def __init__(self, settings: WatchSettings) -> None:
        self._settings = settings
        self._skipped: list[bool] = []
        self._flat: list[float] = []
        """The mean reward of each flat iteration in a row."""
        self._still = 0
        self._weights: float | None = None
        self._agreements: list[float] = []

    def check_updates(self, iteration: int, skipped: int, count: int) -> None:
        """SelfCheckError where too many recent updates were skipped: of this iteration's `count`, so many."""
        self._skipped = [*self._skipped, *(i < skipped for i in range(count))][-max(_RECENT, count) :]
        share = sum(self._skipped) / max(len(self._skipped), 5)  # one of the first few is no rate
        if self._settings.max_skipped and share > self._settings.max_skipped:
            raise SelfCheckError(
                f"iteration {iteration}: {sum(self._skipped)} of the last {len(self._skipped)} updates were skipped,"
                " since their loss or gradient was not finite; lower optim.lr, or train in float32 (model.dtype)"
            )

    def check_rewards(self, iteration: int, record: Mapping[str, MetricValue], groups: int) -> None:
        """SelfCheckError where no group's rewards have differed for too many iterations."""
        flat_groups, mean = metric(record, "advantage/zero_variance_groups"), metric(record, "reward/mean")
        if flat_groups is None or flat_groups < groups or mean is None:
            self._flat = []
            return
        self._flat.append(mean)
        if not self._settings.flat_iterations or len(self._flat) < self._settings.flat_iterations:
            return
        raise SelfCheckError(
            f"iteration {iteration}: for {len(self._flat)} iterations no group's rewards differed, so there was"
            f" nothing to learn; {self._why_flat(int(metric(record, 'reward/skipped_groups') or 0), groups)}"
        )

    def _why_flat(self, skipped: int, groups: int) -> str:
        """A clause on flat iterations, in the last of which so many of the groups had too few scores."""
        if skipped:
            return (
                f"{skipped} of the last iteration's {groups} groups had fewer scores than reward.quorum asks for: look"
                " why they are missing, or lower it"
            )
        if max(self._flat) - min(self._flat) <= 1e-12 * max(1.0, abs(self._flat[0])):
            return f"the reward is {self._flat[-1]:g} for every picture: it does not measure anything here"
        return (
            "within a group all rewards are equal: the task is too hard or too easy, or a group's pictures are the same"
        )

    def check_weights(self, iteration: int, fingerprint: float, taught: bool) -> None:
        """SelfCheckError where trained weights are not finite, or have not moved for too many iterations.

        `fingerprint` is a sum over the trained weights, `taught` whether the iteration had something to learn.
        """
        if not math.isfinite(fingerprint):
            raise SelfCheckError(f"iteration {iteration}: a trained weight is no longer finite; lower optim.lr")
        still = taught and self._weights == fingerprint
        self._still = self._still + 1 if still else 0
        self._weights = fingerprint
        if self._settings.still_iterations and self._still >= self._settings.still_iterations:
            raise SelfCheckError(
                f"iteration {iteration}: for {self._still} iterations no trained weight has moved;"
                " optim.lr is too small for the weights' dtype"
            )

    def check_agreement(self, iteration: int, correlations: Sequence[float | None]) -> None:
        """SelfCheckError where previews have stopped to tell anything of final rewards.

        `correlations` are an audit's, of previews and final rewards at the plan's prune points.
        """
        known = [value for value in correlations if value is not None]
        if not known:
            return
        self._agreements.append(sum(known) / len(known))
        if len(self._agreements) < _AUDITS:
            return
        means = np.convolve(self._agreements, np.full(_AUDITS, 1 / _AUDITS), "valid")
        best, now = float(means.max()), float(means[-1])
        lost = self._settings.lost_agreement
        if lost and best >= _AGREED and now < lost * best:
            raise SelfCheckError(
                f"iteration {iteration}: previews no longer say anything of final rewards (rank correlation {now:.2f}"
                f" over the last {_AUDITS} audits, {best:.2f} at its best); prune later, or look whether the pictures"
                " are still pictures"
            )

    def forget_agreement(self) -> None:
        """Begin the check of agreements anew: those at other prune points do not compare."""
        self._agreements = []

    def state_dict(self) -> SelfChecksState:
        return {
            "skipped": self._skipped,
            "flat": self._flat,
            "still": self._still,
            "weights": self._weights,
            "agreements": self._agreements,
        }

    def load_state_dict(self, state: SelfChecksState) -> None:
        self._skipped = list(state["skipped"])
        self._flat = list(state["flat"])
        self._still = state["still"]
        self._weights = state["weights"]
        self._agreements = list(state["agreements"])


# --- reward hacking ---------------------------------------------------------------------------------------------------

Values = Sequence[float | None]
"""A value per picture, None where it is missing."""

REWARD = "reward"
_FACTOR = 1.5  # by which a statistic of pictures must change to be suspicious


@dataclass(frozen=True)
class Change:
    """The mean difference of paired measurements, and its standard error."""

    value: float
    error: float

    @property
    def rose(self) -> bool:
        return self.value > 2 * self.error and self.value > 0

    @property
    def fell(self) -> bool:
        return self.value < -2 * self.error and self.value < 0


def change(before: Values, after: Values) -> Change:
    """The change over the pictures that have both values."""
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    if len(pairs) < 2:
        return Change(0.0, math.inf)
    differences = np.array([b - a for a, b in pairs])
    return Change(float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(pairs))))


class HackingWatchState(TypedDict):
    best: dict[str, dict[str, list[float | None]]]
    first: dict[str, list[float | None]]
    alarms: int


class HackingWatch:
    """A comparison of evaluations of the same prompts and noise: does the trained reward rise while witnesses fall?

    A witness (a judge, a held-out reward) is compared with the evaluation at which it was best; both differences must
    be more than two standard errors, picture by picture. While the reward is higher than at the first evaluation, the
    mean of a statistic is compared with its first one, and the distance to the reference with `max_kl` (0: no limit).
    """

    def __init__(self, max_kl: float = 0.0) -> None:
        self._max_kl = max_kl
        self._best: dict[str, dict[str, list[float | None]]] = {}
        self._first: dict[str, list[float | None]] = {}
        self._alarms = 0

    def signs(
        self,
        reward: Values,
        witnesses: Mapping[str, Values],
        statistics: Mapping[str, Values],
        kl: float | None = None,
    ) -> list[str]:
        """Suspicious signs of an evaluation, each a clause. Statistics may have any number of values."""
        signs = [*self._witnesses(reward, witnesses), *self._statistics(reward, statistics), *self._kl(reward, kl)]
        self._alarms = self._alarms + 1 if signs else 0
        return signs

    @property
    def alarms(self) -> int:
        """The number of evaluations in a row, up to the last, that were suspicious."""
        return self._alarms

    def _witnesses(self, reward: Values, witnesses: Mapping[str, Values]) -> list[str]:
        signs = []
        for name, values in witnesses.items():
            best = self._best.get(name)
            if best is None or math.isnan(_mean(best[name])) or _mean(values) >= _mean(best[name]):
                self._best[name] = {REWARD: list(reward), name: list(values)}
                continue
            if change(best[REWARD], reward).rose and change(best[name], values).fell:
                signs.append(
                    f"{name} fell from {_mean(best[name]):.3g} to {_mean(values):.3g} while the trained reward rose"
                    f" from {_mean(best[REWARD]):.3g} to {_mean(reward):.3g}"
                )
        return signs

    def _statistics(self, reward: Values, statistics: Mapping[str, Values]) -> list[str]:
        if REWARD not in self._first:
            self._first[REWARD] = list(reward)
        rose = change(self._first[REWARD], reward).rose
        signs = []
        for name, values in statistics.items():
            if not _has_two(values):
                continue
            before, now = _mean(self._first.setdefault(name, list(values))), _mean(values)
            if rose and before > 0 and not 1 / _FACTOR < now / before < _FACTOR:
                signs.append(
                    f"{name} of the pictures went from {before:.3g} to {now:.3g} while the trained reward rose"
                )
        return signs

    def _kl(self, reward: Values, kl: float | None) -> list[str]:
        if not self._max_kl or kl is None or kl <= self._max_kl or not change(self._first[REWARD], reward).rose:
            return []
        return [
            f"the network's velocities went {kl:.2g} (mean square) from the reference's, over watch.max_kl"
            f" {self._max_kl:g}, while the trained reward rose"
        ]

    def state_dict(self) -> HackingWatchState:
        return {"best": self._best, "first": self._first, "alarms": self._alarms}

    def load_state_dict(self, state: HackingWatchState) -> None:
        self._best = {
            witness: {name: list(values) for name, values in best.items()} for witness, best in state["best"].items()
        }
        self._first = {name: list(values) for name, values in state["first"].items()}
        self._alarms = state["alarms"]


def _has_two(values: Values) -> bool:
    """Whether at least two values are known: one tells nothing about pictures in general."""
    return sum(value is not None for value in values) >= 2


def _mean(values: Values) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
