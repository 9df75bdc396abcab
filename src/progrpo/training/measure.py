"""What is chosen by measuring when a run begins: microbatches. The main process measures, and the choice stays in config.json."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from progrpo.config import Config, resolve_plan, trained_items
from progrpo.packing import evenly
from progrpo.policies.base import Policy
from progrpo.training.distributed import Ranks
from progrpo.types import Prompt

_SIZES = (8, 12, 16, 24, 32, 48, 64, 96, 128)
_ROUNDS = 5  # on a CPU, which others may share; a GPU's times hardly differ
_ROUNDS_ON_A_GPU = 2
_CLOSE = 1.06  # of two sizes that are as fast as that, the smaller one: it takes less memory and fills up less


def measured(config: Config, policy: Policy, prompt: Prompt, ranks: Ranks) -> Config:
    """The configuration with microbatches in place of those that it leaves open; `prompt` is one of the run."""
    sampling, optim = config.sampling, config.optim
    if sampling.microbatch is not None and optim.microbatch is not None:
        return config
    found = ranks.from_main(lambda: _fastest(config, policy, prompt, ranks))
    return replace(
        config,
        sampling=replace(sampling, microbatch=sampling.microbatch or found[0]),
        optim=replace(optim, microbatch=optim.microbatch or found[1]),
    )


def _fastest(config: Config, policy: Policy, prompt: Prompt, ranks: Ranks) -> tuple[int, int]:
    """Rows of a network call, and items of a forward and backward pass."""
    plan, prompts = resolve_plan(config), -(-config.prompts.per_iteration // ranks.world)
    rows_T = [prompts * plan.living_at(step) for step in range(config.sampling.num_inference_steps)]
    items = prompts * plan.survivors * trained_items(config)
    told, guidance = policy.encode([prompt]), config.sampling.guidance_scale
    middle = policy.levels(2, config.sampling.shift).timestep[1]

    def call(size: int) -> Tensor:
        rows = torch.zeros(size, dtype=torch.int64)
        x = torch.zeros(size, *policy.latent_shape, device=policy.device)
        return policy.predict(x, middle.to(x), told.take(rows.to(policy.device)), guidance)

    def sample(size: int) -> None:
        with torch.no_grad():
            call(size)

    def train(size: int) -> None:
        call(size).square().mean().backward()
        for parameter in policy.trainable.values():
            parameter.grad = None

    with torch.compiler.set_stance("force_eager"):  # one compilation for each size would take minutes
        forward = _seconds(sample, max(rows_T), policy.device)
        both = _seconds(train, items, policy.device)
    return (
        _best({size: _sampled(rows_T, size, forward, policy.compiled) for size in forward}),
        _best({size: items / size * s for size, s in both.items()}),
    )


def _sampled(rows_T: list[int], size: int, seconds: dict[int, float], one_shape: bool) -> float:
    """Of all network calls of a rollout; between sizes that were timed, seconds are taken to grow evenly."""
    calls = [(-(-rows // size), size if one_shape else evenly(rows, size)) for rows in rows_T]
    shapes = [shape for _, shape in calls]
    found = np.interp(shapes, [0, *seconds], [0.0, *seconds.values()])
    return float(sum(count * s for (count, _), s in zip(calls, found, strict=True)))


def _seconds(work: Callable[[int], None], most: int, device: torch.device) -> dict[int, float]:
    """Of one call by size, up to `most` rows and to what fits into memory.

    The median of several, which go round by round. On a shared machine others' work then slows all sizes down alike; the fastest
    would favour small ones, which slip through its gaps.
    """
    sizes = sorted({min(size, most) for size in _SIZES})
    for size in list(sizes):
        try:
            _timed(work, size, device)
        except torch.OutOfMemoryError:
            sizes = [s for s in sizes if s < size]
            break
    if not sizes:
        raise ValueError(
            f"sampling.microbatch: not even {min(most, *_SIZES)} rows fit into the memory of {device}; give it and"
            " optim.microbatch, from 1 on"
        )
    count = _ROUNDS if device.type == "cpu" else _ROUNDS_ON_A_GPU
    rounds = [[_timed(work, size, device) for size in sizes] for _ in range(count)]
    return {size: statistics.median(found) for size, found in zip(sizes, zip(*rounds, strict=True), strict=True)}


def _timed(work: Callable[[int], None], size: int, device: torch.device) -> float:
    start = time.perf_counter()
    work(size)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _best(seconds: dict[int, float]) -> int:
    least = min(seconds.values())
    return min(size for size, s in seconds.items() if s <= _CLOSE * least)
