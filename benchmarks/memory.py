"""Memory that `progrpo plan --gpu` predicts against memory that was allocated: `python benchmarks/memory.py [--json]`.

A network call, a forward and backward pass and a decoding of each model run here for real, on the CPU in float32, under torch's
profiler, which notes every allocation; the prediction runs the same code on tensors without content. Models: the built-in
ones, and a transformer of SD 3.5's kind with random weights, as a LoRA, with and without activation checkpointing. Goal: within
15 %.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from progrpo.policies.base import Policy, PolicySettings
from progrpo.policies.load import load_policy, policy_from_pipeline, quiet
from progrpo.policies.sizes import sizes
from progrpo.types import Condition

CALLED, TRAINED, DECODED = 8, 4, 4
TOKENS = 32


def random_sd3() -> StableDiffusion3Pipeline:
    """Six layers of width 512, pictures of 256 pixels; text comes from CLIP alone."""
    transformer = SD3Transformer2DModel(
        sample_size=32,
        num_layers=6,
        num_attention_heads=8,
        attention_head_dim=64,
        joint_attention_dim=1024,
        caption_projection_dim=512,
        pooled_projection_dim=512,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
        dual_attention_layers=(0, 1, 2),
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=8,
        shift_factor=0.06,
    )
    text = CLIPTextConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    text.projection_dim = 256
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text),
        tokenizer=None,
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def allocated(work: Callable[[], object]) -> int:
    """The most bytes that live at once during `work`, of those that it allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    now = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def compared(name: str, path: str, settings: PolicySettings, policy: Policy | None = None) -> dict[str, object]:
    policy = policy or load_policy(path, settings)
    told = {n: torch.randn(1, *shape) for n, shape in policy.condition_shapes().items()}  # type: ignore[attr-defined]

    def call(rows: int) -> torch.Tensor:
        condition = Condition({n: t.expand(rows, *t.shape[1:]) for n, t in told.items()})
        return policy.predict(torch.randn(rows, *policy.latent_shape), torch.tensor(500.0), condition)

    def sample() -> None:
        with torch.no_grad():
            call(CALLED)

    def train() -> None:
        call(TRAINED).square().mean().backward()

    for work in (sample, train):  # gradients are there from then on, and are counted with the weights
        work()
    measured = {
        "network call": allocated(sample),
        "forward and backward pass": allocated(train),
        "decoding": allocated(lambda: policy.decode(torch.randn(DECODED, *policy.latent_shape))),
    }
    found = sizes(path, settings, CALLED, TRAINED, DECODED)
    predicted = dict(zip(measured, (found.call_bytes, found.train_bytes, found.decode_bytes), strict=True))
    return {
        "model": name,
        **{
            n: {"predicted_MB": predicted[n] / 1e6, "measured_MB": b / 1e6, "ratio": predicted[n] / b}
            for n, b in measured.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of lines")
    options = parser.parse_args()
    quiet()
    lora = PolicySettings(lora_rank=32, max_sequence_length=TOKENS)
    leaner = replace(lora, activation_checkpointing=True)
    results = [
        compared("shapes-flow, all weights", "shapes-flow", PolicySettings(weights="full")),
        compared("shapes-flow, LoRA", "shapes-flow", PolicySettings()),
        compared("shapes-diffusion, all weights", "shapes-diffusion", PolicySettings(weights="full")),
    ]
    with tempfile.TemporaryDirectory() as folder:
        random_sd3().save_pretrained(folder)
        for name, settings in (("random SD3, LoRA", lora), ("random SD3, LoRA, checkpointing", leaner)):
            results.append(compared(name, folder, settings, policy_from_pipeline(random_sd3(), settings)))
    if options.json:
        print(json.dumps(results))
        return
    for result in results:
        print(result["model"])
        for part, told in result.items():
            if isinstance(told, dict):
                print(f"  {part:28s}" + "   ".join(f"{name} {value:9.2f}" for name, value in told.items()))


if __name__ == "__main__":
    main()
