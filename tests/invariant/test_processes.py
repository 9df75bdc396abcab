"""Two and three processes train what one does. The script runs in two and three processes, over gloo, and once in this one."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from progrpo.config import OptimSettings

SCRIPT = '''
"""python script.py MODEL OUT: what each process trained and kept, by case, and a run of the library; of three only what they add."""
import json, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import progrpo
from progrpo.config import AuditSettings, CheckpointSettings, Config, EvalSettings, ModelSettings
from progrpo.config import NFTSettings, ObjectiveSettings, OptimSettings, PlanSettings, PreviewSettings, PromptSettings, SamplingSettings
from progrpo.config import TrackingSettings
from progrpo.prompts.order import InTurn
from progrpo.policies.base import PolicyContext
from progrpo.policies.load import policy_from_pipeline
from progrpo.policies.sharded import gathered
from progrpo.rewards.function import FunctionReward
from progrpo.rewards.mixture import mixture_of_one
from progrpo.training.distributed import Ranks
from progrpo.training.trainer import Trainer
from progrpo.types import Prompt

torch.set_num_threads(1)
PROMPTS = ("red cat", "blue dog", "green bird")
CONFIG = Config(
    iterations=2,
    model=ModelSettings(lora_rank=2, lora_alpha=4, max_sequence_length=8),
    prompts=PromptSettings(per_iteration=3),
    sampling=SamplingSettings(num_inference_steps=4, microbatch=5),
    plan=PlanSettings("custom", group_size=5, prune=((1, 4),), final_keep=3),
    audit=AuditSettings(every=2),
    eval=EvalSettings(pictures=1, num_inference_steps=2),
    checkpoint=CheckpointSettings(every=1),
)
NFT = ObjectiveSettings(name="nft", nft=NFTSettings(kl_beta=0.01))  # calls by three sets of weights for each of the items


def redness(images, prompts):
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]


class Failing:
    """In the first iteration the middle prompt has no reward; in the second all rewards are the same."""

    def __init__(self, prompt):
        self.prompt, self.calls = prompt, 0

    def __call__(self, images, prompts):
        self.calls += 1  # a preview and a final scoring an iteration
        if self.calls > 2:
            return [0.5] * len(images)
        return [None if p == self.prompt else r for p, r in zip(prompts, redness(images, prompts))]


def trained(model, config, reward):
    """Survivors and records of each iteration, and the weights in the end."""
    context = PolicyContext(world_size=Ranks().world)
    policy = policy_from_pipeline(DiffusionPipeline.from_pretrained(model), config.model, context)
    policy.batch_invariant = not config.model.shard  # as on GPUs
    order = InTurn({"": tuple(map(Prompt, PROMPTS))}, config.seed)
    trainer = Trainer(config, policy, mixture_of_one(FunctionReward(reward)), order, Ranks())
    survivors, records = [], []
    for i in range(config.iterations):
        done = trainer.step()
        living = done.rollout.trajectories
        survivors += [[i, s, m] for s, m in zip(living.slot_N.tolist(), living.member_N.tolist())]
        records.append(done.record)
    trainer.check_frozen()
    full, shared = config.model.weights == "full", config.model.shard and context.world_size > 1
    for name, p in policy.denoiser.named_parameters():
        assert isinstance(p, DTensor) == (shared and (full or not p.requires_grad)), name
        assert not isinstance(p, DTensor) or p.to_local().numel() < p.numel(), name
    return survivors, records, {name: gathered(p.detach()).clone() for name, p in policy.trainable.items()}


def work(model, out):
    ranks = Ranks()
    found, middle = {}, InTurn({"": tuple(map(Prompt, PROMPTS))}, 0).prompts_for(0, 2)[1].text
    cases = {f"updates {n}": (replace(CONFIG, optim=OptimSettings(updates_per_rollout=n)), redness) for n in (1, 2)}
    cases["batch"] = (replace(CONFIG, objective=replace(CONFIG.objective, advantage="batch")), redness)
    # one picture a call: decoders round by shape, and a pixel that comes out another moves a reward
    single = replace(CONFIG, sampling=replace(CONFIG.sampling, microbatch=1))
    cases["gdpo"] = (replace(single, objective=replace(CONFIG.objective, advantage="gdpo")), redness)
    cases["probe"] = (replace(CONFIG, preview=PreviewSettings(probe=True, probe_threshold=-1), audit=AuditSettings(every=1)), redness)
    cases["failing"] = (CONFIG, Failing(middle))
    together = replace(CONFIG, prompts=PromptSettings(per_iteration=3, split_groups=True))
    cases["split"] = (together, redness)
    twice = OptimSettings(updates_per_rollout=2, microbatch=5)
    cases["shard"] = (replace(CONFIG, model=replace(CONFIG.model, shard=True), optim=twice), redness)
    full = replace(CONFIG, model=replace(CONFIG.model, shard=True, weights="full"), objective=NFT)
    cases["full shard"] = (replace(full, optim=OptimSettings(lr=1e-4, updates_per_rollout=2, ema_decay=0.5, microbatch=7)), Failing(middle))
    five = replace(CONFIG, prompts=PromptSettings(per_iteration=5))  # on three: 2, 2 and 1
    cases["five"] = (replace(five, optim=OptimSettings(updates_per_rollout=2)), redness)
    cases["five shard"] = (replace(five, model=replace(CONFIG.model, shard=True), optim=twice), Failing(middle))
    few = replace(together, prompts=PromptSettings(per_iteration=1, split_groups=True), plan=PlanSettings("custom", group_size=5, prune=((1, 2),)))
    cases["few"] = (few, redness)  # on three: one has nobody
    cases["split batch"] = (replace(together, objective=replace(CONFIG.objective, advantage="batch")), redness)
    if ranks.world == 3:
        cases = {name: cases[name] for name in ("five", "five shard", "split", "few")}
    for name, (config, reward) in cases.items():
        survivors, records, weights = trained(model, config, reward)
        found[name] = {"survivors": survivors, "records": records}
        save_file(weights, out / f"{name} {ranks.rank}.safetensors")
    found["world"] = ranks.world
    found["decayed"] = decayed(ranks)
    if ranks.world < 3:
        by_the_library(model, out, found, ranks)
    (out / f"found {ranks.rank}.json").write_text(json.dumps(found))
    ranks.wait_for_all()  # as a run does, or gloo may abort one at its end


def decayed(ranks):
    """Three weights after a step with weight decay: two items reached the first, one the second, and none the third."""
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    for item in ranks.deal(2).tolist():
        sum(weights[:1 if item else 2]).sum().backward()
    ranks.sum_gradients(weights)
    torch.optim.AdamW(weights, lr=0.1, weight_decay=0.5).step()
    return [weight.tolist() for weight in weights]


def by_the_library(model, out, found, ranks):
    mine = out / f"run of {ranks.rank}"
    tracked = replace(CONFIG, tracking=TrackingSettings(("tensorboard",)))
    progrpo.train(DiffusionPipeline.from_pretrained(model), PROMPTS, redness, config=tracked, out=mine)
    found["wrote"] = mine.exists()
    found["event files"] = len(list(out.glob("*/tensorboard/events*")))
    try:
        progrpo.train(DiffusionPipeline.from_pretrained(model), PROMPTS, redness, config=CONFIG, out=mine)
    except ValueError as error:
        found["taken"] = str(error)
    if ranks.world == 2:
        found["unequal"] = unequal(model, out / "unequal", ranks)
    try:
        trained(model, replace(CONFIG, prompts=PromptSettings(per_iteration=1)), redness)
    except ValueError as error:
        found["too few"] = str(error)


def unequal(model, out, ranks):
    """What is said where the second process has other prompts, other weights or another configuration than the first."""
    second, pipeline = ranks.rank == 1, DiffusionPipeline.from_pretrained(model)
    other = replace(CONFIG, optim=OptimSettings(lr=0.5))
    calls = {
        "training": (PROMPTS[::-1] if second else PROMPTS, {}),
        "evaluation": (PROMPTS, {"eval_prompts": ["a" if second else "b"]}),
        "configuration": (PROMPTS, {"config": other if second else CONFIG}),
        "resume": (PROMPTS, {"resume": second}),
        "weights": (PROMPTS, {}),
    }
    said = {}
    for name, (prompts, options) in calls.items():
        if name == "weights" and second:  # as a text encoder that is not in the files gets random ones
            pipeline.text_encoder_2.get_input_embeddings().weight.data.normal_()
        try:
            progrpo.train(pipeline, prompts, redness, out=out, **{"config": CONFIG, **options})
        except ValueError as error:
            said[name] = str(error)
    return {**said, "wrote": out.exists()}


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
'''
WHOLE = ("updates 1", "updates 2", "batch", "gdpo", "probe", "failing", "shard", "full shard")
CASES = (*WHOLE, "split", "split batch")
LR = OptimSettings().lr  # the most of all cases
OF_THREE = ("five", "five shard", "split", "few")


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("script") / "script.py"
    file.write_text(SCRIPT)
    return file


def started(world: int, script: Path, model: Path, out: Path) -> Path:
    """What so many processes left."""
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
        command = [sys.executable, str(script), str(model), str(out)]
        processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * world, "\n".join((out / f"log {rank}").read_text()[-2000:] for rank in range(world))
    return out


@pytest.fixture(scope="module")
def two(script, tiny_sd3, tmp_path_factory) -> Path:
    return started(2, script, tiny_sd3, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(script, tiny_sd3, tmp_path_factory) -> Path:
    return started(3, script, tiny_sd3, tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def one(script, tiny_sd3, tmp_path_factory) -> Path:
    """What one process left."""
    out = tmp_path_factory.mktemp("one")
    runpy.run_path(str(script))["work"](str(tiny_sd3), out)
    return out


def found(out: Path, rank: int) -> dict[str, Any]:
    return json.loads((out / f"found {rank}.json").read_text())


def test_there_were_two_and_one(one, two):
    assert [found(two, 0)["world"], found(two, 1)["world"], found(one, 0)["world"]] == [2, 2, 1]


@pytest.mark.parametrize("case", CASES)
def test_the_same_members_survive(one, two, case):
    first, second = (found(two, rank)[case]["survivors"] for rank in (0, 1))
    if case in WHOLE:
        assert {slot for _, slot, _ in first} == {0, 2} and {slot for _, slot, _ in second} == {1}
    else:  # each has some of every group
        assert len(first) and len(second) and abs(len(first) - len(second)) <= 2 * 3
    assert sorted(first + second) == sorted(found(one, 0)[case]["survivors"])


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
    for ours, theirs in zip(found(two, 0)[case]["records"], found(one, 0)[case]["records"], strict=True):
        assert ours.keys() == theirs.keys()
        rounding = {"seconds", "update/ratio_max_deviation", "update/loss"}
        own_part = set() if case in WHOLE else {"rollout/diversity"}  # of a group's members in one process
        for name in ours.keys() - rounding - own_part:
            if not name.startswith("time/"):
                expected = theirs[name]  # None: a rank correlation of constant rewards
                assert ours[name] == (expected if expected is None else pytest.approx(expected, rel=1e-3, abs=1e-6)), (
                    name
                )


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_THREE)
def test_three_do_what_one_does(one, three, case, assert_trained_alike):
    parts, whole = [found(three, rank)[case] for rank in range(3)], found(one, 0)[case]
    assert sorted(member for part in parts for member in part["survivors"]) == sorted(whole["survivors"])
    expected = load_file(one / f"{case} 0.safetensors")
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
    first, second, third = found(one, 0)["decayed"]
    assert first == second and first != third == [1.0, 1.0]
    assert found(two, 0)["decayed"] == found(two, 1)["decayed"] == [first, second, third]


def test_only_the_main_process_writes(one, two):
    assert [found(two, rank)["wrote"] for rank in (0, 1)] == [True, False]
    assert found(two, 0)["event files"] == 1
    runs = (two / "run of 0", one / "run of 0")
    ours, theirs = ({p.relative_to(run) for p in run.rglob("*") if ".tfevents." not in p.name} for run in runs)
    assert ours == theirs


def test_what_the_main_process_alone_finds_wrong_is_refused_in_all(two):
    assert [found(two, rank)["taken"] for rank in (0, 1)] == [
        f"{two / 'run of 0'} already holds a run (config.json); resume it with progrpo.train(..., out={str(two / 'run of 0')!r}, resume=True),"
        " replace it with --overwrite (in Python overwrite=True), or give another folder as --out (out)"
    ] * 2


def test_what_must_be_equal_and_is_not_is_refused_in_all_by_its_name(two):
    said = found(two, 0)["unequal"]
    assert found(two, 1)["unequal"] == said and said.pop("wrote") is False
    assert said["training"].startswith("the list of training prompts must be the same in all processes, and is ")
    assert "(it begins with 'red cat') in process 0" in said["training"]
    assert "(it begins with 'green bird') in process 1; give all the same prompts" in said["training"]
    assert said["evaluation"].startswith("the list of evaluation prompts must be the same in all processes")
    assert said["configuration"] == (
        "optim.lr must be the same in all processes, and is 0.001 in process 0 and 0.5 in process 1; give all the same configuration"
    )
    assert said["resume"].startswith("resume must be the same in all processes, and is False in process 0 and True")
    assert said["weights"].startswith("the weights of text_encoder_2 must be the same in all processes")


def test_a_process_without_a_prompt_is_refused(two):
    expected = "prompts.per_iteration is 1, fewer than the 2 processes; give each at least one,"
    expected += " or have them share the groups (prompts.split_groups)"
    assert [found(two, rank)["too few"] for rank in (0, 1)] == [expected, expected]
