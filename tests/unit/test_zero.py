"""Settings of DeepSpeed, read as accelerate's launcher writes them.

tests/e2e/test_deepspeed.py runs DeepSpeed itself, where the package is installed.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from progrpo.config import Config, ModelSettings, OptimSettings
from progrpo.training.build import resolve_dtype
from progrpo.training.distributed import Ranks
from progrpo.training.zero import Zero, requested, with_requested_dtype

ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "DEEPSPEED",
    "num_machines": 1,
    "num_processes": 8,
    "use_cpu": False,
}
OF_TRL = {
    "gradient_accumulation_steps": 1,
    "offload_optimizer_device": "none",
    "offload_param_device": "none",
    "zero3_init_flag": False,
    "zero_stage": 2,
}
OF_DEEPSPEED = {
    "bf16": {"enabled": "auto"},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 100,
    "zero_optimization": {
        "stage": 1,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "allgather_bucket_size": 2e8,
        "reduce_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Put what `accelerate launch --config_file` would tell its processes into this one's environment."""

    def launch(of_deepspeed: dict[str, Any], *options: str, **of_accelerate: Any) -> None:
        (file := tmp_path / "accelerate.yaml").write_text(
            yaml.safe_dump({**ACCELERATE, "deepspeed_config": of_deepspeed, **of_accelerate})
        )
        with monkeypatch.context() as own:  # the launcher reads and writes its own environment, too
            own.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
            command = ["--config_file", str(file), "--main_process_port", "0", *options, "script.py"]
            args, _, mixed = _validate_launch_command(launch_command_parser().parse_args(command))
            args.deepspeed_fields_from_accelerate_config = ",".join([*of_deepspeed, *["mixed_precision"] * mixed])
            _, variables = prepare_deepspeed_cmd_env(args)
        for name in {n for n in (*variables, *os.environ) if n.startswith("ACCELERATE_")}:
            monkeypatch.setenv(name, variables[name]) if name in variables else monkeypatch.delenv(name)

    return launch


def in_file(tmp_path, **changed: Any) -> dict[str, Any]:
    """DeepSpeed's own JSON, named in accelerate's configuration."""
    (file := tmp_path / "deepspeed.json").write_text(json.dumps({**OF_DEEPSPEED, **changed}))
    return {"deepspeed_config_file": str(file), "zero3_init_flag": False}


def test_none_of_it_is_asked_for_without_the_launcher():
    assert requested() is None and Ranks().zero is None


@pytest.mark.parametrize(
    ("changed", "of_accelerate", "expected"),
    [
        ({}, {}, Zero(2, buckets={})),
        ({}, {"mixed_precision": "bf16"}, Zero(2, buckets={}, dtype="bfloat16")),
        ({}, {"mixed_precision": "fp16"}, Zero(2, buckets={}, dtype="float16")),
        ({"zero_stage": 1, "offload_optimizer_device": "cpu"}, {}, Zero(1, offload=True, buckets={})),
        ({"gradient_clipping": 0.5}, {}, Zero(2, buckets={}, max_grad_norm=0.5)),
        ({"zero_stage": 0}, {}, Zero(0, buckets={})),
    ],
)
def test_what_accelerate_is_configured_with(launched, changed, of_accelerate, expected):
    launched(OF_TRL | changed, **of_accelerate)
    assert requested() == expected


def test_what_a_file_of_deepspeeds_says(launched, tmp_path):
    launched(in_file(tmp_path), "--mixed_precision", "bf16")
    expected = Zero(1, True, pin_memory=True, buckets={"allgather_bucket_size": 200_000_000}, dtype="bfloat16")
    assert requested() == expected
    launched(in_file(tmp_path, bf16={"enabled": True}, gradient_clipping=1.0))
    assert requested() == replace(expected, max_grad_norm=1.0)


@pytest.mark.parametrize(
    ("changed", "of_accelerate", "words"),
    [
        ({"zero_stage": 3}, {}, "stage 3; .*--model.shard"),
        ({"offload_optimizer_device": "nvme"}, {}, "offload to nvme; make that cpu"),
        ({"offload_param_device": "cpu"}, {}, "parameters to offload to cpu; .*--model.offload"),
        ({"offload_optimizer_device": "cpu", "zero_stage": 0}, {}, "offload in stage 0; take stage 1"),
        ({"gradient_accumulation_steps": 4}, {}, "gradient_accumulation_steps 4; .*optim.microbatch"),
        ({"gradient_clipping": "much"}, {}, "cannot be read .*much.*; mend"),
    ],
)
def test_what_has_no_equal_is_refused_with_what_to_take(launched, changed, of_accelerate, words):
    launched(OF_TRL | changed, **of_accelerate)
    with pytest.raises(ValueError, match=rf"^accelerate launch gives DeepSpeed .*{words}"):
        Ranks()


def test_a_precision_that_no_model_is_trained_in_is_refused(launched, monkeypatch):
    launched(OF_TRL)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")  # accelerate launches it on a GPU alone
    with pytest.raises(ValueError, match=r"gives DeepSpeed mixed_precision fp8; take bf16, fp16 or no"):
        requested()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"optimizer": {"type": "AdamW"}}, "optimizer; give optim.lr"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler; give optim.warmup"),
        ({"train_batch_size": 64}, "train_batch_size 64; .*prompts.per_iteration"),
        ({"train_micro_batch_size_per_gpu": 2}, "train_micro_batch_size_per_gpu 2; .*optim.microbatch"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both fp16 and bf16; take one"),
        ({"amp": {"enabled": True}}, "amp, which has no equal here; leave it out"),
        ({"zero_optimization": {"stage": 1, "zenflow": {}}}, "zero_optimization.zenflow, which has no equal"),
        ({"zero_optimization": {"stage": 1, "allgather_bucket_size": 7}}, "allgather_bucket_size 7; .*even"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": 1e999}}, "cannot be read"),
        ({"zero_optimization": {"stage": "one"}}, "cannot be read .*one"),
        ({"zero_optimization": 1}, "cannot be read"),
        ({"bf16": 1}, "cannot be read"),
    ],
)
def test_what_a_file_of_deepspeeds_has_too_much_is_refused(launched, tmp_path, changed, words):
    launched(in_file(tmp_path, **changed))
    with pytest.raises(ValueError, match=rf"^accelerate launch gives DeepSpeed .*{words}"):
        requested()


def test_a_file_that_is_not_there_is_refused(launched, tmp_path):
    launched({"deepspeed_config_file": str(tmp_path / "none.json"), "zero3_init_flag": False})
    with pytest.raises(ValueError, match=r"cannot be read .*none\.json.*; mend its deepspeed_config"):
        requested()


def test_the_launchers_dtype_is_taken_where_none_is_chosen(launched):
    launched({**OF_TRL, "zero_stage": 0}, mixed_precision="bf16")
    config = Config(model=ModelSettings(dtype="auto"))
    assert resolve_dtype(config, Ranks()).model.dtype == "bfloat16"
    chosen = replace(config, model=ModelSettings(dtype="bfloat16"))
    assert resolve_dtype(chosen, Ranks()) is chosen
    with pytest.raises(ValueError, match=r"bfloat16, and model\.dtype is float32; give --model\.dtype bfloat16"):
        resolve_dtype(Config(), Ranks())


@pytest.mark.parametrize(
    ("config", "zero", "words"),
    [
        (Config(), Zero(0, max_grad_norm=0.1), r"gradient_clipping 0.1, and optim.max_grad_norm is 1; make it auto"),
        (Config(model=ModelSettings(shard=True)), Zero(1), r"as model.shard does; take one"),
        (Config(optim=OptimSettings("adamw_8bit")), Zero(2), r"optim.name adamw_8bit, .*; give --optim.name adamw"),
    ],
)
def test_a_configuration_that_contradicts_it_is_refused(config, zero, words):
    with pytest.raises(ValueError, match=words):
        with_requested_dtype(config, zero)


def test_without_its_package_it_is_refused_with_the_command(monkeypatch):
    monkeypatch.setattr("progrpo.training.zero.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"DeepSpeed, which is not installed: pip install 'progrpo\[deepspeed\]'"):
        with_requested_dtype(Config(), Zero(1))
    assert with_requested_dtype(Config(), Zero(0)) == Config()


def test_what_runs_is_said():
    assert Zero(1).describe(8) == "DeepSpeed: the optimizer's state is shared out among 8 processes"
    assert (
        Zero(2, offload=True)
        .describe(2)
        .endswith("2 processes on the CPU; gradients stay whole in each until the step, also in stage 2")
    )
