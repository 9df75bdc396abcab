"""Measures of evaluations beside rewards, by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from progrpo.config import Config
from progrpo.rewards.base import Reward, Score
from progrpo.rewards.mixture import Component, RewardMixture
from progrpo.rewards.settings import RewardSettings, RewardTerm
from progrpo.rollout.sampling import ode
from progrpo.training.evaluate import Measures, judged, kl_to_reference
from progrpo.training.evaluate_model import with_rewards
from progrpo.training.pictures import diversity
from progrpo.training.trained_model import ModelChoice
from progrpo.types import Pictures, Prompt


def test_diversity_is_the_mean_distance_of_pairs_in_units_of_the_range():
    black, white = np.zeros((2, 2, 3), dtype=np.uint8), np.full((2, 2, 3), 255, dtype=np.uint8)
    assert diversity(np.stack([black, black])) == 0
    assert diversity(np.stack([black, white])) == 1
    assert diversity(np.stack([black, black, white])) == pytest.approx(2 / 3)  # two of three pairs
    half = black.copy()
    half[0] = 255  # half of the values
    assert diversity(np.stack([black, half])) == pytest.approx(np.sqrt(0.5))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_distance_to_the_reference_is_that_of_velocities(tiny_policy, guidance_scale):
    policy = tiny_policy(weights="full")
    prompts, sampling = [Prompt("red cat"), Prompt("blue dog"), Prompt("cat")], ode(policy, 3, guidance_scale, 2)
    assert kl_to_reference(policy, "current", prompts, sampling, seed=0) == 0
    with torch.no_grad():  # of what the network says last: so far apart are the two everywhere
        policy.trainable["proj_out.bias"] += 0.25
    assert kl_to_reference(policy, "current", prompts, sampling, seed=0) == pytest.approx(0.25**2, rel=1e-4)
    policy.named_weights.snapshot("ema", "reference")
    assert kl_to_reference(policy, "ema", prompts, sampling, seed=0) == 0
    policy.named_weights.forget("reference")
    assert kl_to_reference(policy, "current", prompts, sampling, seed=0) is None


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("my_rewards:score", "my_rewards:score"),
        ("__main__:score", "NAME"),
        ("my_rewards:make._locals_.score", "NAME"),
        ("my_rewards:_lambda_", "NAME"),
    ],
)
def test_the_command_that_trusts_a_reward_names_it_where_a_name_loads_it(name, word):
    config = Config(reward=RewardSettings((RewardTerm(name, from_python=True),)))
    with pytest.raises(ValueError, match=rf"if you trust that, name it: progrpo studio runs/a --reward {word}$"):
        with_rewards(ModelChoice("runs/a"), config, (), "studio")


def _pictures(count: int) -> Pictures:
    return Pictures(torch.zeros((count, 4, 4, 3), dtype=torch.uint8), torch.ones(count, dtype=torch.bool))


class _Verdicts(Reward):
    """Fixed values and verdicts, whatever the pictures are."""

    def __init__(self, *scores: Score) -> None:
        self._scores = scores

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        return [*self._scores]


def _mixture(*scores: Score) -> RewardMixture:
    return RewardMixture([Component(RewardTerm("fixed"), _Verdicts(*scores))])


def test_the_verdict_is_the_rewards_and_without_one_that_of_the_held_out_rewards():
    plain = _mixture(Score(0.1), Score(0.2), Score(None))
    strict = _mixture(Score(1.0, True), Score(0.0, False), Score(1.0, True))
    other = _mixture(Score(0.0, False), Score(1.0, True), Score(1.0, True))
    prompts = [Prompt("a"), Prompt("b"), Prompt("c")]

    def verdicts(reward: RewardMixture, held_out: RewardMixture | None) -> list[bool | None]:
        records = judged(_pictures(3), prompts, reward, Measures(held_out=held_out))
        return [record["strict"] for record in records]

    assert verdicts(plain, None) == [None, None, None]
    assert verdicts(plain, strict) == [True, False, None]  # the third one's own score is missing
    assert verdicts(strict, other) == verdicts(strict, None) == [True, False, True]
