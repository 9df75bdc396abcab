"""The work of one process of several, for tests/invariant/test_processes.py.

`python -m tests.support.processes MODEL OUT CASES` trains each case and writes what it kept. Beside the case
`updates 1` it also calls the library.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import progrpo
from progrpo.config import (
    AuditSettings,
    CheckpointSettings,
    Config,
    EvalSettings,
    NFTSettings,
    ObjectiveSettings,
    OptimSettings,
    PlanSettings,
    PreviewSettings,
    PromptSettings,
    SamplingSettings,
    TrackingSettings,
)
from progrpo.policies.base import PolicyContext
from progrpo.policies.load import policy_from_pipeline
from progrpo.policies.settings import ModelSettings
from progrpo.policies.sharded import gathered
from progrpo.prompts.order import InTurn
from progrpo.rewards.function import FunctionReward
from progrpo.training.distributed import Ranks
from progrpo.training.trainer import Trainer
from progrpo.types import Prompt
from tests.support.rewards import mixture_of_one
from tests.support.runs import load_pipeline

torch.set_num_threads(1)
PROMPTS = ("red cat", "blue dog", "green bird")
CONFIG = Config(
    iterations=2,
    model=ModelSettings(lora_rank=2, lora_alpha=4, max_sequence_length=8),
    prompts=PromptSettings(per_iteration=3),
    sampling=SamplingSettings(num_inference_steps=3, microbatch=5),
    plan=PlanSettings("custom", group_size=5, prune=((1, 4),), final_keep=3),
    audit=AuditSettings(every=2),
    eval=EvalSettings(pictures=1, num_inference_steps=2),
    checkpoint=CheckpointSettings(every=1),
)
NFT = ObjectiveSettings(
    name="nft", nft=NFTSettings(kl_beta=0.01)
)  # calls by three sets of weights for each of the items


def recorded():
    """The prompts as pairs of pictures: a clear preference, a tie, and a split vote of twice the strength."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(6)]
    votes = zip(PROMPTS, images[::2], images[1::2], (1.0, 0.5, 0.25), (1.0, 1.0, 2.0), strict=True)
    names = ("image_a", "image_b", "preference", "strength")
    return tuple(Prompt(text, dict(zip(names, pair, strict=True))) for text, *pair in votes)


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
        return [None if p == self.prompt else r for p, r in zip(prompts, redness(images, prompts), strict=True)]


def trained(model, config, reward):
    """Survivors, records and audits of each iteration, and the weights in the end."""
    context = PolicyContext(world_size=Ranks().world)
    policy: Any = policy_from_pipeline(load_pipeline(model), config.model, context)
    policy.batch_invariant = not config.model.shard  # as on GPUs
    order = InTurn({"": recorded() if config.prompts.pairs else tuple(map(Prompt, PROMPTS))}, config.seed)
    trainer = Trainer(config, policy, mixture_of_one(FunctionReward(reward)), order, Ranks())
    survivors, records, audited = [], [], []
    for i in range(config.iterations):
        done = trainer.step()
        living = done.rollout.trajectories
        survivors += [[i, s, m] for s, m in zip(living.slot_N.tolist(), living.member_N.tolist(), strict=True)]
        records.append(done.record)
        if done.audit is not None:
            audited.append({"prompt": done.audit.prompt.text, "final": done.audit.final_G.tolist()})
    trainer.check_frozen()
    full, shard = config.model.weights == "full", config.model.shard and Ranks().world > 1
    for name, p in policy.denoiser.named_parameters():
        assert isinstance(p, DTensor) == (shard and (full or not p.requires_grad)), name
        assert not isinstance(p, DTensor) or p.to_local().numel() < p.numel(), name
    result = {"survivors": survivors, "records": records, "audited": audited}
    return result, {name: gathered(p.detach()).clone() for name, p in policy.trainable.items()}


def work(model, out, names):
    ranks = Ranks()
    results: dict[str, Any] = {}
    middle = InTurn({"": tuple(map(Prompt, PROMPTS))}, 0).prompts_for(0, 2)[1].text
    # one picture a call: decoders round by shape, and a pixel that comes out another moves a reward
    single = replace(CONFIG, sampling=replace(CONFIG.sampling, microbatch=1))
    cases = {f"updates {n}": (replace(single, optim=OptimSettings(updates_per_rollout=n)), redness) for n in (1, 2)}
    cases["batch"] = (replace(CONFIG, objective=replace(CONFIG.objective, advantage="batch")), redness)
    cases["gdpo"] = (replace(single, objective=replace(CONFIG.objective, advantage="gdpo")), redness)
    cases["probe"] = (
        replace(single, preview=PreviewSettings(probe=True, probe_threshold=-1), audit=AuditSettings(every=1)),
        redness,
    )
    cases["watched"] = (
        replace(single, plan=PlanSettings("custom", group_size=5), audit=AuditSettings(every=1)),
        redness,
    )
    cases["failing"] = (CONFIG, Failing(middle))
    together = replace(CONFIG, prompts=PromptSettings(per_iteration=3, split_groups=True))
    cases["split"] = (replace(together, sampling=single.sampling), redness)
    twice = OptimSettings(updates_per_rollout=2, microbatch=5)
    cases["shard"] = (replace(CONFIG, model=replace(CONFIG.model, shard=True), optim=twice), redness)
    full = replace(CONFIG, model=replace(CONFIG.model, shard=True, weights="full"), objective=NFT)
    cases["full shard"] = (
        replace(full, optim=OptimSettings(lr=1e-4, updates_per_rollout=2, ema_decay=0.5, microbatch=7)),
        Failing(middle),
    )
    five = replace(CONFIG, prompts=PromptSettings(per_iteration=5))  # on three: 2, 2 and 1
    cases["five"] = (replace(five, optim=OptimSettings(updates_per_rollout=2)), redness)
    cases["five shard"] = (replace(five, model=replace(CONFIG.model, shard=True), optim=twice), Failing(middle))
    few = replace(
        together,
        prompts=PromptSettings(per_iteration=1, split_groups=True),
        plan=PlanSettings("custom", group_size=5, prune=((1, 2),)),
    )
    cases["few"] = (few, redness)  # on three: one has nobody
    by_batch = replace(together, objective=replace(CONFIG.objective, advantage="batch"))
    cases["split batch"] = (replace(by_batch, optim=OptimSettings(updates_per_rollout=2)), redness)
    # on two: one has nobody left
    cases["groups"] = (replace(single, plan=replace(CONFIG.plan, prune=((0, 4), (1, 3)), keep_groups=1)), redness)
    some = replace(five, plan=replace(CONFIG.plan, keep_groups=2), optim=OptimSettings(updates_per_rollout=2))
    cases["groups by dgpo"] = (replace(some, objective=ObjectiveSettings(name="dgpo")), redness)
    cases["groups shard"] = (replace(some, model=replace(CONFIG.model, shard=True), optim=twice), redness)
    on_pairs = replace(
        CONFIG, prompts=PromptSettings(per_iteration=3, pairs="recorded"), objective=ObjectiveSettings(name="dpo")
    )
    cases["pairs"] = (on_pairs, redness)
    for name in names:
        config, reward = cases[name]
        results[name], weights = trained(model, config, reward)
        save_file(weights, out / f"{name} {ranks.rank}.safetensors")
    results["world"] = ranks.world
    results["decayed"] = decayed(ranks)
    if "updates 1" in names:
        by_the_library(model, out, results, ranks)
    (out / f"results {ranks.rank}.json").write_text(json.dumps(results))
    ranks.wait_for_all()  # as a run does, or gloo may abort one at its end


def decayed(ranks):
    """Three weights after a step with weight decay: two items reached the first, one the second, and none the third."""
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    for item in ranks.deal(2).tolist():
        torch.cat([*weights[: 1 if item else 2]]).sum().backward()
    ranks.sum_gradients(weights)
    torch.optim.AdamW(weights, lr=0.1, weight_decay=0.5).step()
    return [weight.tolist() for weight in weights]


def by_the_library(model, out, results, ranks):
    mine = out / f"run of {ranks.rank}"
    tracked = replace(CONFIG, tracking=TrackingSettings(("tensorboard",)))
    progrpo.train(load_pipeline(model), PROMPTS, redness, config=tracked, out=mine)
    results["wrote"] = mine.exists()
    results["event files"] = len(list(out.glob("*/tensorboard/events*")))
    try:
        progrpo.train(load_pipeline(model), PROMPTS, redness, config=CONFIG, out=mine)
    except ValueError as error:
        results["taken"] = str(error)
    if ranks.world == 2:
        results["unequal"] = unequal(model, out / "unequal", ranks)
    try:
        trained(model, replace(CONFIG, prompts=PromptSettings(per_iteration=1)), redness)
    except ValueError as error:
        results["too few"] = str(error)


def unequal(model, out, ranks):
    """The refusals where the second process has other prompts, weights or another configuration than the first."""
    second, pipeline = ranks.rank == 1, load_pipeline(model)
    other = replace(CONFIG, optim=OptimSettings(lr=0.5))
    calls: dict[str, tuple[Any, dict[str, Any]]] = {
        "training": (PROMPTS[::-1] if second else PROMPTS, {}),
        "evaluation": ({"train": PROMPTS, "test": ["a" if second else "b"]}, {}),
        "configuration": (PROMPTS, {"config": other if second else CONFIG}),
        "mode": (PROMPTS, {"mode": "resume" if second else "new"}),
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
    work(sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(","))
