"""The aesthetic predictor v2.5 on a SigLIP of random weights, against the published formula."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

from progrpo.rewards import aesthetic
from progrpo.rewards.base import Refusal
from progrpo.rewards.load import load_reward
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDE, SIZES = 28, (16, 12, 8, 6, 4, 1)


def published_head() -> dict[str, torch.Tensor]:
    """Five linear layers, at the places that they have beside dropout."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for n, (inputs, outputs) in enumerate(pairwise(SIZES)):
        state[f"scoring_head.{2 * n}.weight"] = torch.randn(outputs, inputs, generator=generator)
        state[f"scoring_head.{2 * n}.bias"] = torch.randn(outputs, generator=generator)
    return state


@pytest.fixture(scope="module")
def siglip() -> SiglipModel:
    config = SiglipConfig(text_config=TOWER, vision_config={**TOWER, "image_size": SIDE, "patch_size": 14})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SiglipModel(config).eval()


@torch.no_grad()
def published_rating(siglip: SiglipModel, picture: np.ndarray) -> float:
    resized = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = (torch.tensor(np.asarray(resized)) / 127.5 - 1).permute(2, 0, 1)[None]
    f = siglip.vision_model(pixels).pooler_output[0]
    h, head = f / f.norm(), published_head()
    for n in range(5):
        h = head[f"scoring_head.{2 * n}.weight"] @ h + head[f"scoring_head.{2 * n}.bias"]
    return float(h)


def test_from_the_cache_without_a_network(siglip, tmp_path, monkeypatch):
    siglip.save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(aesthetic, "SIGLIP", (str(tmp_path), "main"))
    head = tmp_path / "checkpoints" / "aesthetic_predictor_v2_5.pth"
    torch.save(published_head(), head)
    reward = load_reward(RewardTerm("aesthetic_v25", device="cpu"))
    drawn = np.random.default_rng(0).integers(0, 256, (3, 20, 40, 3), dtype=np.uint8)
    ratings = [score.number() for score in reward.score(drawn, [Prompt("")] * 3)]
    assert ratings == pytest.approx([published_rating(siglip, picture) for picture in drawn], abs=1e-4)
    assert np.ptp(ratings) > 1e-3

    head.write_bytes(head.read_bytes()[:100])
    with pytest.raises(
        Refusal, match=r"^reward 'aesthetic_v25': .*_v2_5.pth is damaged, or holds more than tensors; delete it"
    ):
        load_reward(RewardTerm("aesthetic_v25", device="cpu")).check([])
