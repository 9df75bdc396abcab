"""Calls of the library."""

from __future__ import annotations

import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from progrpo.policies.base import Policy
from progrpo.policies.load import load_policy
from progrpo.policies.settings import ModelSettings
from progrpo.prompts.load import load_prompts
from tests.mutation.cases import FIELDS, JUNK, WORDS, Case, damaged


@cache
def built_in_policy() -> Policy:
    """The built-in model, loaded once: training is cut off before anything changes it."""
    return load_policy(ModelSettings("shapes-flow"))


def library_case(rng: random.Random, work: Path) -> Case:
    import progrpo
    from progrpo.rewards.load import load_reward
    from progrpo.rewards.settings import RewardTerm
    from progrpo.storage import load_state, save_state

    junk = rng.choice(
        (*JUNK, len, object(), b"x", ["a", 3], [""], ["a"], [{"prompt": "a"}], [{"text": "a"}], "a red cat")
    )
    act = rng.choice(
        ("prompts", "test", "reward", "config", "mode", "pipeline", "load_prompts", "load_reward", "load_state")
    )
    if act == "load_prompts":
        source = rng.choice([j for j in (*JUNK, *WORDS) if isinstance(j, str)])
        return Case("library", f"load_prompts({source!r:.100})", lambda: load_prompts(source), ("prompt",))
    if act == "load_reward":
        name = rng.choice([j for j in (*JUNK, *WORDS) if isinstance(j, str)])
        return Case("library", f"load_reward({name!r:.100})", lambda: load_reward(RewardTerm(name)), ("reward",))
    if act == "load_state":
        folder, number = work / "state", rng.randrange(3)

        def read() -> None:
            import torch

            save_state(folder, {"a": torch.arange(9.0), "b": {"c": [1, None, "x"]}})
            file = sorted(folder.iterdir())[number]
            file.write_bytes(damaged(file.read_bytes(), rng))
            try:
                load_state(folder)
            finally:
                shutil.rmtree(folder)

        return Case("library", f"load_state, file {number}", read, (str(folder),))
    given: dict[str, Any] = {
        "prompts": ["a"],
        "reward": lambda images, prompts: [0.0] * len(images),
        "out": work / "never",
    }
    given["pipeline"] = None
    if act == "mode":
        junk = rng.choice((junk, "new", "overwrite", "resume"))
    if act == "test":
        given["prompts"] = {"train": ["a"], "test": junk}
    else:
        given[act] = junk

    def call() -> None:
        with pytest.MonkeyPatch.context() as patch:
            if act != "pipeline":
                policy = built_in_policy()  # before the patch, which would stand in its own way
                patch.setattr("progrpo.policies.load.policy_from_pipeline", lambda *_: policy)
            progrpo.train(**given)

    return Case("library", f"train({act}={junk!r:.100})", call, (*FIELDS, "prompts", "reward", "pipeline", "mode"))
