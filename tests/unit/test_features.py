"""Features of pictures: equal for equal pictures, one row each, and refused by one sentence where there are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from progrpo.rewards.base import Refusal
from progrpo.suites.statistics import pairwise_distance, vendi
from progrpo.training.features import load_features, pixels

BLACK, WHITE = np.zeros((2, 8, 8, 3), np.uint8), np.full((1, 8, 8, 3), 255, np.uint8)


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    size, crop = {"shortest_edge": 28}, {"height": 28, "width": 28}
    BitImageProcessorPil(size=size, crop_size=crop).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["pixels", "shapes", "dino"])
def test_equal_pictures_have_equal_features(name, dino):
    features = load_features(dino if name == "dino" else name)
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, size=(1, 64, 64, 3), dtype=np.uint8)
    other = rng.integers(0, 256, size=(1, 64, 64, 3), dtype=np.uint8)
    seen = features(np.concatenate([picture, picture, other]))
    assert len(seen) == 3 and seen[0] == pytest.approx(seen[1], abs=1e-5)
    assert pairwise_distance(seen[:2]) == pytest.approx(0, abs=1e-6) and vendi(seen[:2]) == pytest.approx(1, abs=1e-4)
    distance = pairwise_distance(seen[1:])
    assert distance is not None and distance > 1e-4


def test_features_do_not_depend_on_the_batch(dino):
    features = load_features(dino)
    pictures = np.random.default_rng(1).integers(0, 256, size=(20, 32, 24, 3), dtype=np.uint8)
    assert features(pictures)[17] == pytest.approx(features(pictures[17:18])[0], abs=1e-5)


def test_pixels_are_around_grey():
    seen = pixels(np.concatenate([BLACK, WHITE]))
    assert seen.shape == (3, 32 * 32 * 3) and (seen[:2] == -1).all() and (seen[2] == 1).all()
    assert pairwise_distance(seen[1:]) == pytest.approx(2)


def test_a_network_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Refusal, match="reward 'dino': there is no cached copy of no-such/dino"):
        load_features("no-such/dino")
