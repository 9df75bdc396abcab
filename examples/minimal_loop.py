"""GRPO with pruning inside sampling (Pro-GRPO, arXiv 2512.15347) in one file: every stage is a few lines.

    python examples/minimal_loop.py [--iterations 3]

expand a group per prompt -> denoise -> preview and prune -> reward -> advantage -> loss -> optimizer step

It trains the built-in flow model on the built-in reward on a CPU, with the library's own pieces and no trainer. What
`progrpo train` adds: evaluation, checkpoints, audits, several processes, slow rewards, other objectives and models.

Letters of shapes: P prompts, G members of a group, N trajectories of all groups, C H W a latent.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from progrpo.objectives.advantage import advantages, group_statistics
from progrpo.objectives.base import Experience
from progrpo.objectives.grpo import GRPO
from progrpo.objectives.settings import GRPOSettings
from progrpo.policies.base import Policy
from progrpo.policies.load import load_policy, quiet
from progrpo.policies.settings import ModelSettings
from progrpo.rewards.mixture import RewardMixture, load_mixture
from progrpo.rewards.settings import RewardTerm
from progrpo.rollout.denoise import Denoiser, denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan, PrunePoint
from progrpo.rollout.prune import ovf, survivors
from progrpo.rollout.sampling import Record, Sampling, sampling_for
from progrpo.rollout.settings import SamplingSettings
from progrpo.types import Prompt, Trajectories
from progrpo.zoo.shapes.world import sample_prompts

SEED = 0
PROMPTS = 4  # per iteration
STEPS = 8  # of sampling; all but the last are trained
PLAN = Plan(12, (PrunePoint(step=3, keep=6),))  # groups of 12; after the network call of step 3 six members go on
MICROBATCH = 48  # rows of a forward and backward pass


def score(policy: Policy, reward: RewardMixture, prompts: Sequence[Prompt], batch: Trajectories, x0: Tensor) -> Tensor:
    """The rewards of decoded latents x0 (N, C, H, W): float64 (N,), NaN where missing."""
    pictures = policy.decode(x0)
    own_prompts = [prompts[group] for group in batch.group_N.tolist()]
    return reward.score(pictures.images_NHWC.numpy(), own_prompts, batch.group_N, pictures.there_N).value_N


def roll_out(
    policy: Policy, reward: RewardMixture, prompts: Sequence[Prompt], sampling: Sampling, key: NoiseKey
) -> tuple[Experience, Tensor]:
    """Sample and prune a group per prompt; the survivors with their advantages, and their rewards (N,)."""
    condition = policy.encode(prompts)
    slot_P = torch.arange(len(prompts))  # noise is drawn by (seed, iteration, slot, member, step)

    def prune(step: int, batch: Trajectories) -> Trajectories:
        """After each network call: at a prune point, keep the members whose previews differ most."""
        keep = PLAN.keep_after(step)
        if keep is None:
            return batch
        assert batch.output_NCHW is not None
        x0_NCHW = sampling.process.x0(step, batch.x_NCHW, batch.output_NCHW)  # the data that the ODE heads for
        previews_N = score(policy, reward, prompts, batch, x0_NCHW)
        rows = survivors(batch.group_N, previews_N, keep, ovf, key.group_seeds(slot_P, step))
        print(f"  step {step}: {len(batch)} previews, std {previews_N.std():.3f}; {len(rows)} trajectories go on")
        return batch.take(rows)

    batch = expand(policy, slot_P, PLAN.group_size, sampling, key)
    batch = denoise(Denoiser(policy, condition, sampling), batch, key, Meter(), prune)
    rewards_N = score(policy, reward, prompts, batch, batch.x_NCHW)
    statistics = group_statistics(rewards_N, batch.group_N, len(prompts))
    advantages_N, known_N = advantages(rewards_N, batch.group_N, statistics)
    experience = Experience(batch, advantages_N, condition, sampling.process, key, sampling.guidance_scale)
    return experience.take(known_N.nonzero().flatten()), rewards_N


def update(policy: Policy, objective: GRPO, optimizer: torch.optim.Optimizer, experience: Experience) -> float:
    """One optimizer step on all transitions of the survivors; the norm of the gradient."""
    experience = objective.prepare(policy, experience, MICROBATCH, updates=1)
    transitions = objective.settings.items_per_trajectory(len(experience.trajectories.path))
    items = torch.arange(len(experience) * transitions)
    for items_B in items.split(MICROBATCH):
        loss = objective.loss(policy, experience, items_B)
        (loss.total / len(items)).backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.trainable.values(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


def train(iterations: int) -> list[float]:
    """Train and print; the mean reward of each iteration."""
    quiet()
    policy = load_policy(ModelSettings(path="shapes-flow", dtype="float32"))
    reward = load_mixture([RewardTerm("shapes")], frames=1)
    settings = SamplingSettings(num_inference_steps=STEPS, microbatch=MICROBATCH)
    record = Record(steps=frozenset(range(STEPS - 1)))  # transitions with log-probs, of all steps but the last
    sampling = sampling_for(policy, settings, range(STEPS), record)  # Flow-GRPO's SDE at every step
    objective = GRPO(GRPOSettings().for_sampler(sampling.process.sampler, math.prod(policy.latent_shape)))
    optimizer = torch.optim.AdamW(policy.trainable.values(), lr=3e-4)
    means = []
    for iteration in range(iterations):
        prompts = sample_prompts("train", PROMPTS, seed=iteration)
        print(f"iteration {iteration + 1}: {', '.join(prompt.text for prompt in prompts)}")
        experience, rewards_N = roll_out(policy, reward, prompts, sampling, NoiseKey(SEED, iteration))
        norm = update(policy, objective, optimizer, experience)
        means.append(float(rewards_N.nanmean()))
        print(f"  {len(experience)} survivors, mean reward {means[-1]:.3f}, gradient norm {norm:.3g}")
    cost = PLAN.predict(STEPS, STEPS - 1, guidance=False)
    whole = Plan(PLAN.group_size).predict(STEPS, STEPS - 1, guidance=False)
    print(f"pruning: {cost.nfe} network calls per prompt instead of {whole.nfe}")
    return means


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=3)
    train(parser.parse_args().iterations)
