"""Expand and prune: from prompts to the trajectories that are worth training on (Pro-GRPO, arXiv 2512.15347)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from progrpo.policies.base import Policy
from progrpo.rewards.base import Scorer
from progrpo.rollout.denoise import Sampling, denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan
from progrpo.rollout.preview import Previewing, preview, score
from progrpo.rollout.prune import Selector
from progrpo.rollout.sharding import NOT_SHARDED, GroupSharding, own_share, rebalanced, sharded_survivors
from progrpo.types import GroupScores, Preview, Prompt, Rollout, Trajectories


def rollout(
    policy: Policy,
    reward: Scorer,
    prompts: Sequence[Prompt],
    slot_P: Tensor,
    plan: Plan,
    sampling: Sampling,
    select: Selector,
    key: NoiseKey,
    meter: Meter,
    how: Previewing = Previewing(),  # noqa: B008 (frozen)
    sharding: GroupSharding = NOT_SHARDED,
) -> Rollout:
    """One group a prompt, expanded, pruned as `plan` says, finished, decoded and rewarded.

    `slot_P` (int64) are the prompts' global places in the iteration, by which noise is drawn. With a `final_keep` the
    group's final rewards select the survivors; all finalists' rewards are kept beside theirs. The processes of
    `sharding` share each group's members, and each has its part of the rollout.
    """
    plan.validate(sampling.num_inference_steps)
    condition = policy.encode(prompts)
    previews: list[Preview] = []

    def kept(batch: Trajectories, scores_N: Tensor, keep: int, step: int) -> Tensor:
        return sharded_survivors(batch, scores_N, keep, select, key.group_seeds(slot_P, step), len(prompts), sharding)

    def prune(step: int, batch: Trajectories) -> Trajectories:
        keep = plan.keep_after(step)
        if keep is None:
            return batch
        _, scores_N = preview(policy, reward, prompts, condition, batch, step, sampling, how, meter)
        rows = kept(batch, scores_N, keep, step)
        previews.append(Preview(step, batch.group_N, batch.member_N, scores_N, _mask(rows, len(batch))))
        return rebalanced(batch.take(rows), sharding)

    batch = own_share(expand(policy, slot_P, plan.group_size, sampling, key), sharding)
    sampling = sampling.with_max_batch(len(batch))
    finalists = denoise(policy, condition, batch, sampling, key, meter, prune)
    with meter.stage("reward"):
        pictures, scores = score(policy, reward, prompts, finalists, finalists.x_NCHW, sampling.microbatch, meter)
    rewarded = GroupScores.of(scores, finalists.group_N)
    rows = torch.arange(len(finalists))
    if plan.final_keep is not None:
        rows = kept(finalists, scores.ranking_N, plan.final_keep, sampling.num_inference_steps)
    return Rollout(
        prompts=tuple(prompts),
        condition=condition,
        trajectories=finalists.take(rows),
        pictures=pictures.take(rows),
        survivors=rewarded.take(rows),
        finalists=rewarded,
        previews=tuple(previews),
    )


def _mask(rows: Tensor, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.bool).index_fill(0, rows, True)
