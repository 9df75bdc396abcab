"""Calls that a group shares: rollouts under `sampling.same_latent` with and without them, side by side.

    python benchmarks/shared_calls.py [--prompts 4] [--iterations 6] [--json]

Groups of 24 of shapes-flow take ten steps from one initial latent, with noise on all steps or on a random window of two
in the first five (Flow-GRPO-Fast, MixGRPO). Each iteration is sampled twice from the same noise, with the calls before
the members part made once a group, and once a member. Printed are the NFE and the processor seconds of sampling over
those of the latter, and the largest difference of the final latents, which only the shapes of calls can cause.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from statistics import median

import torch

from progrpo.config import Config, ModelSettings, PromptSettings, SamplingSettings
from progrpo.policies.load import load_policy, quiet
from progrpo.rollout.denoise import Denoiser, denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.training.build import sampling_from
from progrpo.zoo.shapes.world import sample_prompts

GROUP, STEPS = 24, 10
WINDOWS = {
    "noise on all steps": SamplingSettings(num_inference_steps=STEPS, same_latent=True),
    "a random window of 2 in the first 5": SamplingSettings(
        num_inference_steps=STEPS, same_latent=True, sde_window="random", sde_window_size=2, sde_window_end=5
    ),
}


@torch.no_grad()
def measured(settings: SamplingSettings, prompts: int, iterations: int) -> dict[str, float]:
    """The figures of a window, over iterations."""
    config = Config(model=ModelSettings(dtype="float32"), prompts=PromptSettings(per_iteration=prompts))
    config = replace(config, sampling=settings)
    policy = load_policy(config.model)
    condition = policy.encode(sample_prompts("train", prompts, seed=0))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    nfe = {True: 0, False: 0}
    off = 0.0
    for iteration in range(-1, iterations):  # the first is not counted
        key = NoiseKey(0, max(0, iteration))
        shared = sampling_from(config, policy, "transitions", max(0, iteration))
        latents = {}
        for shares in (True, False) if iteration % 2 else (False, True):
            sampling = shared if shares else replace(shared, shared_calls=0)
            meter = Meter()
            batch = expand(policy, torch.arange(prompts), GROUP, sampling, key)
            start = time.process_time()
            latents[shares] = denoise(Denoiser(policy, condition, sampling), batch, key, meter).x_NCHW
            if iteration >= 0:
                seconds[shares].append(time.process_time() - start)
                nfe[shares] += meter.cost.nfe
        off = max(off, float((latents[True] - latents[False]).abs().max()))
    ratios = [own / other for own, other in zip(seconds[True], seconds[False], strict=True)]
    time_ratio = sum(seconds[True]) / sum(seconds[False])
    return {"nfe": nfe[True] / nfe[False], "seconds": time_ratio, "median": median(ratios), "latents_off_by": off}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    results = {name: measured(settings, options.prompts, options.iterations) for name, settings in WINDOWS.items()}
    if options.json:
        print(json.dumps(results))
        return
    for name, figures in results.items():
        print(f"{name:38s}", "  ".join(f"{key} {value:.3g}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
