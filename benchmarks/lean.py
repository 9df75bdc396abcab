"""The gains and costs of the settings that save memory: `python benchmarks/lean.py [--json]`.

docs/memory.md has the table. The model is a LoRA on a transformer of SD 3.5's kind with random weights
(`benchmarks/memory.py`), in bfloat16 on one CPU thread. The output has the bytes of the denoiser's frozen weights, the
most bytes that live at once beside them in a microbatch's forward and backward pass, the seconds of that pass and of a
network call. It also has the error of 8 bits and of bfloat16 in the output of shapes-flow, whose weights were trained:
the root of the mean square difference over that of the output, on a grid of 10 steps. The text encoders in 8 bits have
lines of their own: the cosine of shapes-flow's embeddings with the whole encoders' (least and median of all tokens),
and the bytes and the seconds of a text for a random encoder of T5's kind in bfloat16. If the package of 8-bit AdamW is
there, it has the bytes of its averages and the seconds of a step, for two million weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from memory import CALLED, TOKENS, TRAINED, allocated, random_sd3
from torch.nn import functional
from transformers import T5Config, T5EncoderModel

from progrpo.config import OptimSettings
from progrpo.policies.load import load_policy, policy_from_pipeline, quiet
from progrpo.policies.quantized import quantize_blocks
from progrpo.policies.settings import ModelSettings
from progrpo.training.optimizer import optimizer_from
from progrpo.types import Condition
from progrpo.zoo.shapes.world import sample_prompts

LORA = ModelSettings(lora_rank=32, max_sequence_length=TOKENS, dtype="bfloat16")
KNOBS = {
    "bfloat16": LORA,
    "int8": replace(LORA, quantize="int8"),
    "activation checkpointing": replace(LORA, activation_checkpointing=True),
    "both": replace(LORA, quantize="int8", activation_checkpointing=True),
}
TEXTS, STEPS, REPEATS = 24, 10, 3


def seconds(work: Callable[[], object]) -> float:
    """The least of some calls, after one that does not count."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def passes(settings: ModelSettings) -> dict[str, float]:
    policy: Any = policy_from_pipeline(random_sd3(), settings)
    tensors = {name: torch.randn(1, *shape) for name, shape in policy.family.condition_shapes().items()}

    def call(rows: int) -> torch.Tensor:
        condition = Condition({name: t.expand(rows, *t.shape[1:]) for name, t in tensors.items()})
        output: torch.Tensor = policy.predict(torch.randn(rows, *policy.latent_shape), torch.tensor(500.0), condition)
        return output

    def train() -> None:
        call(TRAINED).square().mean().backward()

    update = seconds(train)  # gradients are there from then on, and belong to the weights
    with torch.no_grad():
        sample = seconds(lambda: call(CALLED))
    return {
        "frozen_MB": sum(t.nbytes for _, t in policy.frozen()) / 1e6,
        "forward_and_backward_MB": allocated(train) / 1e6,
        "call_seconds": sample,
        "forward_and_backward_seconds": update,
    }


@torch.no_grad()
def off_by(settings: ModelSettings) -> dict[str, float]:
    """The error of shapes-flow by these settings at the latents that the unchanged one comes to."""
    whole, changed = load_policy(ModelSettings()), load_policy(settings)
    prompts, levels, errors = sample_prompts("test", TEXTS, seed=0), whole.levels(STEPS), []
    conditions = {policy: policy.encode(prompts) for policy in (whole, changed)}
    x = torch.randn(TEXTS, *whole.latent_shape, generator=torch.Generator().manual_seed(0))
    for step in range(STEPS):
        one, other = (policy.predict(x, levels.timestep[step], conditions[policy]) for policy in (whole, changed))
        errors.append(((other - one).norm() / one.norm()).item())
        x = x + (levels.sigma[step + 1] - levels.sigma[step]) * one
    return {"off_by_median": median(errors), "off_by_last": errors[-1]}


@torch.no_grad()
def cosines() -> dict[str, float]:
    """The cosine of each token's embedding, and of the pooled ones, with the whole encoders' in shapes-flow."""
    whole, lean = load_policy(ModelSettings()), load_policy(ModelSettings(text_quantize="int8"))
    prompts = sample_prompts("test", TEXTS, seed=0)
    one, other = whole.encode(prompts).tensors, lean.encode(prompts).tensors
    cosine = torch.cat([functional.cosine_similarity(one[name], other[name], dim=-1).flatten() for name in one])
    return {"cosine_least": cosine.min().item(), "cosine_median": cosine.median().item()}


@torch.no_grad()
def encoding(quantized: bool) -> dict[str, float]:
    """The bytes of a random text encoder of T5's kind, and the seconds of a text of 256 tokens."""
    config = T5Config(d_model=1024, d_ff=2560, d_kv=64, num_heads=16, num_layers=4, feed_forward_proj="gated-gelu")
    torch.manual_seed(0)
    encoder = T5EncoderModel(config).to(torch.bfloat16).eval().requires_grad_(False)
    if quantized:
        quantize_blocks(encoder)
    tokens = torch.arange(256)[None]
    size = sum(t.nbytes for t in (*encoder.parameters(), *encoder.buffers()))
    return {"encoder_MB": size / 1e6, "text_seconds": seconds(lambda: encoder(tokens))}


def averages(name: Any) -> dict[str, float]:
    weights = torch.nn.Parameter(torch.randn(2048, 1024))
    optimizer = optimizer_from(OptimSettings(name), [weights])
    weights.grad = torch.randn_like(weights)
    taken = seconds(optimizer.step)
    state = optimizer.state_dict()["state"][0]
    held = state.get("__bnb_optimizer_quant_state__", state).values()  # where bitsandbytes puts it
    return {"averages_MB": sum(t.nbytes for t in held if torch.is_tensor(t)) / 1e6, "step_seconds": taken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    results: dict[str, Any] = {name: passes(settings) for name, settings in KNOBS.items()}
    results["shapes-flow, int8"] = off_by(ModelSettings(quantize="int8"))
    results["shapes-flow, bfloat16"] = off_by(ModelSettings(dtype="bfloat16"))
    results["shapes-flow, text encoders int8"] = cosines() | off_by(ModelSettings(text_quantize="int8"))
    results["text encoder bfloat16"], results["text encoder int8"] = encoding(False), encoding(True)
    for name in ("adamw", "adamw_8bit") if find_spec("bitsandbytes") else ("adamw",):
        results[name] = averages(name)
    if options.json:
        print(json.dumps(results))
        return
    for name, figures in results.items():
        print(name)
        for figure, value in figures.items():
            print(f"  {figure:32s}{value:10.4f}")


if __name__ == "__main__":
    main()
