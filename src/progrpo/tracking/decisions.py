"""Decisions on a run's plan: their metrics, and their words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from progrpo.tracking.records import Metrics, metric

_GROUP = "plan/"


@dataclass(frozen=True)
class PlanDecision:
    """The plan in force in an iteration and the next one, with what decided between them.

    A plan is the numbers of members at its start and after each choice (`path`), and the `steps` after which choices
    by previews come. `value` and `next_value` are expected progress per second, over plain GRPO's. `training_ratio` is
    the seconds of training a member over those of sampling it unpruned. `noise_scale` (in prompts) and `own_direction`
    are of the plan in force, and None before they are known. `next_variance` is V of the next plan by the audits: the
    variance of its survivors' final rewards, over that of the whole group's; None in older records.
    """

    value: float
    path: Sequence[int]
    steps: Sequence[int]
    next_value: float
    next_path: Sequence[int]
    next_steps: Sequence[int]
    training_ratio: float
    noise_scale: float | None
    own_direction: float | None
    next_variance: float | None = None

    @classmethod
    def of(cls, record: Metrics) -> PlanDecision | None:
        """The decision of an iteration's record; None where it has none, or only the value that older runs write."""
        value, next_value, ratio = (_number(record, name) for name in ("value", "next_value", "training_ratio"))
        if value is None or next_value is None or ratio is None:
            return None
        path, steps, next_path, next_steps = (
            _whole(record, name) for name in ("path", "steps", "next_path", "next_steps")
        )
        measured = (_number(record, name) for name in ("noise_scale", "own_direction", "next_variance"))
        return cls(value, path, steps, next_value, next_path, next_steps, ratio, *measured)

    def metrics(self) -> Metrics:
        return {_GROUP + name: value for name, value in asdict(self).items()}

    @property
    def changes(self) -> bool:
        """Whether the next plan is another one."""
        return (self.path, self.steps) != (self.next_path, self.next_steps)

    @property
    def plan(self) -> str:
        """The plan in force, such as `groups of 24 -> 12 (12 after step 8)`."""
        return _words(self.path, self.steps)

    @property
    def next_plan(self) -> str:
        return _words(self.next_path, self.next_steps)

    @property
    def sentence(self) -> str:
        """The next plan, its expected progress, and why."""
        when = "from here on" if self.changes else "as before"
        rest = f" ({self.value:.2f} x until here)" if self.changes else ", and no other plan is worth a change"
        return (
            f"{self.next_plan} {when}: {self.next_value:.2f} x the expected progress a second of plain groups of 24"
            f"{rest}, since {self.reasons}"
        )

    @property
    def reasons(self) -> str:
        """A clause with the measurements that decided. V is left out for a plan that keeps all, where it is 1."""
        noise = "not known yet" if self.noise_scale is None else f"{self.noise_scale:.3g} prompts"
        reasons = [
            f"training a member takes {self.training_ratio:.2g} x its sampling",
            f"the gradient noise scale is {noise}",
        ]
        if self.next_variance is not None and len(self.next_path) > 1:
            reasons.insert(0, f"its survivors have {self.next_variance:.2f} x the reward variance of their groups (V)")
        if self.own_direction is not None:
            reasons.append(f"prompts' own directions add {self.own_direction:.2g} x the noise of their members")
        return f"{', '.join(reasons[:-1])}, and {reasons[-1]}"


def _words(path: Sequence[int], steps: Sequence[int]) -> str:
    chosen = [f"{keep} after step {step}" for keep, step in zip(path[1:], steps, strict=False)]
    chosen += [f"{keep} by final rewards" for keep in path[len(steps) + 1 :]]
    return f"groups of {' -> '.join(map(str, path))} ({', '.join(chosen) or 'not pruned'})"


def _number(record: Metrics, name: str) -> float | None:
    return metric(record, _GROUP + name)


def _whole(record: Metrics, name: str) -> list[int]:
    numbers = record[_GROUP + name]
    assert isinstance(numbers, list)
    return [int(number) for number in numbers]
