"""Sizes that are calculated from a few of a network's equal blocks, against those of the whole network."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from progrpo.policies.base import torch_dtype
from progrpo.policies.settings import ModelSettings
from progrpo.policies.sizes import _sizes_of, sizes, without_weights
from progrpo.policies.stacks import are_adapted_alike, stacks_of, with_blocks

LAYERS = 5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"activation_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"weights": "full"}, marks=pytest.mark.slow),
        pytest.param({"dtype": "bfloat16", "quantize": "int8"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_few_blocks_tell_the_sizes_of_all(tiny_qwen_image: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = shutil.copytree(tiny_qwen_image, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_layers": LAYERS}))
    settings = ModelSettings(str(folder), resolution=16, max_sequence_length=8, lora_rank=2, **changes)
    pipeline = without_weights(str(folder), torch_dtype(settings))
    assert [stack.count for stack in stacks_of({"transformer": pipeline.transformer})] == [LAYERS]
    whole = _sizes_of(pipeline, settings, (2, 3, 1))
    assert asdict(sizes(settings, 2, 3, 1)) == asdict(whole)


class Network(nn.Module):
    """A stack of wide and narrow layers."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for width in widths)


def test_blocks_are_dropped_from_the_middle_of_a_list() -> None:
    networks = {"a": Network(2, 3, 3, 3, 3, 3, 4)}
    (stack,) = stacks_of(networks)
    assert (stack.network, stack.blocks, stack.start, stack.count) == ("a", "layers", 1, 5)
    few = with_blocks(networks, [stack], 2)
    assert [layer.in_features for layer in few["a"].modules() if isinstance(layer, nn.Linear)] == [2, 3, 3, 4]
    assert len(networks["a"].layers) == 7


@pytest.mark.parametrize(
    ("ends", "alike"),
    [(("0", "layers.*.0"), True), (("layers.1.0",), False), (("layers.3.0", "0"), False), ((), True)],
)
def test_a_lora_of_single_blocks_is_recognized(ends: tuple[str, ...], alike: bool) -> None:
    network = Network()
    network.layers.extend(nn.Sequential(nn.Linear(3, 3)) for _ in range(5))
    networks = {"network": network}
    assert are_adapted_alike(networks, stacks_of(networks), ends) is alike


def test_two_networks_of_equal_blocks_are_cut_alike() -> None:
    assert len(stacks_of({"high": Network(*[3] * 5), "low": Network(*[3] * 5)})) == 2


@pytest.mark.parametrize("widths", [(3, 3, 3), (2, 2, 2, 2, 3, 3, 3, 3)], ids=["few", "of two kinds"])
def test_what_would_not_tell_is_left_whole(widths: tuple[int, ...]) -> None:
    assert stacks_of({"network": Network(*widths)}) == []


def test_a_unet_is_left_whole() -> None:
    network = Network(*[3] * 5)
    network.mid_block = nn.Identity()
    assert stacks_of({"unet": network}) == []
