"""The pretraining of `shapes-diffusion`: `progrpo pretrain shapes-diffusion`.

Its teacher is `shapes-flow`. It begins with the teacher's autoencoder, tokenizer and first text encoder. At every noisy
latent its noise prediction is compared with the one that follows from the flow model's velocity, and three of its
layers with the flow model's blocks (hints: arXiv 1412.6550). Neither target has the variance of a single picture's
noise, so a small model gets far in half an hour on a laptop.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel

from progrpo.types import Prompt
from progrpo.zoo.flow import DROP_TEXT, compiled
from progrpo.zoo.pretraining import Pretraining, StageSettings, train_stage
from progrpo.zoo.shapes.models import assemble_diffusion, build_unet, noise_scheduler
from progrpo.zoo.shapes.pretrain import cache_drawn, figures, measure

_T5_LENGTH = 16
MAX_WEIGHT = 10.0  # of an error of noise: at pure noise the velocity's would be 240 and drown all other levels
HINT_WEIGHT = 1.0  # of a layer's unexplained variance, beside the error of noise


@dataclass(frozen=True)
class DiffusionBudget:
    """The size of the only stage. The defaults take half an hour on two cores."""

    pictures: int = 64_000
    steps: int = 7_000
    batch: int = 32
    test_pictures: int = 512


class Taps:
    """The last outputs of some modules of a network."""

    def __init__(self, *modules: nn.Module) -> None:
        self.outputs: list[Tensor] = [torch.empty(0)] * len(modules)
        self._handles = [m.register_forward_hook(self._keep(i)) for i, m in enumerate(modules)]

    def _keep(self, index: int) -> Callable[[nn.Module, object, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: object, output: tuple[Tensor, ...]) -> None:
            self.outputs[index] = output[-1]  # a joint block gives the text first

        return hook

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class Teacher(nn.Module):
    """`shapes-flow` as a predictor of noise in latents of a diffusion process."""

    def __init__(self, pipeline: StableDiffusion3Pipeline, texts: list[str]) -> None:
        super().__init__()
        self.transformer = pipeline.transformer.requires_grad_(False).eval()
        encoded = [_encode(pipeline, texts[i : i + 256]) for i in range(0, len(texts), 256)]
        self.tokens, self.pooled = (torch.cat(batches) for batches in zip(*encoded, strict=True))
        config = pipeline.vae.config
        self.offset = config.shift_factor * config.scaling_factor
        self.taps = Taps(*self.transformer.transformer_blocks[1:])

    @torch.no_grad()
    def noise(self, x: Tensor, alpha: Tensor, sigma: Tensor, row: Tensor) -> Tensor:
        """Predict eps (B, C, H, W) in x = alpha x0 + sigma eps, for the prompts numbered `row`.

        In x / (alpha + sigma) the share of noise is sigma / (alpha + sigma): the flow model's own input. Its latents
        are centred; Stable Diffusion's pipeline does not centre them.
        """
        total = alpha + sigma
        share = sigma / total
        z = (x - alpha * self.offset) / total
        tokens, pooled = self.tokens[row].to(x.device), self.pooled[row].to(x.device)
        v = self.transformer(z, tokens, pooled, share.flatten() * 1000, return_dict=False)[0]
        return z + (1 - share) * v.float()


@torch.no_grad()
def _encode(pipeline: StableDiffusion3Pipeline, texts: list[str]) -> tuple[Tensor, Tensor]:
    tokens, _, pooled, _ = pipeline.encode_prompt(
        texts, None, None, do_classifier_free_guidance=False, max_sequence_length=_T5_LENGTH
    )
    return tokens.cpu(), pooled.cpu()


def begin_text_encoder(pipeline: StableDiffusion3Pipeline) -> CLIPTextModel:
    """Build Stable Diffusion's text encoder with the weights of the flow model's first CLIP encoder."""
    clip = CLIPTextModel(pipeline.text_encoder.config)
    clip.load_state_dict(pipeline.text_encoder.text_model.state_dict())
    return clip


def unshifted(vae: AutoencoderKL) -> AutoencoderKL:
    """A copy of the autoencoder for Stable Diffusion's pipeline, which scales latents and does not shift them."""
    same = AutoencoderKL.from_config(vae.config, shift_factor=None)
    same.register_to_config(_name_or_path="shapes-flow")
    same.load_state_dict(vae.state_dict())
    return same.to(vae.device).eval()


def train_unet(
    pipeline: StableDiffusionPipeline,
    flow: StableDiffusion3Pipeline,
    z: Tensor,
    prompts: list[Prompt],
    budget: DiffusionBudget,
    run: Pretraining,
) -> None:
    """Regress the teacher's noise at uniform timesteps, with the weights of the flow's velocity up to MAX_WEIGHT.

    The U-Net's transformers have the teacher's 8x8 grid. A linear map of each also regresses one of the teacher's last
    three blocks, by the share of unexplained variance. `z` are the flow model's normalised latents.
    """
    device, clip, unet = run.torch_device, pipeline.text_encoder, pipeline.unet
    transformers = [*unet.down_blocks[1].attentions, *unet.up_blocks[0].attentions]
    wide, taught = unet.config.block_out_channels[1], flow.transformer.inner_dim
    hints = nn.ModuleList(nn.Linear(wide, taught) for _ in transformers)
    module = nn.ModuleDict({"clip": clip, "unet": unet, "hints": hints}).to(device)
    taps = Taps(*transformers)
    texts = ["", *sorted({p.text for p in prompts})]
    row_of = {t: i for i, t in enumerate(texts)}
    rows = torch.tensor([row_of[p.text] for p in prompts])
    ids = torch.tensor(pipeline.tokenizer(texts, padding="max_length")["input_ids"])
    teacher = Teacher(flow, texts).to(device)
    alphas_cumprod = noise_scheduler().alphas_cumprod.to(device)

    def predict(x: Tensor, timestep: Tensor, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast(device.type, torch.bfloat16):
            noise = unet(x, timestep, clip(ids).last_hidden_state, return_dict=False)[0]
            layers = [hint(h.flatten(2).mT).float() for hint, h in zip(hints, taps.outputs, strict=True)]
        return noise.float(), layers

    def teach(x: Tensor, alpha: Tensor, sigma: Tensor, row: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast(device.type, torch.bfloat16):
            return teacher.noise(x, alpha, sigma, row), [h.float() for h in teacher.taps.outputs]

    fast_predict = compiled(predict, budget.steps, run.log)
    fast_teach = compiled(teach, budget.steps, run.log)

    def loss_of(step: int) -> Tensor:
        g = torch.Generator().manual_seed(run.seed * 10_000_000 + step)
        chosen = torch.randint(len(prompts), (budget.batch,), generator=g)
        row = torch.where(torch.rand(len(chosen), generator=g) < DROP_TEXT, 0, rows[chosen])
        x0 = z[chosen].float().to(device) + teacher.offset
        eps = torch.randn(x0.shape, generator=g).to(device)
        timestep = torch.randint(len(alphas_cumprod), (len(chosen),), generator=g).to(device)
        signal = alphas_cumprod[timestep][:, None, None, None]
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        x = alpha * x0 + sigma * eps
        # on a CPU the gradient of fused attention is the slowest part of a step
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
            noise, layers = fast_predict(x, timestep, ids[row].to(device))
        target, blocks = fast_teach(x, alpha, sigma, row)
        unexplained = [(a - b).square().mean() / b.var() for a, b in zip(layers, blocks, strict=True)]
        weight = ((alpha + sigma) / alpha).square().clamp(max=MAX_WEIGHT)
        return ((noise - target).square() * weight).mean() + HINT_WEIGHT * torch.stack(unexplained).sum()

    def evaluate() -> str:
        scores = measure(pipeline, "validation", 96, seed=5)
        return f"validation strict {scores['strict']:.3f}, graded {scores['graded']:.3f}"

    matrices = [n for n, p in module.named_parameters() if _is_hidden(n, p)]
    settings = StageSettings(budget.steps, lr=1e-3, decay_fraction=0.5, matrices=matrices)
    train_stage("unet", module, loss_of, settings, run, evaluate)
    taps.remove()


def _is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a weight between hidden layers of the U-Net."""
    if not name.startswith("unet.") or parameter.ndim < 2:
        return False
    convolution = parameter.ndim == 4 and not name.startswith(("unet.conv_in", "unet.conv_out"))
    return convolution or "transformer_blocks" in name or "time_emb_proj" in name


def pretrain_diffusion(run: Pretraining, budget: DiffusionBudget, teacher: Path) -> StableDiffusionPipeline:
    """Run or resume the training, and export the pipeline's folder if asked to.

    `teacher` is the folder of `shapes-flow`.
    """
    run.begin()
    flow, unet = StableDiffusion3Pipeline.from_pretrained(teacher), build_unet()
    clip = begin_text_encoder(flow)
    z, prompts = cache_drawn(flow.vae.to(run.torch_device), budget.pictures, run)
    pipeline = assemble_diffusion(unshifted(flow.vae), clip, flow.tokenizer, unet)
    train_unet(pipeline, flow, z, prompts, budget, run)
    run.log("measuring the finished model on test prompts")
    defaults = {"num_inference_steps": 50, "guidance_scale": 7.5, "pictures": budget.test_pictures // 2}
    measured = figures(pipeline, budget.test_pictures, {"50 steps, guidance 7.5": defaults})
    run.export_model(pipeline, "shapes-diffusion", measured)
    return pipeline
