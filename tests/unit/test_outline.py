"""Sizes of pipelines that are learnt from their own call, without weights, against those that are learnt with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from progrpo.policies.load import policy_from_pipeline
from progrpo.policies.settings import ModelSettings
from progrpo.policies.sizes import Watch, sizes
from progrpo.types import Condition
from tests.support.recorded_pipelines import RECORDED_PIPELINES, build

ROWS = 2


def settings_of(name: str, path: Path) -> ModelSettings:
    case = RECORDED_PIPELINES[name]
    return ModelSettings(str(path), resolution=case.resolution, max_sequence_length=case.tokens, lora_rank=2)


@pytest.mark.parametrize("name", ["z-image", pytest.param("sana", marks=pytest.mark.slow)])
def test_a_call_without_weights_is_that_of_the_learnt_policy(name: str, tmp_path: Path) -> None:
    pipeline = build(name)
    pipeline.save_pretrained(tmp_path)
    settings = settings_of(name, tmp_path)
    counted = sizes(settings, ROWS, ROWS, 1)
    policy: Any = policy_from_pipeline(pipeline, settings)
    inputs = {key: torch.ones(ROWS, *shape) for key, shape in policy.network.input_shapes.items()}
    for leaf in policy.family.learnt.texts:
        if leaf.ragged is not None:
            inputs[leaf.length_name] = torch.full((ROWS,), leaf.shape[leaf.ragged])
    x, timestep = torch.zeros(ROWS, *policy.latent_shape), torch.full((ROWS,), 500.0)
    with torch.no_grad(), Watch([]) as watch:
        policy.family.denoise(x, timestep, Condition(inputs))
    assert counted.call_flops == watch.flops // ROWS
    assert counted.latent == torch.Size(policy.latent_shape).numel() and counted.decode_flops > 0
    assert counted.trained == sum(p.numel() for p in policy.trainable.values())
    assert counted.frozen == sum(p.numel() for p in policy.denoiser.parameters()) - counted.trained


@pytest.mark.slow
def test_a_source_takes_part_in_the_call(tmp_path: Path) -> None:
    build("qwen-image-edit-plus").save_pretrained(tmp_path)
    counted = sizes(settings_of("qwen-image-edit-plus", tmp_path), ROWS, ROWS, 1)
    assert counted.latent == 4 * 8 * 8 and counted.train_flops > counted.call_flops > 0


def test_a_pipeline_whose_encoded_texts_are_not_known_is_refused(tmp_path: Path) -> None:
    build("chroma").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^model\.path: a ChromaPipeline is learnt .* not known without its weights"):
        sizes(settings_of("chroma", tmp_path), 1, 1, 1)
