"""Requests to accelerate that would be ignored are refused, and a lost process has an error of its own."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from progrpo.training.distributed import Ranks, explain_lost_process, is_lost
from progrpo.training.errors import LostProcessError


@pytest.mark.parametrize(
    ("variable", "value", "nothing", "instead"),
    [
        ("USE_FSDP", "true", "false", "model.shard"),
        ("USE_MEGATRON_LM", "true", "false", "model.shard"),
        ("USE_PARALLELISM_CONFIG", "true", "false", "model.shard"),
        ("MIXED_PRECISION", "bf16", "no", "model.dtype"),
        ("DYNAMO_BACKEND", "INDUCTOR", "NO", "model.compile"),
    ],
)
def test_what_accelerate_would_ignore_is_refused_with_what_to_take(variable, value, nothing, instead, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(ValueError, match=rf"asks for .*\(ACCELERATE_{variable}\).*launch without it.*--{instead}"):
        Ranks()
    monkeypatch.setenv(f"ACCELERATE_{variable}", nothing)
    assert Ranks().world == 1


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_places_are_dealt_out_once_also_where_there_are_fewer_than_processes(count):
    for to_main in range(max(1, count)):
        shares = []
        for rank in range(3):
            ranks = Ranks()
            ranks.rank, ranks.world = rank, 3
            shares.append(ranks.deal(count, to_main).tolist())
        assert sorted(place for share in shares for place in share) == list(range(count))
        assert all(share == sorted(share) for share in shares) and (to_main in shares[0] or not count)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_lost_process_differs_from_a_mistake():
    assert is_lost(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"))
    assert is_lost(dist.DistBackendError("NCCL error"))
    assert not is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost(ValueError("Connection closed by peer"))


def test_a_lost_process_is_said_once_and_in_one_sentence():
    with pytest.raises(LostProcessError) as error, explain_lost_process(lambda: "begin anew"):  # noqa: SIM117
        with explain_lost_process(lambda: "go on"):
            raise RuntimeError("[gloo/pair.cc:553] Connection closed by peer. This is\na longer story")
    assert str(error.value) == (
        "another process of this run was lost ([gloo/pair.cc:553] Connection closed by peer); go on"
    )
    with pytest.raises(RuntimeError, match="shapes") as other, explain_lost_process(lambda: "go on"):
        raise RuntimeError("shapes cannot be multiplied")
    assert type(other.value) is RuntimeError
