"""What is asked of accelerate and would be ignored is refused, and whose error means that another process is gone."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from progrpo.training.distributed import Ranks, is_lost


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_an_engine_of_accelerate_is_refused_with_what_to_take(engine, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ValueError, match=r"asks for .*launch without it.*--model\.shard"):
        Ranks()
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "false")
    assert Ranks().world == 1


def test_a_lost_process_is_told_from_a_mistake():
    assert is_lost(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"))
    assert is_lost(dist.DistBackendError("NCCL error"))
    assert not is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost(ValueError("Connection closed by peer"))
