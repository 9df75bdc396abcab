"""How `shapes-tiny` is made: `progrpo pretrain shapes-tiny`.

A small decoder for previews (TAESD's kind), distilled from the decoder of the autoencoder that both built-in models share:
it learns the pictures that the full decoder makes of what it will meet, latents of drawn pictures and the x0 projections
of `shapes-flow` from its first, blurry ones to its finals.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from progrpo.tracking.statistics import spearman
from progrpo.types import Prompt
from progrpo.zoo.pretraining import begun, delivered, train_stage
from progrpo.zoo.shapes import world
from progrpo.zoo.shapes.models import LATENT, to_pictures, to_tensor
from progrpo.zoo.shapes.pretrain import Log
from progrpo.zoo.shapes.verifier import verify

WIDTH = 16  # a whole vector of a CPU, or its half in bfloat16: other widths cost more than their arithmetic
BLOCKS = (3, 1, 1)  # at 16, 32 and 64 pixels; without the last, the way to full resolution would be linear
STEPS = 8  # of denoising, in training and in the figures
_T5_LENGTH = 16
_CHUNK = 64
_TIMED = 48  # pictures a batch


@dataclass(frozen=True)
class TinyBudget:
    """Pairs of a latent and its picture, and steps on them; the defaults take a quarter of an hour on two cores."""

    drawn: int = 4_000
    sampled: int = 1_000
    """Trajectories, each of `STEPS` pairs."""
    steps: int = 8_000
    batch: int = 32
    test_groups: int = 24
    group_size: int = 24


def build_tiny_decoder() -> AutoencoderTiny:
    """16x16x8 -> 64x64x3, 0.03 M parameters; its encoder is the smallest that the class allows, and frozen."""
    tiny = AutoencoderTiny(
        latent_channels=LATENT[0],
        encoder_block_out_channels=(1, 1, 1),
        num_encoder_blocks=(0, 0, 0),
        decoder_block_out_channels=(WIDTH,) * 3,
        num_decoder_blocks=BLOCKS,
    )
    tiny.encoder.requires_grad_(False)
    return tiny.to(memory_format=torch.channels_last)


# --- what it learns from ----------------------------------------------------------------------------------------------


@torch.no_grad()
def projections(flow: StableDiffusion3Pipeline, prompts: Sequence[Prompt], noise: torch.Generator) -> Tensor:
    """x0 projections (T, N, C, H, W) of a trajectory a prompt, as the autoencoder decodes them; the last are finals.

    Each trajectory keeps a random share of its noise from step to step and draws the rest anew: all (an ODE), none, and
    between.
    """
    device = flow.transformer.device
    texts = [p.text for p in prompts]
    tokens, _, pooled, _ = flow.encode_prompt(
        texts, None, None, do_classifier_free_guidance=False, max_sequence_length=_T5_LENGTH, device=device
    )
    flow.scheduler.set_timesteps(STEPS)
    sigmas = flow.scheduler.sigmas.tolist()
    angle = (torch.rand(len(texts), 1, 1, 1, generator=noise) * torch.pi / 2).to(device)
    x = torch.randn(len(texts), *LATENT, generator=noise).to(device)
    found = []
    for sigma, following in pairwise(sigmas):
        timestep = torch.full((len(x),), 1000 * sigma, device=device)
        v = flow.transformer(x, tokens, pooled, timestep, return_dict=False)[0]
        x0, eps = x - sigma * v, x + (1 - sigma) * v
        found.append(x0)
        fresh = torch.randn(x.shape, generator=noise).to(device)
        x = (1 - following) * x0 + following * (angle.cos() * eps + angle.sin() * fresh)
    config = flow.vae.config
    return torch.stack(found) / config.scaling_factor + config.shift_factor


@torch.no_grad()
def decoded(vae: AutoencoderKL | AutoencoderTiny, z_NCHW: Tensor) -> np.ndarray:
    """Pictures, uint8 (N, H, W, 3), in the autoencoder's dtype."""
    parts = [to_pictures(vae.decode(z.to(vae.device, vae.dtype), return_dict=False)[0]) for z in z_NCHW.split(_CHUNK)]
    return np.concatenate(parts)


@torch.no_grad()
def cache_pairs(
    flow: StableDiffusion3Pipeline, out: Path, budget: TinyBudget, seed: int, log: Log
) -> tuple[Tensor, Tensor]:
    """Make once what is learnt from, all of the train split: latents (M, 8, 16, 16), float16, and pictures (M, 64, 64, 3), uint8."""
    file = out / "pairs.safetensors"
    if not file.exists():
        noise, parts = torch.Generator().manual_seed(seed), []
        log(f"pairs: encoding {budget.drawn} drawn pictures")
        drawn = to_tensor(world.examples("train", budget.drawn, seed)[1])
        parts += [flow.vae.encode(x.to(flow.vae.device)).latent_dist.mode() for x in drawn.split(_CHUNK)]
        log(f"pairs: sampling {budget.sampled} trajectories")
        prompts = world.sample_prompts("train", budget.sampled, seed + 1)
        for start in range(0, len(prompts), _CHUNK):
            parts.append(projections(flow, prompts[start : start + _CHUNK], noise).flatten(0, 1))
        z = torch.cat(parts).half().cpu()  # rounded before it is decoded, so that a pair is one
        log(f"pairs: decoding {len(z)} latents")
        save_file({"z": z, "pictures": torch.from_numpy(decoded(flow.vae, z)).contiguous()}, file)
    pairs = load_file(file)
    return pairs["z"], pairs["pictures"]


# --- learning ---------------------------------------------------------------------------------------------------------


def train_decoder(
    tiny: AutoencoderTiny,
    z: Tensor,
    pictures: Tensor,
    held_out: tuple[Tensor, np.ndarray],
    out: Path,
    budget: TinyBudget,
    seed: int,
    device: torch.device,
    log: Log,
) -> None:
    """Regress the full decoder's pictures."""
    tiny.to(device)

    def loss_of(step: int) -> Tensor:
        g = torch.Generator().manual_seed(seed * 10_000_000 + step)
        chosen = torch.randint(len(z), (budget.batch,), generator=g)
        wanted = to_tensor(pictures[chosen].numpy()).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            found = tiny.decoder(z[chosen].float().to(device)).float()
        error = found - wanted
        return error.abs().mean() + error.square().mean()

    def evaluate() -> str:
        return f"held-out |error| {pixel_error(decoded(tiny, held_out[0]), held_out[1]):.4f}"

    train_stage(
        "decoder",
        tiny.decoder,
        loss_of,
        steps=budget.steps,
        lr=4e-3,
        out=out,
        decay_fraction=0.5,
        evaluate=evaluate,
        log=log,
    )


# --- measuring --------------------------------------------------------------------------------------------------------


def pixel_error(a_NHWC: np.ndarray, b_NHWC: np.ndarray) -> float:
    """Mean absolute difference of pixels, as a share of their range."""
    return float(np.abs(a_NHWC.astype(np.float32) - b_NHWC).mean() / 255)


def agreement(
    found_NHWC: np.ndarray, true_NHWC: np.ndarray, prompts: Sequence[Prompt], size: int
) -> dict[str, float | None]:
    """Mean Spearman within groups of `size` of the scores of two decoders' pictures, by reward.

    Groups without an order are left out; None where no group is left.
    """
    pair = [verify(pictures, prompts) for pictures in (found_NHWC, true_NHWC)]
    out: dict[str, float | None] = {}
    for name, strict_share in (("shapes", 0.0), ("shapes_mixed", 0.5)):
        scores = [[(1 - strict_share) * v.graded + strict_share * v.strict for v in side] for side in pair]
        groups = zip(*(np.reshape(side, (-1, size)) for side in scores), strict=True)
        found = [r for a, b in groups if (r := spearman(a, b)) is not None]
        out[name] = float(np.mean(found)) if found else None
    return out


@torch.no_grad()
def milliseconds(models: dict[str, AutoencoderKL | AutoencoderTiny], repeats: int = 40) -> dict[str, float]:
    """Time a picture in batches of 48, by model: the best of runs that take turns, since other work disturbs them alike."""
    best = dict.fromkeys(models, float("inf"))
    for _ in range(repeats):
        for name, model in models.items():
            z = torch.zeros(_TIMED, *LATENT, dtype=model.dtype, device=model.device)
            start = time.perf_counter()
            model.decode(z, return_dict=False)[0].cpu()
            best[name] = min(best[name], (time.perf_counter() - start) * 1000 / _TIMED)
    return best


def tiny_figures(tiny: AutoencoderTiny, flow: StableDiffusion3Pipeline, budget: TinyBudget) -> dict[str, Any]:
    """What the card states, against the full decoder in float32, on groups of test prompts."""
    size = budget.group_size
    prompts = [p for p in world.sample_prompts("test", budget.test_groups, 9) for _ in range(size)]
    z_TNCHW = projections(flow, prompts, torch.Generator().manual_seed(9))
    fast = {
        "tiny": tiny,
        "tiny, bfloat16": deepcopy(tiny).to(torch.bfloat16),
        "full, bfloat16": deepcopy(flow.vae).to(torch.bfloat16),
    }
    found: dict[str, dict[str, Any]] = {name: {} for name in fast}
    for step, z in enumerate(z_TNCHW):
        true = decoded(flow.vae, z)
        for name, vae in fast.items():
            pictures = decoded(vae, z)
            row = {"pixel_error": pixel_error(pictures, true), "spearman": agreement(pictures, true, prompts, size)}
            found[name]["final" if step == STEPS - 1 else f"preview after step {step}"] = row
    times = milliseconds({"full": flow.vae, **fast})
    return {
        "groups": budget.test_groups,
        "group_size": size,
        "milliseconds_a_picture": times,
        "full_over_tiny": {
            "float32": times["full"] / times["tiny"],
            "bfloat16": times["full, bfloat16"] / times["tiny, bfloat16"],
        },
        "against_full": found,
    }


def pretrain_tiny(
    out: Path,
    *,
    teacher: Path,
    budget: TinyBudget,
    seed: int = 0,
    device: str = "auto",
    export: Path | None = None,
    log: Log = print,
) -> AutoencoderTiny:
    """Run or resume the training in `out`; with `export`, write the decoder's folder there.

    `teacher` is the folder of `shapes-flow`. `device` auto is a GPU where there is one.
    """
    place = begun(out, seed, device)
    flow, tiny = StableDiffusion3Pipeline.from_pretrained(teacher).to(place), build_tiny_decoder()
    flow.vae.to(memory_format=torch.channels_last)
    z, pictures = cache_pairs(flow, out, budget, seed, log)
    validation = world.sample_prompts("validation", 2 * len(world.KINDS), seed=1)
    unseen = projections(flow, validation, torch.Generator().manual_seed(1)).flatten(0, 1)
    train_decoder(tiny, z, pictures, (unseen, decoded(flow.vae, unseen)), out, budget, seed, place, log)
    log("measuring the finished decoder on test prompts")
    found, factors = tiny_figures(tiny, flow, budget), flow.vae.config
    # so that it decodes what a denoiser says
    tiny.register_to_config(scaling_factor=factors.scaling_factor, shift_factor=factors.shift_factor)
    delivered(tiny, "shapes-tiny", found, out, export, log)
    return tiny
