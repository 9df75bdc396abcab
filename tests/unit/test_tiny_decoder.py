"""The small decoder for previews: its form, that it can learn, and that the shipped one has learnt."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline
from torch import Tensor

from progrpo.zoo import WEIGHTS
from progrpo.zoo.pretraining import Pretraining
from progrpo.zoo.shapes import world
from progrpo.zoo.shapes.pretrain_tiny import (
    STEPS,
    TinyBudget,
    agreement,
    build_tiny_decoder,
    cache_pairs,
    decoded,
    pixel_error,
    projections,
    train_decoder,
)

SMALL = TinyBudget(drawn=6, sampled=2, steps=30, batch=4)


@cache
def flow() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(WEIGHTS / "shapes-flow")


# --- its form ---------------------------------------------------------------------------------------------------------


def test_shapes_are_those_of_the_autoencoder():
    tiny = build_tiny_decoder()
    with torch.no_grad():
        assert tiny.decode(torch.zeros(2, 8, 16, 16)).sample.shape == (2, 3, 64, 64)
        assert tiny.encode(torch.zeros(2, 3, 64, 64)).latents.shape == (2, 8, 16, 16)
    assert tiny.config.scaling_factor == 1 and tiny.config.shift_factor == 0


def test_only_its_decoder_is_trained():
    tiny = build_tiny_decoder()
    assert not any(p.requires_grad for p in tiny.encoder.parameters())
    assert sum(p.numel() for p in tiny.encoder.parameters()) < 200
    assert sum(p.numel() for p in tiny.decoder.parameters()) < 50_000


# --- what it learns from ----------------------------------------------------------------------------------------------


def test_projections_grow_sharp_and_depend_on_their_noise_alone():
    prompts = world.sample_prompts("train", 6, 0)
    first, again, other = (projections(flow(), prompts, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first.shape == (STEPS, 6, 8, 16, 16)
    assert torch.equal(first, again) and not torch.equal(first, other)
    change = (first.diff(dim=0)).square().mean((1, 2, 3, 4))
    assert change[-1] < change[0] / 5


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[Tensor, Tensor]:
    return cache_pairs(flow(), SMALL, Pretraining(tmp_path_factory.mktemp("pairs"), log=lambda line: None))


def test_a_pair_is_a_latent_and_its_full_decoding(pairs):
    z, pictures = pairs
    assert len(z) == len(pictures) == SMALL.drawn + SMALL.sampled * STEPS
    assert pixel_error(decoded(flow().vae, z.float()), pictures.numpy()) < 1e-4


# --- learning ---------------------------------------------------------------------------------------------------------


def test_the_loss_falls(pairs, tmp_path):
    z, pictures = pairs
    torch.manual_seed(0)
    tiny, held_out = build_tiny_decoder(), (z, pictures.numpy())
    before = pixel_error(decoded(tiny, z), pictures.numpy())
    encoder = [p.clone() for p in tiny.encoder.parameters()]
    lines: list[str] = []
    run = Pretraining(tmp_path, device="cpu", log=lines.append)
    for _ in range(2):  # the second time it only loads
        train_decoder(tiny, z, pictures, held_out, SMALL, run)
    assert "held-out |error|" in lines[0] and lines[1] == f"decoder: resumed at step {SMALL.steps}"
    assert pixel_error(decoded(tiny, z), pictures.numpy()) < 0.8 * before
    assert all(torch.equal(a, b) for a, b in zip(encoder, tiny.encoder.parameters(), strict=True))


def test_equal_pictures_agree():
    prompts, pictures = world.examples("test", 6, seed=0)
    pictures[3:] = pictures[:3]  # else every picture passes, and no group has an order
    assert agreement(pictures, pictures, prompts, 6) == pytest.approx({"shapes": 1, "shapes_mixed": 1})
    assert pixel_error(pictures, pictures) == 0
    assert pixel_error(np.zeros_like(pictures), np.full_like(pictures, 255)) == 1


# --- the shipped one --------------------------------------------------------------------------------------------------


@cache
def shipped() -> AutoencoderTiny:
    return AutoencoderTiny.from_pretrained(WEIGHTS / "shapes-tiny")


def test_the_shipped_one_is_what_is_built():
    """Of latents as a denoiser says them: with the factors of the autoencoder that it stands in for."""
    built = json.loads(build_tiny_decoder().to_json_string())
    ours, theirs = (
        json.loads((WEIGHTS / name / "config.json").read_text()) for name in ("shapes-tiny", "shapes-flow/vae")
    )
    factors = {name: theirs[name] for name in ("scaling_factor", "shift_factor")}
    assert ours.items() >= (built | factors).items()


@pytest.mark.slow
def test_the_shipped_one_decodes_and_ranks_like_the_full_one():
    size = 12
    prompts = [p for p in world.sample_prompts("validation", 6, 3) for _ in range(size)]
    latents = projections(flow(), prompts, torch.Generator().manual_seed(3))
    for step, most, least in ((2, 0.015, 0.7), (5, 0.01, 0.8), (STEPS - 1, 0.01, 0.8)):
        full, small = decoded(flow().vae, latents[step]), decoded(shipped(), latents[step])
        assert pixel_error(small, full) < most
        ranked = agreement(small, full, prompts, size)["shapes"]
        assert ranked is not None and ranked > least


def test_the_card_states_a_decoder_that_is_faster_and_ranks_alike():
    stated = json.loads((WEIGHTS / "shapes-tiny" / "figures.json").read_text())
    assert min(stated["full_over_tiny"].values()) > 2
    assert set(stated["against_full"]["tiny"]) == {*(f"preview after step {t}" for t in range(STEPS - 1)), "final"}
