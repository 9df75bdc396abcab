"""HPSv3 on a Qwen2-VL of random weights: its question, the published computation by hand, and the published names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import Qwen2VLModel

from progrpo.rewards import hpsv3
from progrpo.rewards.base import Refusal
from progrpo.rewards.hpsv3 import TOKEN, HPSv3, build_mean_head, convert_networks, image_processor
from progrpo.rewards.load import load_reward
from progrpo.rewards.questions import question_text
from progrpo.rewards.qwen2vl import read_tokenizer
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt
from tests.support.qwen2vl import (
    FIRST,
    SPECIAL,
    random_head,
    small_config,
    small_hpsv3,
    small_model,
    small_processor,
    tokenizer_file,
)

PROMPTS = [Prompt("two {dogs}"), Prompt("a cat"), Prompt("a much longer prompt, <|Reward|> included")]


def published_state(model: Qwen2VLModel, under: str = "model.") -> dict[str, torch.Tensor]:
    """The checkpoint as published: the text's network under `model`, and the language model's unused head."""
    state = {name.replace("language_model.", under): w.contiguous() for name, w in model.state_dict().items()}
    return state | {f"rm_head.{n}": w for n, w in random_head().items()} | {"lm_head.weight": torch.zeros(3, 24)}


@pytest.fixture(scope="module")
def model() -> Qwen2VLModel:
    return small_model()


@pytest.fixture
def reward(tmp_path) -> HPSv3:
    return small_hpsv3(tmp_path, batch_size=2)


def pictures(count: int = 3, shape: tuple[int, int] = (60, 90)) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize(shape[::-1], Image.Resampling.BICUBIC)) for c in coarse])


@torch.no_grad()
def published_mean(model: Qwen2VLModel, picture: np.ndarray, text: str, tokenizer: Tokenizer) -> float:
    """By hand: embeddings with the picture's in place of its tokens, positions one by one, the last <|Reward|>, and
    three layers.
    """
    inputs = small_processor()(Image.fromarray(picture), return_tensors="pt")
    seen = model.visual(inputs.pixel_values, grid_thw=inputs.image_grid_thw).pooler_output
    question = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * len(seen)
        + f"<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = torch.tensor(tokenizer.encode(question, add_special_tokens=False).ids)
    embedded = model.get_input_embeddings()(ids).clone()
    embedded[ids == model.config.image_token_id] = seen
    hidden = model.language_model(inputs_embeds=embedded[None], position_ids=torch.arange(len(ids)).expand(3, 1, -1))
    h = hidden.last_hidden_state[0, (ids == FIRST + len(SPECIAL)).nonzero()[-1].item()]
    head = random_head()
    for place in ("0", "3"):
        h = F.relu(head[f"{place}.weight"] @ h + head[f"{place}.bias"])
    return float((head["5.weight"] @ h + head["5.bias"])[0])


def test_the_mean_of_the_token_reward(reward, model, tmp_path):
    drawn = pictures()
    tokenizer = read_tokenizer("hpsv3", tokenizer_file(tmp_path), [TOKEN])
    texts = [question_text("hpsv3").replace("{request}", prompt.text) + "\n" for prompt in PROMPTS]
    expected = [published_mean(model, p, text, tokenizer) for p, text in zip(drawn, texts, strict=True)]
    assert [score.value for score in reward.score(drawn, PROMPTS)] == pytest.approx(expected, abs=1e-4)
    assert np.ptp(expected) > 0.01
    alone = [reward.score(drawn[i : i + 1], PROMPTS[i : i + 1])[0].value for i in range(3)]
    assert alone == pytest.approx(expected, abs=1e-4)  # padding changes nothing


def test_the_question():
    text = question_text("hpsv3")
    assert text.startswith("\nYou are tasked with evaluating a generated image based on Visual Quality and Text ")
    end = "Textual prompt - {request}\n\n\n\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND"
    assert text.endswith(end)


def test_the_size_of_pictures():
    shapes = {(512, 512): (448, 448), (1024, 1024): (448, 448), (100, 300): (280, 784), (64, 64): (448, 448)}
    for (height, width), (rows, columns) in shapes.items():
        inputs = image_processor()(Image.new("RGB", (width, height)), return_tensors="pt")
        assert inputs.image_grid_thw.tolist() == [[1, rows // 14, columns // 14]]


@pytest.mark.parametrize("under", ["model.", "model.language_model."])
def test_the_published_names(model, under):
    state = published_state(model, under)
    if under == "model.language_model.":
        state = {f"model.{n}" if n.startswith("visual.") else n: w for n, w in state.items()}
    config = small_config()
    config.text_config.vocab_size = 7  # that of the checkpoint counts
    converted, head = convert_networks(state, config)
    for name, weight in model.state_dict().items():
        assert torch.equal(converted.state_dict()[name], weight)
    x = torch.ones(24)
    assert torch.equal(head(x), build_mean_head(random_head())(x))


def test_from_a_folder_without_a_network(model, reward, tmp_path, monkeypatch):
    small_config().save_pretrained(tmp_path)
    save_file(published_state(model), tmp_path / "HPSv3.safetensors")
    monkeypatch.setattr(hpsv3, "BASE", (str(tmp_path), "main"))
    monkeypatch.setattr(hpsv3, "FILE", (str(tmp_path), "HPSv3.safetensors", "main"))
    monkeypatch.setattr(hpsv3, "image_processor", small_processor)
    loaded = load_reward(RewardTerm("hpsv3", device="cpu", dtype="float32"))
    drawn = pictures()
    expected = [score.value for score in reward.score(drawn, PROMPTS)]
    assert [score.value for score in loaded.score(drawn, PROMPTS)] == pytest.approx(expected, abs=1e-5)
    (tmp_path / "HPSv3.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(Refusal, match=r"^reward 'hpsv3': the weights of .* are damaged"):
        load_reward(RewardTerm("hpsv3", device="cpu")).check([])
