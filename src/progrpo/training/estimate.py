"""An estimate of an iteration on a device, before anything is loaded: operations, memory, time at a share of the peak.

Operations and memory come from the model's own code, run on tensors without content (`policies.sizes`). Not counted are
the operations of rewards, the memory of rewards whose network is not known, the losses of an allocator, and a
denoiser's two compiled copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import NotRequired, TypedDict, cast

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
from progrpo.training.plan_judge import iteration_cost

_FLOAT, _GB = 4, 1e9
_AVERAGES = {"adamw": 2 * _FLOAT, "adamw_8bit": 2 * (1 + _FLOAT / 256)}  # bytes per weight; 256 share a scale
_ROOM = 0.9  # of a card's memory: the allocator, unknown rewards and the driver need the rest
_STEP = 7  # latents at once where noise is added: output, mean, noise, the next one, and three for its log-prob


_NOTHING_FITS = "no settings that are known here"
SettingsByField = dict[str, bool | int | str | None]


class Estimate(TypedDict):
    """An estimate, ready for JSON. Memory is in GB, of the process that has most."""

    model: str
    parameters: int
    trained_parameters: int
    tflops_per_row: float
    tflops_per_decode: float
    pflops_per_iteration: dict[str, float]
    memory_gb: dict[str, float]
    peak_gb: dict[str, float]
    device: str
    device_gb: float
    rewards_not_counted: NotRequired[list[str]]
    fits: bool
    would_fit_with: NotRequired[SettingsByField | str]
    fits_on: list[str]
    share_of_peak_assumed: float
    seconds_per_iteration: float
    pictures_per_hour: dict[str, float]


@dataclass(frozen=True)
class _Memory:
    """GB by what holds them, and the peaks by stage."""

    parts: dict[str, float]
    peaks: dict[str, float]


def estimate(config: Config, device: str, share: float, processes: int) -> Estimate:
    """The estimate of an iteration. `share` is the assumed share of the device's peak."""
    quiet()
    plan = resolve_plan(config)
    card = GPUS[device]
    model = sizes_for(config)
    memory = _memory(config, plan, model, processes)
    operations = flops_by_stage(config, plan, model)
    seconds = sum(operations.values()) / processes / (card.peak * 1e12 * share)
    prompts = config.prompts.per_iteration
    peak = max(memory.peaks.values())
    fits = peak <= _ROOM * card.memory
    fitting = {} if fits else {"would_fit_with": _leaner(config, plan, card, processes) or _NOTHING_FITS}
    unknown = [term.name for term in _rewards(config) if _parameters(term) is None]
    result = {
        "model": config.model.path,
        "parameters": model.frozen + model.trained,
        "trained_parameters": model.trained,
        "tflops_per_row": model.call_flops / 1e12,
        "tflops_per_decode": model.decode_flops / 1e12,
        "pflops_per_iteration": {name: value / 1e15 for name, value in operations.items()},
        "memory_gb": memory.parts,
        "peak_gb": memory.peaks,
        "device": device,
        "device_gb": card.memory,
        **({"rewards_not_counted": unknown} if unknown else {}),
        "fits": fits,
        **fitting,
        "fits_on": [name for name, other in GPUS.items() if peak <= _ROOM * other.memory],
        "share_of_peak_assumed": share,
        "seconds_per_iteration": seconds,
        "pictures_per_hour": {
            "begun": 3600 / seconds * prompts * plan.group_size,
            "trained_on": 3600 / seconds * plan.trained(prompts),
        },
    }
    return cast(Estimate, result)


_sizes_of = cache(sizes)


def sizes_for(config: Config) -> Sizes:
    """The sizes of a configuration's model, at its microbatches."""
    model = config.model
    pair = 2 if config.sampling.in_pairs else 1
    settings = replace(model, dtype="bfloat16" if model.dtype == "auto" else model.dtype, lora="", offload=False)
    called, trained = config.sampling.rows_per_call, config.optim.items_per_pass
    rows = trained * (pair if trains_transitions(config) else 1)
    return _sizes_of(settings, called * pair, rows, min(called, DECODED))


def _memory(config: Config, plan: Plan, model: Sizes, processes: int) -> _Memory:
    loss = config.objective.loss
    # the reference is copied with the model, and lasts to the first update where nothing asks for it then
    reference = config.model.weights == "lora" or loss.uses_reference
    averages = len(loss.averages) + (config.optim.ema_decay > 0)
    copies = averages + max(1, reference + config.eval.keep_best)
    shared = processes if config.model.shard else 1  # a LoRA stays whole everywhere
    trained = _FLOAT * model.trained / (shared if config.model.weights == "full" else 1)
    prompts, sharing = -(-config.prompts.per_iteration // processes), 1
    if config.prompts.split_groups:
        prompts, sharing = config.prompts.per_iteration, processes
    per_number = _latents(config, plan, loss.stores == "means", prompts, sharing)
    latents = {name: model.latent * number for name, number in per_number.items()}
    always = {
        "frozen weights": model.frozen_bytes / shared,
        "decoder": model.decoder_bytes,
        "trained weights, optimizer": trained * (1 + _AVERAGES[config.optim.name] / _FLOAT),
        "copies of trained weights": copies * trained,
        "rewards": sum(_reward_bytes(term) for term in _rewards(config)),
    }
    parts = {
        **always,
        "gradients": trained,
        "gradients of a half": trained if _takes_halves(config, shared) else 0.0,
        "latents while sampling": max(latents["call"], latents["decoding"], latents["step"]),
        "latents in the update": latents["update"],
        "graphs of sampling": _graphs(config, plan, prompts) * model.train_bytes / config.optim.items_per_pass,
        "network call": model.call_bytes,
        "decoding": model.decode_bytes,
        "forward and backward pass": model.train_bytes,
        "text encoders": model.text_encoder_bytes,
    }
    resident = sum(always.values()) + (parts["text encoders"] if config.model.keep_text_encoders else 0)
    denoiser = parts["frozen weights"] + trained
    moments = latents["call"] + model.call_bytes, latents["decoding"] + model.decode_bytes, latents["step"]
    passes = parts["gradients"] + parts["gradients of a half"] + parts["forward and backward pass"]
    begun = parts["decoder"] + (averages + 1) * trained + parts["rewards"]  # beside what prompts are encoded by
    peaks = {
        "start": begun + (max if config.model.offload else sum)((denoiser, parts["text encoders"])),
        "sampling": resident + parts["graphs of sampling"] + max(moments),
        "update": resident + parts["graphs of sampling"] + parts["latents in the update"] + passes,
    }
    return _Memory(_in_gb(parts), _in_gb(peaks))


def _takes_halves(config: Config, shared: int) -> bool:
    """Whether the noise scale is measured, by a second gradient, where so many processes share the denoiser."""
    is_sharded = config.model.weights == "full" and shared > 1
    return config.optim.measures_noise_scale and config.prompts.per_iteration > 1 and not is_sharded


def _in_gb(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value / _GB for name, value in values.items()}


def _latents(config: Config, plan: Plan, means: bool, prompts: int, sharing: int = 1) -> dict[str, float]:
    """Bytes per number of a latent, for the trajectories of so many prompts at their peak, by the moment.

    The moments are a network call, decoding, a step, and the update. The members of a group are dealt over `sharing`
    processes.
    """
    steps = config.sampling.num_inference_steps
    trained = _first_window(config)
    kept = torch.finfo(getattr(torch, config.sampling.latent_dtype)).bits // 8

    def own(step: int) -> int:
        """Bytes of a trajectory before a step: its path, each latent once, and its latent where no path ends in it."""
        done = sum(s < step for s in trained)
        path = (done + 1) * kept + done * means * _FLOAT if done else 0
        return path + (0 if kept == _FLOAT and step - 1 in trained else _FLOAT)

    calls = []
    rows = [-(-plan.rows_at(step, prompts) // sharing) for step in range(steps + 1)]
    finalists, survivors = rows[steps], -(-plan.trained(prompts) // sharing)
    decodings = [own(steps) * finalists]
    moves = []
    for step in range(steps):
        living, left = rows[step], rows[step + 1]
        calls.append(living * (own(step) + _FLOAT))
        moves.append(left * (own(step) + _STEP * _FLOAT))
        if plan.keep_after(step) is not None:
            decodings.append(living * (own(step) + 2 * _FLOAT))
            moves.append((living + left) * (own(step) + _FLOAT))
    if survivors < finalists:
        moves.append((finalists + survivors) * own(steps))
    updates = config.optim.updates_per_rollout
    share = 1 + (1 / updates if updates > 1 else 0)  # an update's own trajectories are taken from all
    update = survivors * own(steps) * share
    begun = rows[0] * _FLOAT  # the noise that all began at, which a rollout keeps to its end
    return {
        "call": begun + max(calls),
        "decoding": begun + max(decodings),
        "step": begun + max(moves),
        "update": update,
    }


def _first_window(config: Config) -> range:
    """The trained steps of a window that begins at step 0, where most members live and paths begin earliest."""
    return range(len(trained_steps(config, 0)))


def _graphs(config: Config, plan: Plan, prompts: int) -> int:
    """The rows of so many prompts whose graphs are kept until the update."""
    return sum(plan.rows_at(step, prompts) for step in _first_window(config)) if config.optim.reuse_rollout else 0


def _rewards(config: Config) -> list[RewardTerm]:
    """The rewards that are on a card of the run."""
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


def _leaner(config: Config, plan: Plan, card: GPU, processes: int) -> SettingsByField:
    """Settings by field that fit, and change what is learnt by rounding alone; empty if none are enough.

    Microbatches come first, which cost least, then a metric, then what costs time or precision. Memory is linear in a
    microbatch.
    """
    own_checkpointing, own_dtype = config.model.activation_checkpointing, config.sampling.latent_dtype
    own_noise_scale = config.optim.noise_scale
    choices = product(
        (own_checkpointing, True),
        (own_dtype, "bfloat16"),
        (config.model.offload, not config.model.shard),
        (own_noise_scale, False),
    )
    for checkpointing, latent_dtype, offload, noise_scale in choices:
        model = replace(config.model, activation_checkpointing=checkpointing, offload=offload)
        changed = replace(
            config,
            model=model,
            sampling=replace(config.sampling, latent_dtype=latent_dtype),
            optim=replace(config.optim, noise_scale=noise_scale),
        )
        fitting = _fitting_microbatches(changed, plan, card, processes)
        if fitting is not None:
            changes: dict[str, tuple[bool | int | str | None, bool | int | str | None]] = {
                "model.activation_checkpointing": (checkpointing, own_checkpointing),
                "sampling.latent_dtype": (latent_dtype, own_dtype),
                "model.offload": (offload, config.model.offload),
                "optim.noise_scale": (noise_scale, own_noise_scale),
                "sampling.microbatch": (fitting[0], config.sampling.microbatch),
                "optim.microbatch": (fitting[1], config.optim.microbatch),
            }
            return {name: new for name, (new, old) in changes.items() if new != old}
    return {}


def _fitting_microbatches(config: Config, plan: Plan, card: GPU, processes: int) -> tuple[int, int] | None:
    """The largest microbatches that fit, by halving. Sampling and the update peak at different times."""
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
        return _memory(_with_microbatches(config, sampling, update), plan, at, processes).peaks

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
    """The bytes of so many rows, between those of one row and those of most rows."""
    return whole if rows == most else round(single + (whole - single) * (rows - 1) / (most - 1))


def _halves(number: int) -> Iterable[int]:
    while number:
        yield number
        number //= 2


# --- operations -------------------------------------------------------------------------------------------------------


def flops_by_stage(config: Config, plan: Plan, model: Sizes) -> Mapping[str, float]:
    """The FLOPs of an iteration by stage, over all processes."""
    cost = iteration_cost(config, plan)
    rows = cost.trained_steps * (2 if trains_transitions(config) and config.sampling.in_pairs else 1)
    return {
        "sampling": cost.nfe * model.call_flops,
        "decoding": cost.decodes * model.decode_flops,
        "update": rows * (model.train_flops + config.objective.loss.extra_forwards * model.call_flops),
    }
