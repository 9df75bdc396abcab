"""Shortcuts while sampling: lossy caches of diffusers and weights in FP8, against the whole network and fewer steps.

    python benchmarks/shortcuts.py [--prompts 4] [--seeds 0 1 2] [--json]

Groups of 24 pictures of shapes-flow are sampled without noise (NFT, AWM, DGPO), from the same initial noise by each
shortcut and by the whole network. SD3's class has no CacheMixin, so the hooks are applied to it here by diffusers' own
functions, TaylorSeer's to the layers in the blocks. First Block Cache is not among them: its hook needs a last block
that returns its text stream, and SD3's drops it.

For each shortcut: the network's processor seconds over those of the whole network, the difference of the mean reward
(with its standard error over groups), Spearman's correlation of the rewards with those of the whole network within a
group, V (the variance of the whole network's rewards over the 12 of 24 that OVF chooses by the shortcut's, over that of
all 24), and the root of the mean square difference of the latents over that of the whole network's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import CacheMixin
from diffusers.hooks import (
    HookRegistry,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from preview import chosen_variance
from torch import Tensor

from progrpo.policies.load import load_policy, quiet
from progrpo.policies.quantized import quantize_blocks
from progrpo.policies.settings import ModelSettings
from progrpo.rewards.mixture import load_mixture
from progrpo.rewards.settings import RewardTerm
from progrpo.rollout.denoise import expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.preview import score
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sampling import Record, Sampling, sampling_for
from progrpo.rollout.settings import SamplingSettings
from progrpo.tracking.statistics import spearman
from progrpo.types import Prompt
from progrpo.zoo.shapes.world import sample_prompts

GROUP, STEPS = 24, 10
Calling = Callable[[Any, Sampling], AbstractContextManager[None]]


@contextmanager
def taylor_seer(denoiser: Any, sampling: Sampling, names: str) -> Iterator[None]:
    """Every second output of these layers from the third step on is extrapolated from those before."""
    layers = [rf"transformer_blocks\.\d+\.({names})"]
    config = TaylorSeerCacheConfig(2, 2, taylor_factors_dtype=torch.float32, cache_identifiers=layers)
    apply_taylorseer_cache(denoiser, config)
    with unhooked(denoiser), CacheMixin.cache_context(denoiser, "rows"):
        yield


@contextmanager
def pyramid(denoiser: Any, sampling: Sampling) -> Iterator[None]:
    """Pyramid Attention Broadcast: attention's output is used for two steps, but at the first and last noise levels."""
    now: list[Tensor] = []
    handle = denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: now.__setitem__(slice(None), [kwargs["timestep"].flatten()[0]]), with_kwargs=True
    )
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        current_timestep_callback=lambda: float(now[0]),
    )
    apply_pyramid_attention_broadcast(denoiser, config)
    try:
        with unhooked(denoiser):
            yield
    finally:
        handle.remove()


@contextmanager
def unhooked(denoiser: Any) -> Iterator[None]:
    """Take all hooks of diffusers off after the block."""
    try:
        yield
    finally:
        for module in denoiser.modules():
            registry: HookRegistry | None = getattr(module, "_diffusers_hook", None)
            if registry is not None:
                for name in list(registry.hooks):
                    registry.remove_hook(name, recurse=False)


@contextmanager
def plain(denoiser: Any, sampling: Sampling) -> Iterator[None]:
    """Call the network as it is."""
    yield


def fp8(denoiser: Any) -> None:
    """Store weights as 8-bit floats, which are widened for each call."""
    denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


SHORTCUTS: dict[str, tuple[Calling, Callable[[Any], None] | None, int]] = {
    "whole": (plain, None, STEPS),
    "7 steps": (plain, None, 7),
    "6 steps": (plain, None, 6),
    "TaylorSeer, attention": (lambda d, s: taylor_seer(d, s, "attn"), None, STEPS),
    "TaylorSeer, all layers": (lambda d, s: taylor_seer(d, s, "attn|ff|ff_context"), None, STEPS),
    "Pyramid Attention Broadcast": (pyramid, None, STEPS),
    "FP8 weights": (plain, fp8, STEPS),
    "int8 weights": (plain, quantize_blocks, STEPS),
}
"""The context of a group's calls, the change of the network before them, and the number of steps."""


class Bench:
    """The model with a shortcut, and the processor seconds of its network calls."""

    def __init__(self, name: str) -> None:
        self.around, change, steps = SHORTCUTS[name]
        self.policy: Any = load_policy(ModelSettings())
        self.denoiser = self.policy.denoiser
        if change:
            change(self.denoiser)
        settings = SamplingSettings(num_inference_steps=steps, microbatch=GROUP)
        sampling = sampling_for(self.policy, settings, range(0), Record())
        self.sampler = Sampler(self.policy, load_mixture([RewardTerm("shapes_mixed")], frames=1), sampling)
        self.seconds = 0.0

    @torch.no_grad()
    def group(self, prompt: Prompt, slot: int, seed: int) -> tuple[Tensor, np.ndarray]:
        """Sample one group: its latents and rewards."""
        sampling, policy = self.sampler.sampling, self.policy
        batch = expand(policy, torch.tensor([slot]), GROUP, sampling, NoiseKey(seed, 0))
        condition, x = policy.encode([prompt]).take(batch.group_N), batch.x_NCHW
        with self.around(self.denoiser, sampling):
            for step in range(sampling.num_inference_steps):
                start = time.process_time()
                output = policy.predict(x, sampling.process.timestep(step, x), condition)
                self.seconds += time.process_time() - start
                x = sampling.process.deterministic(step, x, output)
        scored = score(self.sampler, [prompt], batch.group_N, x, Meter())[1]
        return x, scored.rewards_NR[:, 0].numpy()


def compared(groups: list[tuple[Tensor, Any]], whole: list[tuple[Tensor, Any]]) -> dict[str, float]:
    """The figures of a shortcut over groups."""
    differences = np.array([own.mean() - other.mean() for (_, own), (_, other) in zip(groups, whole, strict=True)])
    agreement, kept, off = [], [], []
    for (x, own), (x_whole, other) in zip(groups, whole, strict=True):
        off.append(((x - x_whole).norm() / x_whole.norm()).item())
        if other.std() > 0 and own.std() > 0:
            rho, variance = spearman(own, other), chosen_variance(torch.as_tensor(own), torch.as_tensor(other))
            assert rho is not None and variance is not None  # rewards differ on both sides
            agreement.append(rho)
            kept.append(variance)
    return {
        "reward_difference": differences.mean(),
        "standard_error": differences.std(ddof=1) / len(differences) ** 0.5,
        "spearman": float(np.mean(agreement)),
        "V": float(np.mean(kept)),
        "latents_off_by": float(np.mean(off)),
        "groups": len(differences),
        "groups_that_differ": len(agreement),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    prompts = sample_prompts("test", options.prompts, seed=0)
    whole: list[tuple[Tensor, Any]] = []
    first, results = 0.0, {}
    for name in SHORTCUTS:
        bench = Bench(name)
        bench.group(prompts[0], 0, 99)  # not counted
        bench.seconds = 0.0
        groups = [bench.group(p, slot, seed) for seed in options.seeds for slot, p in enumerate(prompts)]
        whole, first = whole or groups, first or bench.seconds
        figures = compared(groups, whole) | {"network_time": bench.seconds / first}
        results[name] = figures
        if not options.json:
            print(f"{name:28s}", "  ".join(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
