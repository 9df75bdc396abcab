"""The rewards of a model that was learned from pairs: its score, and the variance of its ensemble.

Both terms of one folder share one network. What it computed last is remembered, so that a call of both terms for the
same pictures is one call of the network.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from progrpo.preferences.reward_model.load import LATENT
from progrpo.preferences.reward_model.model import Description, load_reward_model, read_description
from progrpo.rewards.base import Refusal, Reward, Score
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt


class _Loaded:
    """A reward model, loaded at its first use, and its scores of the last call."""

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        self._load = functools.cache(functools.partial(load_reward_model, folder, device, dtype))
        self._lock = threading.Lock()  # waves score in several threads
        self._last: tuple[bytes, Tensor] | None = None

    def scores(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> Tensor:
        """The members' scores (K, N)."""
        key = _key(pictures_NHWC, prompts)
        with self._lock:
            if self._last is None or self._last[0] != key:
                try:
                    self._last = key, self._load().scores(list(pictures_NHWC), prompts)
                except ValueError as error:
                    raise Refusal(f"reward_model: {error}") from error
            return self._last[1]


def _key(pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> bytes:
    digest = hashlib.sha256(repr((pictures_NHWC.shape, [prompt.text for prompt in prompts])).encode())
    digest.update(np.ascontiguousarray(pictures_NHWC).data if pictures_NHWC.size else b"")
    return digest.digest()


@functools.cache
def _loaded(folder: Path, device: str, dtype: str, digest: str) -> _Loaded:
    """The one of this process for a folder with these weights."""
    return _Loaded(folder, device, dtype)


class LearnedReward(Reward):
    """The mean score of a reward model's members. Pictures it was trained on have mean 0 and standard deviation 1."""

    takes_model = True

    def __init__(self, loaded: _Loaded, description: Description) -> None:
        self._loaded = loaded
        self.version = _digest(description)

    @classmethod
    def make(cls, term: RewardTerm) -> Reward:
        if not term.model:
            raise Refusal(
                f"reward {term.name!r} needs the folder of a reward model: give it as `model`, as in"
                f' {{"name": "{term.name}", "model": "taste"}}; `progrpo reward-model train` makes one'
            )
        folder = Path(term.model).expanduser()
        try:
            description = read_description(folder)
        except ValueError as error:
            raise Refusal(f"reward {term.name!r}: {error}") from error
        if description.backbone == LATENT:
            raise Refusal(
                f"reward {term.name!r}: {term.model} is a latent reward head, which sees no pictures: name it in"
                " preview.latent_reward, and here a reward model that was trained without --latent"
            )
        cls._check(term, description)
        return cls(_loaded(folder.resolve(), term.device, term.dtype, _digest(description)), description)

    @classmethod
    def _check(cls, term: RewardTerm, description: Description) -> None:
        """Refuse a reward model that cannot give this reward."""

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        return [Score(value) for value in self._values(self._loaded.scores(pictures_NHWC, prompts)).tolist()]

    def _values(self, score_KN: Tensor) -> Tensor:
        return score_KN.mean(0)


class LearnedRewardVariance(LearnedReward):
    """The variance of a reward model's members: how little the pairs say of a picture.

    With a negative weight it penalises what the reward is unsure of (UWO, arXiv 2310.02743). With weight 0 it is the
    `reward.noise` of noise-aware selection.
    """

    @classmethod
    def _check(cls, term: RewardTerm, description: Description) -> None:
        if description.members < 2:
            raise Refusal(
                f"reward {term.name!r}: the reward model {term.model} has one member, and a variance needs two;"
                " train it with --members 8"
            )

    def _values(self, score_KN: Tensor) -> Tensor:
        return (score_KN - score_KN.mean(0)).square().sum(0) / (len(score_KN) - 1)


def _digest(description: Description) -> str:
    return hashlib.sha256(repr(sorted(description.sha256.items())).encode()).hexdigest()[:16]
