"""What a run looks out for from iteration to iteration: signs that it learns nothing, and signs that it learns to cheat."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from progrpo.training.errors import SelfCheckError

_RECENT = 20  # updates over which skipped ones are a share
_AUDITS = 5
_AGREED = 0.3  # an agreement that was never higher has not collapsed


class SelfChecks:
    """Stops a run that goes on without learning. It is told the same on every process, and so decides the same."""

    def __init__(self, max_skipped: float, flat_iterations: int, still_iterations: int, lost_agreement: float) -> None:
        self._max_skipped, self._lost_agreement = max_skipped, lost_agreement
        self._flat_iterations, self._still_iterations = flat_iterations, still_iterations
        self._skipped: list[bool] = []
        self._flat: list[float] = []  # mean reward of each flat iteration in a row
        self._still = 0
        self._weights: float | None = None
        self._agreements: list[float] = []

    def updates(self, iteration: int, skipped: int, count: int) -> None:
        """So many of an iteration's updates were skipped, since their loss or gradient was not finite."""
        self._skipped = [*self._skipped, *(i < skipped for i in range(count))][-_RECENT:]
        share = sum(self._skipped) / max(len(self._skipped), count, 5)  # one of the first few is no rate
        if self._max_skipped and share > self._max_skipped:
            raise SelfCheckError(
                f"iteration {iteration}: {sum(self._skipped)} of the last {len(self._skipped)} updates were skipped, since their loss"
                " or gradient was not finite; lower optim.lr, or train in float32 (model.dtype)"
            )

    def rewards(self, iteration: int, record: Mapping[str, Any], groups: int) -> None:
        """From the record of an iteration of so many groups."""
        if record["advantage/zero_variance_groups"] < groups or "reward/mean" not in record:
            self._flat = []
            return
        self._flat.append(record["reward/mean"])
        if not self._flat_iterations or len(self._flat) < self._flat_iterations:
            return
        constant = max(self._flat) - min(self._flat) <= 1e-12 * max(1.0, abs(self._flat[0]))
        why = (
            f"the reward is {self._flat[-1]:g} for every picture: it does not measure anything here"
            if constant
            else "within a group all rewards are equal: the task is too hard or too easy, or a group's pictures are the same"
        )
        raise SelfCheckError(
            f"iteration {iteration}: for {len(self._flat)} iterations no group's rewards differed, so there was nothing to learn; {why}"
        )

    def weights(self, iteration: int, fingerprint: float, taught: bool) -> None:
        """A sum over the trained weights after an iteration in which there was something to learn, or not."""
        if not math.isfinite(fingerprint):
            raise SelfCheckError(f"iteration {iteration}: a trained weight is no longer finite; lower optim.lr")
        still = taught and self._weights == fingerprint
        self._still, self._weights = self._still + 1 if still else 0, fingerprint
        if self._still_iterations and self._still >= self._still_iterations:
            raise SelfCheckError(
                f"iteration {iteration}: for {self._still} iterations no trained weight has moved;"
                " optim.lr is too small for the weights' dtype"
            )

    def agreement(self, iteration: int, found: Sequence[float | None]) -> None:
        """Of an audit: the correlation of previews and final rewards at the plan's prune points."""
        there = [value for value in found if value is not None]
        if not there:
            return
        self._agreements.append(sum(there) / len(there))
        means = np.convolve(self._agreements, np.full(_AUDITS, 1 / _AUDITS), "valid") if self._enough else np.zeros(1)
        best, now = float(means.max()), float(means[-1])
        if self._lost_agreement and best >= _AGREED and now < self._lost_agreement * best:
            raise SelfCheckError(
                f"iteration {iteration}: previews no longer say anything of final rewards (rank correlation {now:.2f} over the last"
                f" {_AUDITS} audits, {best:.2f} at its best); prune later, or look whether the pictures are still pictures"
            )

    @property
    def _enough(self) -> bool:
        return len(self._agreements) >= _AUDITS

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self._skipped,
            "flat": self._flat,
            "still": self._still,
            "weights": self._weights,
            "agreements": self._agreements,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._skipped, self._flat, self._agreements = (list(state[name]) for name in ("skipped", "flat", "agreements"))
        self._still, self._weights = state["still"], state["weights"]


# --- cheating ---------------------------------------------------------------------------------------------------------

REWARD = "reward"
_FACTOR = 1.5  # by which a picture's statistic must change to be one of another kind


@dataclass(frozen=True)
class Change:
    """Mean difference of paired measurements, and its standard error."""

    value: float
    error: float

    @property
    def rose(self) -> bool:
        return self.value > 2 * self.error and self.value > 0

    @property
    def fell(self) -> bool:
        return self.value < -2 * self.error and self.value < 0


def change(before: Sequence[float | None], after: Sequence[float | None]) -> Change:
    """Of the pictures that have both values."""
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    if len(pairs) < 2:
        return Change(0.0, math.inf)
    differences = np.array([b - a for a, b in pairs])
    return Change(float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(pairs))))


class HackingWatch:
    """Compares evaluations on the way, all of the same prompts and noise: does the trained reward rise while witnesses fall?

    A witness (a judge, a held-out reward) is compared with the evaluation at which it was best; both differences must be more than two
    standard errors, picture by picture. A statistic is compared by its mean with the first one that there was, while the reward is higher
    than at the first evaluation. So is a distance to the reference with `max_kl` (0: no limit).
    """

    def __init__(self, max_kl: float = 0.0) -> None:
        self._max_kl = max_kl
        self._best: dict[str, dict[str, list[float | None]]] = {}
        self._first: dict[str, list[float | None]] = {}
        self._alarms = 0

    def look(
        self,
        reward: Sequence[float | None],
        witnesses: Mapping[str, Sequence[float | None]],
        statistics: Mapping[str, Sequence[float | None]],
        kl: float | None = None,
    ) -> list[str]:
        """What is suspicious about an evaluation, in words. Rewards and witnesses have a value a picture, statistics any number of values."""
        found = [*self._witnesses(reward, witnesses), *self._statistics(reward, statistics), *self._kl(reward, kl)]
        self._alarms = self._alarms + 1 if found else 0
        return found

    @property
    def alarms(self) -> int:
        """Evaluations in a row with something suspicious, up to the last."""
        return self._alarms

    def _witnesses(self, reward: Sequence[float | None], witnesses: Mapping[str, Sequence[float | None]]) -> list[str]:
        found = []
        for name, values in witnesses.items():
            best = self._best.get(name)
            if best is None or math.isnan(_mean(best[name])) or _mean(values) >= _mean(best[name]):
                self._best[name] = {REWARD: list(reward), name: list(values)}
                continue
            gain, loss = change(best[REWARD], reward), change(best[name], values)
            if gain.rose and loss.fell:
                found.append(
                    f"{name} fell from {_mean(best[name]):.3g} to {_mean(values):.3g} while the trained reward rose from"
                    f" {_mean(best[REWARD]):.3g} to {_mean(reward):.3g}"
                )
        return found

    def _statistics(
        self, reward: Sequence[float | None], statistics: Mapping[str, Sequence[float | None]]
    ) -> list[str]:
        if REWARD not in self._first:
            self._first[REWARD] = list(reward)
        rose, found = change(self._first[REWARD], reward).rose, []
        for name, values in statistics.items():
            if not _two(values):
                continue
            before, now = _mean(self._first.setdefault(name, list(values))), _mean(values)
            if rose and before > 0 and not 1 / _FACTOR < now / before < _FACTOR:
                found.append(
                    f"{name} of the pictures went from {before:.3g} to {now:.3g} while the trained reward rose"
                )
        return found

    def _kl(self, reward: Sequence[float | None], kl: float | None) -> list[str]:
        if not self._max_kl or kl is None or kl <= self._max_kl or not change(self._first[REWARD], reward).rose:
            return []
        return [
            f"the network's velocities went {kl:.2g} (mean square) from the reference's, over watch.max_kl {self._max_kl:g},"
            " while the trained reward rose"
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "first": self._first, "alarms": self._alarms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best = {name: {k: list(v) for k, v in best.items()} for name, best in state["best"].items()}
        self._first, self._alarms = {name: list(v) for name, v in state["first"].items()}, state["alarms"]


def _two(values: Sequence[float | None]) -> bool:
    """Whether two values are there at least: one says nothing of a kind of pictures."""
    return sum(value is not None for value in values) >= 2


def _mean(values: Sequence[float | None]) -> float:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else math.nan
