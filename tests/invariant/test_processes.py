"""Two and three processes, over gloo, train what one does; each runs `tests.support.processes`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from progrpo.config import OptimSettings
from tests.support.processes import work

ROOT = Path(__file__).parents[2]

WHOLE = ("updates 1", "gdpo", "probe", "watched", "failing", "pairs", "full shard")
GROUPS = ("groups by dgpo", "groups shard")
CASES = (*WHOLE, *GROUPS, "split batch")
LR = OptimSettings().lr  # the most of all cases
OF_THREE = (
    *("updates 2", "batch", "five", "shard", "five shard"),
    *("groups", "groups by dgpo", "groups shard", "split", "few"),
)


def started(world: int, model: Path, out: Path, names: tuple[str, ...]) -> Path:
    """The folder with the results of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    processes = []
    for rank in map(str, range(world)):
        env = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        log = (out / f"log {rank}").open("w")
        command = [sys.executable, "-m", "tests.support.processes", str(model), str(out), ",".join(names)]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * world, "\n".join((out / f"log {rank}").read_text()[-2000:] for rank in range(world))
    return out


@pytest.fixture(scope="module")
def two(tiny_sd3, tmp_path_factory) -> Path:
    return started(2, tiny_sd3, tmp_path_factory.mktemp("two"), CASES)


@pytest.fixture(scope="module")
def three(tiny_sd3, tmp_path_factory) -> Path:
    return started(3, tiny_sd3, tmp_path_factory.mktemp("three"), OF_THREE)


@pytest.fixture(scope="module")
def one(tiny_sd3, tmp_path_factory) -> Path:
    """The folder with the results of one process."""
    out = tmp_path_factory.mktemp("one")
    work(str(tiny_sd3), out, CASES)
    return out


@pytest.fixture(scope="module")
def one_beside_three(tiny_sd3, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one")
    work(str(tiny_sd3), out, OF_THREE)
    return out


def results(out: Path, rank: int) -> dict[str, Any]:
    return json.loads((out / f"results {rank}.json").read_text())


def test_there_were_two_and_one(one, two):
    assert [results(two, 0)["world"], results(two, 1)["world"], results(one, 0)["world"]] == [2, 2, 1]


@pytest.mark.parametrize("case", CASES)
def test_the_same_members_survive(one, two, case):
    first, second = (results(two, rank)[case]["survivors"] for rank in (0, 1))
    if case in WHOLE:
        # the main process has the group that an audit watches, another one every time
        of_main = {(0, 0), (0, 2), (1, 1)} if case == "watched" else {(i, slot) for i in (0, 1) for slot in (0, 2)}
        assert {(i, slot) for i, slot, _ in first} == of_main
        assert {(i, slot) for i, slot, _ in second} == {(i, slot) for i in (0, 1) for slot in range(3)} - of_main
    elif case in GROUPS:  # each has what is left of its own
        assert {slot % 2 for _, slot, _ in first} <= {0} and {slot % 2 for _, slot, _ in second} <= {1}
    else:  # each has some of every group
        assert len(first) and len(second) and abs(len(first) - len(second)) <= 2 * 3
    assert sorted(first + second) == sorted(results(one, 0)[case]["survivors"])


@pytest.mark.parametrize("case", ["watched", "probe"])
def test_the_same_groups_are_audited(one, two, case):
    """By them `plan.preset auto` chooses."""
    ours, theirs = (results(out, 0)[case]["audited"] for out in (two, one))
    assert [audit["prompt"] for audit in ours] == [audit["prompt"] for audit in theirs]
    assert len(ours) == 2 and results(two, 1)[case]["audited"] == []
    for audit, expected in zip(ours, theirs, strict=True):
        assert audit["final"] == pytest.approx(expected["final"], abs=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_the_same_weights_are_learnt(one, two, tiny_sd3, case, assert_trained_alike):
    alone, first, second = (
        load_file(out / f"{case} {rank}.safetensors") for out, rank in ((one, 0), (two, 0), (two, 1))
    )
    assert_trained_alike(first, alone, LR, steps=4)
    for name in alone:
        assert torch.equal(first[name], second[name]), name
    before = load_file(tiny_sd3 / "transformer" / "diffusion_pytorch_model.safetensors")  # a LoRA's B begins at 0
    assert any((w - before.get(name, 0)).abs().max() > 1e-4 for name, w in alone.items() if "lora_A" not in name)


@pytest.mark.parametrize("case", CASES)
def test_the_same_metrics_are_recorded(one, two, case):
    for ours, theirs in zip(results(two, 0)[case]["records"], results(one, 0)[case]["records"], strict=True):
        # of gradients that are shared out the noise scale is not measured
        of_one = {n for n in theirs if n.startswith("update/gradient_") or n == "update/noise_scale"}
        assert ours.keys() == theirs.keys() - (of_one if case == "full shard" else set())
        rounding = {"seconds", "update/ratio_max_deviation", "update/loss"}
        own_part = set() if case in (*WHOLE, *GROUPS) else {"rollout/diversity"}  # of a group's members in one process
        for name in ours.keys() - rounding - own_part:
            if not name.startswith("time/"):
                expected = theirs[name]  # None: a rank correlation of constant rewards
                assert ours[name] == (expected if expected is None else pytest.approx(expected, rel=1e-3, abs=1e-6)), (
                    name
                )


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_THREE)
def test_three_do_what_one_does(one_beside_three, three, case, assert_trained_alike):
    parts, whole = [results(three, rank)[case] for rank in range(3)], results(one_beside_three, 0)[case]
    assert sorted(member for part in parts for member in part["survivors"]) == sorted(whole["survivors"])
    expected = load_file(one_beside_three / f"{case} 0.safetensors")
    for rank in range(3):
        assert_trained_alike(load_file(three / f"{case} {rank}.safetensors"), expected, LR, steps=4)
    for ours, theirs in zip(parts[0]["records"], whole["records"], strict=True):
        for name in (
            "reward/mean",
            "reward/missing",
            "advantage/zero_variance_groups",
            "rollout/nfe",
            "update/grad_norm",
        ):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


def test_a_weight_that_no_item_reaches_is_not_decayed_in_one_process_nor_in_two(one, two):
    """As those of Qwen-Image's last block that turn the text's stream into what is thrown away."""
    first, second, third = results(one, 0)["decayed"]
    assert first == second and first != third == [1.0, 1.0]
    assert results(two, 0)["decayed"] == results(two, 1)["decayed"] == [first, second, third]


def test_only_the_main_process_writes(one, two):
    assert [results(two, rank)["wrote"] for rank in (0, 1)] == [True, False]
    assert results(two, 0)["event files"] == 1
    runs = (two / "run of 0", one / "run of 0")
    ours, theirs = ({p.relative_to(run) for p in run.rglob("*") if ".tfevents." not in p.name} for run in runs)
    assert ours == theirs


def test_what_the_main_process_alone_finds_wrong_is_refused_in_all(two):
    assert [results(two, rank)["taken"] for rank in (0, 1)] == [
        f"{two / 'run of 0'} already holds a run (config.json);"
        f" resume it with progrpo.train(..., out={str(two / 'run of 0')!r}, mode='resume'),"
        " replace it with --overwrite (in Python mode='overwrite'), or give another folder as --out (out)"
    ] * 2


def test_what_must_be_equal_and_is_not_is_refused_in_all_by_its_name(two):
    said = results(two, 0)["unequal"]
    assert results(two, 1)["unequal"] == said and said.pop("wrote") is False
    assert said["training"].startswith("the list of training prompts must be the same in all processes, and is ")
    assert "(it begins with 'red cat') in process 0" in said["training"]
    assert "(it begins with 'green bird') in process 1; give all the same prompts" in said["training"]
    assert said["evaluation"].startswith("the list of evaluation prompts must be the same in all processes")
    assert said["configuration"] == (
        "optim.lr must be the same in all processes, and is 0.001 in process 0 and 0.5 in process 1;"
        " give all the same configuration"
    )
    assert said["mode"].startswith("mode must be the same in all processes, and is 'new' in process 0 and 'resume'")
    assert said["weights"].startswith("the weights of text_encoder_2 must be the same in all processes")


def test_a_process_without_a_prompt_is_refused(two):
    expected = "prompts.per_iteration is 1, fewer than the 2 processes; give each at least one,"
    expected += " or have them share the groups (prompts.split_groups)"
    assert [results(two, rank)["too few"] for rank in (0, 1)] == [expected, expected]
