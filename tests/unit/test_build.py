"""From a configuration to parts: what is settled by measuring, and how an iteration samples."""

from __future__ import annotations

import pytest
import torch

from progrpo.config import Config, GRPOConfig, ModelConfig, ObjectiveConfig, SamplingConfig
from progrpo.policies.load import fastest_dtype
from progrpo.training.build import OBJECTIVES, sampling_from, settled
from progrpo.training.distributed import Ranks


def test_a_dtype_that_is_named_stays():
    config = Config(model=ModelConfig(dtype="float16"))
    assert settled(config, Ranks()) is config


def test_auto_is_measured_once_and_written_down():
    chosen = settled(Config(model=ModelConfig(dtype="auto")), Ranks())
    assert chosen.model.dtype in ("float32", "bfloat16") and chosen == Config(model=chosen.model)
    assert settled(chosen, Ranks()) is chosen
    assert fastest_dtype(torch.device("cpu")) in ("float32", "bfloat16")


@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_a_window_is_stochastic_and_stored_and_the_rest_follows_the_ode(tiny_policy, ratio):
    config = Config(
        sampling=SamplingConfig(num_inference_steps=6, sde_window="sliding", sde_window_size=2, sde_window_interval=1),
        objective=ObjectiveConfig(grpo=GRPOConfig(ratio=ratio)),
    )
    needs = OBJECTIVES["grpo"](config.objective).needs
    sampling = sampling_from(config, tiny_policy(), needs, iteration=2)
    assert sampling.noise_levels == (0, 0, 0.7, 0.7, 0, 0) and sampling.stored_steps == {2, 3}
    assert sampling.stored_means == (ratio == "guard")
