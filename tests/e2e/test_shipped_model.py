"""The model in the package: it loads in diffusers with no further argument, draws what is asked, and is small."""

from __future__ import annotations

import json
import re

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from progrpo.zoo import WEIGHTS
from progrpo.zoo.shapes.pretrain import measure, round_trip

FOLDER = WEIGHTS / "shapes-flow"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(FOLDER)


def test_files_are_safetensors_and_small() -> None:
    files = [f for f in WEIGHTS.rglob("*") if f.is_file()]
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    assert sum(f.stat().st_size for f in files) <= 25e6


def test_no_file_tells_where_it_was_made() -> None:
    texts = [f.read_text() for f in WEIGHTS.rglob("*.json")]
    assert not [t for t in texts if re.search(r'"_name_or_path": "[^"]*[/\\\\]', t)]


def test_has_three_text_encoders_that_read_the_prompt(pipeline: StableDiffusion3Pipeline) -> None:
    def encode(text: str) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, _, pooled, _ = pipeline.encode_prompt(text, None, None, do_classifier_free_guidance=False)
        return tokens, pooled

    red, blue = encode("a red circle"), encode("a blue circle")
    assert pipeline.text_encoder_3 is not None
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(red, blue, strict=True))


def test_the_autoencoder_keeps_what_a_picture_shows(pipeline: StableDiffusion3Pipeline) -> None:
    assert round_trip(pipeline.vae, 240) >= 0.95


def test_it_draws_what_its_card_says(pipeline: StableDiffusion3Pipeline) -> None:
    """96 pictures have a standard error of 5 points: three of them either way."""
    stated = json.loads((FOLDER / "figures.json").read_text())["test"]["10 steps"]["strict"]
    found = measure(pipeline, "test", 96, seed=12, max_sequence_length=16)
    assert found["strict"] == pytest.approx(stated, abs=0.15)
