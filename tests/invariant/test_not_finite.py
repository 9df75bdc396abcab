"""Pictures that are not finite are missing: no reward sees them and nothing is learnt of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

import progrpo
from progrpo.cli import main
from progrpo.config import AuditSettings, ModelSettings, PreviewSettings
from progrpo.policies.base import PolicyContext
from progrpo.policies.load import policy_from_pipeline
from progrpo.rewards.base import Reward, Score
from progrpo.rewards.function import FunctionReward
from progrpo.rewards.mixture import Component, RewardMixture
from progrpo.rewards.settings import RewardTerm
from progrpo.rollout.preview import decoded
from progrpo.rollout.probe import Probe, ProbeExample
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sampling import ode
from progrpo.training.checks import check_failures
from progrpo.training.errors import MissingScoresError, SelfCheckError
from progrpo.training.evaluate import Measures, evaluate
from progrpo.types import Prompt
from tests.support.rewards import mixture_of_one

WEIGHT = "pytorch_lora_weights.safetensors"


@torch.no_grad()
def overflowing(pipeline):
    """A pipeline whose decoder is within float32 and not within float16."""
    pipeline.vae.decoder.conv_in.weight.mul_(1e7)
    return pipeline


def broken(pipeline, denoiser="transformer"):
    """A pipeline whose network says NaN, while all its weights are finite."""
    forward = getattr(pipeline, denoiser).forward
    getattr(pipeline, denoiser).forward = lambda *args, **named: (forward(*args, **named)[0] * torch.nan,)
    return pipeline


def loses(policy, monkeypatch, rows, way="decode"):
    """Have the policy's decoder lose the pictures of such rows of each call."""
    decode = getattr(policy, way)

    def lost(x0):
        made = decode(x0)
        there_N = torch.tensor([i not in rows for i in range(len(x0))])
        return replace(made, there_N=there_N, fault="the decoder gave no finite numbers")

    monkeypatch.setattr(policy, way, lost)


# --- decoders ---------------------------------------------------------------------------------------------------------


def test_a_picture_that_is_not_finite_is_none_and_the_others_are_what_they_were(tiny_policy):
    policy = tiny_policy()
    x0 = torch.randn(4, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    whole, bad = policy.decode(x0), x0.clone()
    assert whole.there_N.all() and not whole.fault
    bad[1, 0, 0, 0], bad[3, 0, 2, 2] = torch.nan, torch.inf
    made = decoded(policy, bad, 3)
    assert made.there_N.tolist() == [True, False, True, False]
    assert torch.equal(made.images_NHWC[[0, 2]], decoded(policy, x0, 3).images_NHWC[[0, 2]])
    assert made.images_NHWC[[1, 3]].unique().numel() == 1  # the same on every processor
    assert made.fault.startswith("the transformer gave no finite numbers (in float32)")


@pytest.mark.usefixtures("family")
def test_every_familys_decoder_says_what_is_none(family, tiny_policy):
    policy = tiny_policy(folder=family)
    x0 = torch.zeros(2, *policy.latent_shape)
    x0[1] = torch.nan
    made = policy.decode(x0)
    assert made.there_N.tolist() == [True, False] and policy.denoiser_name in made.fault
    assert made.images_NHWC.dtype == torch.uint8 and len(made.images_NHWC) == 2


def test_a_decoder_that_overflows_is_named_with_the_dtype(tiny_pipeline):
    settings = ModelSettings(resolution=16, max_sequence_length=8, dtype="float16", lora_rank=2)
    policy = policy_from_pipeline(overflowing(tiny_pipeline()), replace(settings, dtype="float32"))
    x0 = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    assert policy.decode(x0).there_N.all()
    pipeline = tiny_pipeline()
    with torch.no_grad():  # its weights fit
        pipeline.vae.decoder.conv_in.weight.mul_(3e4 / pipeline.vae.decoder.conv_in.weight.abs().max())
    made = policy_from_pipeline(pipeline, settings).decode(30 * x0)
    assert not made.there_N.any()
    assert made.fault == (
        "the decoder gave no finite numbers; in float16 they end at 65,504: take model.dtype bfloat16 or float32"
    )


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_no_reward_sees_it_and_its_scores_are_missing_and_counted():
    seen = []

    class Noting(Reward):
        def score(self, pictures_NHWC, prompts):
            seen.append([p.text for p in prompts])
            return [Score(float(p.text), True) for p in prompts]

    gated = Component(RewardTerm("gated", needs="plain", at_least=2.0), Noting())
    mixture = RewardMixture([Component(RewardTerm("plain"), Noting()), gated])
    prompts = [Prompt(str(i)) for i in range(4)]
    there_N = torch.tensor([True, False, True, True])
    scores = mixture.score(np.zeros((4, 2, 2, 3), np.uint8), prompts, torch.zeros(4, dtype=torch.int64), there_N, "why")
    assert seen == [["0", "2", "3"], ["2", "3"]]
    np.testing.assert_array_equal(scores.value_N, [0, np.nan, 4, 6])
    np.testing.assert_array_equal(scores.passed_N, [1, np.nan, 1, 1])
    failures = mixture.failures()
    assert (failures.pictures, failures.lost, failures.fault, failures.last_error) == (4, 1, "why", "why")
    assert failures.missing == {"plain": 1, "gated": 1} and mixture.failures().lost == 0
    check_failures([failures], 0.25, "now")
    with pytest.raises(
        MissingScoresError, match=r"^now: 1 of 4 pictures are missing \(reward.max_missing allows 20%\): why$"
    ):
        check_failures([failures], 0.2, "now")


def test_what_is_learnt_is_what_the_pictures_that_are_there_teach(tiny_trainer, tiny_config, monkeypatch):
    """As if the reward itself had failed for those: see test_faults for what that is."""
    config = tiny_config(plan=replace(tiny_config().plan, prune=()))
    trainer = tiny_trainer(config)
    loses(trainer.policy, monkeypatch, {1, 6})
    record = trainer.step().record
    calls = []

    def failing(images, prompts):
        calls.append(len(images))
        return [
            None if i in (1, 6) else float(np.asarray(image)[..., 0].mean()) / 255 for i, image in enumerate(images)
        ]

    other = tiny_trainer(config, reward=failing)
    expected = other.step().record
    for name, weight in trainer.policy.trainable.items():
        assert torch.equal(weight, other.policy.trainable[name])
    assert record["reward/missing"] == expected["reward/missing"] == 2 and record["rollout/missing_pictures"] == 2
    assert record["reward/mean"] == expected["reward/mean"] and trainer.totals.lost == 2
    state = trainer.state_dict()
    other.load_state_dict(state)
    assert other.totals.lost == 2 and other.totals.fault == "the decoder gave no finite numbers"


@pytest.mark.parametrize("way", ["decode", "preview"])
def test_a_member_without_a_preview_goes_first(tiny_trainer, tiny_config, tiny_pipeline, monkeypatch, tmp_path, way):
    config = tiny_config(
        plan=replace(tiny_config().plan, prune=((1, 2),)),
        preview=PreviewSettings(decoder="tiny" if way == "preview" else "full"),
    )
    tiny = AutoencoderTiny(
        latent_channels=4,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        upsampling_scaling_factor=2,
    )
    tiny.save_pretrained(tmp_path)
    settings = ModelSettings(resolution=16, max_sequence_length=8, lora_rank=2)
    context = PolicyContext(decoder_for_previews=str(tmp_path))
    trainer = tiny_trainer(config, policy_from_pipeline(tiny_pipeline(), settings, context))
    loses(trainer.policy, monkeypatch, {0, 2, 5, 7}, way)
    rolled = trainer.step().rollout
    assert len(rolled.previews) == 1 and rolled.trajectories.group_N.tolist() == [0, 0, 1, 1]
    assert rolled.trajectories.member_N.tolist() == [1, 3, 0, 2]


def test_a_probe_is_neither_taught_nor_asked_by_it():
    generator = torch.Generator().manual_seed(0)
    seen, rewards = torch.randn(3, 6, 4, 4, 4, generator=generator).half(), torch.arange(6.0)
    text, none = torch.randn(5, 8, generator=generator).half(), torch.full((3, 6), torch.nan)
    probe = Probe(3)
    probe.learn([ProbeExample(seen, text, rewards, none)])
    features, group_N = seen[1].clone(), torch.zeros(6, dtype=torch.int64)
    features[2, 0, 0, 0] = torch.nan
    there = [0, 1, 3, 4, 5]
    scores_N = probe.score(1, features, text[None], group_N)
    assert scores_N[2].isnan() and torch.equal(
        scores_N[there], probe.score(1, features[there], text[None], group_N[there])
    )
    assert scores_N[there].isfinite().all()


# --- runs -------------------------------------------------------------------------------------------------------------


def run(pipeline, config, redness, prompts, out):
    return progrpo.train(pipeline, prompts, redness, config=config, out=out)


@pytest.mark.parametrize("part", ["decoder", "transformer"])
def test_a_model_that_gives_no_picture_stops_at_its_first_evaluation(
    tiny_pipeline, tiny_config, redness, prompts, tmp_path, part
):
    pipeline = tiny_pipeline()
    if part == "decoder":
        pipeline.vae.decoder.conv_out.forward = lambda x: torch.full_like(x[:, :3], torch.inf)
    else:
        broken(pipeline)
    seen = []

    def noting(images, prompts):
        seen.extend(images)
        return redness(images, prompts)

    with pytest.raises(
        MissingScoresError, match=rf"evaluation after 0 iterations: 3 of 3 pictures are missing .*the {part}"
    ):
        run(pipeline, tiny_config(), noting, prompts, tmp_path / "run")
    assert seen == []
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert part in summary["status"] and summary["missing_pictures"] == 3


def test_an_evaluation_without_some_pictures_is_of_the_others(tiny_policy, monkeypatch, redness):
    from progrpo.training.distributed import Ranks

    policy = tiny_policy()
    asked: list[str] = []

    class Judge:
        def passes(self, pictures_NHWC, prompts):
            asked.extend(p.text for p in prompts)
            return [True] * len(prompts)

    def measured():
        reward, held_out = mixture_of_one(FunctionReward(redness)), mixture_of_one(FunctionReward(redness), "other")
        prompts = [Prompt(text) for text in ("red cat", "blue dog", "green bird")]
        sampler = Sampler(policy, reward, ode(policy, 2, 1.0, 64))
        return evaluate(sampler, prompts, 0, Ranks(), Measures(Judge(), held_out, diverse=2))

    whole = measured()
    asked.clear()
    loses(policy, monkeypatch, {1, 4, 5, 6})
    partial = measured()
    assert asked == ["red cat", "green bird"]
    fewer = {"diversity": partial.records[0]["diversity"]}  # of three pictures where it was of four
    assert fewer["diversity"] > 0
    assert partial.records[0] == whole.records[0] | fewer and partial.records[2] == whole.records[2]
    nothing = {"graded": None, "strict": None, "judge": None, "sharpness": None, "saturation": None, "diversity": None}
    assert partial.records[1] == whole.records[1] | nothing | {"held_out": {"other": None}}


def test_an_audit_goes_on_without_them(tiny_trainer, tiny_config, monkeypatch):
    trainer = tiny_trainer(tiny_config(audit=AuditSettings(every=1)))
    loses(trainer.policy, monkeypatch, {1})
    done = trainer.step()
    assert (
        done.audit.final_G.isnan().tolist() == done.audit.scores_TG[0].isnan().tolist() == [False, True, False, False]
    )


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["lora", "full"])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_3"])
def test_a_weight_that_is_not_finite_is_named_before_anything_is_drawn(
    tiny_pipeline, tiny_config, redness, prompts, tmp_path, part, weights
):
    pipeline = tiny_pipeline()
    name, weight = list(getattr(pipeline, part).named_parameters())[-1]
    with torch.no_grad():
        weight.view(-1)[0] = torch.nan
    config = tiny_config(model=replace(tiny_config().model, weights=weights))
    with pytest.raises(
        ValueError, match=rf"^model.path: the {part}'s {name} has numbers that are not finite, .*; give another$"
    ):
        run(pipeline, config, redness, prompts, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_so_is_one_that_a_narrower_dtype_or_an_int8_scale_cannot_hold(tiny_pipeline):
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.transformer.proj_out.weight[0, 0] = 1e6
    settings = ModelSettings(resolution=16, max_sequence_length=8, lora_rank=2, dtype="float16")
    with pytest.raises(ValueError, match=r"proj_out\.weight .*or another model\.dtype if it is finite there$"):
        policy_from_pipeline(pipeline, settings)
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.transformer.transformer_blocks[0].attn.to_q.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"transformer's transformer_blocks\.0\.attn\.to_q\..*scale has numbers"):
        policy_from_pipeline(pipeline, replace(settings, dtype="float32", quantize="int8"))


@pytest.fixture(scope="module")
def trained(tiny_pipeline, tiny_config, redness, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    config = tiny_config(iterations=1)
    return run(tiny_pipeline(), config, redness, prompts, out).path / "lora"


@pytest.fixture
def nan_lora(trained, tmp_path):
    """The LoRA of another trainer whose loss was NaN."""
    (tmp_path / "bad").mkdir()
    tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(trained / WEIGHT).items()}
    save_file(tensors, tmp_path / "bad" / WEIGHT)
    return tmp_path / "bad"


def test_a_lora_that_is_not_finite_is_refused(nan_lora, tiny_pipeline, tiny_config, redness, prompts, tmp_path):
    config = tiny_config(model=ModelSettings(max_sequence_length=8, lora=str(nan_lora)))
    with pytest.raises(ValueError, match=r"LoRA .*bad: its .* has numbers that are not finite"):
        run(tiny_pipeline(), config, redness, prompts, tmp_path / "run")


def test_the_command_line_writes_no_black_picture(nan_lora, tiny_sd3, tmp_path, capsys):
    out = str(tmp_path / "out")
    words = [
        "sample",
        str(tiny_sd3),
        "--lora",
        str(nan_lora),
        "--prompt",
        "x",
        "--num-inference-steps",
        "2",
        "--out",
        out,
    ]
    assert main(words) == 2
    assert "not finite" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_sampling_keeps_what_is_there_and_says_what_is_not(tiny_sd3, tmp_path, monkeypatch):
    from progrpo.policies.pipeline import PipelinePolicy
    from progrpo.training.sample import sample_pictures
    from progrpo.training.trained_model import ModelChoice

    decode = PipelinePolicy.decode

    def lost(self, x0):
        made = decode(self, x0)
        return replace(made, there_N=torch.arange(len(x0)) != 1, fault="the decoder gave no finite numbers")

    monkeypatch.setattr(PipelinePolicy, "decode", lost)
    with pytest.raises(SelfCheckError, match=r"^1 of 3 pictures are missing: the decoder .*; the others are in "):
        prompts, given = [Prompt("a"), Prompt("b"), Prompt("c")], {"num_inference_steps": 1, "seed": 0}
        sample_pictures(ModelChoice(str(tiny_sd3)), prompts, tmp_path / "out", 1, given)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["000-00.png", "002-00.png", "samples.jsonl"]


# --- conditions and weights -------------------------------------------------------------------------------------------


def test_a_text_that_a_dtype_cannot_hold_is_refused_before_anything_is_drawn(tiny_pipeline):
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.text_encoder_3.encoder.final_layer_norm.weight.mul_(1e6)
    settings = ModelSettings(resolution=16, max_sequence_length=8, lora_rank=2)
    policy_from_pipeline(pipeline, settings).encode([Prompt("red cat")])
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.text_encoder_3.encoder.final_layer_norm.weight.mul_(1e6)
    policy = policy_from_pipeline(pipeline, replace(settings, dtype="float16"))
    with pytest.raises(ValueError, match=r"what 'red cat' is encoded as \(prompt_embeds\) is not finite in float16"):
        policy.encode([Prompt("red cat")])


def test_weights_that_training_made_not_finite_end_it_before_they_are_saved(tiny_trainer, tiny_config, monkeypatch):
    trainer = tiny_trainer(tiny_config())
    trainer.step()
    step = trainer.learner.updater.optimizer.step

    def diverging():
        step()
        next(iter(trainer.policy.trainable.values())).data.view(-1)[0] = torch.nan

    monkeypatch.setattr(trainer.learner.updater.optimizer, "step", diverging)
    with pytest.raises(SelfCheckError, match=r"^iteration 2: a trained weight is no longer finite; lower optim\.lr$"):
        trainer.step()
