"""Pictures and figures of a model that no run has chosen settings for, in one process and in several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from progrpo.cli import main


def test_the_end_of_a_long_prompt_changes_the_picture(tiny_sd3, tmp_path):
    begins, pictures = "a red cat beside a green bird and ", []
    for end in ("a blue dog under a tree of green birds", "nothing at all but a great deal of red"):
        out = str(tmp_path / end[:4])
        assert (
            main(["sample", str(tiny_sd3), "--prompt", begins + end, "--out", out, "--num-inference-steps", "4"]) == 0
        )
        pictures.append(np.asarray(Image.open(f"{out}/000-00.png"), int))
    assert np.abs(pictures[0] - pictures[1]).max() > 1


def test_prompts_that_are_cut_are_said_beside_what_is_printed(tmp_path, capsys):
    """The built-in model reads 16 tokens."""
    begins = "a red circle and a blue square and a green triangle and "
    texts = [begins + end for end in ("a yellow circle", "nothing else at all")]
    (tmp_path / "prompts.txt").write_text("\n".join([*texts, "a red circle"]))
    steps = ["--num-inference-steps", "1"]
    assert main(["sample", "shapes-flow", "--prompt", *texts, "--out", str(tmp_path / "out"), *steps]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and err.startswith(
        "warning: 2 of 2 prompts are longer than the text encoders read"
    )
    asked = ["eval", "shapes-flow", "--prompts", str(tmp_path / "prompts.txt"), "--pictures", "3", "--json"]
    asked += ["--reward", "jpeg_compressibility"]
    assert main([*asked, *steps]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["pictures"] == 3 and err.startswith("warning: 2 of 3 prompts are longer")
    assert main(["sample", "shapes-flow", "--prompt", "a red circle", "--out", str(tmp_path / "out"), *steps]) == 0
    assert capsys.readouterr().err == ""


def in_three(*args: str) -> str:
    """The output of the command in three processes; the launcher's own words are on stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", "-m", "progrpo"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *args], env=env, stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_several_processes_share_pictures_out_and_one_writes_them(tmp_path, capsys, count):
    """Of three processes one has nothing to do for two pictures, and their shares differ for four."""
    asked = ["sample", "shapes-flow", "--prompt", "a red circle", "a blue square", "--count", str(count)]
    asked += ["--num-inference-steps", "4", "--out"]
    assert main([*asked, str(tmp_path / "one")]) == 0
    files = [Path(line).name for line in capsys.readouterr().out.split()]
    assert in_three(*asked, str(tmp_path / "three")).split() == [str(tmp_path / "three" / name) for name in files]
    for name in files:
        one, other = (np.asarray(Image.open(tmp_path / out / name), int) for out in ("one", "three"))
        assert np.abs(one - other).max() <= 1


def test_a_reward_is_closed_when_its_evaluation_ends(tmp_path, monkeypatch, capsys):
    score = "    def score(self, images):\n        return [1.0] * len(images)\n"
    close = "    def close(self):\n        raise OSError('busy')\n"
    code = f"class Own:\n{score}\n{close}"
    (tmp_path / "own_closing.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = [
        "eval",
        "shapes-flow",
        "--pictures",
        "1",
        "--num-inference-steps",
        "1",
        "--reward",
        "own_closing:Own",
        "--json",
    ]
    assert main(asked) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["graded"] == 1 and "a reward's close() failed (OSError: busy)" in said.err


@pytest.mark.slow
def test_several_processes_measure_together_and_one_says_what(capsys):
    asked = ["eval", "shapes-flow", "--pictures", "2", "--num-inference-steps", "4", "--json"]
    assert main(asked) == 0
    alone, together = json.loads(capsys.readouterr().out), json.loads(in_three(*asked))
    assert together.keys() == alone.keys() and together["pictures"] == alone["pictures"] == 2
    for name in ("graded", "judge", "diversity"):
        assert together[name] == pytest.approx(alone[name], abs=1e-3), name
