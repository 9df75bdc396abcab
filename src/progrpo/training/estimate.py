"""What an iteration takes on a device, before anything is loaded: operations, memory by what holds it, time at a share of the peak.

Operations and memory are the model's own code's on tensors without content (`policies.sizes`). Not in them: rewards' networks,
what an allocator loses, and a denoiser's two compiled copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch

from progrpo.config import GPU, Config, microbatch, resolve_plan, trained_steps, trains_transitions
from progrpo.policies.base import PolicySettings
from progrpo.policies.load import quiet
from progrpo.policies.sizes import Sizes, sizes
from progrpo.rollout.plan import Plan
from progrpo.rollout.preview import DECODED
from progrpo.training.build import OBJECTIVES
from progrpo.training.judge import prompt_cost

_FLOAT, _GB = 4, 1e9
_AVERAGES = {"adamw": 2 * _FLOAT, "adamw_8bit": 2 * (1 + _FLOAT / 256)}  # bytes a weight; 256 share a scale
_ROOM = 0.9  # of a card's memory: an allocator, rewards and the driver want some


@dataclass(frozen=True)
class Device:
    """GB of memory, and TFLOPS of dense bfloat16 matrix products as its maker states them."""

    memory: int
    peak: float


GPUS: dict[str, Device] = {
    "h200": Device(141, 989),
    "h100": Device(80, 989),
    "a100-80gb": Device(80, 312),
    "a100-40gb": Device(40, 312),
    "l40s": Device(48, 362),
    "a6000": Device(48, 155),
    "rtx5090": Device(32, 210),
    "rtx4090": Device(24, 165),
    "rtx3090": Device(24, 71),
    "l4": Device(24, 121),
}
assert tuple(GPUS) == get_args(GPU)


def estimate(config: Config, device: str, share: float, processes: int) -> dict[str, Any]:
    """Ready for JSON; memory in GB, of the process that has most. `share` is of the device's peak, and an assumption."""
    quiet()
    plan, card = resolve_plan(config), GPUS[device]
    found = _sizes(config)
    memory = _memory(config, plan, found, processes)
    operations = _operations(config, plan, found)
    seconds = sum(operations.values()) / processes / (card.peak * 1e12 * share)
    begun = config.prompts.per_iteration * plan.group_size
    peak = max(memory["peaks"].values())
    return {
        "model": config.model.path,
        "parameters": found.frozen + found.trained,
        "trained_parameters": found.trained,
        "tflops_per_row": found.call_flops / 1e12,
        "tflops_per_decode": found.decode_flops / 1e12,
        "pflops_per_iteration": {name: value / 1e15 for name, value in operations.items()},
        "memory_gb": memory["parts"],
        "peak_gb": memory["peaks"],
        "device": device,
        "device_gb": card.memory,
        "fits": peak <= _ROOM * card.memory,
        "share_of_peak_assumed": share,
        "seconds_per_iteration": seconds,
        "pictures_per_hour": {
            "begun": 3600 / seconds * begun,
            "trained_on": 3600 / seconds * config.prompts.per_iteration * plan.survivors,
        },
    }


def _sizes(config: Config) -> Sizes:
    model, pair = config.model, 2 if config.sampling.in_pairs else 1
    settings = PolicySettings(
        weights=model.weights,
        lora_rank=model.lora_rank,
        lora_alpha=model.lora_alpha,
        lora_targets=model.lora_targets,
        max_sequence_length=model.max_sequence_length,
        resolution=model.resolution,
        frames=model.frames,
        decoding=model.decoding,
        dtype=torch.bfloat16 if model.dtype == "auto" else getattr(torch, model.dtype),
        quantize=model.quantize,
        activation_checkpointing=model.activation_checkpointing,
    )
    called, trained = microbatch(config.sampling), microbatch(config.optim)
    rows = trained * (pair if trains_transitions(config) else 1)
    return sizes(model.path, settings, called * pair, rows, min(called, DECODED))


def _memory(config: Config, plan: Plan, found: Sizes, processes: int) -> dict[str, dict[str, float]]:
    objective = OBJECTIVES[config.objective.name](config.objective)
    reference = config.model.weights == "lora" or objective.uses_reference
    copies = len(objective.averages) + reference + (config.optim.ema_decay > 0) + config.eval.keep_best
    prompts = -(-config.prompts.per_iteration // processes)
    parts = {
        "frozen weights": found.frozen_bytes / (processes if config.model.shard else 1),
        "decoder": found.decoder_bytes,
        "trained weights, gradients, optimizer": (2 * _FLOAT + _AVERAGES[config.optim.name]) * found.trained,
        "copies of trained weights": copies * _FLOAT * found.trained,
        "latents": prompts * found.latent * _latents(config, plan),
        "network call": found.call_bytes,
        "decoding": found.decode_bytes,
        "forward and backward pass": found.train_bytes,
        "text encoders": found.text_encoder_bytes,
    }
    resident = sum(list(parts.values())[:4]) + (parts["text encoders"] if config.model.keep_text_encoders else 0)
    denoiser = parts["frozen weights"] + _FLOAT * found.trained
    peaks = {
        "start": parts["decoder"] + (max if config.model.offload else sum)((denoiser, parts["text encoders"])),
        "sampling": resident + parts["latents"] + max(parts["network call"], parts["decoding"]),
        "update": resident + parts["latents"] + parts["forward and backward pass"],
    }
    return {
        name: {part: value / _GB for part, value in told.items()} for name, told in (("parts", parts), ("peaks", peaks))
    }


def _latents(config: Config, plan: Plan) -> float:
    """Bytes a number of a latent, for a prompt's trajectories at their most: where each is, what the network says, what is kept of its path."""
    trained, kept = trained_steps(config, 0), torch.finfo(getattr(torch, config.sampling.latent_dtype)).bits // 8
    return max(
        plan.living_at(step) * (2 * _FLOAT + 2 * kept * sum(s <= step for s in trained))
        for step in range(config.sampling.num_inference_steps)
    )


def _operations(config: Config, plan: Plan, found: Sizes) -> Mapping[str, float]:
    """Of an iteration over all processes."""
    cost = prompt_cost(config, plan) * config.prompts.per_iteration
    rows = cost.trained_steps * (2 if trains_transitions(config) and config.sampling.in_pairs else 1)
    return {
        "sampling": cost.nfe * found.call_flops,
        "decoding": cost.decodes * found.decode_flops,
        "update": rows * (found.train_flops + _others(config) * found.call_flops),
    }


def _others(config: Config) -> int:
    """Passes of a trained item under other weights: the reference's, and an average's."""
    wanted = config.objective
    own = getattr(wanted, wanted.name)
    pulls = {"grpo": 0, "nft": 1, "awm": int(wanted.awm.average_beta > 0), "dgpo": 1}[wanted.name]
    return pulls + int(own.kl_beta > 0 or wanted.name == "dgpo")
