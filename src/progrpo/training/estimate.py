"""What an iteration takes on a device, before anything is loaded: operations, memory by what holds it, time at a share of the peak.

Operations and memory are the model's own code's on tensors without content (`policies.sizes`). Not in them: rewards' operations and the
memory of those whose network is not known, what an allocator loses, and a denoiser's two compiled copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import torch

from progrpo.config import Config, RewardTerm, resolve_plan, trained_steps, trains_transitions
from progrpo.policies.load import quiet
from progrpo.policies.sizes import Sizes, sizes
from progrpo.registry import load_named
from progrpo.rewards.base import Reward
from progrpo.rewards.settings import REWARDS
from progrpo.rollout.plan import Plan
from progrpo.rollout.preview import DECODED
from progrpo.training.gpus import GPU, GPUS
from progrpo.training.plan_judge import prompt_cost

_FLOAT, _GB = 4, 1e9
_AVERAGES = {"adamw": 2 * _FLOAT, "adamw_8bit": 2 * (1 + _FLOAT / 256)}  # bytes a weight; 256 share a scale
_ROOM = 0.9  # of a card's memory: an allocator, unknown rewards and the driver want some
_STEP = 7  # latents at once where noise is added: output, mean, noise, the next one, and three for its log-prob


def estimate(config: Config, device: str, share: float, processes: int) -> dict[str, Any]:
    """Ready for JSON; memory in GB, of the process that has most. `share` is of the device's peak, and an assumption."""
    quiet()
    plan, card = resolve_plan(config), GPUS[device]
    found = sizes_for(config)
    memory = _memory(config, plan, found, processes)
    operations = flops_by_stage(config, plan, found)
    seconds = sum(operations.values()) / processes / (card.peak * 1e12 * share)
    begun = config.prompts.per_iteration * plan.group_size
    peak = max(memory["peaks"].values())
    fits = peak <= _ROOM * card.memory
    unknown = [term.name for term in _rewards(config) if _parameters(term) is None]
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
        **({"rewards_not_counted": unknown} if unknown else {}),
        "fits": fits,
        **(
            {}
            if fits
            else {"would_fit_with": _leaner(config, plan, card, processes) or "no settings that are known here"}
        ),
        "fits_on": [name for name, other in GPUS.items() if peak <= _ROOM * other.memory],
        "share_of_peak_assumed": share,
        "seconds_per_iteration": seconds,
        "pictures_per_hour": {
            "begun": 3600 / seconds * begun,
            "trained_on": 3600 / seconds * config.prompts.per_iteration * plan.survivors,
        },
    }


_sizes_of = cache(sizes)


def sizes_for(config: Config) -> Sizes:
    """Of a configuration's model, at its microbatches."""
    model, pair = config.model, 2 if config.sampling.in_pairs else 1
    dtype: Any = "bfloat16" if model.dtype == "auto" else model.dtype
    settings = replace(model, dtype=dtype, lora="", offload=False)
    called, trained = config.sampling.rows_per_call, config.optim.items_per_pass
    rows = trained * (pair if trains_transitions(config) else 1)
    return _sizes_of(settings, called * pair, rows, min(called, DECODED))


def _memory(config: Config, plan: Plan, found: Sizes, processes: int) -> dict[str, dict[str, float]]:
    loss = config.objective.loss
    reference = config.model.weights == "lora" or loss.uses_reference
    copies = len(loss.averages) + reference + (config.optim.ema_decay > 0) + config.eval.keep_best
    shared = processes if config.model.shard else 1  # a LoRA stays whole everywhere
    trained = _FLOAT * found.trained / (shared if config.model.weights == "full" else 1)
    prompts = -(-config.prompts.per_iteration // processes)
    latents = {
        name: prompts * found.latent * of_one for name, of_one in _latents(config, plan, loss.stores == "means").items()
    }
    always = {
        "frozen weights": found.frozen_bytes / shared,
        "decoder": found.decoder_bytes,
        "trained weights, optimizer": trained * (1 + _AVERAGES[config.optim.name] / _FLOAT),
        "copies of trained weights": copies * trained,
        "rewards": sum(_reward_bytes(term) for term in _rewards(config)),
    }
    parts = {
        **always,
        "gradients": trained,
        "latents while sampling": max(latents["call"], latents["decoding"], latents["step"]),
        "latents in the update": latents["update"],
        "graphs of sampling": _graphs(config, plan) * prompts * found.train_bytes / config.optim.items_per_pass,
        "network call": found.call_bytes,
        "decoding": found.decode_bytes,
        "forward and backward pass": found.train_bytes,
        "text encoders": found.text_encoder_bytes,
    }
    resident = sum(always.values()) + (parts["text encoders"] if config.model.keep_text_encoders else 0)
    denoiser = parts["frozen weights"] + trained
    moments = latents["call"] + found.call_bytes, latents["decoding"] + found.decode_bytes, latents["step"]
    passes = parts["gradients"] + parts["forward and backward pass"]
    peaks = {
        "start": parts["decoder"] + (max if config.model.offload else sum)((denoiser, parts["text encoders"])),
        "sampling": resident + parts["graphs of sampling"] + max(moments),
        "update": resident + parts["graphs of sampling"] + parts["latents in the update"] + passes,
    }
    return {
        name: {part: value / _GB for part, value in told.items()} for name, told in (("parts", parts), ("peaks", peaks))
    }


def _latents(config: Config, plan: Plan, means: bool) -> dict[str, float]:
    """Bytes a number of a latent, for a prompt's trajectories at their most: in a network call, beside the decoder, where a step is
    taken, and in the update."""
    steps, trained = config.sampling.num_inference_steps, trained_steps(config, 0)
    kept = torch.finfo(getattr(torch, config.sampling.latent_dtype)).bits // 8

    def own(step: int) -> int:
        """Of a trajectory before that step: its path, each latent once, and its place, where the path does not end in it."""
        done = sum(s < step for s in trained)
        path = (done + 1) * kept + done * means * _FLOAT if done else 0
        return path + (0 if kept == _FLOAT and step - 1 in trained else _FLOAT)

    calls, decodings, moves = [], [own(steps) * plan.finalists], []
    for step in range(steps):
        living = plan.living_at(step)
        left = plan.keep_after(step) or living
        calls.append(living * (own(step) + _FLOAT))
        moves.append(left * (own(step) + _STEP * _FLOAT))
        if left < living:
            decodings.append(living * (own(step) + 2 * _FLOAT))
            moves.append((living + left) * (own(step) + _FLOAT))
    if plan.survivors < plan.finalists:
        moves.append((plan.finalists + plan.survivors) * own(steps))
    updates = config.optim.updates_per_rollout
    share = 1 + (1 / updates if updates > 1 else 0)  # an update's own trajectories are taken from all
    update = plan.survivors * own(steps) * share
    begun = plan.group_size * _FLOAT  # the noise that all began at, which a rollout holds to its end
    return {
        "call": begun + max(calls),
        "decoding": begun + max(decodings),
        "step": begun + max(moves),
        "update": update,
    }


def _graphs(config: Config, plan: Plan) -> int:
    """Rows of a prompt whose graphs are held until the update."""
    return sum(plan.living_at(step) for step in trained_steps(config, 0)) if config.optim.reuse_rollout else 0


def _rewards(config: Config) -> list[RewardTerm]:
    """Those that a card of the run has to hold."""
    return [term for term in (*config.reward.terms, *config.eval.rewards) if not term.url and term.device != "cpu"]


def _reward_bytes(term: RewardTerm) -> int:
    return (_parameters(term) or 0) * (4 if term.dtype == "float32" else 2)


def _parameters(term: RewardTerm) -> int | None:
    """The parameters of a reward's network; None where they are not known, as of a user's own."""
    if term.name not in REWARDS:
        return None
    kind: type[Reward] = load_named(term.name, REWARDS, "reward")
    return kind.parameters


# --- what would fit ---------------------------------------------------------------------------------------------------


def _leaner(config: Config, plan: Plan, card: GPU, processes: int) -> dict[str, Any]:
    """By field, what to change so that it fits, nothing of which changes what is learnt but by rounding; empty if that is not enough.

    First microbatches, which cost least, then what costs time or precision. Memory is linear in a microbatch.
    """
    told = config.model.activation_checkpointing, config.sampling.latent_dtype
    for checkpointing, latent_dtype, offload in product(
        (told[0], True), (told[1], "bfloat16"), (config.model.offload, not config.model.shard)
    ):
        model = replace(config.model, activation_checkpointing=checkpointing, offload=offload)
        changed = replace(config, model=model, sampling=replace(config.sampling, latent_dtype=latent_dtype))
        fitting = _fitting_microbatches(changed, plan, card, processes)
        if fitting is not None:
            found = {
                "model.activation_checkpointing": (checkpointing, told[0]),
                "sampling.latent_dtype": (latent_dtype, told[1]),
                "model.offload": (offload, config.model.offload),
                "sampling.microbatch": (fitting[0], config.sampling.microbatch),
                "optim.microbatch": (fitting[1], config.optim.microbatch),
            }
            return {name: new for name, (new, old) in found.items() if new != old}
    return {}


def _fitting_microbatches(config: Config, plan: Plan, card: GPU, processes: int) -> tuple[int, int] | None:
    """The largest halves of a half that fit, of sampling and of the update, which do not have their peaks at the same time."""
    most = config.sampling.rows_per_call, config.optim.items_per_pass
    whole, single = (sizes_for(_with_microbatches(config, *sizes)) for sizes in (most, (1, 1)))

    def peaks(sampling: int, update: int) -> dict[str, float]:
        at = replace(
            whole,
            call_bytes=_between(single.call_bytes, whole.call_bytes, sampling, most[0]),
            decode_bytes=_between(
                single.decode_bytes, whole.decode_bytes, min(sampling, DECODED), min(most[0], DECODED)
            ),
            train_bytes=_between(single.train_bytes, whole.train_bytes, update, most[1]),
        )
        return _memory(_with_microbatches(config, sampling, update), plan, at, processes)["peaks"]

    room = _ROOM * card.memory
    called = next((n for n in _halves(most[0]) if peaks(n, 1)["sampling"] <= room), None)
    trained = next((n for n in _halves(most[1]) if peaks(1, n)["update"] <= room), None)
    if called is None or trained is None or peaks(1, 1)["start"] > room:
        return None
    return called, trained


def _with_microbatches(config: Config, sampling: int, update: int) -> Config:
    return replace(
        config,
        sampling=replace(config.sampling, microbatch=sampling),
        optim=replace(config.optim, microbatch=update),
    )


def _between(single: int, whole: int, rows: int, most: int) -> int:
    return whole if rows == most else round(single + (whole - single) * (rows - 1) / (most - 1))


def _halves(number: int) -> Iterable[int]:
    while number:
        yield number
        number //= 2


# --- operations -------------------------------------------------------------------------------------------------------


def flops_by_stage(config: Config, plan: Plan, found: Sizes) -> Mapping[str, float]:
    """FLOPs of an iteration by stage, over all processes."""
    cost = prompt_cost(config, plan) * config.prompts.per_iteration
    rows = cost.trained_steps * (2 if trains_transitions(config) and config.sampling.in_pairs else 1)
    return {
        "sampling": cost.nfe * found.call_flops,
        "decoding": cost.decodes * found.decode_flops,
        "update": rows * (found.train_flops + config.objective.loss.extra_forwards * found.call_flops),
    }
