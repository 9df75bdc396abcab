"""Which prompts an iteration gets: in turn, or where the rewards of groups lately differed most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from progrpo.prompts.load import Prompts
from progrpo.types import Prompt


class PromptOrder(Protocol):
    """Which prompts an iteration gets, equally on all processes."""

    @property
    def whole(self) -> Iterable[Prompt]:
        """Every prompt there is, as its source has them."""
        ...

    def prompts_for(self, iteration: int, count: int) -> list[Prompt]:
        """The `count` prompts of a zero-based iteration, where every iteration has as many."""
        ...

    def ahead(self, first: int, last: int, count: int) -> Iterable[Prompt]:
        """All that the iterations first .. last - 1 may meet, possibly more than once."""
        ...

    def observe(self, iteration: int, signals: Sequence[float]) -> None:
        """How far the rewards of each group of an iteration differed (a std; NaN: not known), in the order of its prompts."""
        ...

    def metrics(self) -> dict[str, float]:
        """What is worth watching, by name."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class InTurn:
    """The endless order of prompts of a seed: kinds in turn, each in a fresh permutation every time it is used up."""

    prompts: Prompts
    seed: int

    @property
    def whole(self) -> Iterable[Prompt]:
        return [prompt for of_kind in self.prompts.values() for prompt in of_kind]

    def prompts_for(self, iteration: int, count: int) -> list[Prompt]:
        return [self._at(iteration * count + i) for i in range(count)]

    def ahead(self, first: int, last: int, count: int) -> Iterable[Prompt]:
        return map(self._at, range(first * count, last * count))

    def observe(self, iteration: int, signals: Sequence[float]) -> None:
        pass  # a function of (seed, iteration): nothing to learn, and nothing to save

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def _at(self, index: int) -> Prompt:
        turn, kind = divmod(index, len(self.prompts))
        of_kind = list(self.prompts.values())[kind]
        epoch, place = divmod(turn, len(of_kind))
        return of_kind[_permutation(self.seed, kind, epoch, len(of_kind))[place]]


@lru_cache(maxsize=64)
def _permutation(seed: int, kind: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, kind, epoch]).permutation(length)


class BySignal:
    """Prompts are drawn in proportion to how far the rewards of their groups differ: too easy and too hard ones teach nothing.

    A prompt's signal is expected to be its own average std, with its kind's as one observation more; a kind that was not met
    counts like the best one. Every kind starts with equal weight whatever its number of prompts, and none falls below
    `floor` times the average, so that what became easy or possible is seen. Draws are without replacement within an
    iteration, as far as there are prompts, and a function of (seed, iteration, what was observed).
    """

    OWN_MEMORY, KIND_MEMORY = 0.5, 0.9

    def __init__(self, prompts: Prompts, seed: int, floor: float = 0.25) -> None:
        self._all = [prompt for of_kind in prompts.values() for prompt in of_kind]
        self._kinds = list(prompts)
        self._kind = np.repeat(np.arange(len(prompts)), [len(of_kind) for of_kind in prompts.values()])
        self._seed, self._floor = seed, floor
        self._own, self._seen = np.zeros(len(self._all)), np.zeros(len(self._all), dtype=np.int64)
        self._of_kind = np.full(len(prompts), np.nan)

    @property
    def whole(self) -> Iterable[Prompt]:
        return self._all

    def prompts_for(self, iteration: int, count: int) -> list[Prompt]:
        return [self._all[i] for i in self._chosen(iteration, count)]

    def ahead(self, first: int, last: int, count: int) -> Iterable[Prompt]:
        return self._all

    def observe(self, iteration: int, signals: Sequence[float]) -> None:
        for i, signal in zip(self._chosen(iteration, len(signals)), signals, strict=True):
            if math.isnan(signal):
                continue
            kind, own, known = self._kind[i], self._own[i], self._of_kind[self._kind[i]]
            self._own[i] = signal if not self._seen[i] else self.OWN_MEMORY * own + (1 - self.OWN_MEMORY) * signal
            self._of_kind[kind] = (
                signal if np.isnan(known) else self.KIND_MEMORY * known + (1 - self.KIND_MEMORY) * signal
            )
            self._seen[i] += 1

    def metrics(self) -> dict[str, float]:
        shares = np.bincount(self._kind, self._weights(), len(self._kinds))
        known = [(name or "all", k) for k, name in enumerate(self._kinds) if not np.isnan(self._of_kind[k])]
        return (
            {f"prompts/signal@{name}": float(self._of_kind[k]) for name, k in known}
            | {f"prompts/share@{name}": float(shares[k]) for name, k in known}
            | {"prompts/seen": int((self._seen > 0).sum())}
        )

    def state_dict(self) -> dict[str, Any]:
        met = self._seen.nonzero()[0]
        return {
            "met": met.tolist(),
            "own": self._own[met].tolist(),
            "seen": self._seen[met].tolist(),
            "of_kind": [None if np.isnan(v) else v for v in self._of_kind.tolist()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._own[:], self._seen[:] = 0, 0
        self._own[state["met"]], self._seen[state["met"]] = state["own"], state["seen"]
        self._of_kind[:] = [math.nan if v is None else v for v in state["of_kind"]]

    def _weights(self) -> np.ndarray:
        known = self._of_kind[~np.isnan(self._of_kind)]
        of_kind = np.where(np.isnan(self._of_kind), known.max(initial=0), self._of_kind)
        expected = (self._seen * self._own + of_kind[self._kind]) / (self._seen + 1)
        average = known.mean() if len(known) and known.any() else 1.0  # nothing known or nothing teaches: all alike
        weights = (expected + self._floor * average) / np.bincount(self._kind)[self._kind]
        share: np.ndarray = weights / weights.sum()
        return share

    def _chosen(self, iteration: int, count: int) -> list[int]:
        rng = np.random.default_rng([self._seed, iteration])
        rounds, rest = divmod(count, len(self._all))
        drawn = rng.choice(len(self._all), rest, replace=False, p=self._weights())
        return [*range(len(self._all))] * rounds + drawn.tolist()


ORDERS: dict[str, Callable[[Prompts, int], PromptOrder]] = {"turn": InTurn, "signal": BySignal}
