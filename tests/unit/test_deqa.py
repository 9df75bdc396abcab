"""DeQA-Score on an mPLUG-Owl2 of random weights: its parts against transformers' networks and by hand, its score, and
the published names.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from progrpo.rewards.base import Refusal
from progrpo.rewards.deqa import AFTER, BEFORE, LEVELS, pad_to_squares
from progrpo.rewards.load import load_reward
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt
from tests.support.mplug_owl2 import LLAMA, QUERIES, SIDE, VISUAL, small_deqa, small_network

PROMPTS = [Prompt("a dog"), Prompt("a cat"), Prompt("")]
PICTURE = slice(len(BEFORE), len(BEFORE) + QUERIES + 1)


@pytest.fixture(scope="module")
def network():
    return small_network()


def pictures(shape: tuple[int, int] = (40, 71)) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (3, 5, 5, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize(shape[::-1], Image.Resampling.BICUBIC)) for c in coarse])


def pixels(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


# --- the network ------------------------------------------------------------------------------------------------------


def question(network, seen_QD: torch.Tensor) -> torch.Tensor:
    """The embedded question with a picture's tokens in it, (L, D)."""
    words = network.model.embed_tokens.weight
    return torch.cat([words[list(BEFORE)], seen_QD, words[list(AFTER)]])


def plain_llama(network, way: int) -> LlamaForCausalLM:
    """transformers' Llama with the weights for words (0) or for pictures (1)."""
    state = {
        name.replace(f".multiway.{way}", ""): weight
        for name, weight in network.state_dict().items()
        if "visual_" not in name and "vision_" not in name and f".multiway.{1 - way}" not in name
    }
    llama = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    llama.load_state_dict(state, strict=True)
    return llama


@torch.no_grad()
def test_with_equal_weights_for_words_and_pictures_it_is_llama(network):
    equal = small_network()
    for name, weight in equal.state_dict().items():
        weight.copy_(network.state_dict()[name.replace(".multiway.1", ".multiway.0")])
    seen = equal.model.visual_abstractor(equal.model.vision_model(pixels()))
    expected = [plain_llama(equal, 0)(inputs_embeds=question(equal, s)[None]).logits[0, -1] for s in seen]
    answer = equal.next_logits(pixels())
    assert torch.allclose(answer, torch.stack(expected), atol=1e-5)
    assert not torch.allclose(answer, network.next_logits(pixels()), atol=1e-2)


@torch.no_grad()
def test_norms_keys_and_values_differ_for_the_picture_and_nothing_else(network):
    words, picture = (plain_llama(network, way).model.layers[0] for way in (0, 1))
    layer, x = network.model.layers[0], torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(2))
    for module, first, second in (
        (layer.input_layernorm, words.input_layernorm, picture.input_layernorm),
        (layer.post_attention_layernorm, words.post_attention_layernorm, picture.post_attention_layernorm),
        (layer.self_attn.k_proj, words.self_attn.k_proj, picture.self_attn.k_proj),
        (layer.self_attn.v_proj, words.self_attn.v_proj, picture.self_attn.v_proj),
    ):
        expected = [(second if PICTURE.start <= i < PICTURE.stop else first)(x[0, i]) for i in range(40)]
        assert torch.allclose(module(x)[0], torch.stack(expected), atol=1e-6)
        assert not torch.allclose(first(x), second(x), atol=1e-2)


@torch.no_grad()
def test_the_tower_is_a_clip(network):
    tower, sizes = network.model.vision_model, VISUAL["visual_model"]
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    state = {
        "embeddings.class_embedding": tower.embeddings.cls_token.flatten(),
        "embeddings.patch_embedding.weight": tower.embeddings.patch_embed.weight,
        "embeddings.position_embedding.weight": tower.embeddings.position_embedding[0],
    }
    for name, weight in tower.state_dict().items():
        if "query_key_value" in name:  # a head's query, key and value side by side
            parts = weight.unflatten(0, (heads, 3, width // heads)).transpose(0, 1).flatten(1, 2)
            state |= {name.replace("query_key_value", f"{part}_proj"): p for part, p in zip("qkv", parts, strict=True)}
        elif "cls_token" not in name and "patch_embed" not in name and "position_embedding" not in name:
            name = name.replace("dense", "out_proj").replace("embeddings.pre_layernorm", "pre_layrnorm")
            name = name.replace("input_layernorm", "layer_norm1").replace("post_attention_layernorm", "layer_norm2")
            state[name] = weight
    clip = CLIPVisionModel(CLIPVisionConfig(**{n: s for n, s in sizes.items() if n != "model_type"})).eval()
    clip.load_state_dict(state, strict=True)
    expected = tower.post_layernorm(clip(pixels()).last_hidden_state)
    assert torch.allclose(tower(pixels()), expected, atol=1e-5) and expected.std() > 0.1


def waves(n: float, width: int) -> list[float]:
    angles = [n / 10_000 ** (2 * k / width) for k in range(width // 2)]
    return [*map(math.sin, angles), *map(math.cos, angles)]


@torch.no_grad()
def test_the_abstractor_by_hand(network):
    """A query at a time and a head at a time."""
    abstractor, features = network.model.visual_abstractor, torch.randn(5, 16)
    queries_at = torch.tensor([waves(n, 16) for n in range(QUERIES)])
    patches_at = [[0.0] * 16] + [waves(column, 8) + waves(row, 8) for row in range(2) for column in range(2)]
    x = abstractor.query_embeds[0]
    for layer in abstractor.encoder.layers:
        reader = layer.crossattention
        x = reader.norm1(x)
        seen = torch.cat([x, reader.normk(features)])
        key = reader.attention.key(seen + torch.cat([queries_at, torch.tensor(patches_at)]))
        query, value = reader.attention.query(x + queries_at), reader.attention.value(seen)
        attended = torch.zeros_like(x)
        for q in range(QUERIES):
            for head in (slice(4 * h, 4 * h + 4) for h in range(4)):
                weights = (key[:, head] @ query[q, head] / 2).exp()
                attended[q, head] = (weights / weights.sum()) @ value[:, head]
        x = x + reader.output.out_proj(attended)
        mlp, y = reader.output.mlp, reader.output.norm2(x)
        gate = mlp.w1(y)
        x = x + mlp.w2(mlp.ffn_ln(gate * gate.sigmoid() * mlp.w3(y)))
    expected = torch.cat([abstractor.visual_fc(x), abstractor.vit_eos[0]])
    assert torch.allclose(abstractor(features[None])[0], expected, atol=1e-4) and expected.std() > 0.1


# --- the score --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 71), (71, 40)])
def test_the_score_is_the_expected_level(network, shape):
    drawn = pictures(shape)
    expected = []
    for picture in drawn:
        square = Image.new("RGB", (71, 71), (122, 116, 104))
        square.paste(Image.fromarray(picture), ((71 - shape[1]) // 2, (71 - shape[0]) // 2))
        scaled = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255
        normal = (scaled - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
        logits = network.next_logits(torch.tensor(normal).permute(2, 0, 1)[None])[0]
        weights = [math.exp(logits[token]) for token in (15129, 1781, 6534, 6460, 4319)]
        expected.append(sum(w * level for w, level in zip(weights, (5, 4, 3, 2, 1), strict=True)) / sum(weights))
    assert [s.value for s in small_deqa(batch_size=2).score(drawn, PROMPTS)] == pytest.approx(expected, abs=1e-4)
    assert np.ptp(expected) > 0.01 and all(1 < value < 5 for value in expected)


def test_a_square_picture_is_left_alone():
    drawn = pictures((40, 40))
    assert np.array_equal(pad_to_squares(drawn), drawn)
    padded = pad_to_squares(drawn[:, :37])
    assert np.array_equal(padded[:, 1:38], drawn[:, :37]) and (padded[:, 0] == (122, 116, 104)).all()


def test_the_levels_are_five_tokens_and_none_of_the_question():
    assert len(LEVELS) == 5 and not set(LEVELS) & {*BEFORE, *AFTER}


# --- the published names ----------------------------------------------------------------------------------------------


def published_names() -> set[str]:
    """The names of a checkpoint, from those of a layer of each kind."""
    both = ("weight", "bias")
    llama = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    ways = ["self_attn.k_proj", "self_attn.v_proj", "input_layernorm", "post_attention_layernorm"]
    llama += [f"{name}.multiway.{way}" for name in ways for way in (0, 1)]
    tower = ["self_attn.query_key_value", "self_attn.dense", "mlp.fc1", "mlp.fc2"]
    tower += ["input_layernorm", "post_attention_layernorm"]
    reader = ["norm1", "normk", "attention.query", "attention.key", "attention.value", "output.norm2"]
    reader += ["output.out_proj", *(f"output.mlp.{name}" for name in ("w1", "w2", "w3", "ffn_ln"))]
    vision, abstractor = "model.vision_model", "model.visual_abstractor"
    return {
        *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
        *(f"{vision}.embeddings.{name}" for name in ("cls_token", "patch_embed.weight", "position_embedding")),
        *(f"{vision}.{name}.{kind}" for name in ("embeddings.pre_layernorm", "post_layernorm") for kind in both),
        *(f"{abstractor}.{name}" for name in ("query_embeds", "vit_eos", "visual_fc.weight", "visual_fc.bias")),
        *(f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in llama),
        *(f"{vision}.encoder.layers.{i}.{name}.{kind}" for i in (0, 1) for name in tower for kind in both),
        *(
            f"{abstractor}.encoder.layers.{i}.crossattention.{name}.{kind}"
            for i in (0, 1)
            for name in reader
            for kind in both
        ),
    }


def sines(names) -> set[str]:
    return {name for name in names if name.endswith(("q_pos_embed", "k_pos_embed"))}


def test_the_published_names(network):
    names = network.state_dict().keys()
    assert names - sines(names) == published_names() and len(sines(names)) == 4


def write_checkpoint(network, folder: Path, leave_out: str = "") -> None:
    """A folder as published: an older configuration with code of its own, and weights in two files."""
    older = {"model_type": "mplug_owl2", "torch_dtype": "float32", "rope_scaling": None, "rope_theta": 10000.0}
    code = {"auto_map": {"AutoModelForCausalLM": "modeling.Owl"}, "architectures": ["MPLUGOwl2LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**LLAMA, **older, **code, "visual_config": VISUAL}))
    state = {n: w.contiguous() for n, w in network.state_dict().items() if not leave_out or not re.search(leave_out, n)}
    files = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(sorted(state))}
    for file in set(files.values()):
        save_file({name: w for name, w in state.items() if files[name] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("leave_out", ["", "_pos_embed$"])
def test_from_a_published_folder(network, tmp_path, leave_out):
    write_checkpoint(network, tmp_path, leave_out)
    loaded = load_reward(RewardTerm("deqa", model=str(tmp_path), device="cpu"))
    expected = [score.value for score in small_deqa().score(pictures(), PROMPTS)]
    assert [score.value for score in loaded.score(pictures(), PROMPTS)] == pytest.approx(expected, abs=1e-5)
    assert bool(sines(load_file(tmp_path / "model-00001-of-00002.safetensors"))) is (leave_out == "")


@pytest.mark.parametrize(
    "name", ["model.visual_abstractor.vit_eos", "model.layers.1.self_attn.k_proj.multiway.1.weight"]
)
def test_a_missing_weight_is_refused(network, tmp_path, name):
    write_checkpoint(network, tmp_path, f"^{re.escape(name)}$")
    with pytest.raises(
        Refusal, match=f"^reward 'deqa': .* is no DeQANetwork, it has no {re.escape(name)} of"
    ) as refusal:
        load_reward(RewardTerm("deqa", model=str(tmp_path), device="cpu")).score(pictures(), PROMPTS)
    assert "\n" not in str(refusal.value)
