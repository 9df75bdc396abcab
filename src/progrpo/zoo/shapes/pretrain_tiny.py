"""The pretraining of `shapes-tiny`: `progrpo pretrain shapes-tiny`.

It is a small decoder for previews, like TAESD, distilled from the decoder of the autoencoder that both built-in models
share. It learns the full decoder's pictures of the latents that it will meet: those of drawn pictures, and all x0
projections of `shapes-flow`, from the first, blurry ones to the finals.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from progrpo.tracking.statistics import spearman
from progrpo.types import Prompt
from progrpo.zoo.networks import LATENT, to_pictures, to_tensor
from progrpo.zoo.pretraining import Pretraining, StageSettings, train_stage
from progrpo.zoo.shapes import world
from progrpo.zoo.shapes.verifier import verify

WIDTH = 16  # a CPU's vector, or its half in bfloat16: other widths cost more than their arithmetic
BLOCKS = (3, 1, 1)  # at 16, 32 and 64 pixels; without the last, the way to full resolution would be linear
STEPS = 8  # denoising steps, in training and in the figures
_T5_LENGTH = 16
_CHUNK = 64
_TIMED = 48  # pictures a batch


@dataclass(frozen=True)
class TinyBudget:
    """The numbers of pairs of a latent and its picture, and of steps. The defaults take 15 minutes on two cores."""

    drawn: int = 4_000
    sampled: int = 1_000
    """The number of trajectories, each of `STEPS` pairs."""
    steps: int = 8_000
    batch: int = 32
    test_groups: int = 24
    group_size: int = 24


def build_tiny_decoder() -> AutoencoderTiny:
    """Build the decoder: 16x16x8 -> 64x64x3, 0.03 M parameters. Its encoder is the smallest possible one, and
    frozen.
    """
    tiny = AutoencoderTiny(
        latent_channels=LATENT[0],
        encoder_block_out_channels=(1, 1, 1),
        num_encoder_blocks=(0, 0, 0),
        decoder_block_out_channels=(WIDTH,) * 3,
        num_decoder_blocks=BLOCKS,
    )
    tiny.encoder.requires_grad_(False)
    return tiny.to(memory_format=torch.channels_last)


# --- pairs ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def projections(flow: StableDiffusion3Pipeline, prompts: Sequence[Prompt], noise: torch.Generator) -> Tensor:
    """Sample a trajectory per prompt and return its x0 projections (T, N, C, H, W), ready to be decoded.

    The last ones are finals. Each trajectory keeps a random share of its noise from step to step, between all (an ODE)
    and none.
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
    x0_T = []
    for sigma, following in pairwise(sigmas):
        timestep = torch.full((len(x),), 1000 * sigma, device=device)
        v = flow.transformer(x, tokens, pooled, timestep, return_dict=False)[0]
        x0 = x - sigma * v
        eps = x + (1 - sigma) * v
        x0_T.append(x0)
        fresh = torch.randn(x.shape, generator=noise).to(device)
        x = (1 - following) * x0 + following * (angle.cos() * eps + angle.sin() * fresh)
    config = flow.vae.config
    return torch.stack(x0_T) / config.scaling_factor + config.shift_factor


@torch.no_grad()
def decoded(vae: AutoencoderKL | AutoencoderTiny, z_NCHW: Tensor) -> np.ndarray:
    """Decode latents, in the autoencoder's dtype, to pictures, uint8 (N, H, W, 3)."""
    chunks = [to_pictures(vae.decode(z.to(vae.device, vae.dtype), return_dict=False)[0]) for z in z_NCHW.split(_CHUNK)]
    return np.concatenate(chunks)


@torch.no_grad()
def cache_pairs(flow: StableDiffusion3Pipeline, budget: TinyBudget, run: Pretraining) -> tuple[Tensor, Tensor]:
    """Make the pairs of the train split once: latents (M, 8, 16, 16), float16, and pictures (M, 64, 64, 3), uint8."""
    file = run.out / "pairs.safetensors"
    if not file.exists():
        noise = torch.Generator().manual_seed(run.seed)
        run.log(f"pairs: encoding {budget.drawn} drawn pictures")
        drawn = to_tensor(world.examples("train", budget.drawn, run.seed)[1])
        latents = [flow.vae.encode(x.to(flow.vae.device)).latent_dist.mode() for x in drawn.split(_CHUNK)]
        run.log(f"pairs: sampling {budget.sampled} trajectories")
        prompts = world.sample_prompts("train", budget.sampled, run.seed + 1)
        for start in range(0, len(prompts), _CHUNK):
            latents.append(projections(flow, prompts[start : start + _CHUNK], noise).flatten(0, 1))
        z = torch.cat(latents).half().cpu()  # rounded before it is decoded, so that pairs match
        run.log(f"pairs: decoding {len(z)} latents")
        save_file({"z": z, "pictures": torch.from_numpy(decoded(flow.vae, z)).contiguous()}, file)
    pairs = load_file(file)
    return pairs["z"], pairs["pictures"]


# --- training ---------------------------------------------------------------------------------------------------------


def train_decoder(
    tiny: AutoencoderTiny,
    z: Tensor,
    pictures: Tensor,
    held_out: tuple[Tensor, np.ndarray],
    budget: TinyBudget,
    run: Pretraining,
) -> None:
    """Regress the full decoder's pictures from their latents."""
    device = run.torch_device
    tiny.to(device)

    def loss_of(step: int) -> Tensor:
        g = torch.Generator().manual_seed(run.seed * 10_000_000 + step)
        chosen = torch.randint(len(z), (budget.batch,), generator=g)
        target = to_tensor(pictures[chosen].numpy()).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            output = tiny.decoder(z[chosen].float().to(device)).float()
        error = output - target
        return error.abs().mean() + error.square().mean()

    def evaluate() -> str:
        return f"held-out |error| {pixel_error(decoded(tiny, held_out[0]), held_out[1]):.4f}"

    settings = StageSettings(budget.steps, lr=4e-3, decay_fraction=0.5)
    train_stage("decoder", tiny.decoder, loss_of, settings, run, evaluate)


# --- measuring --------------------------------------------------------------------------------------------------------


def pixel_error(a_NHWC: np.ndarray, b_NHWC: np.ndarray) -> float:
    """The mean absolute difference of pixels, as a share of their range."""
    return float(np.abs(a_NHWC.astype(np.float32) - b_NHWC).mean() / 255)


def agreement(
    tiny_NHWC: np.ndarray, full_NHWC: np.ndarray, prompts: Sequence[Prompt], size: int
) -> dict[str, float | None]:
    """The mean Spearman correlation, within groups of `size`, of the scores of two decoders' pictures, by reward.

    Groups without an order are left out; None where no group is left.
    """
    pair = [verify(pictures, prompts) for pictures in (tiny_NHWC, full_NHWC)]
    out: dict[str, float | None] = {}
    for name, strict_share in (("shapes", 0.0), ("shapes_mixed", 0.5)):
        scores = [[(1 - strict_share) * v.graded + strict_share * v.strict for v in side] for side in pair]
        groups = zip(*(np.reshape(side, (-1, size)) for side in scores), strict=True)
        correlations = [r for a, b in groups if (r := spearman(a, b)) is not None]
        out[name] = float(np.mean(correlations)) if correlations else None
    return out


@torch.no_grad()
def milliseconds(models: dict[str, AutoencoderKL | AutoencoderTiny], repeats: int = 40) -> dict[str, float]:
    """The milliseconds per picture in batches of 48, by model.

    Each is the best of runs in which the models take turns, so that other work disturbs them alike.
    """
    best = dict.fromkeys(models, float("inf"))
    for _ in range(repeats):
        for name, model in models.items():
            z = torch.zeros(_TIMED, *LATENT, dtype=model.dtype, device=model.device)
            start = time.perf_counter()
            model.decode(z, return_dict=False)[0].cpu()
            best[name] = min(best[name], (time.perf_counter() - start) * 1000 / _TIMED)
    return best


def tiny_figures(tiny: AutoencoderTiny, flow: StableDiffusion3Pipeline, budget: TinyBudget) -> dict[str, object]:
    """The figures of the model card: against the full decoder in float32, on groups of test prompts."""
    size = budget.group_size
    prompts = [p for p in world.sample_prompts("test", budget.test_groups, 9) for _ in range(size)]
    z_TNCHW = projections(flow, prompts, torch.Generator().manual_seed(9))
    fast = {
        "tiny": tiny,
        "tiny, bfloat16": deepcopy(tiny).to(torch.bfloat16),
        "full, bfloat16": deepcopy(flow.vae).to(torch.bfloat16),
    }
    by_model: dict[str, dict[str, object]] = {name: {} for name in fast}
    for step, z in enumerate(z_TNCHW):
        true = decoded(flow.vae, z)
        for name, vae in fast.items():
            pictures = decoded(vae, z)
            row = {"pixel_error": pixel_error(pictures, true), "spearman": agreement(pictures, true, prompts, size)}
            by_model[name]["final" if step == STEPS - 1 else f"preview after step {step}"] = row
    times = milliseconds({"full": flow.vae, **fast})
    return {
        "groups": budget.test_groups,
        "group_size": size,
        "milliseconds_a_picture": times,
        "full_over_tiny": {
            "float32": times["full"] / times["tiny"],
            "bfloat16": times["full, bfloat16"] / times["tiny, bfloat16"],
        },
        "against_full": by_model,
    }


def pretrain_tiny(run: Pretraining, budget: TinyBudget, teacher: Path) -> AutoencoderTiny:
    """Run or resume the training, and export the decoder's folder if asked to.

    `teacher` is the folder of `shapes-flow`.
    """
    run.begin()
    flow, tiny = StableDiffusion3Pipeline.from_pretrained(teacher).to(run.torch_device), build_tiny_decoder()
    flow.vae.to(memory_format=torch.channels_last)
    z, pictures = cache_pairs(flow, budget, run)
    validation = world.sample_prompts("validation", 2 * len(world.KINDS), seed=1)
    unseen = projections(flow, validation, torch.Generator().manual_seed(1)).flatten(0, 1)
    train_decoder(tiny, z, pictures, (unseen, decoded(flow.vae, unseen)), budget, run)
    run.log("measuring the finished decoder on test prompts")
    measured = tiny_figures(tiny, flow, budget)
    factors = flow.vae.config  # of the latents that a denoiser predicts
    tiny.register_to_config(scaling_factor=factors.scaling_factor, shift_factor=factors.shift_factor)
    run.export_model(tiny, "shapes-tiny", measured)
    return tiny
