"""The order of prompts: in turn, or by how far the rewards of their groups lately differed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypedDict, cast

import numpy as np

from progrpo.messages import raised
from progrpo.prompts.load import PromptsByKind
from progrpo.prompts.settings import ORDERS
from progrpo.registry import load_named
from progrpo.types import Prompt


class PromptOrder(Protocol):
    """An order of prompts, made from prompts by kind and a seed.

    All processes choose the same prompts for an iteration. `prompts_for` returns the same prompts for an iteration
    until its signals are observed.
    """

    @property
    def all_prompts(self) -> Iterable[Prompt]:
        """All prompts, in the order of their source."""
        ...

    def prompts_for(self, iteration: int, count: int) -> list[Prompt]:
        """The prompts of a zero-based iteration. Every iteration has `count` prompts."""
        ...

    def possible_prompts(self, first: int, last: int, count: int) -> Iterable[Prompt]:
        """The prompts that the iterations first .. last - 1 may get. Some may occur more than once."""
        ...

    def observe(self, iteration: int, signals: Sequence[float]) -> None:
        """Take in the std of the rewards of each group of an iteration (NaN: unknown), in the order of its prompts.

        Of a group that was stopped whole (`plan.keep_groups`) it is the std of its previews' scores.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """The metrics of the order, by name. A name begins with `prompts/`."""
        ...

    def state_dict(self) -> Mapping[str, object]:
        """The state that a resumed run needs, ready for JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, object]) -> None: ...


@dataclass(frozen=True)
class InTurn:
    """An endless order: kinds take turns, and each kind is permuted anew every time it is used up."""

    prompts: PromptsByKind
    seed: int

    @property
    def all_prompts(self) -> Iterable[Prompt]:
        return [prompt for prompts in self.prompts.values() for prompt in prompts]

    def prompts_for(self, iteration: int, count: int) -> list[Prompt]:
        return [self._at(iteration * count + i) for i in range(count)]

    def possible_prompts(self, first: int, last: int, count: int) -> Iterable[Prompt]:
        return map(self._at, range(first * count, last * count))

    def observe(self, iteration: int, signals: Sequence[float]) -> None:
        pass  # the order depends on (seed, iteration) alone, so there is nothing to save either

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> Mapping[str, object]:
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        pass

    def _at(self, index: int) -> Prompt:
        turn, kind = divmod(index, len(self.prompts))
        prompts = list(self.prompts.values())[kind]
        epoch, place = divmod(turn, len(prompts))
        return prompts[_permutation(self.seed, kind, epoch, len(prompts))[place]]


@lru_cache(maxsize=64)
def _permutation(seed: int, kind: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, kind, epoch]).permutation(length)


class SignalState(TypedDict):
    """The state of `BySignal`: signal and number of observations of each observed prompt, and the signals of kinds."""

    met: list[int]
    own: list[float]
    seen: list[int]
    of_kind: list[float | None]


class BySignal:
    """A random order that draws prompts in proportion to their signal: how far the rewards of their groups differ.

    Prompts that are too easy or too hard have no signal. The expected signal of a prompt is its own average std, with
    the signal of its kind as one more observation. A kind without observations counts like the best one. Every kind
    starts with equal weight whatever its number of prompts, and none falls below `floor` times the average, so that
    later changes are seen. Draws within an iteration are without replacement, as far as there are prompts. They are a
    function of the seed, the iteration and the observations.
    """

    OWN_MEMORY, KIND_MEMORY = 0.5, 0.9

    def __init__(self, prompts: PromptsByKind, seed: int, floor: float = 0.25) -> None:
        self._all = [prompt for kind in prompts.values() for prompt in kind]
        self._kinds = list(prompts)
        self._kind = np.repeat(np.arange(len(prompts)), [len(kind) for kind in prompts.values()])
        self._seed = seed
        self._floor = floor
        self._own_signal = np.zeros(len(self._all))
        self._seen = np.zeros(len(self._all), dtype=np.int64)
        self._kind_signal = np.full(len(prompts), np.nan)

    @property
    def all_prompts(self) -> Iterable[Prompt]:
        return self._all

    def prompts_for(self, iteration: int, count: int) -> list[Prompt]:
        return [self._all[i] for i in self._draw(iteration, count)]

    def possible_prompts(self, first: int, last: int, count: int) -> Iterable[Prompt]:
        return self._all

    def observe(self, iteration: int, signals: Sequence[float]) -> None:
        for i, signal in zip(self._draw(iteration, len(signals)), signals, strict=True):
            if math.isnan(signal):
                continue
            kind = self._kind[i]
            own = self._own_signal[i] if self._seen[i] else None
            known = None if np.isnan(self._kind_signal[kind]) else self._kind_signal[kind]
            self._own_signal[i] = _moving_average(own, signal, self.OWN_MEMORY)
            self._kind_signal[kind] = _moving_average(known, signal, self.KIND_MEMORY)
            self._seen[i] += 1

    def metrics(self) -> dict[str, float]:
        shares = np.bincount(self._kind, self._probabilities(), len(self._kinds))
        known = [(name or "all", k) for k, name in enumerate(self._kinds) if not np.isnan(self._kind_signal[k])]
        return (
            {f"prompts/signal@{name}": float(self._kind_signal[k]) for name, k in known}
            | {f"prompts/share@{name}": float(shares[k]) for name, k in known}
            | {"prompts/seen": int((self._seen > 0).sum())}
        )

    def state_dict(self) -> SignalState:
        met = self._seen.nonzero()[0]
        return {
            "met": met.tolist(),
            "own": self._own_signal[met].tolist(),
            "seen": self._seen[met].tolist(),
            "of_kind": [None if np.isnan(v) else v for v in self._kind_signal.tolist()],
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        saved = cast(SignalState, state)
        self._own_signal[:] = 0
        self._own_signal[saved["met"]] = saved["own"]
        self._seen[:] = 0
        self._seen[saved["met"]] = saved["seen"]
        self._kind_signal[:] = [math.nan if v is None else v for v in saved["of_kind"]]

    def _probabilities(self) -> np.ndarray:
        """The probability of each prompt to be drawn first."""
        unknown = np.isnan(self._kind_signal)
        known = self._kind_signal[~unknown]
        kind_signal = np.where(unknown, known.max(initial=0), self._kind_signal)
        expected = (self._seen * self._own_signal + kind_signal[self._kind]) / (self._seen + 1)
        average = known.mean() if len(known) and known.any() else 1.0  # without any signal all prompts are equal
        weights = (expected + self._floor * average) / np.bincount(self._kind)[self._kind]
        probabilities: np.ndarray = weights / weights.sum()
        return probabilities

    def _draw(self, iteration: int, count: int) -> list[int]:
        rng = np.random.default_rng([self._seed, iteration])
        rounds, rest = divmod(count, len(self._all))
        drawn = rng.choice(len(self._all), rest, replace=False, p=self._probabilities())
        return [*range(len(self._all))] * rounds + drawn.tolist()


_MEMBERS = ("all_prompts", "prompts_for", "possible_prompts", "observe", "metrics", "state_dict", "load_state_dict")


def _moving_average(average: float | None, value: float, memory: float) -> float:
    """The average after one more value; None stands for an average without values."""
    return value if average is None else memory * average + (1 - memory) * value


def make_order(name: str, prompts: PromptsByKind, seed: int) -> PromptOrder:
    """Make the order that `prompts.order` names. ValueError for a class of the user's own that is no `PromptOrder`."""
    made = load_named(name, ORDERS, "prompts.order", "Class")
    try:
        order: PromptOrder = made(prompts, seed)
    except Exception as error:  # a user's code may raise anything
        raise ValueError(f"prompts.order: {name}(prompts, seed): {raised(error)}") from error
    missing = [member for member in _MEMBERS if not hasattr(order, member)]
    if missing:
        raise ValueError(
            f"prompts.order {name} has no {', '.join(missing)}: it must be a class like"
            " progrpo.prompts.order.PromptOrder, made from (prompts, seed)"
        )
    return order
