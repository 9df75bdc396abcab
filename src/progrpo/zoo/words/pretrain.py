"""The pretraining of `words-flow`: `progrpo pretrain words-flow`.

It begins with the shipped `shapes-flow`: its autoencoder is trained further on drawn words, and its denoiser learns to
spell beside text encoders of its own. Every picture is drawn here; no data is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor

from progrpo.rewards.base import Reward
from progrpo.rewards.ocr import OCR
from progrpo.types import Prompt
from progrpo.zoo.flow import CHUNK, FlowData, cache_latents, seed_of, train_flow, vae_loss
from progrpo.zoo.networks import TextStack, assemble, to_pictures, to_tensor
from progrpo.zoo.pretraining import Pretraining, StageSettings, sample_pictures, train_stage
from progrpo.zoo.words import world
from progrpo.zoo.words.tokens import clip_tokenizer, t5_tokenizer

KIND_WEIGHTS = {"2 letters": 0.2, "3 letters": 0.4, "4 letters": 0.4}
T5_LENGTH = 16


@dataclass(frozen=True)
class WordsBudget:
    """The sizes of the stages. The defaults take about an hour on one core."""

    vae_steps: int = 200
    vae_batch: int = 16
    pictures: int = 12_000
    flow_steps: int = 3_000
    flow_batch: int = 32
    test_pictures: int = 384


def build_text() -> TextStack:
    """Build the text encoders. Their letters and places begin as large as what the layers add.

    With transformers' own scale, 0.02, all that is left of them after a layer is the set of the prompt's letters, and
    after 2,000 steps the model drew the right letters in the wrong places.
    """
    text = TextStack(clip_tokenizer(), t5_tokenizer())
    for clip in (text.clip_1, text.clip_2):
        embeddings = clip.text_model.embeddings
        for table in (embeddings.token_embedding, embeddings.position_embedding):
            torch.nn.init.normal_(table.weight, std=0.5)
    return text


def train_vae(vae: AutoencoderKL, budget: WordsBudget, run: Pretraining) -> None:
    """Train the autoencoder of `shapes-flow` further, on words."""
    _, pictures = world.examples("validation", 96, seed=1)
    held_out = to_tensor(pictures).to(vae.device)

    def loss_of(step: int) -> Tensor:
        x = to_tensor(world.examples("train", budget.vae_batch, seed_of(1, run.seed, step))[1]).to(vae.device)
        return vae_loss(vae, x, step)

    def evaluate() -> str:
        decoded = vae.decode(vae.encode(held_out).latent_dist.mode()).sample
        return f"held-out |error| {(decoded - held_out).abs().mean():.4f}"

    train_stage("vae", vae, loss_of, StageSettings(budget.vae_steps, lr=5e-4), run, evaluate)


def cache_drawn(vae: AutoencoderKL, count: int, run: Pretraining) -> tuple[Tensor, list[Prompt]]:
    """Draw the training pictures and cache their latents. Return these, float16 (M, 8, 16, 16), and their prompts."""
    rng = np.random.default_rng([run.seed, 4])
    table = world.prompts("train")
    kinds = rng.choice(list(KIND_WEIGHTS), count, p=list(KIND_WEIGHTS.values()))
    prompts = [table[k][rng.integers(len(table[k]))] for k in kinds]
    starts = range(0, count, CHUNK)
    chunks = (np.stack([world.picture_for(p, rng) for p in prompts[i : i + CHUNK]]) for i in starts)
    return cache_latents(vae, chunks, run), prompts


def read(reader: Reward, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The share of pictures whose word is read exactly, and the mean of the reward, over all and by kind."""
    scores = reader.score(pictures_NHWC, prompts)
    kinds = [p.columns["kind"] for p in prompts]
    return {
        "pictures": len(prompts),
        "exact": float(np.mean([s.passed for s in scores])),
        "mean": float(np.mean([s.value for s in scores])),
        "by_kind": {
            kind: float(np.mean([s.passed for s, k in zip(scores, kinds, strict=True) if k == kind]))
            for kind in world.KINDS
        },
    }


def measure(pipeline: DiffusionPipeline, reader: Reward, split: str, pictures: int, **options: Any) -> dict[str, Any]:
    """Read a pipeline's deterministic samples for prompts of a split. `options` are those of the pipeline's call."""
    prompts = world.sample_prompts(split, pictures, seed=6)
    options = {"max_sequence_length": T5_LENGTH, **options}
    return read(reader, sample_pictures(pipeline, [p.text for p in prompts], seed=6, **options), prompts)


@torch.no_grad()
def figures(pipeline: DiffusionPipeline, reader: Reward, pictures: int) -> dict[str, Any]:
    """The figures of the model's card, on test words."""
    prompts, drawn = world.examples("test", pictures, seed=7)
    vae = pipeline.vae
    latents = [vae.encode(x.to(vae.device)).latent_dist.mode() for x in to_tensor(drawn).split(CHUNK)]
    decoded = np.concatenate([to_pictures(vae.decode(z).sample) for z in latents])
    sampled: dict[str, dict[str, Any]] = {
        "10 steps": {},
        "40 steps": {"num_inference_steps": 40},
        "10 steps, guidance 3": {"guidance_scale": 3.0},
    }
    return {
        "drawn": read(reader, drawn, prompts),
        "round_trip": read(reader, decoded, prompts),
        "test": {name: measure(pipeline, reader, "test", pictures, **options) for name, options in sampled.items()},
    }


def pretrain_words(run: Pretraining, budget: WordsBudget, start: Path) -> StableDiffusion3Pipeline:
    """Run or resume every stage, and export the pipeline's folder if asked to.

    `start` is the folder of `shapes-flow`. Refusal where rapidocr, which reads the words, is not installed.
    """
    reader = OCR.load()
    run.begin()
    shapes = StableDiffusion3Pipeline.from_pretrained(start)
    vae, transformer = shapes.vae.to(run.torch_device), shapes.transformer.to(run.torch_device)
    vae.register_to_config(_name_or_path="words-flow")  # else an export would hold the path of this folder
    transformer.register_to_config(_name_or_path="words-flow")
    text = build_text()
    train_vae(vae, budget, run)
    z, prompts = cache_drawn(vae, budget.pictures, run)
    pipeline = assemble(vae, text, transformer)

    def evaluate() -> str:
        scores = measure(pipeline, reader, "validation", 48)
        return f"validation exact {scores['exact']:.3f}, mean {scores['mean']:.3f}"

    data = FlowData(z, [p.text for p in prompts], {T5_LENGTH: 1.0}, budget.flow_steps, budget.flow_batch)
    train_flow(text, transformer, data, run, evaluate)
    run.log("measuring the finished model on test words")
    run.export_model(pipeline, "words-flow", figures(pipeline, reader, budget.test_pictures))
    return pipeline
