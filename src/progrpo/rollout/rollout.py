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
from progrpo.types import Preview, Prompt, Rollout, Trajectories


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
) -> Rollout:
    """One group a prompt, expanded, pruned as `plan` says, finished, decoded and rewarded.

    `slot_P` (int64) are the prompts' global places in the iteration, by which noise is drawn. With a `final_keep` the
    group's final rewards select the survivors; all finalists' rewards are kept beside theirs.
    """
    plan.validate(sampling.num_inference_steps)
    condition = policy.encode(prompts)
    previews: list[Preview] = []

    def prune(step: int, batch: Trajectories) -> Trajectories:
        keep = plan.keep_after(step)
        if keep is None:
            return batch
        _, scores_N = preview(policy, reward, prompts, condition, batch, step, sampling, how, meter)
        rows = survivors(batch, scores_N, keep, select, key.group_seeds(slot_P, step), len(prompts))
        previews.append(Preview(step, batch.group_N, batch.member_N, scores_N, _mask(rows, len(batch))))
        return batch.take(rows)

    batch = expand(policy, slot_P, plan.group_size, sampling, key)
    finalists = denoise(policy, condition, batch, sampling, key, meter, prune)
    with meter.stage("reward"):
        images_NHWC, scores = score(policy, reward, prompts, finalists, finalists.x_NCHW, sampling.microbatch, meter)
    rows = torch.arange(len(finalists))
    if plan.final_keep is not None:
        seeds = key.group_seeds(slot_P, sampling.num_inference_steps)
        rows = survivors(finalists, scores.ranking_N, plan.final_keep, select, seeds, len(prompts))
    return Rollout(
        prompts=tuple(prompts),
        condition=condition,
        trajectories=finalists.take(rows),
        images_NHWC=images_NHWC[rows],
        rewards_N=scores.value_N[rows],
        passed_N=scores.passed_N[rows],
        parts_NR=scores.parts_NR[rows],
        finalist_rewards_F=scores.value_N,
        finalist_group_F=finalists.group_N,
        previews=tuple(previews),
    )


def survivors(
    batch: Trajectories, scores_N: Tensor, keep: int, select: Selector, seeds_P: Tensor, num_groups: int
) -> Tensor:
    """Rows of the batch that `select` keeps, prompt-major, members ascending."""
    row_PG, present_PG = to_groups(batch.group_N, num_groups)
    scores_PG = scores_N[row_PG].masked_fill(~present_PG, torch.nan)
    selection = select(scores_PG, keep, present_PG, seeds_P)
    return row_PG.gather(1, selection.indices_PK)[selection.valid_PK]


def to_groups(group_N: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Row number of every member of every group (P, G), and where there is one; G is the largest group's size."""
    count_P = torch.bincount(group_N, minlength=num_groups)
    place_G = torch.arange(int(count_P.max()))
    present_PG = place_G < count_P[:, None]
    row_PG = (count_P.cumsum(0) - count_P)[:, None] + place_G
    return row_PG.where(present_PG, 0), present_PG


def _mask(rows: Tensor, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.bool).index_fill(0, rows, True)
