"""VideoReward on a Qwen2-VL of random weights: the published computation by hand, its frames, and its names."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from progrpo.rewards import videoalign
from progrpo.rewards.base import Refusal
from progrpo.rewards.load import load_reward
from progrpo.rewards.mixture import load_mixture
from progrpo.rewards.questions import question_text
from progrpo.rewards.qwen2vl import read_tokenizer
from progrpo.rewards.settings import RewardTerm
from progrpo.rewards.videoalign import (
    TOKENS,
    VideoAlign,
    VideoAlignMotion,
    VideoAlignText,
    VideoAlignVisual,
    convert_networks,
    image_processor,
    pair_frames,
    seen_frames,
)
from progrpo.types import Prompt
from tests.support.qwen2vl import (
    FIRST,
    SPECIAL,
    random_linear,
    small_config,
    small_model,
    small_processor,
    small_videoalign,
    tokenizer_file,
)

PROMPTS = [Prompt("two {dogs} run"), Prompt("a cat", {"fps": 2}), Prompt("<|TA_reward|> or <|VQ_reward|>, a long one")]
PARTS = (VideoAlignVisual, VideoAlignMotion, VideoAlignText)
IDS = [FIRST + len(SPECIAL) + i for i in range(3)]


@pytest.fixture(scope="module")
def model() -> Qwen2VLModel:
    return small_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("qwen2vl")


@pytest.fixture(scope="module")
def reward(folder) -> VideoAlign:
    return small_videoalign(folder, batch_size=2)


def videos(count: int = 3, frames: int = 9, shape: tuple[int, int] = (60, 90)) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (count * frames, 5, 5, 3), dtype=np.uint8)
    fine = [np.asarray(Image.fromarray(c).resize(shape[::-1], Image.Resampling.BICUBIC)) for c in coarse]
    return np.stack(fine).reshape(count, frames, *shape, 3)


def published_patches(frames_FHWC: np.ndarray) -> tuple[torch.Tensor, list[int]]:
    """By hand: resized frames, normalised, in patches of two frames by 14 by 14 pixels, four neighbours together."""
    side = small_processor().size
    height, width = smart_resize(*frames_FHWC.shape[1:3], 28, side["shortest_edge"], side["longest_edge"])
    fine = [Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC) for f in frames_FHWC]
    pixels = (np.stack([np.asarray(f) for f in fine]) / 255 - OPENAI_CLIP_MEAN) / OPENAI_CLIP_STD
    times, rows, columns = len(fine) // 2, height // 14, width // 14
    patches = [
        pixels[2 * t : 2 * t + 2, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14].transpose(3, 0, 1, 2).ravel()
        for t in range(times)
        for top in range(0, rows, 2)
        for left in range(0, columns, 2)
        for y in (top, top + 1)
        for x in (left, left + 1)
    ]
    return torch.tensor(np.stack(patches), dtype=torch.float32), [times, rows, columns]


@torch.no_grad()
def published_parts(model: Qwen2VLModel, video: np.ndarray, prompt: Prompt, folder) -> list[float]:
    """By hand: embeddings with the video's in place of its tokens, positions one by one, and the three tokens."""
    count = round(min(max(len(video) / prompt.columns.get("fps", 16) * 2, 4), len(video) // 2 * 2) / 2) * 2
    places = torch.linspace(0, len(video) - 1, count).round().long().tolist()
    patches, grid = published_patches(video[places])
    seen = model.visual(patches, grid_thw=torch.tensor([grid])).pooler_output
    tokenizer = read_tokenizer("videoalign", tokenizer_file(folder), TOKENS)
    question = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|video_pad|>" * len(seen)
        + f"<|vision_end|>{question_text('videoalign').replace('{request}', prompt.text)}\n"
        + "<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = torch.tensor(tokenizer.encode(question, add_special_tokens=False).ids)
    embedded = model.get_input_embeddings()(ids).clone()
    embedded[ids == model.config.video_token_id] = seen
    hidden = model.language_model(inputs_embeds=embedded[None], position_ids=torch.arange(len(ids)).expand(3, 1, -1))
    positions = [(ids == token).nonzero().flatten() for token in IDS]
    h = hidden.last_hidden_state[0, [positions[0][0], positions[1][0], positions[2][-1]]]
    raw = (h @ random_linear().weight[0]).tolist()
    return [(raw[0] - 3.6757) / 2.2476, (raw[1] - 1.1646) / 1.3811, (raw[2] - 2.8105) / 2.5121]


def test_the_parts_and_their_sum(reward, model, folder):
    drawn = videos()
    expected = [published_parts(model, v, p, folder) for v, p in zip(drawn, PROMPTS, strict=True)]
    for part, kind in enumerate(PARTS):
        scores = small_videoalign(folder, kind).score(drawn, PROMPTS)
        assert [s.value for s in scores] == pytest.approx([parts[part] for parts in expected], abs=1e-4)
        assert np.ptp([parts[part] for parts in expected]) > 0.01
    sums = [sum(parts) for parts in expected]
    assert [s.value for s in reward.score(drawn, PROMPTS)] == pytest.approx(sums, abs=1e-4)
    alone = [reward.score(drawn[i : i + 1], PROMPTS[i : i + 1])[0].value for i in (2, 1, 0)]
    assert alone[::-1] == pytest.approx(sums, abs=1e-4)  # padding and neighbours change nothing


def test_the_prompt_counts_for_text_alignment_alone(folder):
    drawn = np.repeat(videos(1, frames=4), 2, axis=0)
    prompts = [Prompt("a dog"), Prompt("rain over a quiet town")]
    visual, motion, text = ([s.number() for s in small_videoalign(folder, k).score(drawn, prompts)] for k in PARTS)
    assert (visual[0], motion[0]) == pytest.approx((visual[1], motion[1]), abs=1e-4)
    assert abs(text[0] - text[1]) > 1e-3


def test_the_patches_of_pairs_of_frames():
    frames = videos(1, frames=6)[0]
    inputs = small_processor()(list(frames), return_tensors="pt", input_data_format="channels_last")
    expected, grid = published_patches(frames)
    assert torch.allclose(pair_frames(inputs.pixel_values, 6), expected, atol=1e-5)
    assert grid[1:] == inputs.image_grid_thw[0, 1:].tolist()


def test_two_frames_a_second():
    assert seen_frames(33, 16) == [0, 11, 21, 32]
    assert len(seen_frames(81, 16)) == 10  # 10.1 frames in 5.06 seconds
    assert len(seen_frames(49, 8)) == 12
    assert seen_frames(5, 16) == [0, 1, 3, 4]
    assert seen_frames(3, 16) == [0, 2]
    assert seen_frames(2, 16) == [0, 1]


def test_the_size_of_frames():
    shapes = {(480, 832): (336, 588), (448, 448): (448, 448), (100, 300): (196, 560), (64, 64): (336, 336)}
    for (height, width), (rows, columns) in shapes.items():
        inputs = image_processor()(Image.new("RGB", (width, height)), return_tensors="pt")
        assert inputs.image_grid_thw.tolist() == [[1, rows // 14, columns // 14]]


def test_the_question():
    text = question_text("videoalign")
    assert text.startswith("\nYou are tasked with evaluating a generated video based on three distinct criteria: ")
    assert [text.count(token) for token in TOKENS] == [1, 1, 1]
    assert text.index(TOKENS[0]) < text.index(TOKENS[1]) < text.index("{request}") < text.index(TOKENS[2])
    assert text.endswith("Please provide the ratings of Text Alignment: <|TA_reward|>\nEND")


def published_state() -> tuple[dict[str, torch.Tensor], Any]:
    """A checkpoint under the published names, those of peft on transformers 4.45, and the network that it is of."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network: Any = Qwen2VLForConditionalGeneration(small_config())
        network.rm_head = random_linear()
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*_proj", init_lora_weights=False)
        network = get_peft_model(network, lora)
    renamed = {"model.language_model.": "model.", "model.model.visual.": "model.visual."}
    state = {}
    for name, weight in network.state_dict().items():
        for new, old in renamed.items():
            name = name.replace(new, old)
        state[name] = weight.contiguous()
    return state, network.eval()


def test_the_published_names_and_the_lora():
    state, network = published_state()
    assert {"base_model.model.visual.patch_embed.proj.weight", "base_model.model.model.norm.weight"} <= state.keys()
    assert "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight" in state
    config = small_config()
    config.text_config.vocab_size = 7  # that of the checkpoint counts
    converted, head = convert_networks(state, config)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = network.base_model.model.model(input_ids=ids).last_hidden_state
        actual = converted.eval()(input_ids=ids).last_hidden_state
    assert torch.allclose(actual, expected, atol=1e-4)
    assert torch.equal(head.weight, random_linear().weight)


def test_from_a_folder_without_a_network(folder, tmp_path, monkeypatch):
    state, network = published_state()
    small_config().save_pretrained(tmp_path)
    tokenizer = read_tokenizer("videoalign", tokenizer_file(tmp_path), TOKENS)
    torch.save(state, tmp_path / "model.pth")
    monkeypatch.setattr(videoalign, "BASE", (str(tmp_path), "main"))
    monkeypatch.setattr(videoalign, "FILE", (str(tmp_path), "model.pth", "main"))
    monkeypatch.setattr(videoalign, "image_processor", small_processor)
    term = RewardTerm("videoalign_motion", device="cpu", dtype="float32")
    with pytest.raises(Refusal, match=r"^reward 'videoalign_motion': .*model.pth is damaged, its sha256 is"):
        load_reward(term).check([])
    digest = hashlib.sha256((tmp_path / "model.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(videoalign, "SHA256", digest)
    loaded = load_reward(term)
    assert loaded.video
    merged = network.merge_and_unload()
    expected = VideoAlignMotion(merged.model, merged.rm_head, tokenizer, small_processor()).score(videos(), PROMPTS)
    assert [s.value for s in loaded.score(videos(), PROMPTS)] == pytest.approx([s.value for s in expected], abs=1e-4)


def test_a_video_that_is_not_finite_costs_no_other(reward, monkeypatch):
    term = RewardTerm("my_videos:reward")
    monkeypatch.setattr("progrpo.rewards.mixture.load_reward", lambda term: reward)
    there = torch.tensor([True, False, True])
    scores = load_mixture([term], 4).score(videos(), PROMPTS, torch.zeros(3, dtype=torch.int64), there, "NaN")
    expected = [s.value for s in reward.score(videos(), PROMPTS)]
    assert scores.value_N.tolist() == pytest.approx([expected[0], math.nan, expected[2]], abs=1e-4, nan_ok=True)


def test_a_network_that_is_not_finite_gives_no_score(folder):
    broken = small_videoalign(folder)
    for weight in broken._head.parameters():
        weight.fill_(math.inf)
    assert math.isnan(broken.score(videos(1), PROMPTS[:1])[0].number())


def test_what_is_refused(reward):
    for pictures in (videos()[:, 0], videos(frames=1)):
        with pytest.raises(Refusal, match=r"^reward 'videoalign' scores videos of two frames or more"):
            reward.score(pictures, PROMPTS)
    reward.check(PROMPTS)
    for rate in ("16", 0, -1.0, math.inf, math.nan, True):
        with pytest.raises(Refusal, match=r"the column fps of the prompt 'a dog' must be .* a number above 0"):
            reward.check([Prompt("a dog", {"fps": rate})])
