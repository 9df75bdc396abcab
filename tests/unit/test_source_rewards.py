"""The similarity of an edit to its source: against the published formulas, on networks of random weights."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from progrpo.rewards import lpips
from progrpo.rewards.base import Refusal
from progrpo.rewards.clip_similarity import CLIPSimilarity
from progrpo.rewards.dino import Dino, DinoSimilarity
from progrpo.rewards.load import load_reward
from progrpo.rewards.lpips import LPIPS, LPIPSSimilarity, convert_lpips
from progrpo.rewards.settings import RewardTerm
from progrpo.rewards.source import resized_sources
from progrpo.suites.statistics import pairwise_square_distance
from progrpo.training.features import load_lpips
from progrpo.types import Prompt

WIDTHS = (4, 6, 8, 5, 3)
PLACES = (0, 3, 6, 8, 10)  # of the convolutions in torchvision's AlexNet


def published_weights(widths=WIDTHS) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """AlexNet's and the linear layers', random and under the published names."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(11, 3), (5, widths[0]), (3, widths[1]), (3, widths[2]), (3, widths[3])]
    alexnet = {"classifier.6.bias": torch.zeros(1000)}
    for place, width, (side, below) in zip(PLACES, widths, shapes, strict=True):
        alexnet[f"features.{place}.weight"] = torch.randn(width, below, side, side, generator=generator) * 0.1
        alexnet[f"features.{place}.bias"] = torch.randn(width, generator=generator) * 0.1
    linear = {f"lin{n}.model.1.weight": torch.rand(1, w, 1, 1, generator=generator) for n, w in enumerate(widths)}
    return alexnet, linear


def published_lpips(x: np.ndarray, y: np.ndarray) -> float:
    """By hand in float64: the two pictures' layers, each place of length 1, compared place by place."""
    alexnet, linear = (({n: w.double() for n, w in part.items()}) for part in published_weights())

    def layers(picture: np.ndarray) -> list[torch.Tensor]:
        pixels = torch.tensor(picture).double().permute(2, 0, 1)[None] / 255 * 2 - 1
        h = (pixels - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
            3, 1, 1
        )
        seen = []
        for n, place in enumerate(PLACES):
            h = F.max_pool2d(h, 3, 2) if n in (1, 2) else h
            stride, padding = (4, 2) if n == 0 else (1, 2 if n == 1 else 1)
            h = F.relu(
                F.conv2d(h, alexnet[f"features.{place}.weight"], alexnet[f"features.{place}.bias"], stride, padding)
            )
            seen.append(h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return seen

    compared = zip(layers(x), layers(y), linear.values(), strict=True)
    return sum(float(F.conv2d((a - b) ** 2, w).mean()) for a, b, w in compared)


@pytest.fixture(scope="module")
def network() -> LPIPS:
    return convert_lpips(*published_weights()).double()


def pictures(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_lpips_is_the_published_distance(network):
    x, y = pictures(3), pictures(3)[::-1]
    vectors_x, vectors_y = network.vectors(x), network.vectors(y)
    distances = (vectors_x - vectors_y).square().sum(1)
    expected = [published_lpips(a, b) for a, b in zip(x, y, strict=True)]
    assert distances.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert expected[0] > 0.01 and expected[1] == 0  # the middle picture is compared with itself


def test_the_mean_over_pairs_is_that_of_each_pair(network):
    drawn = pictures(4)
    pairs = [published_lpips(drawn[i], drawn[j]) for i in range(4) for j in range(i)]
    assert pairwise_square_distance(network.vectors(drawn).numpy()) == pytest.approx(np.mean(pairs), rel=1e-6)
    assert pairwise_square_distance(np.ones((1, 3))) is None


def with_sources(sources: np.ndarray, tmp_path) -> list[Prompt]:
    paths = [tmp_path / f"{n}.png" for n in range(len(sources))]
    for source, path in zip(sources, paths, strict=True):
        Image.fromarray(source).save(path)
    return [Prompt(f"make it {n}", {"image": str(path)}) for n, path in enumerate(paths)]


def test_lpips_similarity_is_to_the_prompts_own_source(network, tmp_path):
    sources = pictures(2)
    first, second = with_sources(sources, tmp_path)
    edits = np.concatenate([sources, pictures(3)])
    scores = LPIPSSimilarity(network, batch_size=2).score(edits, [first, second, first, first, second])
    of = [0, 1, 0, 0, 1]
    expected = [1 - published_lpips(edit, sources[n]) for edit, n in zip(edits, of, strict=True)]
    assert [score.value for score in scores] == pytest.approx(expected, rel=1e-6)
    assert scores[0].value == 1


def small_dino() -> Dino:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    size, crop = {"shortest_edge": 28}, {"height": 28, "width": 28}
    return Dino(Dinov2Model(config).double(), BitImageProcessorPil(size=size, crop_size=crop))


def test_dino_similarity_is_the_cosine_of_the_class_tokens(tmp_path):
    dino, sources = small_dino(), pictures(2, 28, 28)
    prompts = with_sources(sources, tmp_path)
    edits = np.stack([sources[0], pictures(3, 28, 28)[0]])

    def direction(picture: np.ndarray) -> torch.Tensor:
        mean, std = (torch.tensor(v) for v in (dino._image_processor.image_mean, dino._image_processor.image_std))
        pixels = ((torch.tensor(picture) / 255 - mean) / std).permute(2, 0, 1)[None]
        feature = dino._model(pixels.double()).last_hidden_state[0, 0]
        return feature / feature.norm()

    expected = [float(direction(a) @ direction(b)) for a, b in zip(edits, sources, strict=True)]
    values = [score.value for score in DinoSimilarity(dino).score(edits, prompts)]
    assert values == pytest.approx(expected, abs=1e-6)
    assert values[0] == pytest.approx(1, abs=1e-6) and expected[1] < 0.999


def test_clip_similarity_is_the_cosine_of_the_projected_features(tmp_path):
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=8, **tower)
    model, size = CLIPVisionModelWithProjection(config).double(), {"height": 28, "width": 28}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size)
    sources = pictures(2, 28, 28)
    edits = np.stack([sources[0], pictures(3, 28, 28)[0]])

    def direction(picture: np.ndarray) -> torch.Tensor:
        mean, std = (torch.tensor(v) for v in (processor.image_mean, processor.image_std))
        pixels = ((torch.tensor(picture) / 255 - mean) / std).permute(2, 0, 1)[None]
        feature = model.visual_projection(model.vision_model(pixels.double()).pooler_output)[0].detach()
        return feature / feature.norm()

    expected = [float(direction(a) @ direction(b)) for a, b in zip(edits, sources, strict=True)]
    scores = CLIPSimilarity(model, processor).score(edits, with_sources(sources, tmp_path))
    assert [score.value for score in scores] == pytest.approx(expected, abs=1e-6)
    assert expected[1] < 0.999


def test_a_source_of_another_size_covers_the_picture(tmp_path):
    wide = pictures(1, 20, 60)
    (prompt,) = with_sources(wide, tmp_path)
    seen, places = resized_sources([prompt, prompt], (16, 24))
    fitted = ImageOps.fit(Image.fromarray(wide[0]), (24, 16), Image.Resampling.LANCZOS)
    assert places == [0, 0] and np.array_equal(seen, np.asarray(fitted)[None])


@pytest.mark.parametrize("make", [lambda: LPIPSSimilarity(LPIPS(WIDTHS)), lambda: DinoSimilarity(small_dino())])
@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({}, "compares with a source picture, but the prompt 'a cat' has no column image; give each prompt"),
        (
            {"image": "no-such.png"},
            "column image of the prompt 'a cat': no-such.png cannot be read as a picture: no such",
        ),
        ({"image": 7}, "column image of the prompt 'a cat' must be a picture or the path of one, not 7"),
    ],
)
def test_a_prompt_without_a_source_is_refused(make, columns, problem):
    reward = make()
    with pytest.raises(Refusal, match=f"^reward '{reward.name}':? {problem}"):
        reward.check([Prompt("a cat", columns)])


def saved(path, weights) -> tuple[str, str]:
    torch.save(weights, path)
    return f"http://127.0.0.1:9/{path.name}", hashlib.sha256(path.read_bytes()).hexdigest()


def test_from_the_cache_without_a_network(tmp_path, monkeypatch):
    """Both files are read by their checksum, and refused where one is another's."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    alexnet, linear = published_weights()
    monkeypatch.setattr(lpips, "ALEXNET", saved(folder / "alexnet.pth", alexnet))
    monkeypatch.setattr(lpips, "WEIGHTS", saved(folder / "alex.pth", linear))
    reward = load_reward(RewardTerm("lpips_similarity", device="cpu"))
    sources = pictures(1)
    prompts = with_sources(sources, tmp_path)
    reward.check(prompts)
    (score,) = reward.score(pictures(3)[:1], prompts)
    assert score.value == pytest.approx(1 - published_lpips(pictures(3)[0], sources[0]), abs=1e-5)
    drawn = pictures(3)
    assert pairwise_square_distance(load_lpips()(drawn)) == pytest.approx(
        np.mean([published_lpips(drawn[i], drawn[j]) for i, j in ((0, 1), (0, 2), (1, 2))]), abs=1e-5
    )
    torch.save({}, folder / "alex.pth")
    with pytest.raises(Refusal, match=r"^reward 'lpips': .*alex.pth is damaged, its sha256 is .*; delete it"):
        load_lpips()
    (folder / "alex.pth").unlink()
    with pytest.raises(Refusal, match=r"^reward 'lpips': there is no cached copy of .*alex.pth, and http"):
        load_lpips()
