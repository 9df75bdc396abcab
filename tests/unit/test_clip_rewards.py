"""PickScore and HPSv2 on small CLIPs of random weights: against the published formulas, and against open_clip's network."""

import hashlib
import json
import math
import os
import pickle
import string
import subprocess
import sys
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

import progrpo
from progrpo.rewards.clip import BATCH, OnFirstScore
from progrpo.rewards.hpsv2 import CHECKPOINT, HPSv2, clip_of, config_of, read_checkpoint, weights_of
from progrpo.rewards.pickscore import PickScore
from progrpo.types import Prompt

LETTERS = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
VOCABULARY = {
    token: i for i, token in enumerate([*LETTERS, "<|startoftext|>", "<|endoftext|>"])
}  # the end last, as CLIP's
LENGTH = 12

TEXTS = ["red cat", "a dog", "birds", "a longer text than the tower reads"] * 5
PROMPTS = [Prompt(f"{text} {letter}") for text, letter in zip(TEXTS, string.ascii_lowercase, strict=False)]
assert len(PROMPTS) > BATCH
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
        letters = [letter for word in text.split() for letter in (*word[:-1], f"{word[-1]}</w>")][: LENGTH - 2]
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


def small_clip(**text) -> CLIPModel:
    both = {"num_attention_heads": 16, "num_hidden_layers": 2, "hidden_act": "gelu", "initializer_factor": 4.0}
    text = {"vocab_size": 54, "max_position_embeddings": LENGTH, "bos_token_id": 52, "eos_token_id": 53, **text}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config={"hidden_size": 32, "intermediate_size": 64, **both, **text},
                vision_config={"hidden_size": 48, "intermediate_size": 96, "patch_size": 56, **both},
                projection_dim=24,
                logit_scale_init_value=3.3,
            )
        )
    return model


def published_pickscore(model: CLIPModel, pictures_NHWC: np.ndarray, texts: list[str]) -> list[float]:
    """The model card's lines, a pair at a time; by hand what its processor does: the shorter side to 224, the middle of it."""
    scores = []
    for picture, text in zip(pictures_NHWC, texts, strict=True):
        height, width = picture.shape[:2]
        shape = (224, int(224 * height / width)) if width <= height else (int(224 * width / height), 224)
        left, top = (shape[0] - 224) // 2, (shape[1] - 224) // 2
        resized = Image.fromarray(picture).resize(shape, Image.Resampling.BICUBIC)
        pixels = normalised(resized.crop((left, top, left + 224, top + 224)))
        with torch.no_grad():
            image_embs = model.get_image_features(pixels[None]).pooler_output
            image_embs = image_embs / torch.norm(image_embs, dim=-1, keepdim=True)
            text_embs = model.get_text_features(ids([text], VOCABULARY["<|endoftext|>"])).pooler_output
            text_embs = text_embs / torch.norm(text_embs, dim=-1, keepdim=True)
            scores.append(float(model.logit_scale.exp() * (text_embs @ image_embs.T)[0]) / 26)
    return scores


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
        square.paste(resized, (math.ceil((224 - width) / 2), math.ceil((224 - height) / 2)))
        rows.append(normalised(square))
    return torch.stack(rows)


def checkpoint(folder: Path, state: object) -> tuple[Path, str]:
    path = folder / CHECKPOINT
    torch.save(state, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("shape", SHAPES)
def test_hpsv2_is_open_clips_network_through_a_checkpoint(shape, tmp_path):
    drawn, model = pictures(SHAPES[shape]), open_clip()
    expected = differ(model.score(published_pixels(drawn), ids([p.text for p in PROMPTS], padding=0)))
    state = read_checkpoint(*checkpoint(tmp_path, {"epoch": 1, "state_dict": model.state_dict()}))
    converted = clip_of(state, text_heads=4, vision_heads=8)
    scores = HPSv2(converted, tokenizer(), CLIPImageProcessorPil()).score(drawn, PROMPTS)
    assert values(scores) == pytest.approx(expected, abs=1e-5)


def test_a_vit_h_of_open_clip_is_one_of_transformers():
    with torch.device("meta"):
        state = OpenClip(
            (1024, 24, 16), (1280, 32, 16), 14, 1024, vocabulary=49408, length=77, ratios=(4, 4)
        ).state_dict()
        model = CLIPModel(config_of(state))
    assert {n: w.shape for n, w in weights_of(state).items()} == {n: w.shape for n, w in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == 986_109_441  # 986.11 million, says open_clip's table of models
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.hidden_size, text.num_attention_heads, text.eos_token_id) == (1024, 16, 49407)
    assert (vision.hidden_size, vision.num_attention_heads, vision.image_size) == (1280, 16, 224)


def test_a_checkpoint_of_another_checksum_is_refused(tmp_path):
    path, sha256 = checkpoint(tmp_path, {"state_dict": open_clip().state_dict()})
    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=rf"'hpsv2'.*{CHECKPOINT} is damaged.* not {sha256}; delete it, and"):
        read_checkpoint(path, sha256)


class Mischief:
    def __reduce__(self):
        return Path.touch, (Path("mischief"),)


def test_a_checkpoint_of_more_than_tensors_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights"):
        read_checkpoint(*checkpoint(tmp_path, {"state_dict": {}, "more": Mischief()}))
    assert not Path("mischief").exists()


# --- what both do -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[PickScore, HPSv2])
def reward(request):
    return request.param(small_clip(), tokenizer(), CLIPImageProcessorPil())


def test_no_pictures_no_scores(reward):
    assert reward.score(pictures((40, 40))[:0], []) == []


def test_features_without_a_direction_are_a_missing_score(reward):
    reward._model.visual_projection.weight.zero_()
    scores = reward.score(pictures((40, 40), 2), PROMPTS[:2])
    assert all(math.isnan(s.value) and math.isnan(s.number()) for s in scores)


def test_weights_are_frozen_and_dropout_is_off(reward):
    assert not any(p.requires_grad for p in reward._model.parameters())
    assert not any(module.training for module in reward._model.modules())


def test_a_reward_is_loaded_once_and_late():
    loaded = []

    def load():
        loaded.append(PickScore(small_clip(), tokenizer(), CLIPImageProcessorPil()))
        return loaded[-1]

    late, drawn = OnFirstScore(load), pictures((40, 40), 2)
    assert loaded == []
    scores = late.score(drawn, PROMPTS[:2])
    assert late.score(drawn, PROMPTS[:2]) == scores == loaded[0].score(drawn, PROMPTS[:2])
    assert len(loaded) == 1


# --- from the hub's cache, without a network --------------------------------------------------------------------------

SCRIPT = """
import json, sys
import progrpo.rewards.load as load
early = "transformers" in sys.modules
import numpy as np
from progrpo.types import Prompt
pictures, texts = np.load(sys.argv[1]), json.loads(sys.argv[2])
rewards, found = {name: load.load_reward(name) for name in sys.argv[3:]}, {"early": early}
for name, reward in rewards.items():
    try:
        found[name] = [s.value for s in reward.score(pictures, [Prompt(t) for t in texts])]
    except ValueError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


BOTH = ("pickscore", "hpsv2")


def score_apart(folder: Path, drawn: np.ndarray, texts: list[str], names=BOTH, hub: str = "") -> dict:
    """Rewards by name, in a process whose cache of the hub is `folder`, and which is offline if there is no `hub` to ask."""
    np.save(folder / "pictures.npy", drawn)
    network = {"HF_ENDPOINT": hub, "NO_PROXY": "127.0.0.1"} if hub else {"HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **network, "HF_HUB_CACHE": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(Path(progrpo.__file__).parents[1])
    command = [sys.executable, "-c", SCRIPT, str(folder / "pictures.npy"), json.dumps(texts), *names]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def cached(cache: Path, repository: str) -> Path:
    """The folder of a repository's files in the hub's cache, as `main`."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    return snapshot


def fill_cache(cache: Path, model: CLIPModel, hps: OpenClip) -> Path:
    model.save_pretrained(cached(cache, "yuvalkirstain/PickScore_v1"))
    texts = cached(cache, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    (texts / "vocab.json").write_text(json.dumps(VOCABULARY))
    (texts / "merges.txt").write_text("#version: 0.2\n")
    snapshot = cached(cache, "xswu/HPSv2")
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    path, sha256 = checkpoint(blobs, {"state_dict": {name: w.half() for name, w in hps.state_dict().items()}})
    (snapshot / CHECKPOINT).symlink_to(path.rename(blobs / sha256))
    return blobs / sha256


def test_from_the_cache_without_a_network(tmp_path):
    drawn, texts = pictures((40, 40), 3), TEXTS[:3]
    model, hps = small_clip(), open_clip(text=(32, 2, 16), vision=(48, 3, 16)).half().float()
    blob = fill_cache(tmp_path, model, hps)
    found = score_apart(tmp_path, drawn, texts)
    assert not found["early"]
    assert found["pickscore"] == pytest.approx(published_pickscore(model, drawn, texts), abs=1e-5)
    assert found["hpsv2"] == pytest.approx(hps.score(published_pixels(drawn), ids(texts, 0)), abs=1e-5)

    with blob.open("ab") as file:
        file.write(b"\0")
    (tmp_path / "models--laion--CLIP-ViT-H-14-laion2B-s32B-b79K" / "snapshots" / ("0" * 40) / "merges.txt").unlink()
    found = score_apart(tmp_path, drawn, texts)
    assert found["pickscore"].startswith(
        "reward.name 'pickscore': there is no cached copy of laion/CLIP-ViT-H-14-laion2B-s32B-b79K,"
    )
    assert "is damaged" in found["hpsv2"]


def test_neither_a_cached_copy_nor_a_network(tmp_path):
    found = score_apart(tmp_path, pictures((40, 40), 1), TEXTS[:1])
    for name, repository in (("pickscore", "yuvalkirstain/PickScore_v1"), ("hpsv2", "xswu/HPSv2")):
        assert found[name].startswith(
            f"reward.name {name!r}: there is no cached copy of {repository}, and the Hugging Face hub did not give one: "
        )
        assert "\n" not in found[name]


class Hub(BaseHTTPRequestHandler):
    """Says of every file that it is as `sha256` says."""

    sha256 = ""

    def do_HEAD(self) -> None:
        self.send_response(200)
        for name, value in {
            "X-Repo-Commit": "0" * 40,
            "X-Linked-Etag": f'"{self.sha256}"',
            "Content-Length": "9",
        }.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_cache_without_links_is_checked_by_what_the_hub_says(tmp_path):
    drawn, texts, hps = pictures((40, 40), 3), TEXTS[:3], open_clip(text=(32, 2, 16), vision=(48, 3, 16)).half().float()
    blob = fill_cache(tmp_path, small_clip(), hps)
    blob.rename(blob.parents[1] / "snapshots" / ("0" * 40) / CHECKPOINT)  # over the link
    answers = type("Answers", (Hub,), {"sha256": blob.name})
    with ThreadingHTTPServer(("127.0.0.1", 0), answers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        found = score_apart(tmp_path, drawn, texts, ["hpsv2"], f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert found["hpsv2"] == pytest.approx(hps.score(published_pixels(drawn), ids(texts, 0)), abs=1e-5)
