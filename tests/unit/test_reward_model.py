"""Reward models on the built-in backbone and on a CLIP: training from a file, their folders, their rewards."""

import base64
import json
import string
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from progrpo.preferences.pairs import Pair, PairsError, write_pairs
from progrpo.preferences.reward_model.clip import ClipBackbone
from progrpo.preferences.reward_model.evaluation import evaluate_pairs
from progrpo.preferences.reward_model.model import load_reward_model, read_description
from progrpo.preferences.reward_model.shapes import _KINDS, _WORDS, ShapesBackbone, layout, target_counts, word_counts
from progrpo.preferences.reward_model.training import TrainingSettings, train_reward_model
from progrpo.preferences.reward_model.tuning import TuningSettings, tune
from progrpo.rewards.base import Refusal
from progrpo.rewards.load import load_reward
from progrpo.rewards.mixture import load_mixture
from progrpo.rewards.server import make_app
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt
from progrpo.zoo.networks import to_tensor
from progrpo.zoo.shapes import world
from progrpo.zoo.shapes.taste import taste
from progrpo.zoo.splits import SPLITS

PROMPTS, PICTURES = world.examples("train", 160, seed=1)
TEST_PROMPTS, TEST_PICTURES = world.examples("test", 24, seed=2)


def write_example(folder, count=80, pictures=PICTURES, prompts=PROMPTS, prefer=taste):
    """A pairs file of `count` pairs, whose second picture is another prompt's."""
    values = prefer(pictures)
    pairs = []
    for i in range(0, 2 * count, 2):
        for row in (i, i + 1):
            Image.fromarray(pictures[row]).save(folder / f"{row}.png")
        pairs.append(Pair(prompts[i], folder / f"{i}.png", folder / f"{i + 1}.png", float(values[i] > values[i + 1])))
    write_pairs(folder / "pairs.jsonl", pairs)
    return pairs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    pairs = write_example(folder)
    result = train_reward_model(folder / "pairs.jsonl", folder / "taste", TrainingSettings(members=3, label_noise=0.0))
    return folder / "taste", pairs, result


def rewards_of(folder, name="reward_model", pictures=TEST_PICTURES, prompts=TEST_PROMPTS):
    return [s.value for s in load_reward(RewardTerm(name, model=str(folder))).score(pictures, prompts)]


def test_it_learns_a_taste_from_few_pairs(trained):
    folder, _, result = trained
    assert result["backbone"] == "shapes"
    assert result["pairs"] + result["held_out"]["pairs"] == 80
    assert result["held_out"]["accuracy"] > 0.7
    assert result["cross_validated"]["pairs"] == result["pairs"]
    assert np.corrcoef(rewards_of(folder), taste(TEST_PICTURES))[0, 1] > 0.6


def test_a_loaded_model_scores_bit_for_bit_alike(trained, tmp_path):
    folder, pairs, result = trained
    train_reward_model(folder.parent / "pairs.jsonl", tmp_path / "again", TrainingSettings(members=3, label_noise=0.0))
    first, second = (load_reward_model(f) for f in (folder, tmp_path / "again"))
    scores = [m.scores(list(TEST_PICTURES), TEST_PROMPTS) for m in (first, second)]
    assert torch.equal(*scores)
    assert evaluate_pairs(first, pairs) == evaluate_pairs(second, pairs)
    assert read_description(folder).sha256 == read_description(tmp_path / "again").sha256
    assert read_description(folder).facts["measured"]["held_out"]["accuracy"] == result["held_out"]["accuracy"]


def test_the_reward_is_the_mean_and_the_other_one_the_variance(trained):
    scores_KN = load_reward_model(trained[0]).scores(list(TEST_PICTURES), TEST_PROMPTS)
    assert rewards_of(trained[0]) == pytest.approx(scores_KN.mean(0).tolist(), abs=1e-12)
    assert rewards_of(trained[0], "reward_model_variance") == pytest.approx(scores_KN.var(0).tolist(), abs=1e-12)


def test_both_terms_use_one_network_once_for_the_same_pictures(trained, monkeypatch):
    calls = []
    features = ShapesBackbone.features

    def counted(self, pictures, prompts):
        calls.append(len(pictures))
        return features(self, pictures, prompts)

    monkeypatch.setattr(ShapesBackbone, "features", counted)
    model = str(trained[0])
    terms = (RewardTerm("reward_model", model=model), RewardTerm("reward_model_variance", -1.0, model=model))
    mixture = load_mixture(terms, frames=1)
    pictures = TEST_PICTURES[::-1].copy()  # such that no other test has asked for them
    result = mixture.score(pictures, TEST_PROMPTS, torch.zeros(24, dtype=torch.int64))
    assert calls == [24]
    assert torch.allclose(result.value_N, result.rewards_NR[:, 0] - result.rewards_NR[:, 1])
    mixture.score(TEST_PICTURES, TEST_PROMPTS, torch.zeros(24, dtype=torch.int64))
    assert calls == [24, 24]


def test_a_cache_tells_one_training_from_another(trained, tmp_path):
    pairs = write_example(tmp_path, prefer=lambda pictures: [-value for value in taste(pictures)])
    folder = tmp_path / "model"
    values = []
    for source in (trained[0].parent / "pairs.jsonl", tmp_path / "pairs.jsonl"):
        train_reward_model(source, folder, TrainingSettings(members=2, label_noise=0.0))
        term = RewardTerm("reward_model", model=str(folder), cache=str(tmp_path / "cache"))
        scores = load_mixture([term], 1).score(TEST_PICTURES, TEST_PROMPTS, torch.zeros(24, dtype=torch.int64))
        values.append(scores.value_N)
    assert len(pairs) == 80
    assert np.corrcoef(values[0].numpy(), values[1].numpy())[0, 1] < -0.5


def test_it_is_served(trained):
    term = RewardTerm("reward_model", model=str(trained[0]))
    png = BytesIO()
    Image.fromarray(TEST_PICTURES[0]).save(png, "PNG")
    item = {"png": base64.b64encode(png.getvalue()).decode(), "prompt": TEST_PROMPTS[0].text}
    with TestClient(make_app(term, load_reward(term))) as client:
        answer = client.post("/v1/score", json={"version": 1, "items": [item]}).json()
    assert answer["scores"][0]["value"] == pytest.approx(rewards_of(trained[0])[0], abs=1e-5)


# --- what is refused --------------------------------------------------------------------------------------------------


def refusal(folder, name="reward_model"):
    with pytest.raises(Refusal) as caught:
        rewards_of(folder, name)
    return str(caught.value)


def test_folders_that_are_no_reward_model_are_refused(trained, tmp_path):
    assert "needs the folder" in refusal("")
    assert "is no reward model" in refusal(tmp_path)
    assert "is no reward model" in refusal(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("reward_model.json", lambda text: text[: len(text) // 2]),
        ("reward_model.json", lambda text: text.replace(b'"format": 1', b'"format": 99')),
        ("reward_model.json", lambda text: b"[]"),
        ("head.safetensors", lambda content: content[:-1]),
        ("head.safetensors", lambda content: None),
    ],
)
def test_damaged_folders_are_refused(trained, tmp_path, file, change):
    for path in trained[0].iterdir():
        content = path.read_bytes() if path.name != file else change(path.read_bytes())
        if content is not None:
            (tmp_path / path.name).write_bytes(content)
    assert f"is damaged, at its {file}" in refusal(tmp_path)


def test_a_single_member_has_no_variance(trained, tmp_path):
    train_reward_model(
        trained[0].parent / "pairs.jsonl", tmp_path / "one", TrainingSettings(members=1, label_noise=0.0)
    )
    assert len(rewards_of(tmp_path / "one")) == 24
    assert "a variance needs two" in refusal(tmp_path / "one", "reward_model_variance")


def test_the_built_in_backbone_wants_pictures_of_its_size(trained):
    reward = load_reward(RewardTerm("reward_model", model=str(trained[0])))
    with pytest.raises(Refusal, match="64x64 pixels, not 32x32"):
        reward.score(np.zeros((2, 32, 32, 3), np.uint8), TEST_PROMPTS[:2])


def test_pairs_of_another_world_need_a_named_backbone(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    write_example(tmp_path, 20, pictures, prefer=lambda p: p.mean((1, 2, 3)))
    for backbone, message in (("auto", "name a CLIP with --backbone"), ("shapes", "is 32x32, not 64x64")):
        with pytest.raises(ValueError, match=message):
            train_reward_model(tmp_path / "pairs.jsonl", tmp_path / "out", TrainingSettings(backbone))
    write_example(tmp_path, 20, prompts=[Prompt("a dog")] * 40)
    with pytest.raises(ValueError, match="'a dog' is none of its prompts"):
        train_reward_model(tmp_path / "pairs.jsonl", tmp_path / "out", TrainingSettings())


def test_nothing_is_trained_on_a_file_with_faults_or_over_another_folder(trained, tmp_path):
    pairs = write_example(tmp_path, 20)
    (tmp_path / "3.png").unlink()
    (tmp_path / "8.png").write_bytes(b"no picture")
    with pytest.raises(PairsError, match=r"(?s)line 2: .*line 5: "):
        train_reward_model(tmp_path / "pairs.jsonl", tmp_path / "out", TrainingSettings())
    assert not (tmp_path / "out").exists()
    good = trained[0].parent / "pairs.jsonl"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no reward model; name another folder"):
        train_reward_model(good, tmp_path / "notes", TrainingSettings())
    with pytest.raises(PairsError, match="line 2"):
        train_reward_model(good, tmp_path / "out", TrainingSettings(held_out=tmp_path / "pairs.jsonl"))
    write_pairs(tmp_path / "few.jsonl", pairs[2:4] + pairs[5:8])
    with pytest.raises(ValueError, match="10 are needed"):
        train_reward_model(tmp_path / "few.jsonl", tmp_path / "out", TrainingSettings(held_out=0.0))


def test_words_are_counted_in_singular():
    names = ["red", "circle", "cross", "three", "left"]
    counts = word_counts([Prompt("three red circles"), Prompt("a Red cross left of a red circle"), Prompt("a dog")])
    rows = counts[:, [_WORDS.index(name) for name in names]]
    assert rows.tolist() == [[1, 1, 0, 1, 0], [2, 1, 1, 0, 1], [0, 0, 0, 0, 0]]


def test_objects_that_a_prompt_names_are_those_of_the_world():
    for split in SPLITS:
        for prompts in world.prompts(split).values():
            for prompt, row in zip(prompts, target_counts(prompts).tolist(), strict=True):
                kinds = [kind for pair in prompt.columns["objects"] for kind in pair if kind]
                assert row == [kinds.count(kind) for kind in _KINDS]


def test_layout_of_a_drawn_square():
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[16:32, 40:56] = (255, 0, 0)
    area, log_area, x, y, distance, root, _, *colour = layout(to_tensor(picture[None]))[0].tolist()
    assert area == pytest.approx(1 / 16)
    assert log_area == pytest.approx(np.log(1 / 16), abs=0.02)
    assert (x, y) == (pytest.approx(0.5, abs=0.02), pytest.approx(-0.25, abs=0.02))
    assert (distance, root) == (pytest.approx(x * x + y * y, abs=1e-6), pytest.approx(np.hypot(x, y), abs=1e-6))
    assert colour == pytest.approx([1, 0, 0], abs=0.02)
    assert layout(to_tensor(np.full((1, 64, 64, 3), 255, np.uint8))).isfinite().all()


# --- on a CLIP --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of random weights, as a folder of the hub's layout."""
    folder = tmp_path_factory.mktemp("clip")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 54, "bos_token_id": 52, "eos_token_id": 53, **tower}
    vision = {"image_size": 32, "patch_size": 8, **tower}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, initializer_factor=4.0)
        CLIPModel(config).save_pretrained(folder)
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    words = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip-pairs")
    return folder / "pairs.jsonl", write_example(folder, 30, prefer=lambda pictures: pictures[..., 0].mean((1, 2)))


def test_a_clips_features_are_its_directions_their_product_and_its_cosine(clip_folder):
    features = ClipBackbone.from_hub(str(clip_folder)).features(list(TEST_PICTURES), TEST_PROMPTS)
    picture_ND, product_ND = features.blocks
    assert torch.allclose(picture_ND.norm(dim=1), torch.ones(24))
    clipscore: Any = load_reward(RewardTerm("clipscore", model=str(clip_folder)))
    cosines = clipscore._loaded().cosines(TEST_PICTURES, [p.text for p in TEST_PROMPTS])
    assert features.prior_N is not None
    assert features.prior_N.tolist() == pytest.approx(cosines, abs=1e-6)
    assert torch.allclose(product_ND.sum(1), features.prior_N, atol=1e-6)


def test_a_frozen_clip_and_one_with_a_lora_are_saved_and_loaded(clip_folder, clip_pairs, tmp_path):
    for rank in (0, 2):
        out = tmp_path / f"rank-{rank}"
        settings = TrainingSettings(str(clip_folder), lora_rank=rank, members=2, label_noise=0.0)
        result = train_reward_model(clip_pairs[0], out, settings)
        assert result["held_out"]["pairs"] + result["pairs"] == 30
        description = read_description(out)
        assert (description.lora, description.backbone) == (rank > 0, str(clip_folder))
        loaded = load_reward_model(out)
        held_out = evaluate_pairs(loaded, clip_pairs[1])
        assert 0 <= held_out["accuracy"] <= 1
        assert len(set(rewards_of(out))) > 1
    assert (tmp_path / "rank-2" / "lora.safetensors").is_file()


def test_a_lora_moves_and_the_loss_falls(clip_folder, clip_pairs):
    backbone = ClipBackbone.from_hub(str(clip_folder))
    frozen = {name: p.clone() for name, p in backbone.model.named_parameters()}
    before = backbone.features(list(TEST_PICTURES), TEST_PROMPTS)
    tuned = tune(backbone, clip_pairs[1], TuningSettings(rank=2, epochs=3, lr=3e-3), lambda line: None)
    assert min(tuned.losses) < tuned.losses[0]
    assert 0 < int(tuned.judged_M.sum()) < 20
    assert any(float(t.abs().max()) > 0 for name, t in backbone.lora().items() if "lora_B" in name)
    names = {name.replace(".base_layer", ""): p for name, p in backbone.model.named_parameters() if "lora_" not in name}
    assert all(torch.equal(names[name], frozen[name]) for name in frozen)
    after = backbone.features(list(TEST_PICTURES), TEST_PROMPTS)
    assert not torch.equal(before.blocks[0], after.blocks[0])
    twin = ClipBackbone.from_hub(str(clip_folder))
    twin.load_lora(backbone.lora())
    assert torch.equal(twin.features(list(TEST_PICTURES), TEST_PROMPTS).blocks[0], after.blocks[0])


def test_a_lora_of_another_network_is_refused(clip_folder):
    backbone = ClipBackbone.from_hub(str(clip_folder))
    with pytest.raises(ValueError, match="of another CLIP"):
        backbone.load_lora({"a.lora_A.weight": torch.zeros(2, 32)})
    with pytest.raises(ValueError, match="takes no LoRA"):
        ShapesBackbone().load_lora({})


def test_a_lora_is_for_clips(trained, tmp_path):
    with pytest.raises(ValueError, match="a LoRA tunes a CLIP"):
        train_reward_model(trained[0].parent / "pairs.jsonl", tmp_path / "out", TrainingSettings(lora_rank=4))
