"""The pretraining of `shapes-flow`: `progrpo pretrain shapes-flow`.

It has four stages, which the same command resumes: the autoencoder, the cached latents, the flow model with its text
encoders, and the detector of the second opinion. Every picture is drawn here; no data is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor

from progrpo.types import Prompt
from progrpo.zoo.flow import CHUNK, FlowData, cache_latents, seed_of, train_flow, vae_loss
from progrpo.zoo.networks import assemble, build_transformer, build_vae, load_parts, to_pictures, to_tensor
from progrpo.zoo.pretraining import Pretraining, StageSettings, sample_pictures, train_stage
from progrpo.zoo.shapes import world
from progrpo.zoo.shapes.detector import ShapeDetector, detector_loss, save_detector
from progrpo.zoo.shapes.models import build_text
from progrpo.zoo.shapes.verifier import verify

KIND_WEIGHTS = {"single": 0.06, "two": 0.24, "counting": 0.22, "colours": 0.06, "position": 0.24, "binding": 0.18}
# T5 tokens: without a mask their number changes the picture, and the long ones cost four times the usual
LENGTHS = {16: 0.94, 32: 0.01, 64: 0.01, 128: 0.01, 256: 0.03}
GUIDANCE_SCALES = (1.0, 2.0, 3.0, 4.5)
# StableDiffusion3Pipeline's
_DEFAULTS = {"num_inference_steps": 28, "guidance_scale": 7.0, "max_sequence_length": 256}


@dataclass(frozen=True)
class Budget:
    """The sizes of the stages. The defaults take two to three hours on two cores."""

    vae_steps: int = 4_000
    vae_batch: int = 32
    judge_steps: int = 700
    judge_batch: int = 64
    pictures: int = 128_000
    flow_steps: int = 26_000
    flow_batch: int = 64
    test_pictures: int = 512


def train_vae(budget: Budget, run: Pretraining) -> AutoencoderKL:
    torch.manual_seed(run.seed)
    vae = build_vae().to(run.torch_device)
    prompts, pictures = world.examples("validation", 192, seed=1)
    held_out = to_tensor(pictures).to(vae.device)

    def loss_of(step: int) -> Tensor:
        x = to_tensor(world.examples("train", budget.vae_batch, seed_of(1, run.seed, step))[1]).to(vae.device)
        return vae_loss(vae, x, step)

    def evaluate() -> str:
        decoded = vae.decode(vae.encode(held_out).latent_dist.mode()).sample
        strict = np.mean([v.strict for v in verify(to_pictures(decoded), prompts)])
        return f"held-out |error| {(decoded - held_out).abs().mean():.4f}, strict round trip {strict:.3f}"

    train_stage("vae", vae, loss_of, StageSettings(budget.vae_steps, lr=2e-3), run, evaluate)
    return vae


def train_detector(budget: Budget, run: Pretraining) -> ShapeDetector:
    torch.manual_seed(run.seed)
    detector = ShapeDetector()
    prompts, pictures = world.examples("validation", 256, seed=1)

    def loss_of(step: int) -> Tensor:
        return detector_loss(detector, budget.judge_batch, seed_of(2, run.seed, step))

    def evaluate() -> str:
        return f"passes drawn truth {np.mean(detector.passes(pictures, prompts)):.3f}"

    train_stage("judge", detector, loss_of, StageSettings(budget.judge_steps, lr=2e-3), run, evaluate)
    return detector


def cache_drawn(vae: AutoencoderKL, count: int, run: Pretraining) -> tuple[Tensor, list[Prompt]]:
    """Draw the training pictures and cache their latents. Return these, float16 (M, 8, 16, 16), and their prompts."""
    rng = np.random.default_rng([run.seed, 4])
    table = world.prompts("train")
    kinds = rng.choice(list(KIND_WEIGHTS), count, p=list(KIND_WEIGHTS.values()))
    prompts = [table[k][rng.integers(len(table[k]))] for k in kinds]
    starts = range(0, count, CHUNK)
    chunks = (np.stack([world.draw(world.scene_for(p, rng)) for p in prompts[i : i + CHUNK]]) for i in starts)
    return cache_latents(vae, chunks, run), prompts


@torch.no_grad()
def measure(pipeline: DiffusionPipeline, split: str, pictures: int, seed: int, **options: Any) -> dict[str, Any]:
    """Score a pipeline's deterministic samples for prompts of a split, strict and graded, over all and by kind.

    `options` are the pipeline call's. The default is 10 steps without guidance.
    """
    prompts = world.sample_prompts(split, pictures, seed)
    verdicts = verify(sample_pictures(pipeline, [p.text for p in prompts], seed, **options), prompts)
    kinds = [p.columns["kind"] for p in prompts]
    by_kind = {
        k: float(np.mean([v.strict for v, kind in zip(verdicts, kinds, strict=True) if kind == k])) for k in world.KINDS
    }
    return {
        "pictures": pictures,
        "strict": float(np.mean([v.strict for v in verdicts])),
        "graded": float(np.mean([v.graded for v in verdicts])),
        "by_kind": by_kind,
    }


@torch.no_grad()
def round_trip(vae: AutoencoderKL, pictures: int) -> float:
    """The share of drawn test pictures that pass the strict verdict after encoding and decoding."""
    prompts, drawn = world.examples("test", pictures, seed=7)
    latents = [vae.encode(x.to(vae.device)).latent_dist.mode() for x in to_tensor(drawn).split(64)]
    decoded = np.concatenate([to_pictures(vae.decode(z).sample) for z in latents])
    return float(np.mean([v.strict for v in verify(decoded, prompts)]))


def figures(
    pipeline: DiffusionPipeline, pictures: int, more: Mapping[str, Mapping[str, Any]], **always: Any
) -> dict[str, Any]:
    """The figures of a model card, on test prompts, with the guidance scale that is best on validation prompts.

    `more` are further options to sample with, by name. `always` are options of every pipeline call, unless `more` has
    its own.
    """
    by_scale = {
        scale: measure(pipeline, "validation", pictures // 2, seed=8, guidance_scale=scale, **always)["strict"]
        for scale in GUIDANCE_SCALES
    }
    best = max(by_scale, key=lambda scale: by_scale[scale])
    test: dict[str, Mapping[str, Any]] = {
        "10 steps": {},
        "40 steps": {"num_inference_steps": 40},
        f"10 steps, guidance {best:g}": {"guidance_scale": best},
        **more,
    }
    return {
        "pictures": pictures,
        "round_trip_strict": round_trip(pipeline.vae, pictures),
        "validation_strict_by_guidance_scale": {f"{scale:g}": strict for scale, strict in by_scale.items()},
        "test": {
            name: measure(pipeline, "test", **{"pictures": pictures, "seed": 6, **always, **options})
            for name, options in test.items()
        },
    }


def pretrain(run: Pretraining, budget: Budget, start: Path | None = None) -> StableDiffusion3Pipeline:
    """Run or resume every stage, and export the folders of the pipeline and of the detector if asked to.

    With `start`, the folder of an exported `shapes-flow`, its text encoders and its denoiser are trained further, and
    its autoencoder stays.
    """
    run.begin()
    text, transformer = build_text(), build_transformer().to(run.torch_device)
    vae = load_parts(start, text, transformer).to(run.torch_device) if start else train_vae(budget, run)
    z, prompts = cache_drawn(vae, budget.pictures, run)

    def evaluate() -> str:
        scores = measure(assemble(vae, text, transformer), "validation", 96, seed=5, max_sequence_length=min(LENGTHS))
        return f"validation strict {scores['strict']:.3f}, graded {scores['graded']:.3f}"

    data = FlowData(z, [p.text for p in prompts], LENGTHS, budget.flow_steps, budget.flow_batch)
    train_flow(text, transformer, data, run, evaluate)
    detector = train_detector(budget, run)
    pipeline = assemble(vae, text, transformer)
    run.log("measuring the finished model on test prompts")
    more: dict[str, dict[str, Any]] = {
        "10 steps, 256 T5 tokens": {"max_sequence_length": 256},
        "28 steps, guidance 7, 256 T5 tokens": {**_DEFAULTS, "pictures": budget.test_pictures // 2},
    }
    measured = figures(pipeline, budget.test_pictures, more, max_sequence_length=min(LENGTHS))
    run.export_model(pipeline, "shapes-flow", measured)
    if run.export:
        save_detector(detector, run.export / "shapes-judge")
    return pipeline
