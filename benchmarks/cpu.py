"""Two measures for CPUs in low precision: a decoder's layers, and freed memory that is kept.

    python benchmarks/cpu.py [--model shapes-flow] [--rows 96] [--pictures 32] [--rounds 7] [--json]

decoder    milliseconds per picture by diffusers' layers and by those of progrpo.policies.decoder, which take turns in
           one process; the distance of both from float32, as the root mean square of pixels in [-1, 1]
memory     milliseconds per row of a network call without gradient, in processes of their own that take turns: with
           freed memory kept (progrpo.training.memory), and with glibc's own setting

Figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL

from progrpo.config import ModelSettings
from progrpo.policies.base import PolicyContext
from progrpo.policies.decoder import optimize_for_cpu
from progrpo.policies.load import quiet
from progrpo.training.build import policy_from
from progrpo.training.distributed import Ranks
from progrpo.training.memory import keep_freed_memory
from progrpo.zoo import WEIGHTS
from progrpo.zoo.shapes import world

UNTOLD = {"GLIBC_TUNABLES": "glibc.malloc.check=0"}  # a user's own word, after which nothing is changed


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def decoding(model: str, pictures: int, rounds: int) -> dict[str, dict[str, float]]:
    true = AutoencoderKL.from_pretrained(WEIGHTS / model / "vae")
    ways = {"diffusers": copy.deepcopy(true).bfloat16(), "progrpo": copy.deepcopy(true).bfloat16()}
    optimize_for_cpu(ways["progrpo"])
    latents = torch.randn(pictures, true.config.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = true.decode(latents).sample
    narrow, error = latents.bfloat16(), dict[str, float]()
    spent: dict[str, list[float]] = {way: [] for way in ways}
    for way, decoder in ways.items():
        decoder.to(memory_format=torch.channels_last)
        error[way] = float((decoder.decode(narrow).sample.float() - expected).square().mean().sqrt())
    for _ in range(rounds):
        for way, decoder in ways.items():
            spent[way].append(seconds(partial(decoder.decode, narrow)))
    return {way: {"ms a picture": 1000 * statistics.median(spent[way]) / pictures, "rms": error[way]} for way in ways}


def call(model: str, rows: int, rounds: int) -> float:
    """The milliseconds per row in a process that has done nothing else."""
    policy: Any = policy_from(ModelSettings(path=model, dtype="bfloat16"), PolicyContext(Ranks().device))
    condition = policy.encode(world.sample_prompts("train", 4, 0)).take(torch.arange(rows) % 4)
    x, timestep = torch.randn(rows, *policy.latent_shape), policy.levels(10).timestep[5]
    with torch.no_grad():
        spent = [seconds(lambda: policy.predict(x, timestep, condition)) for _ in range(rounds + 1)]
    return 1000 * statistics.median(spent[1:]) / rows


def memory(command: list[str], rounds: int) -> dict[str, float]:
    spent: dict[str, list[float]] = {"kept": [], "as glibc has it": []}
    for _ in range(rounds):
        for way, variables in zip(spent, ({}, UNTOLD), strict=True):
            done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=True)
            spent[way].append(float(done.stdout))
    return {way: statistics.median(times) for way, times in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes-flow")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only-call", action="store_true", help="print the milliseconds of a call in this process")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    quiet()
    if options.only_call:
        print(call(options.model, options.rows, options.rounds))
        return
    keep_freed_memory()
    again = [sys.executable, __file__, "--only-call", "--model", options.model, "--rows", str(options.rows)]
    decoders = decoding(options.model, options.pictures, 3 * options.rounds)
    ms_per_row = memory(again, -(-options.rounds // 2))
    if options.json:
        results = {"decoder": decoders, "memory, ms a row": ms_per_row}
        print(json.dumps({**vars(options), "torch": torch.__version__, **results}, indent=1))
        return
    for name, figures in decoders.items():
        print(f"{name:17s} {figures['ms a picture']:.3f} ms a picture, {figures['rms']:.5f} from float32")
    for name, ms in ms_per_row.items():
        print(f"{name:17s} {ms:.3f} ms a row of a network call")


if __name__ == "__main__":
    main()
