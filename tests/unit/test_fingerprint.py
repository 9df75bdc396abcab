"""Checksums of weights: equal for equal numbers however they lie in memory, and other for one number that differs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from progrpo.policies.fingerprint import fingerprint


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Conv2d(16, 33, 3), "b": nn.Linear(100, 331), "c": nn.BatchNorm1d(5)})


def test_names_order_and_layout_do_not_count(network):
    renamed = nn.ModuleDict({"x": network["c"], "y": copy.deepcopy(network["a"]), "z": network["b"]})
    renamed["y"].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert fingerprint(renamed) == fingerprint(network)


@pytest.mark.parametrize("name", ["a.weight", "a.bias", "b.weight", "c.running_mean", "c.num_batches_tracked"])
@pytest.mark.parametrize("place", [0, -1])
def test_one_number_counts(network, name, place):
    before, tensor = fingerprint(network), network.state_dict()[name].view(-1)
    was = tensor[place].clone()
    tensor[place] += 1
    assert fingerprint(network) != before
    tensor[place] = was
    assert fingerprint(network) == before


def test_dtype_and_shape_count(network):
    assert fingerprint(copy.deepcopy(network).to(torch.bfloat16)) != fingerprint(network)
    zeros = [nn.Linear(2, 6, bias=False), nn.Linear(3, 4, bias=False)]
    for linear in zeros:
        nn.init.zeros_(linear.weight)
    assert fingerprint(zeros[0]) != fingerprint(zeros[1])


def test_a_policy_has_one_of_each_part_as_it_was_given(family, tiny_policy):
    policy, other = tiny_policy(folder=family, weights="full"), tiny_policy(folder=family)
    parts = {name for name in policy.fingerprints if not name.startswith("text_encoder")}
    assert {policy.denoiser_name, "vae"} <= parts and "text_encoder" in policy.fingerprints
    assert policy.fingerprints == other.fingerprints  # a fresh LoRA is no part of it
