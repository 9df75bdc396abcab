"""The contract of every reward, built in or a user's function."""

import asyncio
import functools
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

from progrpo.preferences.reward_model.head import Ensemble, columns
from progrpo.preferences.reward_model.model import RewardModel, save_reward_model
from progrpo.preferences.reward_model.shapes import ShapesBackbone
from progrpo.rewards.aesthetic import Aesthetic
from progrpo.rewards.base import Reward, RewardWrapper, Score
from progrpo.rewards.clip import ClipCosine
from progrpo.rewards.clip_similarity import CLIPSimilarity
from progrpo.rewards.clipscore import CLIPScore
from progrpo.rewards.deqa import DeQA
from progrpo.rewards.dino import Dino, DinoSimilarity
from progrpo.rewards.function import FunctionReward
from progrpo.rewards.geneval import Colors, Detector, GenEval, GenEvalFlowGRPO
from progrpo.rewards.hpsv2 import HPSv2
from progrpo.rewards.hpsv3 import HPSv3
from progrpo.rewards.imagereward import ImageReward, blip_tokenizer
from progrpo.rewards.load import load_reward
from progrpo.rewards.lpips import LPIPS, LPIPSSimilarity
from progrpo.rewards.ocr import OCR
from progrpo.rewards.ocr_line import OCRLine
from progrpo.rewards.pickscore import PickScore
from progrpo.rewards.retrying import RetryingReward
from progrpo.rewards.reward_model import LearnedReward
from progrpo.rewards.settings import ASK_A_MODEL, REWARDS, RewardTerm
from progrpo.rewards.similarity import SourceSimilarity
from progrpo.types import Prompt
from progrpo.zoo.shapes import world
from tests.support.mplug_owl2 import small_deqa
from tests.support.qwen2vl import small_hpsv3, small_videoalign
from tests.support.siglip import small_aesthetic_v2_5

PROMPTS, PICTURES = world.examples("test", 12, seed=3)
PROMPTS = [*PROMPTS[:6], *PROMPTS[7:], PROMPTS[6]]  # half of the pictures are not what is asked for
COLUMNS = {
    "target": ["bcircle", "ecir"],
    "include": [{"class": "cat", "count": 8, "color": "red"}, {"class": "dog", "count": 1}],
}
SOURCE = Image.fromarray(world.examples("test", 1, seed=4)[1][0])
PROMPTS = [Prompt(p.text, {**p.columns, **COLUMNS, "image": SOURCE}) for p in PROMPTS]


def brightness(images, prompts):
    """Of each picture, shifted by its prompt; of dark pictures none."""
    means = [float(np.asarray(i).mean()) for i in images]
    return [None if m < 200 else m + len(p) for m, p in zip(means, prompts, strict=True)]


def object_share(images, prompts, objects):
    return np.array([len(o) / len(p) for o, p in zip(objects, prompts, strict=True)], np.float32)


def all_columns(images, prompts, **columns):
    return [len(kind) + len(objects) for kind, objects in zip(columns["kind"], columns["objects"], strict=True)]


async def slowly(images, prompts):
    await asyncio.sleep(0)
    return brightness(images, prompts)


class Contrast:
    def __call__(self, images, prompts):
        return [float(np.asarray(i).std()) for i in images]


TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def random_weights(make):
    """A network of random weights, equal at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def small_clip() -> CLIPModel:
    text = {"vocab_size": 54, "bos_token_id": 52, "eos_token_id": 53, **TOWER}
    config = CLIPConfig(text_config=text, vision_config={"patch_size": 56, **TOWER}, initializer_factor=4.0)
    return random_weights(lambda: CLIPModel(config))


def small(kind: type[ClipCosine]) -> ClipCosine:
    """A reward of the hub's on a CLIP of random weights."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    words = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return kind(small_clip(), CLIPTokenizer(vocab=words, merges=[]), CLIPImageProcessorPil())


def small_clipscore() -> ClipCosine:
    reward = small(CLIPScore)
    reward._model.visual_projection.weight.neg_()  # these random weights find no prompt like any picture
    return reward


def small_head(width: int) -> nn.Sequential:
    return random_weights(lambda: nn.Sequential(nn.Linear(width, 4), nn.Linear(4, 1)))


def small_vision() -> CLIPVisionModelWithProjection:
    vision = CLIPVisionModelWithProjection(small_clip().config.vision_config)
    vision.load_state_dict(small_clip().state_dict(), strict=False)
    return vision


def small_aesthetic() -> Aesthetic:
    vision = small_vision()
    return Aesthetic(vision, small_head(vision.config.projection_dim), CLIPImageProcessorPil())


class Filmed(RewardWrapper):
    """A reward of videos on videos of two frames, the picture and its mirror image."""

    def score(self, pictures_NHWC, prompts):
        return self._reward.score(np.stack([pictures_NHWC, pictures_NHWC[:, :, ::-1]], axis=1), prompts)


def with_tokenizer(make: Callable[[Path], Reward]) -> Reward:
    with tempfile.TemporaryDirectory() as folder:
        return make(Path(folder))


def small_imagereward() -> ImageReward:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "green", "circle", "square", "a"]
    vision = BlipVisionConfig(patch_size=56, image_size=224, initializer_range=0.5, **TOWER)
    text = BlipTextConfig(
        vocab_size=32, encoder_hidden_size=32, max_position_embeddings=40, initializer_range=0.5, **TOWER
    )
    return ImageReward(
        random_weights(lambda: BlipVisionModel(vision)),
        random_weights(lambda: BlipTextModel(text, add_pooling_layer=False)),
        small_head(32),
        blip_tokenizer({word: i for i, word in enumerate(words)}),
        CLIPImageProcessorPil(),
    )


def small_geneval(kind: type[GenEval] = GenEval) -> GenEval:
    """Its detector has seen nothing, and so finds most things everywhere."""
    config = YolosConfig(
        image_size=[64, 64],
        patch_size=16,
        num_detection_tokens=8,
        id2label={0: "dog", 1: "cat"},
        initializer_range=1.0,
        **TOWER,
    )
    processor = YolosImageProcessorPil(size={"height": 64, "width": 64})
    clip = small(CLIPScore)
    colors = Colors(clip._model, clip._tokenizer, clip._image_processor)
    return kind(Detector(random_weights(lambda: YolosForObjectDetection(config)), processor), colors)


def small_dino() -> Dino:
    config = Dinov2Config(image_size=224, patch_size=56, initializer_range=0.5, mlp_ratio=2, **TOWER)
    return Dino(random_weights(lambda: Dinov2Model(config)), CLIPImageProcessorPil())


def learned(name: str) -> Reward:
    """A reward of a model with random heads on the built-in backbone."""
    backbone = ShapesBackbone()
    features = columns(backbone.features(list(PICTURES), PROMPTS))
    width, generator = features.shape[1], torch.Generator().manual_seed(0)
    weight_KD = torch.randn(3, width, generator=generator, dtype=torch.float64)
    std_D = features.std(0).where(features.std(0) > 1e-3, torch.inf)
    ensemble = Ensemble(weight_KD, features.mean(0), std_D, torch.tensor(float(width)), 1.0)
    with tempfile.TemporaryDirectory() as folder:
        save_reward_model(RewardModel(backbone, ensemble), "shapes", {}, Path(folder) / "taste")
        reward = load_reward(RewardTerm(name, model=str(Path(folder) / "taste")))
        reward.score(PICTURES[:0], [])  # what loads it, while the folder is there
    return reward


def reads_the_colour(picture_HWC):
    return SimpleNamespace(txts=("abcdefgh"[int(picture_HWC.mean()) % 8], "circle"))


NOT_ALONE = (*ASK_A_MODEL, "votes")
"""Rewards that need a server, or people."""
PARTS = ("videoalign_visual", "videoalign_motion", "videoalign_text")
"""Terms of the sum `videoalign`, computed as it is."""
BUILDERS: dict[str, Callable[[], Any]] = {
    **{name: functools.partial(load_reward, RewardTerm(name)) for name in REWARDS if name not in (*NOT_ALONE, *PARTS)},
    "clipscore": small_clipscore,
    "pickscore": lambda: small(PickScore),
    "hpsv2": lambda: small(HPSv2),
    "imagereward": small_imagereward,
    "aesthetic": small_aesthetic,
    "aesthetic_v2_5": small_aesthetic_v2_5,
    "deqa": small_deqa,
    "hpsv3": lambda: with_tokenizer(small_hpsv3),
    "videoalign": lambda: Filmed(with_tokenizer(small_videoalign)),
    "reward_model": lambda: learned("reward_model"),
    "reward_model_variance": lambda: learned("reward_model_variance"),
    "clip_similarity": lambda: CLIPSimilarity(small_vision(), CLIPImageProcessorPil()),
    "dino_similarity": lambda: DinoSimilarity(small_dino()),
    "lpips_similarity": lambda: LPIPSSimilarity(random_weights(LPIPS)),
    "ocr": lambda: OCR(reads_the_colour),
    "ocr_line": lambda: OCRLine(reads_the_colour),
    "geneval": small_geneval,
    "geneval_flow_grpo": lambda: small_geneval(GenEvalFlowGRPO),
    "function": lambda: FunctionReward(brightness),
    "function of a column": lambda: FunctionReward(object_share),
    "function of all columns": lambda: FunctionReward(all_columns),
    "async function": lambda: FunctionReward(slowly),
    "callable object": lambda: FunctionReward(Contrast()),
    "in batches": lambda: FunctionReward(brightness, batch_size=5),
    "patient": lambda: RetryingReward(FunctionReward(brightness)),
}


@pytest.fixture(scope="module", params=BUILDERS)
def reward(request):
    """Made once: what it scores must not depend on what it scored before."""
    return BUILDERS[request.param]()


def test_one_score_a_picture_of_plain_types(reward):
    scores = reward.score(PICTURES, PROMPTS)
    assert len(scores) == len(PICTURES)
    for score in scores:
        assert isinstance(score, Score)
        assert score.value is None or type(score.value) is float
        assert score.passed is None or isinstance(score.passed, bool)
        assert isinstance(score.number(), float)
    assert len({s.value for s in scores}) > 1


def test_order_is_kept_and_pictures_do_not_see_each_other(reward):
    networks = ClipCosine, Aesthetic, ImageReward, GenEval, LearnedReward, SourceSimilarity, DeQA, HPSv3, Filmed
    rounding = (
        1e-3 if isinstance(reward, LearnedReward) else 1e-5 if isinstance(reward, networks) else 0.0
    )  # a network's kernels differ by the size of their batch
    together = reward.score(PICTURES, PROMPTS)
    alone = [reward.score(PICTURES[i : i + 1], PROMPTS[i : i + 1])[0] for i in range(len(PROMPTS))]
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    shuffled = reward.score(PICTURES[order], [PROMPTS[i] for i in order])
    for scores, expected in ((alone, together), (shuffled, [together[i] for i in order])):
        assert [s.passed for s in scores] == [s.passed for s in expected]
        numbers = [s.number() for s in expected]
        assert [s.number() for s in scores] == pytest.approx(numbers, rel=0.0, abs=rounding, nan_ok=True)


def test_the_same_twice(reward):
    assert reward.score(PICTURES, PROMPTS) == reward.score(PICTURES, PROMPTS)


def test_pictures_and_prompts_are_left_alone(reward):
    pictures, prompts = PICTURES.copy(), list(PROMPTS)
    columns = [dict(p.columns) for p in PROMPTS]
    reward.score(pictures, prompts)
    assert np.array_equal(pictures, PICTURES)
    assert prompts == PROMPTS
    assert [p.columns for p in prompts] == columns


def test_read_only_and_strided_pictures(reward):
    wide = np.repeat(PICTURES, 2, axis=0)[::2]
    wide.setflags(write=False)
    assert reward.score(wide, PROMPTS) == reward.score(PICTURES, PROMPTS)
