"""The mixture of a run's rewards: weighted and gated, with their failures counted."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from progrpo.messages import named
from progrpo.rewards.base import Refusal, Reward, Score
from progrpo.rewards.cache import CachedReward, stamp_of
from progrpo.rewards.frames import FrameAverageReward
from progrpo.rewards.load import load_reward
from progrpo.rewards.retrying import RetryingReward
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt, Scores

_NOT_ASKED = Score(None)


@dataclass(frozen=True)
class Component:
    """A reward of a mixture, and the term with its weight and gate."""

    term: RewardTerm
    reward: Reward


@dataclass(frozen=True)
class Failures:
    """The counts of scores and pictures that are missing."""

    asked: Mapping[str, int]
    """The number of scores by reward, those of lost pictures included."""
    missing: Mapping[str, int]
    """The number of missing scores by reward."""
    last_error: str | None
    pictures: int = 0
    """The number of pictures."""
    lost: int = 0
    """The number of pictures that are not finite."""
    fault: str = ""
    """The cause of the last lost picture."""


Ranking = Callable[[Tensor, Tensor], Tensor]
"""A function of rewards_NR and group_N. Its value (N,) is what selectors compare."""


class RewardMixture:
    """The weighted sum of its rewards, missing where one of them is.

    A term with `needs` counts as 0, and its reward is not called, where the reward in `needs` is below `at_least`.
    """

    def __init__(self, components: Sequence[Component], ranking: Ranking | None = None) -> None:
        """`ranking` gives what selectors compare; None: the sum itself."""
        self._components = components
        self._ranking = ranking
        self._lock = threading.Lock()
        self._closed = False
        self._reset_counts()

    def counted_apart(self) -> RewardMixture:
        """A mixture of the same rewards that counts its own failures."""
        return RewardMixture(self._components, self._ranking)

    @property
    def weights(self) -> Mapping[str, float]:
        return {component.term.name: component.term.weight for component in self._components}

    @property
    def groupwise(self) -> str | None:
        """The name of a reward that must see whole groups, if there is one."""
        return next((component.term.name for component in self._components if component.reward.groupwise), None)

    def score(
        self,
        pictures_NHWC: np.ndarray,
        prompts: Sequence[Prompt],
        group_N: Tensor,
        there_N: Tensor | None = None,
        fault: str = "",
    ) -> Scores:
        if there_N is None:
            there_N = torch.ones(len(prompts), dtype=torch.bool)
        self._count_pictures(there_N, fault)
        rewards: dict[str, Tensor] = {}
        verdicts: list[list[bool | None]] = []
        for component in self._components:
            term = component.term
            called_N = there_N
            values_N = torch.zeros(len(prompts), dtype=torch.float64)
            values_N[~there_N] = math.nan
            if term.needs:
                gate_N = rewards[term.needs]
                called_N = gate_N >= term.at_least  # False where the gate is missing
                values_N[gate_N.isnan()] = math.nan
            rows = called_N.nonzero().flatten()
            scores = self._scores(component, pictures_NHWC, prompts, group_N, rows)
            values_N[rows] = torch.tensor([s.number() for s in scores], dtype=torch.float64)
            rewards[term.name] = values_N
            if not term.needs:
                passed = dict(zip(rows.tolist(), (s.passed for s in scores), strict=True))
                verdicts.append([passed.get(i) for i in range(len(prompts))])
        rewards_NR = torch.stack(list(rewards.values()), dim=1)
        weights_R = torch.tensor(list(self.weights.values()), dtype=torch.float64)
        value_N = (rewards_NR * weights_R).sum(1)
        ranking_N = value_N if self._ranking is None else self._ranking(rewards_NR, group_N)
        passed_N = torch.tensor([_all(row) for row in zip(*verdicts, strict=True)], dtype=torch.float64)
        return Scores(value_N, ranking_N, passed_N, rewards_NR)

    def failures(self) -> Failures:
        """Return the counts since the last call, and reset them."""
        with self._lock:
            failures = Failures(self._asked, self._missing, self._last_error, self._pictures, self._lost, self._fault)
            self._reset_counts()
        return failures

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts, or a machine, that one of the rewards cannot work with."""
        for component in self._components:
            component.reward.check(prompts)

    def close(self) -> None:
        """Close every reward, also where one raises. A second call does nothing: several places end a run."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as closing:
            for component in self._components:
                closing.callback(component.reward.close)

    def _scores(
        self, component: Component, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt], group_N: Tensor, rows: Tensor
    ) -> list[Score]:
        """The scores of these rows, in order. A reward that ranks sees one group at a time.

        People are not asked about a picture without a group, as those of evaluations are: it has no score.
        """
        name, reward = component.term.name, component.reward
        calls = [rows[group_N[rows] == g] for g in group_N[rows].unique()] if reward.groupwise else [rows]
        least = 2 if reward.waits_for_people else 1
        by_row: dict[int, Score] = {}
        for call in [places.tolist() for places in calls if len(places) >= least]:
            scores = reward.score(pictures_NHWC[call], [prompts[i] for i in call])
            assert len(scores) == len(call), f"reward {name}: {len(scores)} scores for {len(call)} pictures"
            by_row |= dict(zip(call, scores, strict=True))
        self._count(name, list(by_row.values()))
        return [by_row.get(i, _NOT_ASKED) for i in rows.tolist()]

    def _reset_counts(self) -> None:
        self._asked = dict.fromkeys(self.weights, 0)
        self._missing = dict.fromkeys(self.weights, 0)
        self._last_error: str | None = None
        self._pictures, self._lost, self._fault = 0, 0, ""

    def _count_pictures(self, there_N: Tensor, fault: str) -> None:
        lost = int((~there_N).sum())
        with self._lock:
            self._pictures += len(there_N)
            self._lost += lost
            for name in self.weights if lost else ():
                self._asked[name] += lost
                self._missing[name] += lost
            if lost:
                self._fault, self._last_error = fault, self._last_error or fault

    def _count(self, name: str, scores: Sequence[Score]) -> None:
        missing = [s for s in scores if math.isnan(s.number())]
        with self._lock:  # waves score in several threads
            self._asked[name] += len(scores)
            self._missing[name] += len(missing)
            if missing:
                reason = " ".join(str(missing[-1].error or "it gave no finite number").split())
                self._last_error = f"reward {name}: {named(reason)}"


def load_mixture(terms: Sequence[RewardTerm], frames: int, ranking: Ranking | None = None) -> RewardMixture:
    """Load the rewards of these terms as one. Rewards of pictures see `frames` frames of a video."""
    return RewardMixture([component_from(term, load_reward(term), frames) for term in terms], ranking)


def component_from(term: RewardTerm, reward: Reward, frames: int) -> Component:
    """Give a reward the retries, the cache and the frames of videos that its term asks for."""
    if reward.groupwise and term.cache:
        raise Refusal(
            f"reward {term.name!r} ranks a group, so its scores cannot be kept by picture; leave out its cache"
        )
    # a server's client has the time limit, and knows which of its pictures it concerns
    timeout = None if term.url or reward.waits_for_people else term.timeout
    reward = RetryingReward(reward, 0 if reward.waits_for_people else term.retries, timeout)
    if term.cache:
        is_local = term.model and not term.url and not term.names_model_of_server
        version = reward.version or (stamp_of(Path(term.model).expanduser()) if is_local else "")
        names = term.name, term.model, term.sha256, version
        reward = CachedReward(reward, " ".join(filter(None, names)), Path(term.cache))
    if not reward.video:
        reward = FrameAverageReward(reward, frames)
    return Component(term, reward)


def close_all(mixtures: Iterable[RewardMixture | None], warn: Callable[[str], None]) -> None:
    """Close the mixtures. Where one fails, a sentence goes to `warn`; its scores are complete by then."""
    for mixture in filter(None, mixtures):
        try:
            mixture.close()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            warn(
                f"a reward's close() failed ({reason}); nothing else is affected, what the reward holds may be held"
                " still"
            )


@contextmanager
def closed_where_refused(mixtures: Iterable[RewardMixture | None]) -> Iterator[None]:
    """Run the block, and close the mixtures where it raises."""
    with ExitStack() as refused:
        # a close that fails beside a refusal says nothing: the refusal is the sentence to be read
        refused.callback(close_all, mixtures, lambda warning: None)
        yield
        refused.pop_all()


def _all(verdicts: Sequence[bool | None]) -> float:
    """1 if all rewards with a verdict pass, 0 if one does not, NaN if none has a verdict."""
    known = [v for v in verdicts if v is not None]
    return float(all(known)) if known else math.nan
