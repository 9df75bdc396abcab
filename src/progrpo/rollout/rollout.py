"""Expand and prune: from prompts to the trajectories that are worth training on (Pro-GRPO, arXiv 2512.15347)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from progrpo.rollout.denoise import denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.preview import preview, score
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sharding import own_share, rebalanced
from progrpo.types import GroupScores, Preview, Prompt, Rollout, Trajectories


def rollout(sampler: Sampler, prompts: Sequence[Prompt], slot_P: Tensor, key: NoiseKey, meter: Meter) -> Rollout:
    """One group per prompt: expanded, pruned by the sampler's plan, finished, decoded and rewarded.

    `slot_P` (int64) has the prompts' global places in the iteration, by which noise is drawn. With the plan's
    `final_keep` the final rewards select the survivors; the rewards of all finalists are kept beside theirs. With the
    plan's `keep_groups` some groups have none. With group sharding each process has its part of the rollout.
    """
    plan, sampling, sharding = sampler.plan, sampler.sampling, sampler.sharding
    plan.validate(sampling.num_inference_steps)
    condition = sampler.policy.encode(prompts)
    previews: list[Preview] = []
    batch = own_share(expand(sampler.policy, slot_P, plan.group_size, sampling, key), sharding)
    sampler = sampler.with_max_batch(len(batch))

    def prune(step: int, batch: Trajectories) -> Trajectories:
        sampler.observe(step, batch)
        keep = plan.keep_after(step)
        if keep is None:
            return batch
        _, scores_N = preview(sampler, prompts, condition, batch, step, meter)
        rows = sampler.survivors(batch, scores_N, keep, key.group_seeds(slot_P, step))
        if plan.stops_groups_after(step):
            rows = rows[sampler.going_on(batch, scores_N)[rows]]
        previews.append(Preview(step, batch.group_N, batch.member_N, scores_N))
        return rebalanced(batch.take(rows), sharding)

    finished = denoise(sampler.denoiser(condition), batch, key, meter, prune)
    with meter.stage("reward"):
        pictures, scores = score(sampler, prompts, finished.group_N, finished.x_NCHW, meter)
    rows = torch.arange(len(finished))
    if plan.final_keep is not None:
        seeds_P = key.group_seeds(slot_P, sampling.num_inference_steps)
        rows = sampler.survivors(finished, scores.ranking_N, plan.final_keep, seeds_P)
    finalists = GroupScores.of(scores, finished.group_N)
    return Rollout(
        prompts=tuple(prompts),
        condition=condition,
        trajectories=finished.take(rows),
        pictures=pictures.take(rows),
        survivors=finalists.take(rows),
        finalists=finalists,
        previews=tuple(previews),
    )


def last_scores(rolled: Rollout) -> tuple[Tensor, Tensor]:
    """The last scores of every group, and the group of each: final rewards, or previews where it was stopped whole."""
    scores, groups = [rolled.finalists.value_N], [rolled.finalists.group_N]
    for seen in rolled.previews:
        stopped_N = ~torch.isin(seen.group_N, rolled.finalists.group_N)
        scores.append(seen.scores_N[stopped_N])
        groups.append(seen.group_N[stopped_N])
    return torch.cat(scores), torch.cat(groups)
