"""Command lines, within this process and in processes of their own."""

from __future__ import annotations

import contextlib
import io
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from progrpo.cli import COMMANDS, main
from progrpo.config import Config
from progrpo.settings import field_paths
from tests.mutation.cases import FIELDS, WORDS, Case, Reached

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
    "eval shapes-flow o --suite geneval --prompts p.txt --limit 4 --per-prompt 2 --against m --features pixels --out e",
    *(
        "report o",
        "compare o p --out c.html --json",
        "board o --host 127.0.0.1 --port 0",
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
        flag = "--" + rng.choice(field_paths(Config)).replace("_", "-")
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
            code: object = main(words)
        except SystemExit as stop:
            code = stop.code
    sentence = re.fullmatch(r"progrpo: error: (.*)\n", said.getvalue())
    if code == 2 and sentence:
        raise ValueError(sentence[1])
    assert code == 0 and not said.getvalue(), f"exit code {code}: {said.getvalue()[:2000]}"


def arguments_case(rng: random.Random, work: Path) -> Case:
    words = arguments(rng)
    options = ("--", "argument", "comes first", "does not take", "is no ", "Missing", "given twice", *COMMANDS)
    return Case("arguments", " ".join(words)[:500], lambda: command(words), (*FIELDS, *options))


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
        "process", " ".join(words)[:200], run, (*FIELDS, "--", "does not take", "is no ", "comes first", "given twice")
    )


@contextlib.contextmanager
def cut_off() -> Iterator[None]:
    """Models are not loaded, and what comes after them is not done: whoever asks has passed every check before that."""
    import progrpo.training.entry
    import progrpo.zoo.shapes.pretrain_diffusion
    import progrpo.zoo.shapes.pretrain_tiny  # noqa: F401

    ends = (
        "training.inputs.policy_from",
        "training.run.with_measured_microbatches",
        "training.trained_model.policy_from",
        "rewards.server.serve",
        "pages.board.serve",
        *(f"zoo.shapes.pretrain{n}.pretrain{n}" for n in ("", "_diffusion", "_tiny")),
    )

    def reached(*_: object, **__: object) -> NoReturn:
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        for end in ends:
            patch.setattr(f"progrpo.{end}", reached)
        patch.setattr("progrpo.training.build.fastest_dtype", lambda device: "float32")
        yield
