"""The tutorial, executed as it stands, but for fewer iterations, prompts and pictures."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from progrpo.cli import main

PAGE = Path(__file__).parents[2] / "docs/tutorial.md"
BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)
FEWER = {
    "iterations": 1,
    "eval.pictures": 2,
    "eval.num-inference-steps": 4,
    "prompts.per-iteration": 1,
    "audit.every": 0,
    "model.dtype": "float32",
    "sampling.microbatch": 12,
    "optim.microbatch": 48,
}
"""Options in place of the page's: less work, and nothing is measured."""
ELSEWHERE = ("make ", "source ", "uv ", "docker ", "mkdir ", "python ", "torchrun ")
"""Beginnings of commands that set up an environment, start `my_run.py` or start other processes."""


def commands(block: str) -> list[str]:
    return [line for line in block.replace("\\\n", " ").splitlines() if line and not line.startswith(ELSEWHERE)]


def shorter(command: str) -> list[str]:
    """The words of a command; a run gets the numbers of `FEWER`, and a resumed one goes one iteration further."""
    words = shlex.split(command)[1:]
    if words[0] != "train":
        return words
    resumed = "--resume" in words
    fewer = {"iterations": 2} if resumed else FEWER
    kept = [w for i, w in enumerate(words) if not {w, words[i - 1]} & {f"--{name}" for name in fewer}]
    return kept + [str(word) for name, value in fewer.items() for word in (f"--{name}", value)]


@pytest.mark.slow
def test_the_tutorial_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for kind, block in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if kind == "python":
            name = block.splitlines()[0].removeprefix("# ")
            Path(name).write_text(block)
            continue
        for command in commands(block):
            if command.startswith("printf"):
                subprocess.run(command, shell=True, check=True)
            else:
                assert main(shorter(command)) == 0, command
    script = Path("my_run.py").read_text()
    for shown, here in (("iterations=4", "iterations=1"), ("per_iteration=2", "per_iteration=1"), ("=12)", "=2)")):
        assert shown in script
        script = script.replace(shown, here)
    Path("my_run.py").write_text(script)
    runpy.run_path("my_run.py")
    sys.modules.pop("my_rewards", None)
    for run in ("first", "warm", "lora", "python"):
        assert Path("runs", run, "report.html").is_file()
    assert Path("runs/lora/lora/pytorch_lora_weights.safetensors").is_file()
    assert Path("compare.html").is_file() and len(list(Path("pictures").glob("*.png"))) == 2
