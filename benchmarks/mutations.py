"""Bad input by the thousand: `python benchmarks/mutations.py [--seed 0] [--cases 5000] [--processes 24] [--json]`.

Recipes, arguments, library calls, files and models, each mutated at random or damaged on purpose. A case is accepted (a mutation
may be harmless), or refused by one sentence that names a field, an option or a file: a ValueError of the library, exit code 2 of the
command line. Goals: 0 tracebacks, 0 unclear sentences, 0 files left by what was refused. What costs time is cut off where it would
begin: training and sampling at their model. `--processes` cases run in processes of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from progrpo.cli import COMMANDS, main
from progrpo.config import (
    Config,
    RewardTerm,
    check,
    config_from_json,
    config_to_json,
    field_paths,
    from_dict,
    resolve_plan,
    to_dict,
    trained_items,
)
from progrpo.imports.flow_factory import import_flow_factory
from progrpo.imports.flow_grpo import import_flow_grpo
from progrpo.prompts.load import load_prompts
from progrpo.recipes import RECIPES, load_recipe
from progrpo.rewards.settings import REWARDS
from progrpo.rollout.plan import summary

LONGEST = 1500  # characters of a sentence
DEEP = "[" * 100_000
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.5, 1.0, 1e308, 5e-324),
    *(math.nan, math.inf, -math.inf),
    *(
        "",
        " ",
        "nan",
        "1",
        "none",
        "a" * 100_000,
        "a\nb",
        "\0",
        "\ud800",
        "\u2028",
        "😀",
        "../../x",
        "/dev/null",
        "a:b",
        "*",
    ),
    *([], [[]], {}, {"a": 1}, [1, 2, 3], [[3, 4], [3, 4]], [[5, 4], [3, 2]], [[99, 2]], [[1, 99]], ["shapes"], [None]),
)
WORDS = (
    "",
    " ",
    "-1",
    "0",
    "1",
    "2",
    "nan",
    "inf",
    "1e999",
    "9" * 5000,
    "x" * 100_000,
    "a\nb",
    "😀",
    "\udcff",
    "--",
    "-",
    "=",
)
WORDS += (
    "--help=1",
    "--nope",
    "--seed",
    "--seed=x",
    "--plan.prune",
    "none",
    "None",
    "true",
    "{",
    "{}",
    "[]",
    '{"name": 3}',
    "2*",
)
WORDS += (
    "x*ocr",
    "shapes",
    "nan*shapes",
    "no.such:thing",
    ".:x",
    "a..b:c",
    "os:path",
    "~nobody/x",
    "/",
    "/dev/null",
    ".",
    "null",
)
SHARES = {
    "recipe": 0.41,
    "python": 0.2,
    "arguments": 0.2,
    "prompts": 0.06,
    "config file": 0.04,
    "settings file": 0.03,
    "library": 0.03,
    "run": 0.03,
}


@dataclass(frozen=True)
class Case:
    kind: str
    tried: str
    run: Callable[[], object]
    names: tuple[str, ...] = ()
    """A refusal holds one of these; without any, the name of a field."""


class Reached(Exception):
    """Checks are passed, and the work would begin."""


def outcome(case: Case) -> tuple[str, str]:
    """`accepted`, `refused`, `unclear` or `traceback`, and the sentence."""
    try:
        case.run()
    except Reached:
        return "accepted", ""
    except ValueError as error:
        sentence = str(error)
        clear = sentence.isprintable() and len(sentence) <= LONGEST
        named = any(name in sentence for name in case.names or _FIELDS)
        return ("refused" if clear and named else "unclear"), sentence
    except (Exception, SystemExit) as error:
        return "traceback", f"{type(error).__name__}: {error}"
    return "accepted", ""


_FIELDS = tuple(
    {part for path in field_paths() for part in path.split(".")} | {"is not a field", "configuration", "JSON"}
)


# --- recipes ----------------------------------------------------------------------------------------------------------


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every part of JSON data, as the way to it."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def mutate(data: Any, rng: random.Random) -> Any:
    """The same JSON data with something wrong in one place, most likely."""
    way = rng.choice([p for p in places(data) if p] or [()])
    if not way:
        return rng.choice(JUNK)
    parent = data
    for key in way[:-1]:
        parent = parent[key]
    value, act = parent[way[-1]], rng.randrange(8)
    if act == 0:
        parent.pop(way[-1])
    elif act == 1 and isinstance(parent, dict):
        parent[str(way[-1])[1:] + rng.choice(("", "s", "\n", "😀"))] = value  # a mistyped name
    elif act == 2:
        parent[way[-1]] = [value]
    elif act == 3:
        parent[way[-1]] = {"name": value, str(way[-1]): value}
    elif act == 4 and isinstance(value, int | float):
        parent[way[-1]] = value * rng.choice((-1, 0, 0.5, 2, 1000, 10**6, 10**18, 1e300))
    elif act == 5 and isinstance(value, str):
        parent[way[-1]] = value[: len(value) // 2] + rng.choice(("", "x", "\0", "*", ":"))
    else:
        parent[way[-1]] = rng.choice(JUNK)
    return data


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
    """What a run does with its configuration before it loads a model."""
    check(config)
    assert config_from_json(config_to_json(config)) == from_dict(to_dict(config)), (
        "an accepted configuration survives JSON"
    )
    steps, guided = config.sampling.num_inference_steps, config.sampling.guidance_scale > 1
    summary(resolve_plan(config), steps, trained_items(config), guided, config.preview.ode_steps)


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
        rng.choice([*field_paths(), "sampling", "reward", "objective.nft"]),
        (object(), len, Config, b"x", {1, 2}),
    )
    junk = rng.choice((*JUNK, *more, {"terms": ["shapes"]}, [RewardTerm("shapes")], (RewardTerm("ocr", math.nan),)))

    def changed(part: Any, names: Sequence[str]) -> Any:
        value = junk if len(names) == 1 else changed(getattr(part, names[0]), names[1:])
        return dataclasses.replace(part, **{names[0]: value})

    whole = rng.random() < 0.02
    return Case("python", f"{path} = {junk!r:.200}", lambda: use(junk if whole else changed(config, path.split("."))))


# --- the command line -------------------------------------------------------------------------------------------------

LINES = (
    *("train smoke", "train smoke --iterations 2 --seed 3 --out o", "train --resume o --iterations 3", "train no.json"),
    *("train quickstart --plan.preset flash --optim.lr 1e-3", "train smoke --plan.prune 1 4 3 3 --plan.preset custom"),
    *("train smoke --reward.terms shapes 0.5*jpeg_compressibility", "train smoke --prompts.source p.txt --overwrite"),
    *("train sd3 --eval.rewards shapes_strict --sampling.microbatch None", "train smoke --optim.betas 0.9 0.99"),
    *(
        "plan sd3 --plan flash --json",
        "plan smoke --num-inference-steps 8 --guidance-scale 2",
        "recipes",
        "recipes sd3",
    ),
    *("sample shapes-flow --prompt cat dog --count 2 --out s", "sample shapes-flow --prompt a --lora l --seed 1"),
    *("eval shapes-flow --reward shapes --pictures 4 --json", "eval shapes-flow --prompts p.txt --split validation"),
    *(
        "report o",
        "repro table4 --json",
        "pretrain shapes-flow --out o --vae-steps 3",
        "pretrain shapes-tiny --device cpu",
    ),
    *("import flow_grpo p.py:f --gpus 8 --out i.json", "import flow-factory p.txt --overwrite"),
    *("serve-reward shapes --port 0 --host 127.0.0.1", "--version", "--help"),
)


def arguments(rng: random.Random) -> list[str]:
    words = rng.choice(LINES).split()
    for _ in range(rng.choice((1, 1, 2, 3))):
        place, act = rng.randrange(len(words) + 1), rng.randrange(7)
        flag = "--" + rng.choice(field_paths()).replace("_", "-")
        if act == 0:
            words.insert(place, rng.choice(WORDS))
        elif act == 1:
            words[place : place + 1] = [rng.choice(WORDS)]
        elif act == 2:
            del words[place : place + rng.randint(1, 2)]
        elif act == 3:
            words += words[place : place + 2]  # a repeated flag
        elif act == 4:
            words += [flag, rng.choice(WORDS)]
        elif act == 5:
            words += [f"{flag}={rng.choice(WORDS)}"]
        else:
            words[place : place + 1] = [word[:-1] for word in words[place : place + 1]]
    return words


def command(words: Sequence[str]) -> None:
    """Run a command line as a user does. ValueError for exit code 2 and nothing but its sentence on stderr."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
    sentence = re.fullmatch(r"progrpo: error: (.*)\n", said.getvalue())
    if code == 2 and sentence:
        raise ValueError(sentence[1])
    assert code == 0 and not said.getvalue(), f"exit code {code}: {said.getvalue()[:2000]}"


def arguments_case(rng: random.Random, work: Path) -> Case:
    words = arguments(rng)
    options = ("--", "argument", "comes first", "does not take", "is no ", "Missing", "given twice", *COMMANDS)
    return Case("arguments", " ".join(words)[:500], lambda: command(words), (*_FIELDS, *options))


@contextlib.contextmanager
def cut_off() -> Iterator[None]:
    """Models are not loaded, and what comes after them is not done: whoever asks has passed every check before that."""
    import progrpo.training.run
    import progrpo.zoo.shapes.pretrain_diffusion
    import progrpo.zoo.shapes.pretrain_tiny  # noqa: F401

    ends = (
        "training.run.policy_from",
        "training.run.measured",
        "training.evaluate.trained_policy",
        "rewards.server.serve",
    )
    ends += (
        "training.sample.trained_policy",
        *(f"zoo.shapes.pretrain{n}.pretrain{n}" for n in ("", "_diffusion", "_tiny")),
    )
    with contextlib.ExitStack() as stack:
        for end in ends:
            stack.enter_context(mock.patch(f"progrpo.{end}", side_effect=Reached))
        stack.enter_context(mock.patch("progrpo.training.build.fastest_dtype", return_value="float32"))
        yield


# --- files ------------------------------------------------------------------------------------------------------------


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A file's bytes cut, flipped, encoded anew, or with something in them."""
    place, act = rng.randrange(len(content) + 1), rng.randrange(8)
    text = content.decode("utf-8", "replace")
    more = (
        b"\0",
        b"\xff",
        b"\r",
        b"\r\n",
        b"\xef\xbb\xbf",
        b"{",
        b'"',
        b"\xe2\x80\xa8",
        b"\n" * 1000,
        b"x" * 2_000_000,
        DEEP.encode(),
    )
    choices: tuple[Callable[[], bytes], ...] = (
        lambda: content[:place],
        lambda: content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :],
        lambda: content[:place] + rng.choice(more) + content[place:],
        lambda: text.encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7"))),
        lambda: content.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\0"))),
        lambda: b"",
        lambda: content * 3,
        lambda: bytes(rng.randrange(256) for _ in range(64)),
    )
    return choices[act]()


ROWS = (
    '{"prompt": "a red cat", "n": 1}',
    '{"prompt": "two dogs"}',
    '{"text": "a"}',
    '{"prompt": 3}',
    '{"prompt": ""}',
    "[]",
    "3",
)
ROWS += (
    '"a"',
    "null",
    '{"prompt": null}',
    '{"prompt": "\\ud800"}',
    '{"prompt": "\\u0000"}',
    "{}",
    '{"prompt": NaN}',
    "9" * 5000,
)
ROWS += tuple(
    f'{{"prompt": "a", "image": {image}}}'
    for image in ("null", "3", '""', '"none.png"', '"\\ud800"', '"\\u0000"', '"."')
)
ROWS += (DEEP, '{"prompt": "a", "n": ' + "9" * 5000 + "}", "{'prompt': 'a'}", '{"prompt": ["a"]}', '{"a\\nb": 1}')


def prompts_case(rng: random.Random, work: Path) -> Case:
    lines = rng.random() < 0.5
    rows = [rng.choice(ROWS[:2] if rng.random() < 0.7 else ROWS) for _ in range(3)]
    content = ("a red cat\na green dog\n\nein grüner Würfel\n" if lines else "\n".join(rows)).encode()
    content = damaged(content, rng) if rng.random() < 0.6 else content
    file = work / f"prompts.{rng.choice(('txt', 'txt', 'jsonl', 'csv') if lines else ('jsonl',))}"

    def read() -> None:
        file.write_bytes(content)
        try:
            load_prompts(str(file))
        finally:
            file.unlink()

    return Case("prompts", f"{file.suffix} {content[:200]!r}", read, (str(file),))


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

    return Case("config file", f"{content[:200]!r}", read, (str(folder / "config.json"), *_FIELDS))


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


# --- library calls ----------------------------------------------------------------------------------------------------


def library_case(rng: random.Random, work: Path) -> Case:
    import progrpo
    from progrpo.rewards.load import load_reward
    from progrpo.storage import load_state, save_state

    junk = rng.choice(
        (*JUNK, len, object(), b"x", ["a", 3], [""], ["a"], [{"prompt": "a"}], [{"text": "a"}], "a red cat")
    )
    act = rng.choice(
        ("prompts", "eval_prompts", "reward", "config", "pipeline", "load_prompts", "load_reward", "load_state")
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
    given |= {act: junk}
    pipeline = given.pop("pipeline", mock.sentinel.pipeline)

    def call() -> None:
        known = mock.patch("progrpo.policies.load.policy_from_pipeline", return_value=mock.MagicMock())
        with known if pipeline is mock.sentinel.pipeline else contextlib.nullcontext():
            progrpo.train(pipeline, **given)

    return Case("library", f"train({act}={junk!r:.100})", call, (*_FIELDS, "prompts", "reward", "pipeline"))


# --- run folders ------------------------------------------------------------------------------------------------------


def whole_run(folder: Path) -> None:
    """A finished run in miniature, without a model."""
    import numpy as np

    from progrpo.tracking.run_folder import RunFolder

    run, grey = RunFolder.create(folder), np.full((4, 8, 8, 3), 128, np.uint8)
    run.write_config(to_dict(RECIPES["smoke"]()))
    record = {"prompt": "a cat", "kind": "one", "graded": 0.5, "strict": True, "judge": None, "held_out": {"jpeg": 0.5}}
    cost = {"nfe": 8, "decodes": 4, "reward_calls": 4, "trained_steps": 8}
    audit = {
        "iteration": 0,
        "prompt": "a cat",
        "steps": [0, 1],
        "scores": [[0.1, 0.2, 0.3, None]] * 2,
        "final": [0.4, 0.1, 0.2, 0.3],
    }
    for when in ("before", "after"):
        run.write_evaluation(when, [record, record | {"kind": "two", "strict": False}], grey[:2])
    run.append_metrics(
        {
            "iteration": 0,
            "seconds": 1.0,
            "reward/mean": 0.5,
            "rollout/nfe": 8,
            "prompts/seen": 1,
            "prompts/share@one": 1.0,
        }
    )
    run.append_metrics(
        {"iteration": 1, "seconds": 1.0, "reward/mean": 0.6, "reward/mean@jpeg": 0.5, "preview/rank_correlation@1": 0.5}
    )
    run.write_audit(
        {**audit, "stopped_at": [None, None, 1, 2], "kept_uniform": [0, 1], "kept_ovf": [2, 3]},
        grey.repeat(3, 0).reshape(4, 3, 8, 8, 3),
    )
    plan = {"path": [4, 3], "prune_steps": [1], "selector": "ovf", "num_inference_steps": 2}
    known = {
        "rewards": {"weights": {"a": 1, "b": 2}, "selected_on": "sum", "asked": {"a": 3}, "missing": {"a": 1}},
        "plan": plan,
    }
    about = {
        "status": "finished",
        "recipe": "smoke",
        "iterations": 2,
        "seed": 0,
        "wall_seconds": 3.0,
        "seconds_by_stage": {"sample": 1.0},
    }
    run.write_summary(
        {
            **known,
            **about,
            "cost": {"predicted": cost, "counted": cost, "audit": cost},
            "nfe_saved": 0.2,
            "versions": {"a": "1"},
        }
    )


def run_case(rng: random.Random, work: Path) -> Case:
    from progrpo.tracking.report import write_report

    folder = work / "run"
    name = rng.choice(
        ("summary.json", "metrics.jsonl", "evaluation/before.json", "audit/0000.json", "config.json", "audit/0000.png")
    )
    act, seed = rng.random(), rng.random()

    def read() -> None:
        whole_run(folder)
        file, own = folder / name, random.Random(seed)
        if act < 0.1:
            file.unlink()
        elif act < 0.4 or file.suffix != ".json":
            file.write_bytes(damaged(file.read_bytes(), own))
        else:
            file.write_text(json.dumps(mutate(json.loads(file.read_text()), own)))
        try:
            write_report(folder)
        finally:
            shutil.rmtree(folder)

    return Case("run", f"{name} {act:.2f} {seed}", read, (str(folder), "audit"))


MAKERS: dict[str, Callable[[random.Random, Path], Case]] = {
    "recipe": recipe_case,
    "python": python_case,
    "arguments": arguments_case,
    "prompts": prompts_case,
    "config file": config_file_case,
    "settings file": settings_file_case,
    "library": library_case,
    "run": run_case,
}


# --- models -----------------------------------------------------------------------------------------------------------


def model_cases(work: Path) -> Iterator[Case]:
    """Damaged folders of the built-in models, and trained weights of another."""
    from progrpo.policies.base import PolicySettings
    from progrpo.policies.load import load_policy, quiet
    from progrpo.zoo import WEIGHTS

    quiet()
    weights, index = "transformer/diffusion_pytorch_model.safetensors", "model_index.json"
    settings = (PolicySettings("lora", lora_rank=2), PolicySettings("full"))
    for name in ("shapes-flow", "shapes-diffusion"):
        for kind in settings:
            load_policy(name, kind).save(work / "trained" / f"{name}-{kind.weights}")

    def case(
        tried: str, damage: Callable[[Path], object], trained: Path | None = None, base: str = "shapes-flow"
    ) -> Case:
        folder = work / "model"

        def load() -> None:
            shutil.copytree(WEIGHTS / base, folder)
            try:
                damage(folder)
                load_policy(folder, settings[0], trained)
            finally:
                shutil.rmtree(folder)

        return Case("model", tried, load, (str(folder), str(work), "model.path: "))

    def edited(name: str, **changes: Any) -> Callable[[Path], object]:
        def edit(folder: Path) -> None:
            data = json.loads((folder / name).read_text()) | changes
            (folder / name).write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))

        return edit

    def cut(name: str, size: int) -> Callable[[Path], object]:
        return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])

    def without(name: str, tensor: str) -> Callable[[Path], object]:
        from safetensors.torch import load_file, save_file

        def drop(folder: Path) -> None:
            kept = {key: value for key, value in load_file(folder / name).items() if tensor not in key}
            save_file(kept, folder / name, metadata={"format": "pt"})

        return drop

    for size in (0, 7, 100, 5000, -1):
        for name in (weights, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
            yield case(f"{name} cut at {size}", cut(name, size))
    for name in (
        index,
        "transformer/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
    ):
        yield case(f"{name} cut", cut(name, 30))
        yield case(f"{name} absent", lambda folder, name=name: (folder / name).unlink())
        yield case(f"{name} a list", lambda folder, name=name: (folder / name).write_text("[]"))
    for part in ("transformer", "vae", "tokenizer", "text_encoder_3"):
        yield case(f"no {part}", lambda folder, part=part: shutil.rmtree(folder / part))
        yield case(f"{part} not in the index", edited(index, **{part: ...}))
        for junk in (3, ["os", "system"], ["no_such_library", "X"], ["diffusers", "NoSuch"], [None, None]):
            yield case(f"{part} is {junk}", edited(index, **{part: junk}))
    for junk in (None, 3, ["a"], "KolorsPipeline", "StableDiffusionPipeline", "os.system", "x" * 10_000, "a\nb"):
        yield case(f"pipeline {junk!r:.50}", edited(index, _class_name=junk))
    yield case(
        "another family's pipeline", edited(index, _class_name="StableDiffusion3Pipeline"), base="shapes-diffusion"
    )
    for changes in (
        {"num_layers": "x"},
        {"num_layers": 9},
        {"num_attention_heads": 0},
        {"in_channels": -1},
        {"sample_size": None},
    ):
        yield case(f"transformer {changes}", edited("transformer/config.json", **changes))
    for name, tensor in (
        (weights, "proj_out.weight"),
        ("text_encoder/model.safetensors", "final_layer_norm.bias"),
        (weights, ""),
    ):
        yield case(f"{name} without {tensor!r}", without(name, tensor))
    yield case("a pickle", lambda folder: (folder / weights).rename(folder / weights.replace(".safetensors", ".bin")))
    for name in ("shapes-flow", "shapes-diffusion"):
        for kind in settings:
            own = work / "trained" / f"{name}-{kind.weights}"
            other = {"shapes-flow": "shapes-diffusion", "shapes-diffusion": "shapes-flow"}[name]
            yield case(f"{own.name} on {other}", lambda folder: None, own, other)
            yield case(f"{own.name} on its own", lambda folder: None, own, name)
            bad, file = work / "trained" / f"{own.name}-cut", next(own.glob("*.safetensors")).name
            shutil.copytree(own, bad)
            cut(file, -99)(bad)
            yield case(f"{own.name}, cut", lambda folder: None, bad, name)
    yield case("no trained weights", lambda folder: None, work)


# --- processes of their own -------------------------------------------------------------------------------------------


def process_case(rng: random.Random, work: Path) -> Case:
    """A command line that is refused before a model is needed, so that nothing of what it would do is done."""
    wrong = (
        "--nope",
        "--seed=x",
        "--iterations=0",
        "--plan.prune=9",
        "--optim.lr=nan",
        "--reward.terms={",
        "--recipe=../x",
    )
    words = (
        [*rng.choice(LINES).split(), rng.choice(wrong)]
        if rng.random() < 0.7
        else [rng.choice(("", "trian", "😀", "a\nb", "x" * 9999))]
    )

    def run() -> None:
        done = subprocess.run(
            [sys.executable, "-m", "progrpo", *words], cwd=work, capture_output=True, text=True, timeout=120
        )
        sentence = re.fullmatch(r"progrpo: error: (.*)\n", done.stderr)
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr[-2000:]
        if done.returncode == 2:
            raise ValueError(sentence[1] if sentence else done.stderr)

    return Case(
        "process", " ".join(words)[:200], run, (*_FIELDS, "--", "does not take", "is no ", "comes first", "given twice")
    )


# --- all of it --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """An empty current folder, for the time being."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("p.txt").write_text("a cat\n")
        yield Path(folder).resolve()


def tally(cases: Iterator[Case], work: Path, wrong: list[str]) -> dict[str, Counter[str]]:
    """Outcomes by kind; what is wrong is added to `wrong`."""
    counts: dict[str, Counter[str]] = {}
    before = {path for path in work.rglob("*") if path.parts[len(work.parts)] != "trained"}
    for case in cases:
        found, sentence = outcome(case)
        left = {path for path in work.rglob("*") if path.parts[len(work.parts)] != "trained"} - before
        for path in left if found != "accepted" else ():
            wrong.append(f"{case.kind}: left {path}: {case.tried}")
        for path in sorted(left, reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        if found not in ("accepted", "refused"):
            wrong.append(f"{case.kind}: {found}: {case.tried[:300]} -> {sentence[:300]}")
        counts.setdefault(case.kind, Counter()).update(
            ["cases", found, *["files_left"] * bool(left and found != "accepted")]
        )
    return counts


def random_cases(seed: int, count: int, work: Path, shares: dict[str, float]) -> Iterator[Case]:
    for kind, share in shares.items():
        for i in range(round(count * share)):
            yield MAKERS[kind](random.Random(f"{seed} {kind} {i}"), work)


def measure(seed: int, cases: int, processes: int) -> tuple[dict[str, Counter[str]], list[str]]:
    wrong: list[str] = []
    with workplace() as work:
        with cut_off():
            counts = tally(random_cases(seed, cases, work, SHARES), work, wrong)
        counts |= tally(model_cases(work), work, wrong)
        apart = (process_case(random.Random(f"{seed} process {i}"), work) for i in range(processes))
        counts |= tally(apart, work, wrong)
    return counts, wrong


COLUMNS = ("cases", "refused", "accepted", "unclear", "traceback", "files_left")


def report() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--processes", type=int, default=24)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # a mistyped name is looked for in no hub
    counts, wrong = measure(options.seed, options.cases, options.processes)
    total: Counter[str] = sum(counts.values(), Counter())
    rows = {kind: {column: row[column] for column in COLUMNS} for kind, row in (*counts.items(), ("all", total))}
    if options.json:
        print(json.dumps({"by_kind": rows, "wrong": wrong}))
        return
    print(f"{'':12}" + "".join(f"{column:>12}" for column in COLUMNS))
    for kind, row in rows.items():
        print(f"{kind:12}" + "".join(f"{value:12,}" for value in row.values()))
    print("\n".join(wrong[:40]))


if __name__ == "__main__":
    report()
