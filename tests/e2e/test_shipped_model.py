"""The models in the package: they load in diffusers with no further argument, draw what is asked, and are small."""

from __future__ import annotations

import json
import re

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline

from progrpo.zoo import WEIGHTS
from progrpo.zoo.shapes.pretrain import measure, round_trip

MODELS = {"shapes-flow": StableDiffusion3Pipeline, "shapes-diffusion": StableDiffusionPipeline}


@pytest.fixture(scope="module")
def pipelines() -> dict[str, DiffusionPipeline]:
    return {name: DiffusionPipeline.from_pretrained(WEIGHTS / name) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_of_its_family(name: str, pipelines: dict[str, DiffusionPipeline]) -> None:
    assert type(pipelines[name]) is MODELS[name]


def test_files_are_safetensors_and_small() -> None:
    files = [f for f in WEIGHTS.rglob("*") if f.is_file()]
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    for folder in WEIGHTS.iterdir():
        assert sum(f.stat().st_size for f in files if folder in f.parents) <= 25e6


def test_no_file_tells_where_it_was_made() -> None:
    texts = [f.read_text() for f in WEIGHTS.rglob("*.json")]
    assert not [t for t in texts if re.search(r'"_name_or_path": "[^"]*[/\\\\]', t)]


def test_has_three_text_encoders_that_read_the_prompt(pipelines: dict[str, DiffusionPipeline]) -> None:
    pipeline = pipelines["shapes-flow"]

    def encode(text: str) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, _, pooled, _ = pipeline.encode_prompt(text, None, None, do_classifier_free_guidance=False)
        return tokens, pooled

    red, blue = encode("a red circle"), encode("a blue circle")
    assert pipeline.text_encoder_3 is not None
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(red, blue, strict=True))


def test_both_have_the_same_autoencoder(pipelines: dict[str, DiffusionPipeline]) -> None:
    flow, diffusion = (pipelines[name].vae.state_dict() for name in MODELS)
    assert flow.keys() == diffusion.keys() and all(torch.equal(flow[k], diffusion[k]) for k in flow)


@pytest.mark.slow
def test_the_autoencoder_keeps_what_a_picture_shows(pipelines: dict[str, DiffusionPipeline]) -> None:
    assert round_trip(pipelines["shapes-flow"].vae, 240) >= 0.95


@pytest.mark.parametrize("name", ["shapes-flow", pytest.param("shapes-diffusion", marks=pytest.mark.slow)])
def test_it_draws_what_its_card_says(name: str, pipelines: dict[str, DiffusionPipeline]) -> None:
    """96 pictures have a standard error of 5 points: three of them either way."""
    stated = json.loads((WEIGHTS / name / "figures.json").read_text())["test"]["10 steps"]["strict"]
    more = {"max_sequence_length": 16} if name == "shapes-flow" else {}
    scores = measure(pipelines[name], "test", 96, seed=12, **more)
    assert scores["strict"] == pytest.approx(stated, abs=0.15)
