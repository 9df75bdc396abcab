"""The rewards on CLIPs of random weights: against the published formulas, and against open_clip's network."""

import hashlib
import json
import math
import os
import pickle
import re
import string
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

import progrpo
from progrpo.rewards import hpsv2, pickscore
from progrpo.rewards.aesthetic import Aesthetic
from progrpo.rewards.base import Refusal
from progrpo.rewards.clip import VIT_H, VIT_L, build_head, center_crop
from progrpo.rewards.clipscore import CLIPScore
from progrpo.rewards.hpsv2 import CHECKPOINT, HPSv2, convert_clip, convert_weights, infer_config, pad_to_square
from progrpo.rewards.hub import LazyReward, place, read_pickle
from progrpo.rewards.pickscore import PickScore
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

LETTERS = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
VOCABULARY = {
    token: i for i, token in enumerate([*LETTERS, "<|startoftext|>", "<|endoftext|>"])
}  # the end last, as CLIP's
LENGTH = 24

TEXTS = ["red cat", "a dog", "birds", "a longer text than the tower reads"] * 5
PROMPTS = [Prompt(f"{text} {letter}") for text, letter in zip(TEXTS, string.ascii_lowercase, strict=False)]
assert len(PROMPTS) > RewardTerm("clipscore").network_batch_size
SHAPES = {"square": (40, 40), "tall": (45, 30), "wide": (21, 50), "odd": (40, 27), "large": (300, 224)}


def pictures(shape: tuple[int, int], count: int = len(PROMPTS)) -> np.ndarray:
    """Smooth, so that the way they are resized counts as little as in a photograph, and each of other colours."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize(shape[::-1], Image.Resampling.BICUBIC)) for c in coarse])


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=VOCABULARY, merges=[])


def ids(texts: list[str], padding: int) -> torch.Tensor:
    """By hand: the start, the letters of each word with its last one marked, the end, and padding."""
    rows = []
    for text in texts:
        letters = [letter for word in text.lower().split() for letter in (*word[:-1], f"{word[-1]}</w>")][: LENGTH - 2]
        row = [VOCABULARY[token] for token in ("<|startoftext|>", *letters, "<|endoftext|>")]
        rows.append(row + [padding] * (LENGTH - len(row)))
    return torch.tensor(rows)


def normalised(picture: Image.Image) -> torch.Tensor:
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((torch.tensor(np.asarray(picture)) / 255 - mean) / std).permute(2, 0, 1)


def values(scores):
    assert all(type(s.value) is float and s.passed is None for s in scores)
    return [s.value for s in scores]


def differ(numbers):
    assert np.std(numbers) > 0.02 * max(abs(n) for n in numbers)
    return numbers


# --- PickScore --------------------------------------------------------------------------------------------------------


def small_clip(side: int = 224, seed: int = 0, **text) -> CLIPModel:
    both = {"num_attention_heads": 16, "num_hidden_layers": 2, "hidden_act": "gelu", "initializer_factor": 4.0}
    both["projection_dim"] = 24
    text = {"vocab_size": 54, "max_position_embeddings": LENGTH, "bos_token_id": 52, "eos_token_id": 53, **text}
    vision = {"hidden_size": 48, "intermediate_size": 96, "patch_size": 56, "image_size": side}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(
            CLIPConfig(
                text_config={"hidden_size": 32, "intermediate_size": 64, **both, **text},
                vision_config={**vision, **both},
                projection_dim=24,
                logit_scale_init_value=3.3,
            )
        )
    return model


def cropped(picture: np.ndarray, side: int = 224) -> torch.Tensor:
    """By hand what CLIP's processor does: the shorter side resized, and the middle of the other."""
    height, width = picture.shape[:2]
    shape = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    left, top = (shape[0] - side) // 2, (shape[1] - side) // 2
    resized = Image.fromarray(picture).resize(shape, Image.Resampling.BICUBIC)
    return normalised(resized.crop((left, top, left + side, top + side)))


@torch.no_grad()
def cosines(model: CLIPModel, pictures_NHWC: np.ndarray, texts: list[str], side: int = 224) -> list[float]:
    """The lines of PickScore's model card, a pair at a time."""
    similarities = []
    for picture, text in zip(pictures_NHWC, texts, strict=True):
        image_embs = model.get_image_features(cropped(picture, side)[None]).pooler_output
        image_embs = image_embs / torch.norm(image_embs, dim=-1, keepdim=True)
        text_embs = model.get_text_features(ids([text], VOCABULARY["<|endoftext|>"])).pooler_output
        text_embs = text_embs / torch.norm(text_embs, dim=-1, keepdim=True)
        similarities.append(float((text_embs @ image_embs.T)[0]))
    return similarities


def published_pickscore(model: CLIPModel, pictures_NHWC: np.ndarray, texts: list[str]) -> list[float]:
    return [model.logit_scale.exp().item() * cosine / 26 for cosine in cosines(model, pictures_NHWC, texts)]


@pytest.mark.parametrize("shape", SHAPES)
def test_pickscore_is_the_published_formula(shape):
    drawn, model = pictures(SHAPES[shape]), small_clip()
    expected = differ(published_pickscore(model, drawn, [p.text for p in PROMPTS]))
    scores = PickScore(model, tokenizer(), CLIPImageProcessorPil()).score(drawn, PROMPTS)
    assert values(scores) == pytest.approx(expected, abs=1e-5)


def test_pickscore_reads_texts_as_the_old_configuration_of_clip_does():
    drawn, model = pictures((40, 40)), small_clip()
    old = small_clip(eos_token_id=2)  # transformers then takes the highest id for the end
    old.load_state_dict(model.state_dict())
    scores = [values(PickScore(m, tokenizer(), CLIPImageProcessorPil()).score(drawn, PROMPTS)) for m in (model, old)]
    assert scores[0] == scores[1]


# --- CLIPScore --------------------------------------------------------------------------------------------------------


def published_clipscore(model: CLIPModel, pictures_NHWC: np.ndarray, texts: list[str], side: int = 224) -> list[float]:
    similarities = cosines(model, pictures_NHWC, [f"A photo depicts {text}" for text in texts], side)
    return [2.5 * cosine if cosine > 0 else 0.0 for cosine in similarities]


@pytest.mark.parametrize("shape", SHAPES)
def test_clipscore_is_the_published_formula(shape):
    drawn, texts = pictures(SHAPES[shape]), [p.text for p in PROMPTS]
    turned, model = small_clip(), small_clip()
    turned.text_projection.weight.data.neg_()
    expected = [published_clipscore(m, drawn, texts) for m in (model, turned)]
    assert sum(score == 0.0 for score in (*expected[0], *expected[1])) == len(
        texts
    )  # what one clips the other does not
    differ(expected[0] if any(expected[0]) else expected[1])
    for clip, reference in zip((model, turned), expected, strict=True):
        scores = CLIPScore(clip, tokenizer(), CLIPImageProcessorPil()).score(drawn, PROMPTS)
        assert values(scores) == pytest.approx(reference, abs=1e-5)


def save_clip(folder: Path, model: CLIPModel, side: int = 224) -> None:
    """With all of its repository's files that a reward reads."""
    model.save_pretrained(folder)
    crop = {"height": side, "width": side}
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop).save_pretrained(folder)
    save_tokenizer(folder)


def save_tokenizer(folder: Path) -> None:
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def test_clipscore_of_another_clip_in_a_folder_with_its_own_resolution(tmp_path):
    drawn, model = pictures((40, 60)), small_clip(side=112)
    save_clip(tmp_path, model, side=112)
    reward = CLIPScore.from_hub(RewardTerm("clipscore", device="cpu", model=str(tmp_path)))
    expected = differ(published_clipscore(model, drawn, [p.text for p in PROMPTS], side=112))
    assert values(reward.score(drawn, PROMPTS)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("lacking", ["vocab.json", "preprocessor_config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_of_a_clip_is_refused(tmp_path, lacking):
    save_clip(tmp_path, small_clip())
    (tmp_path / lacking).unlink()
    with pytest.raises(Refusal, match=rf"^reward 'clipscore': there is no cached copy of {tmp_path}, and.*{lacking}"):
        CLIPScore.from_hub(RewardTerm("clipscore", device="cpu", model=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "what"), [("model.safetensors", "weights of"), ("vocab.json", "vocab.json and merges.txt of")]
)
def test_a_file_of_a_clip_that_was_cut_is_refused(tmp_path, name, what):
    save_clip(tmp_path, small_clip())
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
    with pytest.raises(
        Refusal, match=rf"^reward 'clipscore': the {what} {tmp_path} are damaged \(.*; fetch them anew$"
    ):
        CLIPScore.from_hub(RewardTerm("clipscore", device="cpu", model=str(tmp_path)))


@pytest.mark.parametrize("change", [lambda w: {}, lambda w: {"text_projection.weight": w[:-1].clone()}])
def test_weights_that_lack_or_do_not_fit_are_not_made_up(tmp_path, change):
    save_clip(tmp_path, small_clip())
    weights = load_file(tmp_path / "model.safetensors")
    changed = change(weights.pop("text_projection.weight"))
    save_file({**weights, **changed}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        Refusal, match=rf"^reward 'clipscore': {tmp_path} is no CLIPModel, it has no text_projection.weight"
    ):
        CLIPScore.from_hub(RewardTerm("clipscore", device="cpu", model=str(tmp_path)))


# --- LAION's aesthetic predictor --------------------------------------------------------------------------------------


class PublishedHead(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        sizes, drops = (width, 32, 16, 8, 4, 1), (0.2, 0.2, 0.1, None, None)
        layers = []
        for i, drop in enumerate(drops):
            layers += [nn.Linear(sizes[i], sizes[i + 1])] + ([nn.Dropout(drop)] if drop else [])
        self.layers = nn.Sequential(*layers)
        generator = torch.Generator().manual_seed(2)
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0.0, 0.5, generator=generator)


def published_aesthetic(model: CLIPModel, head: PublishedHead, pictures_NHWC: np.ndarray) -> list[float]:
    with torch.no_grad():
        features = model.get_image_features(torch.stack([cropped(p) for p in pictures_NHWC])).pooler_output
        return head.eval().layers(features / features.square().sum(1, keepdim=True).sqrt()).squeeze(1).tolist()


def vision_of(model: CLIPModel) -> CLIPVisionModelWithProjection:
    vision = CLIPVisionModelWithProjection(model.config.vision_config)
    vision.load_state_dict(model.state_dict(), strict=False)
    return vision


@pytest.mark.parametrize("shape", SHAPES)
def test_the_aesthetic_predictor_is_the_published_network_through_a_checkpoint(shape, tmp_path):
    drawn, model, head = pictures(SHAPES[shape]), small_clip(), PublishedHead()
    assert list(head.state_dict()) == [f"layers.{i}.{kind}" for i in (0, 2, 4, 6, 7) for kind in ("weight", "bias")]
    expected = differ(published_aesthetic(model, head, drawn))
    state = read_pickle("aesthetic", *checkpoint(tmp_path, head.state_dict()))
    reward = Aesthetic(vision_of(model), build_head(state), CLIPImageProcessorPil())
    assert values(reward.score(drawn, PROMPTS)) == pytest.approx(expected, abs=1e-5)


def test_the_aesthetic_predictor_does_not_read_prompts():
    drawn, reward = pictures((40, 40)), aesthetic()
    assert reward.score(drawn, PROMPTS) == reward.score(drawn, PROMPTS[::-1])


# --- HPSv2: open_clip's network, written anew in torch ----------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = (
            ("c_fc", nn.Linear(width, ratio * width)),
            ("gelu", nn.GELU()),
            ("c_proj", nn.Linear(ratio * width, width)),
        )
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, ratio) for _ in range(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, ratio: int, patch: int, output: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((224 // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, ratio)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, output))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.conv1(pixels).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(
        self,
        text: tuple[int, int, int] = (32, 2, 4),
        vision: tuple[int, int, int] = (48, 3, 8),
        patch: int = 56,
        output: int = 24,
        vocabulary: int = len(VOCABULARY),
        length: int = LENGTH,
        ratios: tuple[int, int] = (2, 3),
    ) -> None:
        """Of each tower: width, layers, heads."""
        super().__init__()
        self.visual = Visual(*vision, ratios[1], patch, output)
        self.transformer = Transformer(*text, ratios[0])
        self.token_embedding = nn.Embedding(vocabulary, text[0])
        self.positional_embedding = nn.Parameter(torch.empty(length, text[0]))
        self.ln_final = nn.LayerNorm(text[0])
        self.text_projection = nn.Parameter(torch.empty(text[0], output))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def encode_text(self, texts: torch.Tensor) -> torch.Tensor:
        x = self.token_embedding(texts) + self.positional_embedding
        mask = torch.full((texts.shape[1], texts.shape[1]), -math.inf).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), texts.argmax(-1)] @ self.text_projection

    @torch.no_grad()
    def score(self, pixels: torch.Tensor, texts: torch.Tensor) -> list[float]:
        image_features, text_features = F.normalize(self.visual(pixels)), F.normalize(self.encode_text(texts))
        return (image_features @ text_features.T).diag().tolist()


def open_clip(**sizes) -> OpenClip:
    model = OpenClip(**sizes)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        centre = 1.0 if name.endswith("weight") and ".ln_" in f".{name}" else 0.0
        nn.init.normal_(parameter, centre, 0.3, generator=generator)  # biases and layer norms too: nothing hides
    return model.eval()


def published_pixels(pictures_NHWC: np.ndarray) -> torch.Tensor:
    """The longer side to 224, and black around the shorter one."""
    rows = []
    for picture in pictures_NHWC:
        scale = 224 / max(picture.shape[:2])
        height, width = (round(scale * side) for side in picture.shape[:2])
        resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
        square = Image.new("RGB", (224, 224))
        square.paste(
            resized, ((224 - width) // 2, (224 - height) // 2)
        )  # the published padding: floor, and the rest after
        rows.append(normalised(square))
    return torch.stack(rows)


def checkpoint(folder: Path, state: object, name: str = CHECKPOINT) -> tuple[Path, str]:
    path = folder / name
    torch.save(state, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("shape", SHAPES)
def test_hpsv2_is_open_clips_network_through_a_checkpoint(shape, tmp_path):
    drawn, model = pictures(SHAPES[shape]), open_clip()
    expected = differ(model.score(published_pixels(drawn), ids([p.text for p in PROMPTS], padding=0)))
    state = read_pickle("hpsv2", *checkpoint(tmp_path, {"epoch": 1, "state_dict": model.state_dict()}))["state_dict"]
    converted = convert_clip(state, text_heads=4, vision_heads=8)
    scores = HPSv2(converted, tokenizer(), CLIPImageProcessorPil()).score(drawn, PROMPTS)
    assert values(scores) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("extra", "before"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (7, 4), (9, 4)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_middle_is_torchvisions(extra, before, turned):
    """Numbers of its CenterCrop, which rounds half of the rest to an even number."""
    drawn = np.random.default_rng(0).integers(0, 256, (224, 224 + extra, 3), np.uint8)
    middle = center_crop(drawn.transpose(1, 0, 2) if turned else drawn, 224)
    assert np.array_equal(middle.transpose(1, 0, 2) if turned else middle, drawn[:, before : before + 224])


@pytest.mark.parametrize(("height", "before", "after"), [(50, 56, 56), (97, 3, 4), (99, 1, 1), (98, 2, 2), (100, 0, 0)])
@pytest.mark.parametrize("turned", [False, True])
def test_hpsv2_has_the_odd_row_of_black_at_the_end(height, before, after, turned):
    """Numbers of the published code's padding, pad // 2 first and pad - pad // 2 last, for a side of 224."""
    white = np.full((height, 100, 3), 255, np.uint8)
    square = pad_to_square(white.transpose(1, 0, 2) if turned else white, 224)
    rows = (square.transpose(1, 0, 2) if turned else square)[..., 0]
    assert square.shape == (224, 224, 3)
    assert not rows[:before].any() and not rows[224 - after :].any() and (rows[before : 224 - after] == 255).all()


def test_a_vit_h_of_open_clip_is_one_of_transformers():
    with torch.device("meta"):
        state = OpenClip(
            (1024, 24, 16), (1280, 32, 16), 14, 1024, vocabulary=49408, length=77, ratios=(4, 4)
        ).state_dict()
        model = CLIPModel(infer_config(state))
    assert {n: w.shape for n, w in convert_weights(state).items()} == {
        n: w.shape for n, w in model.state_dict().items()
    }
    assert sum(p.numel() for p in model.parameters()) == 986_109_441  # 986.11 million, says open_clip's table of models
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.hidden_size, text.num_attention_heads, text.eos_token_id) == (1024, 16, 49407)
    assert (vision.hidden_size, vision.num_attention_heads, vision.image_size) == (1280, 16, 224)


def test_a_checkpoint_of_another_checksum_is_refused(tmp_path):
    path, sha256 = checkpoint(tmp_path, {"state_dict": open_clip().state_dict()})
    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(Refusal, match=rf"^reward 'hpsv2': .*{CHECKPOINT} is damaged.* not {sha256}; delete it, and"):
        read_pickle("hpsv2", path, sha256)


class Mischief:
    def __reduce__(self):
        return Path.touch, (Path("mischief"),)


def test_a_checkpoint_of_more_than_tensors_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        Refusal, match=r"^reward 'hpsv2': .* is damaged, or holds more than tensors; delete it"
    ) as refusal:
        read_pickle("hpsv2", *checkpoint(tmp_path, {"state_dict": {}, "more": Mischief()}))
    assert isinstance(refusal.value.__cause__, pickle.UnpicklingError)
    assert not Path("mischief").exists()


# --- what all of them do ----------------------------------------------------------------------------------------------


def aesthetic(**settings) -> Aesthetic:
    head = build_head(PublishedHead().state_dict())
    return Aesthetic(vision_of(small_clip()), head, CLIPImageProcessorPil(), **settings)


def cosine_reward(kind, **settings):
    return kind(small_clip(), tokenizer(), CLIPImageProcessorPil(), **settings)


MAKERS: dict[str, Callable[..., Any]] = {
    kind.__name__: partial(cosine_reward, kind) for kind in (PickScore, HPSv2, CLIPScore)
}
MAKERS["Aesthetic"] = aesthetic


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.fixture
def reward(make):
    return make()


def test_no_pictures_no_scores(reward):
    assert reward.score(pictures((40, 40))[:0], []) == []


def test_features_without_a_direction_are_a_missing_score(reward):
    reward._model.visual_projection.weight.zero_()
    scores = reward.score(pictures((40, 40), 2), PROMPTS[:2])
    assert len(scores) == 2
    assert all(math.isnan(s.value) and math.isnan(s.number()) for s in scores)


@pytest.mark.parametrize("batch_size", [1, 7, len(PROMPTS)])
def test_the_size_of_a_batch_changes_nothing_but_rounding(make, batch_size):
    drawn = pictures((40, 40))
    assert values(make(batch_size=batch_size).score(drawn, PROMPTS)) == pytest.approx(
        values(make().score(drawn, PROMPTS)), abs=1e-5
    )


def test_weights_are_frozen_and_dropout_is_off(reward):
    assert not any(p.requires_grad for p in reward._model.parameters())
    assert not any(module.training for module in reward._model.modules())


def test_a_reward_is_loaded_once_and_late():
    loaded = []

    class Small(PickScore):
        @classmethod
        def from_hub(cls, term):
            loaded.append(PickScore(small_clip(), tokenizer(), CLIPImageProcessorPil()))
            return loaded[-1]

    late, drawn = LazyReward(Small, RewardTerm("pickscore")), pictures((40, 40), 2)
    assert loaded == []
    scores = late.score(drawn, PROMPTS[:2])
    assert late.score(drawn, PROMPTS[:2]) == scores == loaded[0].score(drawn, PROMPTS[:2])
    assert len(loaded) == 1


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_network_is_placed_as_the_settings_say(dtype, expected):
    model = place(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), RewardTerm("clipscore", device="cpu", dtype=dtype))
    assert {p.dtype for p in model.parameters()} == {expected}
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(Refusal, match="device cuda:1: there is no GPU here; leave it out or say cpu"):
        place(nn.Linear(2, 2), RewardTerm("clipscore", device="cuda:1"))


# --- from the hub's cache, without a network --------------------------------------------------------------------------

SCRIPT = """
import importlib, json, shutil, sys
from pathlib import Path
import progrpo.rewards.load as load
early = "transformers" in sys.modules
import numpy as np
from progrpo.rewards.base import Refusal
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt
told, pictures = json.loads(sys.argv[1]), np.load(sys.argv[2])
prompts = [Prompt(text) for text in told["texts"]]
def say(name, model=""):
    reward = load.load_reward(RewardTerm(name, model=model))
    try:
        return [s.value for s in reward.score(pictures, prompts)]
    except Refusal as error:
        return str(error)
for module, constants in told["constants"].items():
    vars(importlib.import_module(f"progrpo.rewards.{module}")).update(constants)
names = ["pickscore", "hpsv2", "clipscore", "aesthetic"]
found = {"early": early, "whole": {name: say(name) for name in names}, "other": say("clipscore", "some/clip")}
for path in map(Path, told["broken"]):
    path.unlink()
    path.with_name("other").exists() and path.with_name("other").rename(path)
found["broken"] = {name: say(name) for name in names}
shutil.rmtree(told["hub"])
found["empty"] = {name: say(name) for name in names}
print(json.dumps(found))
"""


def cached(cache: Path, repository: str, revision: str) -> Path:
    """The folder of a repository's files at a commit in the hub's cache."""
    snapshot = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    return snapshot


def as_main(cache: Path, repository: str, revision: str) -> None:
    refs = cache / f"models--{repository.replace('/', '--')}" / "refs"
    refs.mkdir()
    (refs / "main").write_text(revision)


OFFLINE_HUB = r"the Hugging Face hub \([^()]*HF_HUB_OFFLINE is set, so it was not asked[^()]*\)"
NOWHERE = "http://127.0.0.1:9/head%2Bof-linear-layers.pth"


@pytest.mark.slow
def test_from_the_cache_without_a_network(tmp_path):
    drawn, texts = pictures((40, 40), 3), TEXTS[:3]
    pick, clip, other, head = small_clip(), small_clip(seed=1), small_clip(side=112), PublishedHead()
    hps = open_clip(text=(32, 2, 16), vision=(48, 3, 16)).half().float()
    hub, torch_hub = tmp_path / "hub", tmp_path / "torch" / "hub" / "checkpoints"
    pick.save_pretrained(cached(hub, pickscore.MODEL, pickscore.REVISION))
    save_tokenizer(words := cached(hub, *VIT_H))
    state = {"state_dict": {name: w.half() for name, w in hps.state_dict().items()}}
    published, sha256 = checkpoint(cached(hub, hpsv2.REPOSITORY, hpsv2.REVISION), state)
    checkpoint(published.parent, {"state_dict": {}}, "other")
    save_clip(cached(hub, *VIT_L), clip)
    save_clip(cached(hub, "some/clip", "0" * 40), other, side=112)
    as_main(hub, "some/clip", "0" * 40)
    torch_hub.mkdir(parents=True)
    head_file, head_sha256 = checkpoint(torch_hub, head.state_dict(), "head+of-linear-layers.pth")

    np.save(tmp_path / "pictures.npy", drawn)
    constants = {"hpsv2": {"SHA256": sha256}, "aesthetic": {"URL": NOWHERE, "SHA256": head_sha256}}
    broken = [str(words / "merges.txt"), str(published), str(head_file)]
    inputs = {"texts": texts, "constants": constants, "broken": broken, "hub": str(hub)}
    places = {"HF_HUB_CACHE": str(hub), "TORCH_HOME": str(tmp_path / "torch"), "HF_HUB_OFFLINE": "1"}
    places |= {
        "PYTHONPATH": str(Path(progrpo.__file__).parents[1]),
        "NO_PROXY": "127.0.0.1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", SCRIPT, json.dumps(inputs), str(tmp_path / "pictures.npy")]
    done = subprocess.run(command, env={**os.environ, **places}, check=True, capture_output=True, text=True)
    outputs = json.loads(done.stdout.splitlines()[-1])

    assert not outputs["early"]
    whole, broken, empty = outputs["whole"], outputs["broken"], outputs["empty"]
    assert whole["pickscore"] == pytest.approx(published_pickscore(pick, drawn, texts), abs=1e-5)
    assert whole["hpsv2"] == pytest.approx(hps.score(published_pixels(drawn), ids(texts, 0)), abs=1e-5)
    assert whole["clipscore"] == pytest.approx(published_clipscore(clip, drawn, texts), abs=1e-5)
    assert whole["aesthetic"] == pytest.approx(published_aesthetic(clip, head, drawn), abs=1e-5)
    assert outputs["other"] == pytest.approx(published_clipscore(other, drawn, texts, side=112), abs=1e-5)

    assert re.match(lacks("pickscore", VIT_H[0]), broken["pickscore"])
    assert f"{published} is damaged, its sha256 is " in broken["hpsv2"]
    assert broken["hpsv2"].endswith(f" and not {sha256}; delete it, and it is fetched anew")
    assert broken["clipscore"] == whole["clipscore"]
    assert re.match(lacks("aesthetic", head_file, re.escape(NOWHERE)), broken["aesthetic"])

    repositories = {"pickscore": pickscore.MODEL, "hpsv2": hpsv2.REPOSITORY}
    for name, refusal in empty.items():
        assert re.match(lacks(name, repositories.get(name, VIT_L[0])), refusal)
        assert "\n" not in refusal


def lacks(name: str, what: str | Path, source: str = OFFLINE_HUB) -> str:
    """The pattern of a refusal."""
    return f"reward {name!r}: there is no cached copy of {re.escape(str(what))}, and {source} did not give one: "
