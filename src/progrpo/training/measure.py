"""Microbatches that are chosen by measuring when a run begins.

The main process measures, and the choice is written into config.json.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
import psutil
import torch
from torch import Tensor

from progrpo.config import Config, resolve_plan, trained_items
from progrpo.durable import write_text
from progrpo.packing import balanced_size
from progrpo.policies.base import Policy
from progrpo.training.distributed import Ranks
from progrpo.training.memory import result_unless_out_of_memory
from progrpo.types import Prompt

_SIZES = (8, 12, 16, 24, 32, 48, 64, 96, 128)
_CLOSE = 1.06  # of two sizes that are so close in time, the smaller one is chosen: it takes less memory
_SAMPLING_BUDGET, _TRAINING_BUDGET = 1.0, 2.0  # seconds of calls
_BLOCK = 0.1  # seconds per size, since short calls would fall into the gaps of other work
_BUSY = 0.15  # the largest share of the processors that others use while a measurement is kept


def with_measured_microbatches(config: Config, policy: Policy, prompt: Prompt, ranks: Ranks) -> Config:
    """The configuration, with the fastest microbatches in place of those that it leaves open."""
    sampling, optim = config.sampling, config.optim
    if sampling.microbatch is not None and optim.microbatch is not None:
        return config
    fastest = ranks.from_main(lambda: _fastest(config, policy, prompt, ranks))
    return replace(
        config,
        sampling=replace(sampling, microbatch=sampling.microbatch or fastest[0]),
        optim=replace(optim, microbatch=optim.microbatch or fastest[1]),
    )


def _fastest(config: Config, policy: Policy, prompt: Prompt, ranks: Ranks) -> tuple[int, int]:
    """The fastest number of rows of a network call, and of items of a forward and backward pass."""
    plan = resolve_plan(config)
    prompts = -(-config.prompts.per_iteration // ranks.world)
    rows_T = [plan.rows_at(step, prompts) for step in range(config.sampling.num_inference_steps)]
    items = plan.trained(prompts) * trained_items(config)
    key = _key(config, policy, max(rows_T), items)
    timings = Timings.recall(key)
    if timings is None:
        timings = _timings(config, policy, prompt, (max(rows_T), items))
        timings.keep(key)
    return (
        _best({n: _sampled(rows_T, n, timings.sample, policy.compiled) for n in timings.sample}),
        _best({n: items / n * seconds for n, seconds in timings.train.items()}),
    )


def _timings(config: Config, policy: Policy, prompt: Prompt, most: tuple[int, int]) -> Timings:
    """Seconds of a call, without gradient and with it, for up to so many rows and items."""
    condition = policy.encode([prompt])
    guidance = config.sampling.guidance_scale
    middle = policy.levels(2, config.sampling.shift).timestep[1]

    def call(size: int) -> Tensor:
        rows = torch.zeros(size, dtype=torch.int64)
        x = torch.zeros(size, *policy.latent_shape, device=policy.device)
        return policy.predict(x, middle.to(x), condition.take(rows.to(policy.device)), guidance)

    def sample(size: int) -> None:
        with torch.no_grad():
            call(size)

    def train(size: int) -> None:
        call(size).square().mean().backward()
        for parameter in policy.trainable.values():
            parameter.grad = None

    load = _OtherLoad()
    # eager, since one compilation for each size would take minutes
    with torch.compiler.set_stance("force_eager"), _undisturbed(policy.device, load) as clock:
        sampling = _seconds(sample, most[0], clock, _SAMPLING_BUDGET)
        training = _seconds(train, most[1], clock, _TRAINING_BUDGET)
    return Timings(sampling, training, quiet=load.share() <= _BUSY)


def _sampled(rows_T: list[int], size: int, seconds: Mapping[int, float], one_shape: bool) -> float:
    """Seconds of all network calls of a rollout, interpolated between the sizes that were timed."""
    calls = [(-(-rows // size), size if one_shape else balanced_size(rows, size)) for rows in rows_T]
    shapes = [shape for _, shape in calls]
    each = np.interp(shapes, [0, *seconds], [0.0, *seconds.values()])
    return float(sum(count * s for (count, _), s in zip(calls, each, strict=True)))


def _seconds(work: Callable[[int], None], most: int, clock: _Clock, budget: float) -> dict[int, float]:
    """Mean seconds of a call by size, up to `most` rows or what fits into memory.

    It ends where the time per row has become flat, and where the next size would exceed the budget in seconds.
    """
    seconds: dict[int, float] = {}
    sizes = sorted({min(size, -(-most // clock.threads)) for size in _SIZES})
    spent = 0.0
    for size, following in pairwise([*sizes, 0]):
        timed = result_unless_out_of_memory(partial(_warm_up_and_block, work, size, clock, budget))
        if timed is None:
            break
        warm_up, block = timed
        seconds[size] = sum(block) / len(block)
        spent += warm_up + sum(block)
        growing = 2 * seconds[size] * following / size
        if _is_flat(seconds) or spent + growing > budget:
            break
    if not seconds:
        raise ValueError(
            f"sampling.microbatch: not even {sizes[0]} rows fit into the memory of {clock.device}; give it and"
            " optim.microbatch, from 1 on"
        )
    return {min(clock.threads * size, most): s for size, s in seconds.items()}


def _warm_up_and_block(
    work: Callable[[int], None], size: int, clock: _Clock, budget: float
) -> tuple[float, list[float]]:
    """Seconds of a first call, and of each call of a block: the first one alone where it is long."""
    warm_up = _timed(work, size, clock)
    return warm_up, [warm_up] if warm_up > budget / 4 else _block(work, size, clock)


def _block(work: Callable[[int], None], size: int, clock: _Clock) -> list[float]:
    """Seconds of each call of a tenth of a second of calls, a hundred at most."""
    block = [_timed(work, size, clock)]
    while sum(block) < _BLOCK and len(block) < 100:
        block.append(_timed(work, size, clock))
    return block


def _is_flat(seconds: Mapping[int, float]) -> bool:
    """Whether the two largest sizes take about as long per row as sizes of half as many rows or fewer.

    Both must, since a disturbance of one must not end the search.
    """
    rate = {size: s / size for size, s in seconds.items()}
    largest = list(rate)[-2:]
    smaller = {size: [r for n, r in rate.items() if 2 * n <= size] for size in largest}
    return all(smaller[size] and rate[size] * _CLOSE > min(smaller[size]) for size in largest)


@dataclass(frozen=True)
class _Clock:
    """A clock of work on a device: the wall's seconds, or this process' seconds of a processor.

    Work may be timed on one of several `threads`; all of them take as long for as many times the rows.
    """

    device: torch.device
    now: Callable[[], float] = time.perf_counter
    threads: int = 1


@contextmanager
def _undisturbed(device: torch.device, load: _OtherLoad) -> Iterator[_Clock]:
    """Run the block with a clock that other work on the processors hardly disturbs.

    On a busy machine that is this process' time of a processor, with one thread, since several would wait for each
    other.
    """
    time.sleep(_BLOCK)  # while this process uses no processor
    if device.type != "cpu" or load.share() <= _BUSY:
        yield _Clock(device)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield _Clock(device, time.process_time, threads)
    finally:
        torch.set_num_threads(threads)


def _timed(work: Callable[[int], None], size: int, clock: _Clock) -> float:
    start = clock.now()
    work(size)
    if clock.device.type == "cuda":
        torch.cuda.synchronize(clock.device)
    return clock.now() - start


def _best(seconds: Mapping[int, float]) -> int:
    least = min(seconds.values())
    return min(size for size, s in seconds.items() if s <= _CLOSE * least)


# --- timings are kept for the same machine and model ----------------------------------------------------------------


@dataclass(frozen=True)
class Timings:
    """Mean seconds of a call by size, while sampling and while training.

    `quiet` says that other work used little of the processors meanwhile.
    """

    sample: Mapping[int, float]
    train: Mapping[int, float]
    quiet: bool = True

    @classmethod
    def recall(cls, key: Mapping[str, object]) -> Self | None:
        """The timings of that key; None where none are kept, or they cannot be read."""
        try:
            kept = json.loads(_file(key).read_bytes())
            sample, train = ({int(n): float(s) for n, s in kept[name].items()} for name in ("sample", "train"))
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            return None
        seconds = [*sample.values(), *train.values()]
        usable = bool(sample and train) and all(0 < s < math.inf for s in seconds)
        return cls(sample, train) if usable and kept["key"] == key else None

    def keep(self, key: Mapping[str, object]) -> None:
        """Keep the timings in the user's cache, if the machine was quiet and there is a place for them."""
        if not self.quiet:
            return
        with suppress(OSError, RuntimeError):
            file = _file(key)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps({"key": key, "sample": self.sample, "train": self.train}))


def _key(config: Config, policy: Policy, rows: int, items: int) -> dict[str, object]:
    """The machine, the model and the sizes that a call's seconds depend on, in JSON's types."""
    model = {k: v for k, v in asdict(config.model).items() if k not in ("path", "lora", "keep_text_encoders")}
    frozen = sum(t.numel() for _, t in policy.frozen())
    trained = sum(p.numel() for p in policy.trainable.values())
    key = {
        "torch": torch.__version__,
        "processor": _processor(policy.device),
        "threads": torch.get_num_threads(),
        "policy": [policy.denoiser_name, policy.prediction, frozen, trained, policy.latent_shape, model],
        "pairs": config.sampling.in_pairs,
        "most": [rows, items],
    }
    plain: dict[str, object] = json.loads(json.dumps(key))
    return plain


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _file(key: Mapping[str, object]) -> Path:
    """The file of a key in the user's cache. RuntimeError where the user has no home."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache / "progrpo" / "microbatches" / f"{digest[:32]}.json"


class _OtherLoad:
    """The share of the processors' time that other processes use from now on."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._busy = _busy_elsewhere()

    def share(self) -> float:
        whole = (time.perf_counter() - self._start) * (psutil.cpu_count() or 1)
        return max(0.0, _busy_elsewhere() - self._busy) / whole


def _busy_elsewhere() -> float:
    """Seconds of the processors that other processes have used since the machine started."""
    own, every = psutil.Process().cpu_times(), psutil.cpu_times()
    idle = every.idle + getattr(every, "iowait", 0.0)
    return sum(every) - getattr(every, "guest", 0.0) - getattr(every, "guest_nice", 0.0) - idle - own.user - own.system
