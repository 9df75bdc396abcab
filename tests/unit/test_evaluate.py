"""Measures of evaluations beside rewards, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from progrpo.config import Config
from progrpo.rewards.settings import RewardSettings, RewardTerm
from progrpo.rollout.sampling import ode
from progrpo.training.evaluate import kl_to_reference
from progrpo.training.evaluate_model import with_rewards
from progrpo.training.pictures import diversity
from progrpo.training.trained_model import ModelChoice
from progrpo.types import Prompt


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
