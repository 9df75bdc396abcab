"""Inputs that all processes must have alike. The messages where they differ: tests/invariant/test_processes.py."""

from __future__ import annotations

from dataclasses import replace

from progrpo.config import (
    Config,
    EvalSettings,
    ModelSettings,
    OptimSettings,
    PromptSettings,
    RewardSettings,
    RewardTerm,
)
from progrpo.training.equal_inputs import comparable


def test_places_may_differ_by_machine_and_all_else_may_not():
    term = RewardTerm("pickscore", device="cuda:0", cache="a")
    config = Config(reward=RewardSettings((term,)), eval=EvalSettings(rewards=(term,)))
    other = replace(term, device="cuda:1", cache="b", url="http://localhost:8001")
    elsewhere = replace(
        config,
        model=ModelSettings("/scratch/1/model"),
        prompts=PromptSettings(source="/scratch/1/prompts.txt"),
        reward=RewardSettings((other,)),
        eval=EvalSettings(prompts="/scratch/1/eval.txt", rewards=(other,)),
    )
    assert comparable(config) == comparable(elsewhere)
    for changed in (
        replace(config, optim=OptimSettings(lr=0.5)),
        replace(config, seed=1),
        replace(config, model=ModelSettings(dtype="auto")),
        replace(config, reward=RewardSettings((replace(term, weight=2.0),))),
        replace(config, eval=EvalSettings(rewards=())),
    ):
        assert comparable(changed) != comparable(config)
