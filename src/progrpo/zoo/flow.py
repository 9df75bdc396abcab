"""The stages that the built-in flow models share: cached latents, and the flow model with its text encoders."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from progrpo.zoo.networks import TextStack, to_tensor
from progrpo.zoo.pretraining import Pretraining, StageSettings, train_stage

DROP_TEXT = 0.1  # the share of empty prompts, for classifier-free guidance
CHUNK = 64  # pictures that are encoded at once: more fall out of the processor's cache
KL_WEIGHT = 3e-4  # on the mean over latent elements: it keeps the posterior wide, so that decoders forgive small errors
_WORTH_COMPILING = 1_000  # steps: a compilation takes a minute
P = ParamSpec("P")
T = TypeVar("T")


def seed_of(stage: int, seed: int, step: int) -> int:
    """A seed of drawn pictures, another one for every stage, run and step."""
    return (stage * 1_000 + seed) * 10_000_000 + step


def vae_loss(vae: AutoencoderKL, x_NCHW: Tensor, step: int) -> Tensor:
    """The autoencoder's loss on pictures in [-1, 1]: absolute and square error, and the posterior's KL divergence."""
    noise = torch.Generator(vae.device).manual_seed(step)
    with torch.autocast(vae.device.type, torch.bfloat16):
        posterior = vae.encode(x_NCHW).latent_dist
        decoded = vae.decode(posterior.sample(noise)).sample.float()
    error = decoded - x_NCHW
    return error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, chunks: Iterable[np.ndarray], run: Pretraining) -> Tensor:
    """Encode pictures once, uint8 (N, H, W, 3) each. Return float16 posterior means (M, 8, 16, 16), normalised.

    The autoencoder's shift and scale are set so that latents have mean 0 and variance 1. A finished file of the
    run is read, and no picture is drawn.
    """
    file = run.out / "latents.safetensors"
    if not file.exists():
        means: list[Tensor] = []
        for pictures in chunks:
            if len(means) % 160 == 0:
                run.log(f"latents: {len(means)} batches")
            means.append(vae.encode(to_tensor(pictures).to(vae.device)).latent_dist.mode().half().cpu())
        save_file({"z": torch.cat(means).contiguous()}, file)
    z = load_file(file)["z"]
    shift = z.float().mean().item()
    scale = 1 / z.float().std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return (z - shift) * scale


@dataclass(frozen=True)
class FlowData:
    """The training data of a flow model: normalised latents (M, C, H, W) and the M texts of their prompts."""

    z_NCHW: Tensor
    texts: Sequence[str]
    lengths: Mapping[int, float]
    """Numbers of T5 tokens, with the share of batches that has each."""
    steps: int
    batch: int


def train_flow(
    text: TextStack,
    transformer: SD3Transformer2DModel,
    data: FlowData,
    run: Pretraining,
    evaluate: Callable[[], str],
) -> None:
    """Train denoiser and text encoders, on the denoiser's device, as a rectified flow (arXiv 2209.03003).

    They regress eps - x0 at logit-normal times (arXiv 2403.03206).
    """
    device = transformer.device
    module = nn.ModuleDict({"text": text, "transformer": transformer}).to(device)
    texts = ["", *sorted(set(data.texts))]
    row_of = {t: i for i, t in enumerate(texts)}
    rows = torch.tensor([row_of[t] for t in data.texts])
    ids = {length: text.tokenize(texts, length) for length in data.lengths}

    def error(x: Tensor, sigma: Tensor, target: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            tokens, pooled = text(clip_ids, t5_ids)
            v = transformer(x, tokens, pooled, sigma * 1000, return_dict=False)[0]
        return (v.float() - target).square().mean()

    fast_error = compiled(error, data.steps, run.log)

    def loss_of(step: int) -> Tensor:
        g = torch.Generator().manual_seed(seed_of(3, run.seed, step))
        chosen = torch.randint(len(rows), (data.batch,), generator=g)
        row = torch.where(torch.rand(len(chosen), generator=g) < DROP_TEXT, 0, rows[chosen])
        shares = torch.tensor(list(data.lengths.values()))
        length = list(data.lengths)[int(torch.multinomial(shares, 1, generator=g))]
        x0 = data.z_NCHW[chosen].float()
        eps = torch.randn(x0.shape, generator=g)
        sigma = torch.randn(len(chosen), generator=g).sigmoid().to(device)
        x0, eps = x0.to(device), eps.to(device)
        x = torch.lerp(x0, eps, sigma[:, None, None, None])
        tokens = (i[row].to(device) for i in ids[length])
        # on a CPU the gradient of fused attention is the slowest part of a step; the rare lengths are not worth a
        # compilation each
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
            return (fast_error if length == min(data.lengths) else error)(x, sigma, eps - x0, *tokens)

    blocks = [n for n, p in module.named_parameters() if p.ndim == 2 and "transformer_blocks" in n]
    settings = StageSettings(data.steps, lr=1e-3, decay_fraction=0.5, matrices=blocks)
    train_stage("flow", module, loss_of, settings, run, evaluate)


def compiled(function: Callable[P, T], steps: int, log: Callable[[str], None]) -> Callable[P, T]:
    """Compile a function by torch, which makes it a quarter faster. Without a compiler, log it and return the
    function.
    """
    if steps < _WORTH_COMPILING:
        return function
    if shutil.which("c++") is None and shutil.which("cl") is None:
        log("flow: no C++ compiler found, so the training step is not compiled and takes a quarter longer")
        return function
    return torch.compile(function)
