"""Recipes, configurations made by Python, config files, and other frameworks' settings."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from progrpo.checks import check
from progrpo.config import Config, config_from_json, config_to_json, from_dict, plan_costs, resolve_plan, to_dict
from progrpo.imports.flow_factory.read import import_flow_factory
from progrpo.imports.flow_grpo.read import import_flow_grpo
from progrpo.recipes import RECIPES, load_recipe
from progrpo.rewards.settings import REWARDS, RewardTerm
from progrpo.settings import field_paths
from tests.mutation.cases import DEEP, FIELDS, JUNK, WORDS, Case, damaged, mutate


def term(rng: random.Random) -> Any:
    """A reward as a recipe may name one, and as none should."""
    names = (*REWARDS, "module:function", "m:", ":f", "shapess", "", "a:b:c")
    fields = {f.name: rng.choice((*JUNK, *names)) for f in dataclasses.fields(RewardTerm) if rng.random() < 0.15}
    return rng.choice(
        (rng.choice(names), f"{rng.choice(WORDS)}*{rng.choice(names)}", {"name": rng.choice(names), **fields})
    )


def shuffle_plan(data: Any, rng: random.Random) -> None:
    """Numbers of a plan, a grid and a window that may or may not go together."""
    small = partial(rng.randint, -1, 12)
    points = [[small(), small()] for _ in range(rng.randint(0, 3))]
    data["plan"] |= {"preset": rng.choice(("custom", "custom", "standard", "flash", "sd14")), "group_size": small()}
    data["plan"] |= {"prune": points, "final_keep": rng.choice((None, small()))}
    data["sampling"] |= {
        "num_inference_steps": small(),
        "sde_window": rng.choice(("first", "sliding", "random", "all", "none")),
    }
    data["sampling"] |= {"sde_window_size": small(), "sde_window_end": rng.choice((None, small()))}


def use(config: Config) -> None:
    """Use a configuration as a run does before it loads a model."""
    check(config)
    assert config_from_json(config_to_json(config)) == from_dict(to_dict(config)), (
        "an accepted configuration survives JSON"
    )
    plan_costs(config, resolve_plan(config))


def recipe_case(rng: random.Random, work: Path) -> Case:
    data = json.loads(config_to_json(RECIPES[rng.choice(list(RECIPES))]()))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        act = rng.random()
        if act < 0.15:
            shuffle_plan(data, rng)
        elif act < 0.3:
            data["reward"]["terms" if rng.random() < 0.9 else "term"] = [term(rng) for _ in range(rng.randint(0, 3))]
        else:
            data = mutate(data, rng)
        if not isinstance(data, dict) or not {"plan", "sampling", "reward"} <= data.keys():
            break
        if not all(isinstance(data[name], dict) for name in ("plan", "sampling", "reward")):
            break
    text = json.dumps(data)
    if rng.random() < 0.05:
        text = text[: rng.randrange(len(text))] + rng.choice(("", DEEP, "}", '"seed": 1, "seed": 2}'))
    return Case("recipe", text, lambda: use(config_from_json(text)))


def python_case(rng: random.Random, work: Path) -> Case:
    """A configuration that Python code made: no JSON reader stood before it."""
    config: Any = RECIPES[rng.choice(list(RECIPES))]()
    path, more = (
        rng.choice([*field_paths(Config), "sampling", "reward", "objective.nft"]),
        (object(), len, Config, b"x", {1, 2}),
    )
    junk = rng.choice((*JUNK, *more, {"terms": ["shapes"]}, [RewardTerm("shapes")], (RewardTerm("ocr", math.nan),)))

    def changed(part: Any, names: Sequence[str]) -> Any:
        value = junk if len(names) == 1 else changed(getattr(part, names[0]), names[1:])
        return dataclasses.replace(part, **{names[0]: value})

    whole = rng.random() < 0.02
    return Case("python", f"{path} = {junk!r:.200}", lambda: use(junk if whole else changed(config, path.split("."))))


def config_file_case(rng: random.Random, work: Path) -> Case:
    content = damaged(config_to_json(RECIPES[rng.choice(list(RECIPES))]()).encode(), rng)
    folder = work / "stranger"

    def read() -> None:
        folder.mkdir()
        try:
            (folder / "config.json").write_bytes(content)
            use(load_recipe(str(rng.choice((folder, folder / "config.json")))))
        finally:
            shutil.rmtree(folder)

    return Case("config file", f"{content[:200]!r}", read, (str(folder / "config.json"), *FIELDS))


SETTINGS = {
    ".yaml": b"""model: {finetune_type: lora, lora_rank: 8, model_name_or_path: m}
train: {trainer_type: grpo, group_size: 4, clip_range: 1e-4, resolution: [64, 64], guidance_scale: 4.5}
scheduler: {dynamics_type: CPS, num_sde_steps: 2, sde_steps: [0, 1, 2]}
rewards: [{reward_model: OCR, weight: 0.5}, {reward_model: a.b.C}]
""",
    ".py": b"""import ml_collections
def f(gpu_number=2):
    config = ml_collections.ConfigDict()
    config.sample = sample = ml_collections.ConfigDict({"num_steps": 10, "train_batch_size": 4})
    sample.num_image_per_prompt, sample.num_batches_per_epoch = 8, int(8 / gpu_number)
    config.reward_fn = {"ocr": 1.0, "deqa": 0.5} if gpu_number > 1 else {}
    config.run_name = f"a-{gpu_number}"
    return config
""",
}


def settings_file_case(rng: random.Random, work: Path) -> Case:
    """Another framework's settings, for `progrpo import`."""
    suffix = rng.choice(list(SETTINGS))
    file, content = (
        work / f"stranger{suffix}",
        SETTINGS[suffix] if rng.random() < 0.1 else damaged(SETTINGS[suffix], rng),
    )

    def read() -> None:
        file.write_bytes(content)
        try:
            use((import_flow_factory(str(file)) if suffix == ".yaml" else import_flow_grpo(f"{file}:f")).config)
        finally:
            file.unlink()

    return Case("settings file", f"{suffix} {content[:200]!r}", read, (str(file),))
