"""Latent reward heads: their features, training, folders, and previews that rank by them."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from progrpo.checks import check
from progrpo.cli.entry import main
from progrpo.config import AuditSettings, PlanSettings, PreviewSettings, config_from_json
from progrpo.preferences.pairs import Pair, write_pairs
from progrpo.preferences.reward_model.head import Ensemble
from progrpo.preferences.reward_model.latent import LatentBackbone, LatentHead, latent_features, load_latent_head
from progrpo.preferences.reward_model.load import LATENT
from progrpo.preferences.reward_model.model import RewardModel, load_reward_model, save_reward_model
from progrpo.preferences.reward_model.training import TrainingSettings, train_reward_model
from progrpo.rewards.base import Refusal
from progrpo.rewards.function import FunctionReward
from progrpo.rewards.load import load_reward
from progrpo.rewards.settings import RewardTerm
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan, PrunePoint
from progrpo.rollout.rollout import rollout
from progrpo.rollout.sampler import Sampler
from progrpo.training.absolute_paths import with_absolute_paths
from progrpo.training.build import sampling_from
from progrpo.training.latent_reward import latent_reward
from progrpo.types import Cost, Prompt
from tests.support.rewards import mixture_of_one


def pooled(pictures):
    """Latents (N, 3, 8, 8) of pictures: the means of patches, in [-1, 1]."""
    pixels = torch.as_tensor(np.stack([np.asarray(p.resize((64, 64))) for p in pictures])).permute(0, 3, 1, 2)
    return torch.nn.functional.avg_pool2d(pixels.float() / 127.5 - 1, 8)


def negative(pictures):
    return -pooled(pictures)


def random_head(channels: int) -> Ensemble:
    features, generator = 5 * (3 * channels + 2), torch.Generator().manual_seed(0)
    weight_KD = torch.randn(2, features, generator=generator, dtype=torch.float64)
    one = torch.ones(features, dtype=torch.float64)
    return Ensemble(weight_KD, 0 * one, one, torch.tensor(1.0, dtype=torch.float64), 1.0, 0.0)


def save_random_head(policy: Any, folder: Path) -> Path:
    backbone = LatentBackbone("tiny", policy.encode_pictures)
    model = RewardModel(backbone, random_head(policy.latent_shape[0]))
    save_reward_model(model, LATENT, {"latent": backbone.facts()}, folder)
    return folder


def write_example(folder: Path, count: int) -> Path:
    """Pairs of discs, of which the redder one is preferred."""
    generator, pairs = np.random.default_rng(0), []
    y, x = np.mgrid[0:64, 0:64]
    for i in range(count):
        red = generator.uniform(0, 255, 2)
        for j in range(2):
            disc = np.hypot(x - generator.uniform(16, 48), y - generator.uniform(16, 48)) < 10
            pixels = np.where(disc[..., None], (red[j], 80, 80), (230, 230, 230)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}-{j}.png")
        pairs.append(Pair(Prompt(f"disc {i}"), folder / f"{i}-0.png", folder / f"{i}-1.png", float(red[0] > red[1])))
    write_pairs(folder / "pairs.jsonl", pairs)
    return folder / "pairs.jsonl"


# --- features ---------------------------------------------------------------------------------------------------------


def test_features_are_the_moments_that_they_say():
    x_NCHW = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    y, x = np.meshgrid(np.linspace(-1, 1, 4), np.linspace(-1, 1, 5), indexing="ij")
    for latent, features in zip(x_NCHW.double().numpy(), latent_features(x_NCHW), strict=True):
        middle = np.sort(latent.reshape(3, -1))[:, 9]  # the lower one of two
        deviation = latent - middle[:, None, None]
        energy = (deviation**2).sum(0)
        mask = energy / (energy + 3 / 4)
        parts = [*deviation, *abs(deviation), energy, mask, *(mask * latent)]
        square = x**2 + y**2 - (x**2 + y**2).mean()
        expected = [
            (part.mean(), part.std(ddof=1), (part * x).mean(), (part * y).mean(), (part * square).mean())
            for part in parts
        ]
        np.testing.assert_allclose(features.numpy(), np.ravel(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_latent_that_is_not_finite_has_no_score_and_the_others_keep_theirs(bad):
    x_NCHW = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    head = LatentHead(random_head(3))
    expected = head.score(x_NCHW)
    x_NCHW[1, 0, 2, 2] = bad
    score_N = head.score(x_NCHW)
    assert score_N.isnan().tolist() == [False, True, False]
    assert torch.equal(score_N[[0, 2]], expected[[0, 2]]) and score_N.dtype == torch.float64


# --- training and folders ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent")
    settings = TrainingSettings(members=2, label_noise=0.0)
    pairs = write_example(folder, 60)
    return folder / "head", train_reward_model(
        pairs, folder / "head", settings, load_latent=lambda: LatentBackbone("discs", pooled)
    )


def test_it_learns_from_pairs_and_ranks_latents(trained):
    folder, result = trained
    assert result["backbone"] == LATENT and result["held_out"]["accuracy"] > 0.8
    pictures = []
    y, x = np.mgrid[0:64, 0:64]
    for red in (0, 80, 160, 240):
        disc = np.hypot(x - 30, y - 34) < 10
        pictures.append(Image.fromarray(np.where(disc[..., None], (red, 80, 80), (230, 230, 230)).astype(np.uint8)))
    score_N = load_latent_head(folder, pooled).score(pooled(pictures))
    assert score_N.tolist() == sorted(score_N.tolist())


def test_a_head_is_refused_for_another_autoencoder(trained):
    with pytest.raises(ValueError, match="was trained on latents of discs, and this model's autoencoder is another"):
        load_latent_head(trained[0], negative)
    with pytest.raises(ValueError, match="autoencoder is another"):
        load_latent_head(trained[0], lambda pictures: pooled(pictures)[:, :2])


def test_a_head_is_no_reward_of_pictures(trained):
    with pytest.raises(ValueError, match="scores the latents of a model, not pictures"):
        load_reward_model(trained[0])
    with pytest.raises(Refusal, match="is a latent reward head, which sees no pictures"):
        load_reward(RewardTerm("reward_model", model=str(trained[0])))


def test_a_reward_model_of_pictures_is_no_head(tmp_path):
    model = RewardModel(LatentBackbone("discs", pooled), random_head(3))
    save_reward_model(model, "shapes", {}, tmp_path / "taste")
    with pytest.raises(ValueError, match="is a reward model of pictures; train a latent reward head with"):
        load_latent_head(tmp_path / "taste", pooled)


def test_the_command_trains_a_head_of_a_model(tmp_path, tiny_sd3, tiny_policy, capsys):
    pairs = write_example(tmp_path, 12)
    command = ["reward-model", "train", str(pairs), "--out", str(tmp_path / "head"), "--held-out", "0"]
    assert main([*command, "--latent", str(tiny_sd3), "--members", "1", "--label-noise", "0"]) == 0
    assert "latent" in capsys.readouterr().out
    policy = tiny_policy()
    head = load_latent_head(tmp_path / "head", policy.encode_pictures)
    assert head.score(torch.randn(2, *policy.latent_shape)).isfinite().all()
    assert main([*command, "--latent", str(tiny_sd3), "--lora-rank", "2"]) != 0
    assert "leave --backbone and --lora-rank out" in capsys.readouterr().err


# --- previews ---------------------------------------------------------------------------------------------------------


def test_a_head_decides_who_is_pruned_and_nothing_is_decoded(tiny_policy, tiny_config, redness, prompts_of):
    policy, head = tiny_policy(), LatentHead(random_head(4))
    assert policy.latent_shape[0] == 4
    sampling = sampling_from(tiny_config(), policy, "transitions", 0)
    projections = []

    def keep(step, batch):
        if step == 1:
            projections.append(sampling.process.x0(step, batch.x_NCHW, batch.output_NCHW))

    sampler = Sampler(
        policy,
        mixture_of_one(FunctionReward(redness)),
        sampling,
        Plan(5, (PrunePoint(1, 2),)),
        lambda scores_PG, keep, present_PG, seeds_P: best(scores_PG, keep),
        latent_reward=head,
        observe=keep,
    )
    meter = Meter()
    rolled = rollout(sampler, prompts_of("red cat"), torch.tensor([0]), NoiseKey(3, 1), meter)
    (preview,) = rolled.previews
    expected = head.score(projections[0])
    assert torch.equal(preview.scores_N, expected)
    assert rolled.trajectories.member_N.tolist() == sorted(expected.topk(2).indices.tolist())
    assert meter.cost == Cost(nfe=2 * 5 + 2 * 2, decodes=2, reward_calls=2, probed=5)


def best(scores_PG, keep):
    from progrpo.rollout.prune import Selection

    indices_PK = scores_PG.topk(keep).indices.sort().values
    return Selection(indices_PK, torch.ones_like(indices_PK, dtype=torch.bool))


@pytest.mark.parametrize("keep_groups", [None, 1])
def test_a_run_counts_its_rankings_and_audits_them(tiny_policy, tiny_trainer, tiny_config, tmp_path, keep_groups):
    policy = tiny_policy()
    folder = save_random_head(policy, tmp_path / "head")
    config = tiny_config(
        preview=PreviewSettings(latent_reward=str(folder)),
        plan=PlanSettings("custom", group_size=4, prune=((1, 3),), keep_groups=keep_groups),
        audit=AuditSettings(every=1),
    )
    check(config)
    trainer = tiny_trainer(config, policy)
    done = trainer.step()
    assert trainer.totals.counted == trainer.totals.predicted == trainer.predicted()
    assert trainer.totals.counted.probed == 2 * 4 and trainer.totals.counted.previews == 0
    assert trainer.totals.audited == Cost(nfe=16, decodes=20, reward_calls=20, previews=16, probed=16)
    audit = done.audit
    assert audit is not None and not torch.equal(audit.used_TG, audit.scores_TG)
    assert done.record["preview/rank_correlation@1"] == audit.used_agreement()[1]


def test_keeping_everyone_with_a_head_is_plain_grpo_bit_for_bit(tiny_policy, tiny_trainer, tiny_config, tmp_path):
    folder = save_random_head(tiny_policy(), tmp_path / "head")
    plain = tiny_config(plan=PlanSettings("custom", group_size=4))
    keeps_all = replace(
        plain,
        plan=PlanSettings("custom", group_size=4, prune=((1, 4),)),
        preview=PreviewSettings(latent_reward=str(folder)),
    )
    trainers = [tiny_trainer(config) for config in (plain, keeps_all)]
    for _ in range(2):
        for trainer in trainers:
            trainer.step()
    states = [trainer.state_dict()["policy"]["current"] for trainer in trainers]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_run_with_a_head_of_another_model_is_refused(trained, tiny_trainer, tiny_config):
    with pytest.raises(ValueError, match=r"preview\.latent_reward: .* was trained on latents of discs"):
        tiny_trainer(tiny_config(preview=PreviewSettings(latent_reward=str(trained[0]))))


@pytest.mark.parametrize(
    ("preview", "message"),
    [
        (PreviewSettings(latent_reward="head", probe=True), "preview.probe must be false for preview.latent_reward"),
        (PreviewSettings(latent_reward="head", ode_steps=2), "preview.ode_steps must be 1 for preview.latent_reward"),
        (PreviewSettings(latent_reward="head", decoder="tiny"), "preview.decoder must be full for"),
    ],
)
def test_settings_without_effect_beside_a_head_are_refused(tiny_config, preview, message):
    with pytest.raises(ValueError, match=message):
        check(tiny_config(preview=preview, audit=AuditSettings(every=1)))


def test_a_run_keeps_the_folder_as_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "head").mkdir()
    config = config_from_json('{"preview": {"latent_reward": "head"}}')
    assert with_absolute_paths(config).preview.latent_reward == str(tmp_path / "head")


# --- a user's own -----------------------------------------------------------------------------------------------------

OWN = """
seen = []

def loud(x0, texts):
    seen.extend(texts)
    return x0.float().square().mean((1, 2, 3))

class Loud:
    def score(self, x0, texts):
        return loud(x0, texts).tolist()

class Unmade:
    def __init__(self):
        raise OSError("no weights")

def of_all(x0, texts):
    return 1.0

def broken(x0, texts):
    return x0.no_such_method()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_latents.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_latents", None)


@pytest.mark.parametrize("name", ["loud", "Loud"])
def test_ones_own_latent_reward_ranks_with_the_texts(own, tiny_policy, name):
    reward = latent_reward(PreviewSettings(latent_reward=f"my_latents:{name}"), tiny_policy())
    assert reward is not None
    x0_NCHW = torch.arange(48.0).view(3, 4, 2, 2)
    x0_NCHW[1] = math.nan
    scores = reward.score(x0_NCHW, [Prompt("a"), Prompt("b"), Prompt("c")])
    expected = x0_NCHW.square().mean((1, 2, 3)).double()
    torch.testing.assert_close(scores, expected, equal_nan=True)
    assert scores.dtype == torch.float64
    assert sys.modules["my_latents"].seen == ["a", "b", "c"]


def test_a_run_ranks_by_ones_own_latent_reward(own, tiny_trainer, tiny_config):
    config = tiny_config(
        preview=PreviewSettings(latent_reward="my_latents:loud"),
        plan=PlanSettings("custom", group_size=4, prune=((1, 3),)),
    )
    check(config)
    trainer = tiny_trainer(config)
    trainer.step()
    assert trainer.totals.counted == trainer.totals.predicted
    assert trainer.totals.counted.probed == 2 * 4 and trainer.totals.counted.previews == 0
    seen = sys.modules["my_latents"].seen
    assert len(seen) == 8 and seen[:4] == [seen[0]] * 4 and seen[4:] == [seen[4]] * 4  # each row has its group's text


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("my_latents:lous", "'my_latents:lous': the module 'my_latents' has no function or class 'lous'"),
        ("no_such_module:f", "'no_such_module:f': there is no module 'no_such_module'"),
        ("my_latents:seen", r"'my_latents:seen' must be a function of latents and texts, not \[\]$"),
        ("my_latents:Unmade", "'my_latents:Unmade': my_latents.py, line 14: OSError: no weights$"),
    ],
)
def test_a_name_of_nothing_is_refused(own, tiny_policy, name, problem):
    with pytest.raises(ValueError, match=f"^preview.latent_reward {problem}"):
        latent_reward(PreviewSettings(latent_reward=name), tiny_policy())


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("of_all", r"it gave the shape \(\) for 2 latents; return one number each$"),
        ("broken", "my_latents.py, line 20: AttributeError: 'Tensor' object has no attribute 'no_such_method'$"),
    ],
)
def test_an_answer_that_is_no_score_each_is_refused(own, tiny_policy, name, problem):
    reward = latent_reward(PreviewSettings(latent_reward=f"my_latents:{name}"), tiny_policy())
    assert reward is not None
    with pytest.raises(ValueError, match=f"^preview.latent_reward 'my_latents:{name}': {problem}"):
        reward.score(torch.zeros(2, 4, 2, 2), [Prompt("a"), Prompt("b")])


def test_a_function_is_not_asked_about_nothing(own, tiny_policy):
    """As in a process all of whose groups were stopped."""
    reward = latent_reward(PreviewSettings(latent_reward="my_latents:broken"), tiny_policy())
    assert reward is not None and reward.score(torch.zeros(0, 4, 2, 2), []).shape == (0,)
