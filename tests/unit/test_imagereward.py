"""ImageReward against its published network, written anew in torch, through a checkpoint of the published names."""

# mypy: disable-error-code="arg-type, index, operator, union-attr"
# (torch says of a module's parts that each is a tensor or a module)

import hashlib
import json
import math
import os
import string
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import BlipTextModel, BlipVisionModel, CLIPImageProcessorPil

import progrpo
from progrpo.rewards.clip import build_head
from progrpo.rewards.hub import read_pickle
from progrpo.rewards.imagereward import (
    FILE,
    VOCABULARY,
    ImageReward,
    blip_tokenizer,
    convert_networks,
    infer_text_config,
    infer_vision_config,
    split_weights,
)
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

LETTERS = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
WORDS = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS])}
ADDED = {"[DEC]": len(WORDS), "[ENC]": len(WORDS) + 1}

LONG = "a text of so many letters that not all of them are read"
TEXTS = ["Réd cat", "a dog", LONG, "birds [ENC] of a tree", "", "a %", "an [DEC]"] * 3
PROMPTS = [Prompt(f"{text} {letter}") for text, letter in zip(TEXTS, string.ascii_lowercase, strict=False)]
assert len(PROMPTS) > RewardTerm("imagereward").network_batch_size
SHAPES = {"square": (40, 40), "tall": (46, 30), "wide": (21, 50), "large": (300, 224), "odd": (224, 227)}


def pictures(shape: tuple[int, int], count: int = len(PROMPTS)) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize(shape[::-1], Image.Resampling.BICUBIC)) for c in coarse])


def published_pixels(picture: np.ndarray) -> torch.Tensor:
    """The published preprocessing: the shorter side to 224, torchvision's middle of the other, CLIP's mean and std."""
    height, width = picture.shape[:2]
    shape = (224, int(224 * height / width)) if width <= height else (int(224 * width / height), 224)
    left, top = (round((length - 224) / 2.0) for length in shape)
    made = Image.fromarray(picture).resize(shape, Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((torch.tensor(np.asarray(made)) / 255 - mean) / std).permute(2, 0, 1)


def ids(text: str) -> list[int]:
    """By hand, of 35 at most: the start, each word's letters, of which all but the first continue it, and the end."""
    tokens = []
    for word in text.split():
        if word in ADDED:
            tokens.append(ADDED[word])
        elif word == "%":
            tokens.append(WORDS["[UNK]"])
        else:
            plain = word.lower().replace("é", "e")
            tokens += [WORDS[plain[0]], *(WORDS[f"##{letter}"] for letter in plain[1:])]
    return [WORDS["[CLS]"], *tokens[:33], WORDS["[SEP]"]]


# --- the published network --------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """Modules and parameters under the published names."""

    def __init__(self, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Of one example: softmax(q k' / sqrt(width of a head)) v, head by head."""
    parts = zip(*(t.chunk(heads, dim=-1) for t in (q, k, v)), strict=True)
    return torch.cat([(a @ b.T / math.sqrt(a.shape[-1])).softmax(-1) @ c for a, b, c in parts], dim=-1)


class VisionBlock(nn.Module):
    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Holder(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width))
        self.mlp = Holder(fc1=nn.Linear(width, ratio * width), fc2=nn.Linear(ratio * width, width))

    def forward(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        q, k, v = self.attn.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.attn.proj(attend(q, k, v, heads))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class Vision(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, patch: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, (224 // patch) ** 2 + 1, width))
        self.patch_embed = Holder(proj=nn.Conv2d(3, width, patch, stride=patch))
        self.blocks = nn.ModuleList(VisionBlock(width, ratio) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.cls_token[0], self.patch_embed.proj(pixels[None])[0].flatten(1).T]) + self.pos_embed[0]
        for block in self.blocks:
            x = block(x, self.heads)
        return self.norm(x)


class Attention(nn.Module):
    def __init__(self, width: int, source: int) -> None:
        super().__init__()
        self.self = Holder(query=nn.Linear(width, width), key=nn.Linear(source, width), value=nn.Linear(source, width))
        self.output = Holder(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))

    def forward(self, x: torch.Tensor, source: torch.Tensor, heads: int) -> torch.Tensor:
        y = attend(self.self.query(x), self.self.key(source), self.self.value(source), heads)
        return self.output.LayerNorm(self.output.dense(y) + x)


class TextLayer(nn.Module):
    def __init__(self, width: int, source: int, ratio: int) -> None:
        super().__init__()
        self.attention, self.crossattention = Attention(width, width), Attention(width, source)
        self.intermediate = Holder(dense=nn.Linear(width, ratio * width))
        self.output = Holder(dense=nn.Linear(ratio * width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12))

    def forward(self, x: torch.Tensor, picture: torch.Tensor, heads: int) -> torch.Tensor:
        x = self.crossattention(self.attention(x, x, heads), picture, heads)
        return self.output.LayerNorm(self.output.dense(F.gelu(self.intermediate.dense(x))) + x)


class Text(nn.Module):
    def __init__(
        self, width: int, layers: int, heads: int, source: int, ratio: int, vocabulary: int, length: int
    ) -> None:
        super().__init__()
        self.heads = heads
        self.embeddings = Holder(
            word_embeddings=nn.Embedding(vocabulary, width),
            position_embeddings=nn.Embedding(length, width),
            LayerNorm=nn.LayerNorm(width, eps=1e-12),
        )
        self.embeddings.register_buffer("position_ids", torch.arange(length)[None])
        self.encoder = Holder(layer=nn.ModuleList(TextLayer(width, source, ratio) for _ in range(layers)))

    def forward(self, tokens: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        parts = self.embeddings
        x = parts.LayerNorm(parts.word_embeddings(tokens) + parts.position_embeddings.weight[: len(tokens)])
        for layer in self.encoder.layer:
            x = layer(x, picture, self.heads)
        return x


class Published(nn.Module):
    def __init__(
        self,
        vision: tuple[int, int, int] = (24, 3, 4),
        text: tuple[int, int, int] = (16, 2, 2),
        patch: int = 56,
        ratios: tuple[int, int] = (2, 3),
        vocabulary: int = len(WORDS) + len(ADDED),
        length: int = 40,
        head: tuple[int, ...] = (12, 8, 6, 4, 1),
        projection: int = 8,
    ) -> None:
        """Of each tower: width, layers, heads."""
        super().__init__()
        self.blip = Holder(
            visual_encoder=Vision(*vision, patch, ratios[0]),
            text_encoder=Text(*text, vision[0], ratios[1], vocabulary, length),
            vision_proj=nn.Linear(vision[0], projection),
            text_proj=nn.Linear(text[0], projection),
        )
        sizes = zip((text[0], *head), head, strict=False)
        drops = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]
        first, second, third, fourth, fifth = (nn.Linear(*size) for size in sizes)
        self.mlp = Holder(layers=nn.Sequential(first, drops[0], second, drops[1], third, drops[2], fourth, fifth))

    @torch.no_grad()
    def score(self, picture: np.ndarray, text: str) -> float:
        seen = self.blip.visual_encoder(published_pixels(picture))
        reward = self.mlp.layers(self.blip.text_encoder(torch.tensor(ids(text)), seen)[0])
        return ((reward - 0.16717362830052426) / 1.0333394966054072).item()


def published(**sizes: tuple[int, int, int]) -> Published:
    model, generator = Published(**sizes), torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        centre = 1.0 if name.endswith("weight") and "norm" in name.lower() else 0.0
        nn.init.normal_(parameter, centre, 0.3, generator=generator)  # biases and layer norms too: nothing hides
    vision = model.blip.visual_encoder
    for parameter in (vision.cls_token, vision.pos_embed, *vision.patch_embed.parameters()):
        parameter.data *= 0.01  # so small that the epsilon of the first norm counts
    return model.eval()


def checkpoint(folder: Path, model: Published) -> tuple[Path, str]:
    torch.save(model.state_dict(), folder / FILE[1])
    return folder / FILE[1], hashlib.sha256((folder / FILE[1]).read_bytes()).hexdigest()


def reward_of(state: dict[str, torch.Tensor], **settings: int) -> ImageReward:
    return ImageReward(*convert_networks(state, 4, 2), blip_tokenizer(WORDS), CLIPImageProcessorPil(), **settings)


def values(scores) -> list[float]:
    assert all(type(s.value) is float and s.passed is None for s in scores)
    return [s.value for s in scores]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_published_network_through_a_checkpoint(shape, tmp_path):
    drawn, model = pictures(SHAPES[shape]), published()
    expected = [model.score(picture, prompt.text) for picture, prompt in zip(drawn, PROMPTS, strict=True)]
    assert np.std(expected) > 0.02 * max(abs(r) for r in expected)
    scores = reward_of(read_pickle("imagereward", *checkpoint(tmp_path, model))).score(drawn, PROMPTS)
    assert values(scores) == pytest.approx(expected, abs=2e-5)


def test_both_the_picture_and_the_text_count():
    drawn, reward = pictures((40, 40), 3), reward_of(published().state_dict())
    one, others = values(reward.score(drawn, PROMPTS[:3])), values(reward.score(drawn, PROMPTS[3:6]))
    assert len({*one, *others, *values(reward.score(drawn[::-1], PROMPTS[:3]))}) == 8  # the one in the middle twice


@pytest.mark.parametrize("batch_size", [1, 7, len(PROMPTS)])
def test_the_size_of_a_batch_changes_nothing_but_rounding(batch_size):
    drawn, state = pictures((40, 40)), published().state_dict()
    scores = [values(r.score(drawn, PROMPTS)) for r in (reward_of(state), reward_of(state, batch_size=batch_size))]
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)


def test_no_pictures_no_scores():
    assert reward_of(published().state_dict()).score(pictures((40, 40))[:0], []) == []


@pytest.mark.parametrize(
    "name", ["blip.visual_encoder.norm.bias", "blip.text_encoder.encoder.layer.1.output.dense.bias"]
)
def test_a_checkpoint_that_lacks_a_weight_is_not_filled_up_with_random_ones(name):
    state = published().state_dict()
    del state[name]
    with pytest.raises(AssertionError, match="missing_keys"):
        convert_networks(state, 4, 2)


def test_the_published_sizes_are_those_of_the_published_file():
    with torch.device("meta"):
        sizes = {"vision": (1024, 24, 16), "text": (768, 12, 12), "patch": 16, "ratios": (4, 4), "length": 512}
        rest = {"vocabulary": 30524, "head": (1024, 128, 64, 16, 1), "projection": 256}
        state = Published(**sizes, **rest).state_dict()
        parts = split_weights(state)
        vision, text = BlipVisionModel(infer_vision_config(parts[0])), BlipTextModel(infer_text_config(parts[1]), False)
        models = vision, text, build_head(parts[2])
    for model, weights in zip(models, parts, strict=True):
        expected = {name.removeprefix("layers."): weight.shape for name, weight in weights.items()}
        assert {name: weight.shape for name, weight in model.state_dict().items()} == expected
    heads = vision.config.num_attention_heads, text.config.num_attention_heads
    assert (*heads, vision.config.image_size, text.config.vocab_size) == (16, 12, 224, 30524)
    stored = sum(w.numel() * w.element_size() for w in state.values())
    assert 0 < 1_786_880_927 - stored < 300_000  # what the hub says of the file, and the names in it


# --- from the hub's cache ---------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, sys
import numpy as np
from progrpo.rewards.base import Refusal
from progrpo.rewards.load import load_reward
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt
drawn, blob, link = sys.argv[1], sys.argv[2], sys.argv[3]
pictures, prompts = np.load(drawn), [Prompt(t) for t in json.loads(sys.argv[4])]
def say():
    try:
        return [s.value for s in load_reward(RewardTerm("imagereward")).score(pictures, prompts)]
    except Refusal as error:
        return str(error)
found = {"linked": say()}
whole = os.path.getsize(blob)
with open(blob, "ab") as file:
    file.write(b"0")
found["damaged"] = say()
os.truncate(blob, whole)
os.replace(blob, link)
found["not linked"] = say()
print(json.dumps(found))
"""


class Hub(BaseHTTPRequestHandler):
    """Says of every file that it is as `sha256` says."""

    sha256 = ""
    asked: list[str] = []  # noqa: RUF012 (a class for each server)

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        headers = {"X-Repo-Commit": FILE[2], "X-Linked-Etag": f'"{self.sha256}"', "Content-Length": "9"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def cached(cache: Path, repository: str, name: str, revision: str) -> Path:
    path = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / revision / name
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.slow
def test_from_the_cache_by_the_checksum_of_its_link_and_without_links_by_the_hubs(tmp_path):
    drawn, texts, model = pictures((40, 40), 3), TEXTS[:3], published(vision=(32, 2, 16), text=(24, 2, 12))
    np.save(tmp_path / "pictures.npy", drawn)
    vocabulary, link = cached(tmp_path, *VOCABULARY), cached(tmp_path, *FILE)
    vocabulary.write_text("\n".join(WORDS))
    blobs = link.parents[2] / "blobs"
    blobs.mkdir()
    path, sha256 = checkpoint(blobs, model)
    link.symlink_to(path.rename(blobs / sha256))

    answers: Any = type("Answers", (Hub,), {"sha256": sha256, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), answers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1"}
        places = {"HF_HUB_CACHE": str(tmp_path), "PYTHONPATH": str(Path(progrpo.__file__).parents[1])}
        environment = {**os.environ, **hub, **places, "CUDA_VISIBLE_DEVICES": ""}
        files = [str(tmp_path / "pictures.npy"), str(blobs / sha256), str(link)]
        command = [sys.executable, "-c", SCRIPT, *files, json.dumps(texts)]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        server.shutdown()
    outputs = json.loads(done.stdout.splitlines()[-1])
    expected = [model.score(picture, text) for picture, text in zip(drawn, texts, strict=True)]
    assert outputs["linked"] == pytest.approx(expected, abs=2e-5)
    assert outputs["damaged"].startswith(f"reward 'imagereward': {blobs / sha256} is damaged, its sha256 is ")
    assert outputs["not linked"] == pytest.approx(expected, abs=2e-5)
    assert answers.asked == [f"/{FILE[0]}/resolve/{FILE[2]}/{FILE[1]}"]  # once: links need no network
