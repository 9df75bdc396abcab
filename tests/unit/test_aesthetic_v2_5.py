"""The aesthetic predictor v2.5 on a SigLIP of random weights: the published formula by hand, and the files of its
head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from progrpo.rewards import aesthetic_v2_5
from progrpo.rewards.aesthetic_v2_5 import convert_head
from progrpo.rewards.base import Refusal
from progrpo.rewards.load import load_reward
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt
from tests.support.siglip import SIDE, WIDTH, published_head, small_aesthetic_v2_5, small_siglip

PROMPTS = [Prompt("a dog"), Prompt("a cat"), Prompt("")]
NAME = "aesthetic_v2_5"


def pictures(shape: tuple[int, int] = (40, 70)) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (3, 5, 5, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize(shape[::-1], Image.Resampling.BICUBIC)) for c in coarse])


@torch.no_grad()
def published_rating(picture_HWC: np.ndarray) -> float:
    """By hand: the picture as a square in -1..1, the pooled feature of length 1, and five matrix products."""
    square = np.asarray(Image.fromarray(picture_HWC).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    pixels_CHW = torch.tensor(square).permute(2, 0, 1) / 127.5 - 1
    x = small_siglip()(pixels_CHW[None]).pooler_output[0]
    x = x / x.square().sum().sqrt()
    head = published_head()
    for place in range(0, 10, 2):
        x = head[f"scoring_head.{place}.weight"] @ x + head[f"scoring_head.{place}.bias"]
    return float(x[0])


def as_pickle(folder: Path, state: object) -> tuple[str, str]:
    path = folder / "head.pth"
    torch.save(state, path)
    return str(path), hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("shape", [(40, 70), (90, 30)])
def test_the_published_formula(shape):
    drawn = pictures(shape)
    expected = [published_rating(picture) for picture in drawn]
    assert np.ptp(expected) > 0.01
    assert [s.value for s in small_aesthetic_v2_5(batch_size=2).score(drawn, PROMPTS)] == pytest.approx(
        expected, abs=1e-4
    )


def test_both_files_of_the_head_from_a_term(tmp_path, monkeypatch):
    small_siglip().save_pretrained(tmp_path)
    monkeypatch.setattr(aesthetic_v2_5, "SIGLIP", (str(tmp_path), "main"))
    path, sha256 = as_pickle(tmp_path, published_head())
    save_file(published_head(), tmp_path / "head.safetensors")
    expected = [s.value for s in small_aesthetic_v2_5().score(pictures(), PROMPTS)]
    for term in (
        RewardTerm(NAME, model=path, sha256=sha256, device="cpu"),
        RewardTerm(NAME, model=str(tmp_path / "head.safetensors"), device="cpu"),
    ):
        assert [s.value for s in load_reward(term).score(pictures(), PROMPTS)] == pytest.approx(expected, abs=1e-6)


def test_a_term_without_a_head_is_refused_at_once(tmp_path):
    for term, sentence in (
        (RewardTerm(NAME), "needs the file of its head in `model`, which you bring yourself"),
        (RewardTerm(NAME, model=str(tmp_path / "none.pth")), "there is no file .*none.pth"),
        (RewardTerm(NAME, model=as_pickle(tmp_path, {})[0]), "may be a pickle, .* give what `sha256sum` prints"),
    ):
        with pytest.raises(Refusal, match=f"^reward '{NAME}'.*{sentence}") as refusal:
            load_reward(term)
        assert "\n" not in str(refusal.value)


def test_a_pickle_of_another_checksum_is_not_read(tmp_path, monkeypatch):
    small_siglip().save_pretrained(tmp_path)
    monkeypatch.setattr(aesthetic_v2_5, "SIGLIP", (str(tmp_path), "main"))
    path, sha256 = as_pickle(tmp_path, published_head())
    term = RewardTerm(NAME, model=path, sha256="0" * 64, device="cpu")
    with pytest.raises(Refusal, match=f"its sha256 is {sha256} and not {'0' * 64}; give the file that you mean"):
        load_reward(term).score(pictures(), PROMPTS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.pop("scoring_head.4.bias"), "scoring_head.4.bias"),
        (lambda state: state.update({"scoring_head.0.weight": torch.zeros(1024, 7)}), "scoring_head.0.weight"),
        (lambda state: state.update({"layers.0.weight": torch.zeros(1)}), "layers.0.weight"),
    ],
)
def test_another_head_is_refused(change: Callable[[dict[str, torch.Tensor]], object], named):
    state = published_head()
    change(state)
    with pytest.raises(Refusal, match=f"is not the published head, since {named} is missing"):
        convert_head(RewardTerm(NAME, model="head.pth"), state, WIDTH)


@pytest.mark.parametrize("name", ["pickscore", "clipscore"])
def test_a_checksum_that_a_reward_does_not_take_is_refused(name):
    with pytest.raises(Refusal, match=f"^reward '{name}' takes no checksum; leave out sha256"):
        load_reward(RewardTerm(name, sha256="0" * 64))
