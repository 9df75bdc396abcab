"""The probe: what it sees and is told, that it learns to rank, and when it is believed."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch

from progrpo.rollout import probe as module
from progrpo.rollout.probe import Probe, ProbeExample, ProbeState, latent_features, probe_examples, text_features
from progrpo.storage import load_state, save_state
from progrpo.tracking.statistics import spearman
from progrpo.types import Condition, Trajectories

STEPS, GROUP, CHANNELS, SIDE, TOKENS = 2, 6, 3, 4, 5
NAN = float("nan")


def drawn(groups: int, seed: int = 0, members: int = GROUP) -> list[ProbeExample]:
    """Latents whose reward is their first channel's mean, scaled by the text; noise hides that of the first step."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    examples = []
    for _ in range(groups):
        latents, direction = draw(members, CHANNELS, SIDE, SIDE) + 2 * draw(members, CHANNELS, 1, 1), draw(1).sign()
        text = draw(TOKENS, 2)
        text[:, 1] = direction
        seen = torch.stack([draw(*latents.shape), 5 + 3 * latents]).half()
        rewards = (direction * latents[:, 0].mean((1, 2)) + 3 * draw(1)).double()
        examples.append(
            ProbeExample(seen, text.half(), rewards, torch.full((STEPS, members), NAN, dtype=torch.float64))
        )
    return examples


def learnt(*parts: list[ProbeExample], seed: int = 0) -> Probe:
    probe = Probe(STEPS, seed)
    for part in parts:
        probe.learn(part)
    return probe


def scores(probe: Probe, asked: list[ProbeExample], step: int = 1) -> torch.Tensor:
    group = torch.arange(len(asked)).repeat_interleave(torch.tensor([len(a.rewards_N) for a in asked]))
    return probe.score(
        step, torch.cat([a.features_TNCHW[step] for a in asked]), torch.stack([a.text for a in asked]), group
    )


# --- its features -----------------------------------------------------------------------------------------------------


def test_large_latents_are_averaged_down_and_small_ones_seen_as_they_are():
    x = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    by_hand = x.view(2, 3, 16, 2, 16, 4).mean((3, 5))
    torch.testing.assert_close(latent_features(x).float(), by_hand, atol=2e-3, rtol=2e-3)
    assert latent_features(x).dtype == torch.float16
    assert torch.equal(latent_features(x[..., :8, :16]), x[..., :8, :16].half())
    assert latent_features(x[..., :9, :3]).shape == (2, 3, 8, 2)  # patches of 2 x 2 need even sides


def test_of_a_video_the_mean_frame_is_seen():
    x = torch.randn(2, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(latent_features(x), latent_features(x.sum(2) / 5))


@pytest.mark.parametrize("width", [3, 128, 129, 700])
def test_wide_texts_are_narrowed_by_the_same_matrix_every_time(width):
    embeds = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(0))
    features = text_features(Condition({"prompt_embeds": embeds}))
    assert features.shape == (2, 4, min(width, 128)) and features.dtype == torch.float16
    assert torch.equal(features, text_features(Condition({"prompt_embeds": embeds})))
    if width <= 128:
        assert torch.equal(features, embeds.half())
    else:  # lengths and angles stay as far as so many numbers can keep them
        pairs = [
            (features[0, i].float() @ features[1, j].float(), embeds[0, i] @ embeds[1, j])
            for i in range(4)
            for j in range(4)
        ]
        lengths = [(features[0, i].float().norm() ** 2, embeds[0, i].norm() ** 2) for i in range(4)]
        narrowed, whole = torch.tensor(pairs + lengths).T
        assert torch.corrcoef(torch.stack([narrowed, whole]))[0, 1] > 0.8


def test_a_lesson_is_what_was_seen_of_one_group():
    group, slot = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([7, 7, 5, 5, 5])
    features = tuple(torch.randn(5, CHANNELS, SIDE, SIDE).half() for _ in range(STEPS))
    embeds, rewards = torch.randn(3, TOKENS, 2), torch.arange(5.0, dtype=torch.float64)
    finished = Trajectories(
        group, slot, torch.arange(5), torch.zeros(5, CHANNELS, SIDE, SIDE), latent_features=features
    )
    previews = torch.arange(10.0, dtype=torch.float64).view(STEPS, 5)
    by_slot = probe_examples(finished, Condition({"prompt_embeds": embeds}), rewards, previews)
    first, second = by_slot[7], by_slot[5]
    assert torch.equal(second.features_TNCHW, torch.stack(features)[:, 2:])
    assert torch.equal(second.text, embeds[2].half())
    assert second.rewards_N.tolist() == [2, 3, 4] and second.previews_TN.tolist() == [[2, 3, 4], [7, 8, 9]]
    assert torch.equal(first.text, embeds[0].half()) and first.rewards_N.tolist() == [0, 1]
    alone = probe_examples(finished, Condition({"prompt_embeds": embeds}), rewards)
    assert all(lesson.previews_TN.isnan().all() for lesson in alone.values()) and alone.keys() == {5, 7}
    blind = Trajectories(group, group, torch.arange(5), finished.x_NCHW)
    assert probe_examples(blind, Condition({}), rewards) == {}


# --- what it learns ---------------------------------------------------------------------------------------------------


def test_it_ranks_groups_that_it_has_not_seen_as_their_texts_ask():
    probe, fresh = learnt(*(drawn(4, seed) for seed in range(60))), drawn(12, seed=1000)
    predicted = {step: scores(probe, fresh, step).view(12, GROUP).numpy() for step in range(STEPS)}
    truth = [lesson.rewards_N.numpy() for lesson in fresh]
    informed, blind = (
        np.mean([spearman(s, t) or 0.0 for s, t in zip(predicted[step], truth, strict=True)]) for step in (1, 0)
    )
    assert informed > 0.9 and abs(blind) < 0.4  # the first step knows nothing of the reward
    swapped = [
        ProbeExample(a.features_TNCHW, (a.text * torch.tensor([1, -1])).half(), a.rewards_N, a.previews_TN)
        for a in fresh
    ]
    turned = scores(probe, swapped).view(12, GROUP).numpy()
    assert np.mean([spearman(s, t) or 0.0 for s, t in zip(turned, truth, strict=True)]) < -0.8


def test_previews_teach_as_well_where_they_are_known():
    known = [ProbeExample(a.features_TNCHW, a.text, a.rewards_N, a.rewards_N.expand(STEPS, -1)) for a in drawn(4)]
    assert not torch.equal(scores(learnt(known), known), scores(learnt(drawn(4)), known))


def test_a_number_added_to_all_rewards_teaches_the_same():
    """Rewards are in 64ths, of which the shift and the mean of eight are exact in float64, and in float32 not."""

    def lesson(one: ProbeExample, shift: float) -> ProbeExample:
        rewards = (one.rewards_N * 64).round() / 64 + shift
        return ProbeExample(one.features_TNCHW, one.text, rewards, rewards.expand(STEPS, -1))

    plain, shifted = ([lesson(one, shift) for one in drawn(6, members=8)] for shift in (0.0, 1e9))
    torch.testing.assert_close(scores(learnt(shifted), shifted), scores(learnt(plain), plain), rtol=1e-4, atol=1e-5)


def test_a_score_is_made_within_the_group_alone():
    probe, fresh = learnt(drawn(8)), drawn(3, seed=5)
    together, alone = scores(probe, fresh), torch.cat([scores(probe, [one]) for one in fresh])
    assert together.dtype == torch.float64 and together.isfinite().all()
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    doubled = [
        ProbeExample(torch.cat([a.features_TNCHW] * 2, 1), a.text, a.rewards_N.repeat(2), a.previews_TN) for a in fresh
    ]
    twice = scores(probe, doubled).view(3, 2, GROUP)
    torch.testing.assert_close(twice[:, 0].flatten(), together, rtol=1e-4, atol=1e-5)


def test_groups_of_any_size_have_scores():
    probe = learnt(drawn(4), drawn(2, members=1), drawn(2, members=3))
    assert scores(probe, [*drawn(1, members=1), *drawn(1, members=2), *drawn(1, members=30)]).isfinite().all()


def test_means_are_of_those_that_are_there():
    generator = torch.Generator().manual_seed(0)
    values, group = torch.randn(9, 2, generator=generator), torch.tensor([0, 0, 1, 1, 1, 3, 3, 3, 3])
    there = torch.rand(9, 2, generator=generator) > 0.4
    centred = module._centred(values, group, there)
    for k in range(2):
        for g in (0, 1, 3):
            own = (group == g) & there[:, k]
            mean = values[own, k].sum() / max(1, int(own.sum()))
            torch.testing.assert_close(centred[group == g, k], values[group == g, k] - mean)


def test_a_missing_reward_is_no_number():
    """Above all not 0: what is learnt differs from what a reward of 0 teaches, and is finite."""
    one = drawn(1)[0]
    gone = one.rewards_N.clone()
    gone[[1, 4]] = NAN
    probe = learnt([ProbeExample(one.features_TNCHW, one.text, gone, one.previews_TN)])
    zero = learnt([ProbeExample(one.features_TNCHW, one.text, gone.nan_to_num(0.0), one.previews_TN)])
    assert scores(probe, [one]).isfinite().all()
    assert not torch.allclose(scores(probe, [one]), scores(zero, [one]))


def test_rewards_that_are_all_missing_teach_nothing():
    one = drawn(1)[0]
    lost = ProbeExample(one.features_TNCHW, one.text, torch.full_like(one.rewards_N, NAN), one.previews_TN)
    probe = learnt([lost], [])
    assert not probe.has_learnt
    probe.learn([lost, *drawn(4)])
    assert probe.has_learnt
    assert torch.equal(scores(probe, [one]), scores(learnt(drawn(4)), [one]))


def test_the_latest_groups_are_kept(monkeypatch):
    monkeypatch.setattr(module, "_KEPT", 3)
    parts = [drawn(2, seed) for seed in range(3)]
    state = learnt(*parts).state_dict()["learnt"]
    assert state is not None
    kept = state["lessons"]
    latest = [parts[1][1], *parts[2]]
    assert all(torch.equal(k["seen_TNCHW"], w.features_TNCHW) for k, w in zip(kept, latest, strict=True))


def test_it_is_a_function_of_its_seed_and_what_it_was_taught_and_draws_from_nobody_else():
    state, fresh = torch.get_rng_state(), drawn(2, seed=9)
    predicted = [scores(learnt(drawn(4), drawn(4, 1), seed=seed), fresh) for seed in (0, 0, 1)]
    assert torch.equal(predicted[0], predicted[1]) and not torch.allclose(predicted[0], predicted[2])
    assert torch.equal(torch.get_rng_state(), state)


# --- when it is believed ----------------------------------------------------------------------------------------------


def watched(*agreements) -> Probe:
    probe = learnt(drawn(2))
    for agreement in agreements:
        probe.watch(agreement)
    return probe


def test_it_is_trusted_after_three_audits_and_not_before():
    assert not watched().trusted(0, 0.5)
    assert not watched((0.9, 0.9), (0.9, 0.9)).trusted(0, 0.5)
    assert watched((0.9, 0.9), (0.9, 0.9), (0.9, 0.9)).trusted(0, 0.5)


def test_it_is_trusted_at_the_threshold_and_not_below_and_each_step_for_itself():
    probe = watched((0.5, 0.25), (0.25, 0.25), (0.75, 0.25))
    assert probe.agreement(0) == 0.5 and probe.agreement(1) == 0.25
    assert probe.trusted(0, 0.5) and not probe.trusted(0, 0.501)
    assert not probe.trusted(1, 0.5) and probe.trusted(1, 0.25)


def test_audits_without_an_agreement_are_not_counted():
    probe = watched((0.75, None), (None, None), (0.75, 0.75))
    assert probe.agreement(0) is None and not probe.trusted(0, -1)
    probe.watch((0.75, 0.75))
    assert probe.agreement(0) == 0.75 and probe.agreement(1) is None


def test_groups_whose_rewards_are_equal_take_no_trust_away():
    assert watched(*[(0.75, 0.75)] * 3, *[(None, None)] * 6).trusted(0, 0.5)


def test_trust_is_lost_when_the_agreement_falls():
    probe = watched(*[(0.9, 0.9)] * 20)
    assert probe.trusted(0, 0.5)
    falls = 0
    while probe.trusted(0, 0.5):
        probe.watch((0.0, 0.9))
        falls += 1
    assert 1 < falls <= 6  # old audits are forgotten
    assert probe.trusted(1, 0.5)


def test_who_has_learnt_nothing_is_not_trusted():
    probe = Probe(STEPS)
    for _ in range(3):
        probe.watch((1.0, 1.0))
    assert probe.agreement(0) == 1 and not probe.trusted(0, 0.5)
    with pytest.raises(AssertionError, match="learn first"):
        scores(probe, drawn(1))


# --- resume -----------------------------------------------------------------------------------------------------------


def test_a_probe_comes_back_from_disk_as_it_was(tmp_path):
    probe, fresh = watched((0.1, None), (0.7, 0.3), (0.8, 0.4)), drawn(2, seed=1)
    save_state(tmp_path / "state", probe.state_dict())
    other = learnt(drawn(3, seed=5))
    other.load_state_dict(cast(ProbeState, load_state(tmp_path / "state")))
    for step in range(STEPS):
        assert torch.equal(scores(other, fresh, step), scores(probe, fresh, step))
        assert other.agreement(step) == probe.agreement(step)
    for one in (probe, other):
        one.learn(drawn(2, seed=3))
        one.watch((0.9, 0.9))
    assert torch.equal(scores(other, fresh), scores(probe, fresh))
    assert other.agreement(1) == probe.agreement(1) is not None


def test_a_probe_that_knows_nothing_comes_back_so(tmp_path):
    save_state(tmp_path / "state", Probe(STEPS).state_dict())
    other = learnt(drawn(2))
    other.load_state_dict(cast(ProbeState, load_state(tmp_path / "state")))
    assert not other.has_learnt and other.agreement(0) is None
    other.learn(drawn(3))
    assert torch.equal(scores(other, drawn(1, 7)), scores(learnt(drawn(3)), drawn(1, 7)))


def test_a_condition_without_embeddings_of_texts_is_refused():
    with pytest.raises(
        ValueError, match=r"^preview\.probe needs embeddings of texts, .* no prompt_embeds; leave it out"
    ):
        text_features(Condition({"labels": torch.zeros(2, 3)}))
