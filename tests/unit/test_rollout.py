"""Groups in rows and back, survivors of ragged groups, and what a rollout records."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from progrpo.config import SamplingSettings
from progrpo.diffusion.levels import flow_levels
from progrpo.diffusion.process import Process
from progrpo.rewards.base import Reward, Score
from progrpo.rollout.denoise import Denoiser, denoise, expand
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import INITIAL, NoiseKey
from progrpo.rollout.plan import Plan, PrunePoint
from progrpo.rollout.preview import score
from progrpo.rollout.prune import survivors, to_groups
from progrpo.rollout.rollout import rollout
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sampling import Record, Sampling, ode, sampling_for
from progrpo.training.build import sampling_from
from progrpo.types import Prompt, Trajectories
from tests.support.grids import SAMPLERS, SELECTORS
from tests.support.rewards import mixture_of_one

NAN = float("nan")


def living(*groups):
    """Trajectories of these groups, whose latents say which row they are."""
    group = torch.tensor(groups)
    rows = torch.arange(len(group))
    return Trajectories(group, group, rows, rows.float().reshape(-1, 1, 1, 1))


def with_settings(sampling, **settings):
    return replace(sampling, settings=replace(sampling.settings, **settings))


def test_to_groups_of_even_groups():
    row, present = to_groups(torch.tensor([0, 0, 1, 1]), 2)
    assert row.tolist() == [[0, 1], [2, 3]] and present.all()


def test_to_groups_of_ragged_and_absent_groups():
    row, present = to_groups(torch.tensor([0, 0, 0, 2]), 4)
    assert present.tolist() == [[True] * 3, [False] * 3, [True, False, False], [False] * 3]
    assert row[present].tolist() == [0, 1, 2, 3]


def test_survivors_of_even_groups_are_prompt_major_and_ascending():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.4, 0.6, 0.3], dtype=torch.float64)
    rows = survivors(living(0, 0, 0, 1, 1, 1).group_N, scores, 2, SELECTORS["ovf"], torch.zeros(2, dtype=torch.int64))
    assert rows.tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("selector", SELECTORS)
def test_survivors_of_ragged_groups_are_never_more_than_there_are(selector):
    batch = living(0, 0, 0, 0, 2, 2, 3)
    scores = torch.tensor([0.1, 0.9, 0.5, 0.4, 0.2, 0.8, 0.7], dtype=torch.float64)
    rows = survivors(batch.group_N, scores, 3, SELECTORS[selector], torch.zeros(4, dtype=torch.int64))
    assert torch.bincount(batch.group_N[rows], minlength=4).tolist() == [3, 0, 2, 1]
    assert rows.tolist() == sorted(set(rows.tolist()))


@pytest.mark.parametrize("selector", SELECTORS)
def test_survivors_have_scores_where_enough_have(selector):
    batch = living(0, 0, 0, 0, 1, 1, 1)
    scores = torch.tensor([NAN, 0.9, NAN, 0.4, NAN, NAN, 0.7], dtype=torch.float64)
    rows = survivors(batch.group_N, scores, 2, SELECTORS[selector], torch.zeros(2, dtype=torch.int64))
    assert rows.tolist() == [1, 3, 4, 6]


def test_expanding_gives_every_member_noise_of_its_own(tiny_policy):
    policy, key = tiny_policy(), NoiseKey(seed=5, iteration=2)
    batch = expand(policy, torch.tensor([4, 9]), 3, ode(policy, 4, 1.0, 8), key)
    assert batch.group_N.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.slot_N.tolist() == [4, 4, 4, 9, 9, 9] and batch.member_N.tolist() == [0, 1, 2] * 2
    assert batch.x_NCHW.shape == (6, *policy.latent_shape) and batch.x_NCHW.dtype == torch.float32
    assert torch.equal(batch.x_NCHW[4], key.draw(torch.tensor([9]), torch.tensor([1]), INITIAL, policy.latent_shape)[0])
    assert len(batch.x_NCHW.flatten(1).unique(dim=0)) == 6


def test_members_may_begin_at_their_groups_noise(tiny_policy):
    policy, key = tiny_policy(), NoiseKey(seed=5, iteration=2)
    sampling = with_settings(ode(policy, 4, 1.0, 8), same_latent=True)
    batch = expand(policy, torch.tensor([4, 9]), 3, sampling, key)
    assert batch.member_N.tolist() == [0, 1, 2] * 2  # whose steps have noise of their own
    first, second = batch.x_NCHW[:3], batch.x_NCHW[3:]
    assert (first == first[0]).all() and (second == second[0]).all() and not torch.equal(first, second)
    alone = expand(policy, torch.tensor([9]), 1, sampling, key)
    assert torch.equal(alone.x_NCHW[0], second[0])  # it belongs to the slot, not to the batch
    own = expand(policy, torch.tensor([9]), 3, with_settings(sampling, same_latent=False), key)
    assert not any(torch.equal(x, second[0]) for x in own.x_NCHW)


def test_members_that_began_as_one_part_at_the_first_step(tiny_policy, tiny_config, prompts_of):
    policy, key = tiny_policy(), NoiseKey(seed=5, iteration=2)
    settings = SamplingSettings(num_inference_steps=3, same_latent=True)
    sampling = sampling_from(tiny_config(sampling=settings), policy, "transitions", 0)
    batch = expand(policy, torch.tensor([4, 9]), 3, sampling, key)
    path = denoise(
        Denoiser(policy, policy.encode(prompts_of("red cat", "blue dog")), sampling), batch, key, Meter()
    ).path
    assert len(path[0].x_NCHW.flatten(1).unique(dim=0)) == 2
    assert len(path[0].x_next_NCHW.flatten(1).unique(dim=0)) == 6


@pytest.mark.parametrize("first", [0, 2])
def test_equal_members_share_the_calls_before_they_part(tiny_policy, tiny_config, prompts_of, first):
    policy, key = tiny_policy(moved=0.1), NoiseKey(seed=5, iteration=2)
    settings = SamplingSettings(num_inference_steps=5, same_latent=True, microbatch=1)
    config = tiny_config(sampling=settings)
    steps = range(first, 4)
    sampling = sampling_for(policy, settings, steps, Record(frozenset(steps), latent_features=True))
    shared = replace(sampling, shared_calls=first + 1)
    assert sampling_from(config, policy, "transitions", 0).shared_calls == 1
    condition, results = policy.encode(prompts_of("red cat", "blue dog")), []
    for each in (sampling, shared):
        meter = Meter()
        batch = expand(policy, torch.tensor([4, 9]), 3, each, key)
        results.append((denoise(Denoiser(policy, condition, each), batch, key, meter), meter.cost.nfe))
    (own, nfe), (done, nfe_shared) = results
    assert nfe == 2 * 3 * 5 and nfe_shared == nfe - 2 * 2 * (first + 1)
    assert torch.equal(own.x_NCHW, done.x_NCHW) and len(done.x_NCHW.flatten(1).unique(dim=0)) == 6
    for a, b in zip(own.path, done.path, strict=True):
        assert torch.equal(a.x_NCHW, b.x_NCHW) and torch.equal(a.log_prob_N, b.log_prob_N)
    assert all(map(torch.equal, own.latent_features, done.latent_features))


@pytest.mark.parametrize("latent_dtype", ["float32", "bfloat16", "float16"])
def test_a_trajectory_goes_on_from_what_was_stored(
    family_at_length, tiny_policy, tiny_config, prompts_of, latent_dtype
):
    policy, key = tiny_policy(folder=family_at_length), NoiseKey(seed=5, iteration=2)
    dtype, settings = getattr(torch, latent_dtype), SamplingSettings(num_inference_steps=4, latent_dtype=latent_dtype)
    sampling = sampling_from(tiny_config(sampling=settings), policy, "means", 0)
    batch = expand(policy, torch.tensor([4, 9]), 2, sampling, key)
    assert torch.equal(batch.x_NCHW.to(dtype).float(), batch.x_NCHW)
    done = denoise(Denoiser(policy, policy.encode(prompts_of("red cat", "blue dog")), sampling), batch, key, Meter())
    assert torch.equal(done.path[0].x_NCHW.float(), batch.x_NCHW)
    assert all(torch.equal(t.x_next_NCHW, after.x_NCHW) for t, after in pairwise(done.path))
    for t in done.path:
        assert t.mean_NCHW is not None
        assert t.x_NCHW.dtype == t.x_next_NCHW.dtype == dtype
        assert t.log_prob_N.dtype == t.mean_NCHW.dtype == torch.float32
        std = sampling.process.stds_T[t.step]
        drawn = t.mean_NCHW + std * key.draw(batch.slot_N, batch.member_N, t.step, policy.latent_shape)
        assert torch.equal(t.x_next_NCHW, drawn.to(dtype))
        density = sampling.process.log_prob(t.x_next_NCHW.float(), t.mean_NCHW, std)
        torch.testing.assert_close(t.log_prob_N, density)
    assert done.x_NCHW.dtype == torch.float32 and torch.equal(done.x_NCHW.to(dtype).float(), done.x_NCHW)


@pytest.mark.parametrize("latent_dtype", ["float32", "bfloat16"])
def test_a_latent_is_kept_once_however_often_a_batch_is_taken(tiny_policy, tiny_config, prompts_of, latent_dtype):
    policy, key = tiny_policy(), NoiseKey(seed=5, iteration=2)
    settings = SamplingSettings(num_inference_steps=4, latent_dtype=latent_dtype)
    sampling = sampling_from(tiny_config(sampling=settings), policy, "transitions", 0)
    batch = expand(policy, torch.tensor([4]), 4, sampling, key)

    def prune(step: int, living: Trajectories) -> Trajectories:
        return living.take(torch.arange(0, len(living), 2)) if step < 2 else living

    done = denoise(Denoiser(policy, policy.encode(prompts_of("red cat")), sampling), batch, key, Meter(), prune)
    kept = [x for t in done.path for x in (t.x_NCHW, t.x_next_NCHW)]
    assert len(done) == 1 and len(kept) == 6
    assert len({x.data_ptr() for x in kept}) == 4
    assert all(torch.equal(before.x_next_NCHW, after.x_NCHW) for before, after in pairwise(done.path))
    assert done.take(torch.arange(1)) is done


def test_steps_without_noise_are_rounded_too(tiny_policy, prompts_of):
    policy, key = tiny_policy(), NoiseKey(seed=5, iteration=2)
    sampling = with_settings(ode(policy, 3, 1.0, 8), latent_dtype="bfloat16")
    batch, seen = expand(policy, torch.tensor([4]), 2, sampling, key), []

    def watch(step: int, living: Trajectories) -> Trajectories:
        seen.append(living.x_NCHW)
        return living

    denoise(Denoiser(policy, policy.encode(prompts_of("red cat")), sampling), batch, key, Meter(), watch)
    assert len(seen) == 3 and all(torch.equal(x.bfloat16().float(), x) for x in seen)


@dataclass
class Verdicts(Reward):
    """Scores, in order: a reward with strict verdicts and gaps."""

    scores: list[Score]

    def score(self, pictures_NHWC, prompts):
        assert pictures_NHWC.dtype == np.uint8 and len(pictures_NHWC) == len(prompts)
        return self.scores


def test_scores_are_numbers_verdicts_and_gaps(tiny_policy):
    policy, meter = tiny_policy(), Meter()
    verdicts = [Score(0.5, True), Score(None), Score(float("inf"), False)]
    x0 = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(policy, mixture_of_one(Verdicts(verdicts)), ode(policy, 4, 1.0, 2))
    images, scores = score(sampler, [Prompt("a"), Prompt("b")], torch.tensor([0, 0, 1]), x0, meter)
    values, passed = scores.value_N, scores.passed_N
    assert images.images_NHWC.shape == (3, 16, 16, 3) and images.images_NHWC.dtype == torch.uint8
    np.testing.assert_array_equal(values, [0.5, NAN, NAN])
    np.testing.assert_array_equal(passed, [1.0, NAN, 0.0])
    assert values.dtype == torch.float64
    assert (meter.cost.decodes, meter.cost.reward_calls, meter.cost.nfe) == (3, 3, 0)


def test_a_reward_of_another_length_is_refused(tiny_policy):
    policy = tiny_policy()
    sampler, x0 = (
        Sampler(policy, mixture_of_one(Verdicts([Score(1.0)])), ode(policy, 4, 1.0, 2)),
        torch.zeros(2, *policy.latent_shape),
    )
    with pytest.raises(AssertionError, match="1 scores for 2 pictures"):
        score(sampler, [Prompt("a")], torch.tensor([0, 0]), x0, Meter())


def test_a_rollout_records_what_it_did(tiny_trainer, tiny_config, prompts):
    trainer, meter = tiny_trainer(tiny_config()), Meter()
    plan, asked = Plan(4, (PrunePoint(0, 4), PrunePoint(1, 3)), final_keep=2), [Prompt(p) for p in prompts[:2]]
    rolled = rollout(replace(trainer.sampler, plan=plan), asked, torch.tensor([0, 1]), NoiseKey(0, 0), meter)
    assert rolled.prompts == tuple(asked) and rolled.group_N.tolist() == [0, 0, 1, 1]
    assert len(rolled.pictures.images_NHWC) == len(rolled.survivors.value_N) == 4
    assert rolled.finalists.group_N.tolist() == [0] * 3 + [1] * 3 and rolled.survivors.passed_N.isnan().all()
    assert set(rolled.survivors.value_N.tolist()) <= set(rolled.finalists.value_N.tolist())
    (only,) = rolled.previews  # the point that keeps everyone previews nothing
    assert only.step == 1 and only.scores_N.shape == (8,)
    assert [t.step for t in rolled.trajectories.path] == [0, 1, 2]
    assert rolled.trajectories.output_NCHW is None
    one = plan.predict(4, 0, guidance=False)
    assert meter.cost == one + one
    assert set(meter.seconds) == {"sample", "preview", "reward"}


def test_a_step_without_noise_cannot_be_stored():
    process = Process("flow", SAMPLERS["flow_grpo"], flow_levels(torch.tensor([1.0, 0.5, 0.0])), (0.7, 0.0))
    with pytest.raises(AssertionError, match="an ODE step has no log-prob"):
        Sampling(process, record=Record(frozenset({1})))
