"""The pretraining of `shapes-flow`: `progrpo pretrain shapes-flow`.

It has four stages, which the same command resumes: the autoencoder, the cached latents, the flow model with its text
encoders, and the detector of the second opinion. Every picture is drawn here; no data is downloaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from progrpo.types import Prompt
from progrpo.zoo.pretraining import begin, export_model, train_stage
from progrpo.zoo.shapes import world
from progrpo.zoo.shapes.detector import ShapeDetector, detector_loss, save_detector
from progrpo.zoo.shapes.models import (
    TextStack,
    assemble,
    build_transformer,
    build_vae,
    load_parts,
    to_pictures,
    to_tensor,
)
from progrpo.zoo.shapes.verifier import verify

# on the mean over latent elements: it keeps the posterior wide, so that the decoder forgives small errors
KL_WEIGHT = 3e-4
KIND_WEIGHTS = {"single": 0.06, "two": 0.24, "counting": 0.22, "colours": 0.06, "position": 0.24, "binding": 0.18}
# T5 tokens: without a mask their number changes the picture, and the long ones cost four times the usual
LENGTHS = {16: 0.94, 32: 0.01, 64: 0.01, 128: 0.01, 256: 0.03}
GUIDANCE_SCALES = (1.0, 2.0, 3.0, 4.5)
# StableDiffusion3Pipeline's
_DEFAULTS = {"num_inference_steps": 28, "guidance_scale": 7.0, "max_sequence_length": 256}
_WORTH_COMPILING = 1_000  # steps: a compilation takes a minute
DROP_TEXT = 0.1  # the share of empty prompts, for classifier-free guidance
Log = Callable[[str], None]
P = ParamSpec("P")
T = TypeVar("T")


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


def _seed_of(stage: int, seed: int, step: int) -> int:
    """A seed of drawn pictures, another one for every stage, run and step."""
    return (stage * 1_000 + seed) * 10_000_000 + step


def train_vae(out: Path, budget: Budget, seed: int, device: torch.device, log: Log) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = build_vae().to(device)
    prompts, pictures = world.examples("validation", 192, seed=1)
    held_out = to_tensor(pictures).to(device)

    def loss_of(step: int) -> Tensor:
        x = to_tensor(world.examples("train", budget.vae_batch, _seed_of(1, seed, step))[1]).to(device)
        noise = torch.Generator(device).manual_seed(step)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.sample(noise)).sample.float()
        error = decoded - x
        return (
            error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        )

    def evaluate() -> str:
        decoded = vae.decode(vae.encode(held_out).latent_dist.mode()).sample
        strict = np.mean([v.strict for v in verify(to_pictures(decoded), prompts)])
        return f"held-out |error| {(decoded - held_out).abs().mean():.4f}, strict round trip {strict:.3f}"

    train_stage("vae", vae, loss_of, steps=budget.vae_steps, lr=2e-3, out=out, evaluate=evaluate, log=log)
    return vae


def train_detector(out: Path, budget: Budget, seed: int, log: Log) -> ShapeDetector:
    torch.manual_seed(seed)
    detector = ShapeDetector()
    prompts, pictures = world.examples("validation", 256, seed=1)

    def loss_of(step: int) -> Tensor:
        return detector_loss(detector, budget.judge_batch, _seed_of(2, seed, step))

    def evaluate() -> str:
        return f"passes drawn truth {np.mean(detector.passes(pictures, prompts)):.3f}"

    train_stage("judge", detector, loss_of, steps=budget.judge_steps, lr=2e-3, out=out, evaluate=evaluate, log=log)
    return detector


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, out: Path, count: int, seed: int, log: Log) -> tuple[Tensor, list[Prompt]]:
    """Encode the training pictures once. Return float16 posterior means (M, 8, 16, 16), normalised, and their prompts.

    The autoencoder's shift and scale are set so that latents have mean 0 and variance 1.
    """
    file = out / "latents.safetensors"
    chunk = 64  # larger ones fall out of the processor's cache
    rng = np.random.default_rng([seed, 4])
    table = world.prompts("train")
    kinds = rng.choice(list(KIND_WEIGHTS), count, p=list(KIND_WEIGHTS.values()))
    prompts = [table[k][rng.integers(len(table[k]))] for k in kinds]
    if not file.exists():
        chunks = []
        for start in range(0, count, chunk):
            pictures = np.stack([world.draw(world.scene_for(p, rng)) for p in prompts[start : start + chunk]])
            chunks.append(vae.encode(to_tensor(pictures).to(vae.device)).latent_dist.mode().half().cpu())
            if start % (160 * chunk) == 0:
                log(f"latents: {start}/{count}")
        save_file({"z": torch.cat(chunks).contiguous()}, file)
    z = load_file(file)["z"]
    shift = z.float().mean().item()
    scale = 1 / z.float().std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return (z - shift) * scale, prompts


def train_flow(
    vae: AutoencoderKL,
    text: TextStack,
    transformer: SD3Transformer2DModel,
    z: Tensor,
    prompts: list[Prompt],
    out: Path,
    budget: Budget,
    seed: int,
    log: Log,
) -> None:
    """Train denoiser and text encoders as a rectified flow (arXiv 2209.03003).

    They regress eps - x0 at logit-normal times (arXiv 2403.03206).
    """
    device = vae.device
    module = nn.ModuleDict({"text": text, "transformer": transformer}).to(device)
    texts = ["", *sorted({p.text for p in prompts})]
    row_of = {t: i for i, t in enumerate(texts)}
    rows = torch.tensor([row_of[p.text] for p in prompts])
    ids = {length: text.tokenize(texts, length) for length in LENGTHS}

    def error(x: Tensor, sigma: Tensor, target: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            tokens, pooled = text(clip_ids, t5_ids)
            v = transformer(x, tokens, pooled, sigma * 1000, return_dict=False)[0]
        return (v.float() - target).square().mean()

    fast_error = compiled(error, budget.flow_steps, log)

    def loss_of(step: int) -> Tensor:
        g = torch.Generator().manual_seed(_seed_of(3, seed, step))
        chosen = torch.randint(len(prompts), (budget.flow_batch,), generator=g)
        row = torch.where(torch.rand(len(chosen), generator=g) < DROP_TEXT, 0, rows[chosen])
        length = list(LENGTHS)[int(torch.multinomial(torch.tensor(list(LENGTHS.values())), 1, generator=g))]
        x0 = z[chosen].float()
        eps = torch.randn(x0.shape, generator=g)
        sigma = torch.randn(len(chosen), generator=g).sigmoid().to(device)
        x0, eps = x0.to(device), eps.to(device)
        x = torch.lerp(x0, eps, sigma[:, None, None, None])
        tokens = (i[row].to(device) for i in ids[length])
        # on a CPU the gradient of fused attention is the slowest part of a step; the rare lengths are not worth a
        # compilation each
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
            return (fast_error if length == min(LENGTHS) else error)(x, sigma, eps - x0, *tokens)

    def evaluate() -> str:
        scores = measure(assemble(vae, text, transformer), "validation", 96, seed=5, max_sequence_length=min(LENGTHS))
        return f"validation strict {scores['strict']:.3f}, graded {scores['graded']:.3f}"

    blocks = [n for n, p in module.named_parameters() if p.ndim == 2 and "transformer_blocks" in n]
    train_stage(
        "flow",
        module,
        loss_of,
        steps=budget.flow_steps,
        lr=1e-3,
        out=out,
        matrices=blocks,
        decay_fraction=0.5,
        evaluate=evaluate,
        log=log,
    )


def compiled(function: Callable[P, T], steps: int, log: Log) -> Callable[P, T]:
    """Compile a function by torch, which makes it a quarter faster. Without a compiler, log it and return the
    function.
    """
    if steps < _WORTH_COMPILING:
        return function
    if shutil.which("c++") is None and shutil.which("cl") is None:
        log("flow: no C++ compiler found, so the training step is not compiled and takes a quarter longer")
        return function
    return torch.compile(function)


@torch.no_grad()
def measure(pipeline: DiffusionPipeline, split: str, pictures: int, seed: int, **options: Any) -> dict[str, Any]:
    """Score a pipeline's deterministic samples for prompts of a split, strict and graded, over all and by kind.

    `options` are the pipeline call's. The default is 10 steps without guidance.
    """
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 10, "guidance_scale": 1.0, **options}
    prompts = world.sample_prompts(split, pictures, seed)
    images = []
    for start in range(0, pictures, 64):
        batch = [p.text for p in prompts[start : start + 64]]
        g = torch.Generator().manual_seed(seed + start)
        images.append(pipeline(batch, generator=g, output_type="np", **options).images)
    verdicts = verify((np.concatenate(images) * 255).round().astype(np.uint8), prompts)
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


def pretrain(
    out: Path,
    *,
    budget: Budget,
    seed: int = 0,
    device: str = "auto",
    start: Path | None = None,
    export: Path | None = None,
    log: Log = print,
) -> StableDiffusion3Pipeline:
    """Run or resume every stage in `out`. With `export`, write the folders of the pipeline and of the detector there.

    `device` auto is a GPU where there is one. With `start`, the folder of an exported `shapes-flow`, its text encoders
    and its denoiser are trained further, and its autoencoder stays.
    """
    place = begin(out, seed, device)
    text, transformer = TextStack(), build_transformer()
    vae = load_parts(start, text, transformer).to(place) if start else train_vae(out, budget, seed, place, log)
    z, prompts = cache_latents(vae, out, budget.pictures, seed, log)
    train_flow(vae, text, transformer, z, prompts, out, budget, seed, log)
    detector = train_detector(out, budget, seed, log)
    pipeline = assemble(vae, text, transformer)
    log("measuring the finished model on test prompts")
    more: dict[str, dict[str, Any]] = {
        "10 steps, 256 T5 tokens": {"max_sequence_length": 256},
        "28 steps, guidance 7, 256 T5 tokens": {**_DEFAULTS, "pictures": budget.test_pictures // 2},
    }
    measured = figures(pipeline, budget.test_pictures, more, max_sequence_length=min(LENGTHS))
    export_model(pipeline, "shapes-flow", measured, out, export, log)
    if export:
        save_detector(detector, export / "shapes-judge")
    return pipeline
