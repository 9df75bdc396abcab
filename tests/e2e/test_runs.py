"""The commands that need a model, with the one in the package and the recipe `smoke`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from progrpo.cli import main
from progrpo.storage import load_state
from progrpo.tracking.run_folder import RunFolder
from tests.support.states import same_state


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """`progrpo train smoke --seed 3` on few pictures, in a process of its own as a user starts it."""
    out = tmp_path_factory.mktemp("runs") / "smoke"
    asked = ["--seed", "3", "--eval.pictures", "4", "--out", str(out)]
    command = [sys.executable, "-m", "progrpo", "train", "smoke", *asked]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "iteration 2/2" in done.stdout and "report.html" in done.stdout
    return out


def untimed(folder: Path) -> list[dict[str, Any]]:
    records = RunFolder(folder).metrics.read()
    return [{k: v for k, v in r.items() if k != "seconds" and not k.startswith("time/")} for r in records]


def assert_the_same(a: Path, b: Path) -> None:
    assert untimed(a) == untimed(b) != []
    for when in ("before", "after"):
        assert RunFolder(a).evaluations[when].read() == RunFolder(b).evaluations[when].read() != []
    ours, theirs = (load_file(folder / "lora" / "pytorch_lora_weights.safetensors") for folder in (a, b))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_a_recipe_is_trained(run):
    summary: Any = RunFolder(run).summary.read()
    assert (summary["recipe"], summary["seed"], summary["iterations"], summary["status"]) == ("smoke", 3, 2, "finished")
    for name in ("reward", "accuracy", "judge"):
        assert all(0 <= summary[f"{name}_{when}"] <= 1 for when in ("before", "after"))
    assert (
        summary["nfe"] == 2 * 2 * (6 * 4 + 4 * 2)
        and summary["cost"]["predicted"]["nfe"] == summary["cost"]["counted"]["nfe"]
    )
    assert summary["command"].startswith("progrpo train smoke --seed 3")
    assert (run / "report.html").is_file() and (run / "audit" / "0001.png").is_file()


def test_whole_groups_are_stopped(on_a_tiny_model, tmp_path, capsys):
    options = ["smoke", "--prompts.per-iteration", "3", "--plan.keep-groups", "2", "--prompts.order", "signal"]
    assert main(["plan", *options, "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)
    assert costs["groups"] == [3, 2] and costs["nfe_per_iteration"] == 3 * 6 * 4 + 2 * 4 * 2
    assert main(["train", *options, *on_a_tiny_model, "--out", str(tmp_path / "run")]) == 0
    assert "groups of 6 -> 4 by ovf, 3 -> 2 prompts an iteration, 88 NFE each" in capsys.readouterr().out
    run = RunFolder(tmp_path / "run")
    records, summary = run.metrics.read(), run.summary.read()
    assert [record["rollout/stopped_groups"] for record in records] == [1, 1]
    assert [record["rollout/nfe"] for record in records] == [costs["nfe_per_iteration"]] * 2
    assert [record["rollout/reward_calls"] for record in records] == [costs["reward_calls_per_iteration"]] * 2
    assert summary["status"] == "finished" and summary["plan"]["groups"] == [3, 2]
    assert "2 of 3 prompts do after step 3" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_is_not_overwritten_unasked(run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["train", "smoke", "--out", str(run)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("progrpo: error: ") and err.count("\n") == 1 and "already holds a run" in err
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory) -> Path:
    """The run anew from its configuration, and an iteration longer."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    assert main(["train", str(run / "config.json"), "--iterations", "3", "--out", str(out)]) == 0
    return out


def test_a_run_can_be_repeated_from_its_config(run, straight):
    assert untimed(straight)[:2] == untimed(run) != []
    assert RunFolder(straight).evaluations["before"].read() == RunFolder(run).evaluations["before"].read() != []
    ours, theirs = (load_state(f / "checkpoints" / "iteration_000002")["policy"] for f in (straight, run))
    assert same_state(ours, theirs)


def test_stop_and_resume_is_a_straight_run(run, straight, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(run, resumed)
    assert main(["train", "--resume", str(resumed), "--iterations", "3"]) == 0
    assert_the_same(resumed, straight)
    ours, theirs = (
        load_state(f / "checkpoints" / "iteration_000003")["optimizer"]["state"] for f in (resumed, straight)
    )
    assert all(ours[i][name].equal(theirs[i][name]) for i in ours for name in ("exp_avg", "exp_avg_sq", "step"))


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory) -> Path:
    """Everything that decides by measuring: previews by the tiny decoder or a probe, and the plan by what they cost."""
    out = tmp_path_factory.mktemp("runs") / "adaptive"
    asked = ["--preview.decoder", "tiny", "--preview.probe", "--preview.probe-threshold", "-1", "--plan.adaptive"]
    asked += ["--audit.every", "1", "--iterations", "5", "--checkpoint.keep", "9"]
    asked += ["--eval.pictures", "2", "--prompts.per-iteration", "1"]
    assert main(["train", "smoke", *asked, "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_a_probe_takes_over_and_the_plan_is_judged(adaptive):
    summary = RunFolder(adaptive).summary.read()
    records: Any = RunFolder(adaptive).metrics.read()
    assert [r["rollout/probed"] > 0 for r in records] == [False] * 4 + [True]  # measured thrice by then
    assert all(r["rollout/previews"] > 0 for r in records[:4])
    assert [r.get("plan/value") is not None for r in records] == [False] * 2 + [True] * 3
    assert all(r["plan/next_path"][0] == 6 and r["plan/next_path"][-1] >= 4 for r in records[2:])
    assert [r["plan/path"] for r in records[3:]] == [r["plan/next_path"] for r in records[2:-1]]
    assert summary["plan"]["value"] == records[-1]["plan/next_value"]
    assert summary["cost"]["predicted"]["nfe"] == summary["cost"]["counted"]["nfe"]
    assert summary["cost"]["predicted"]["probed"] == summary["cost"]["counted"]["probed"]
    assert (adaptive / "report.html").is_file()


@pytest.mark.slow
def test_what_was_decided_by_measuring_is_decided_again(adaptive, tmp_path):
    """Resumed from before the first verdict: the costs are those of the first time, though this time's are others."""
    again = tmp_path / "again"
    shutil.copytree(adaptive, again)
    for folder in sorted((again / "checkpoints").iterdir())[2:]:
        shutil.rmtree(folder)
    assert main(["train", "--resume", str(again)]) == 0
    assert_the_same(again, adaptive)
    assert RunFolder(again).costs.read() == RunFolder(adaptive).costs.read()


def test_a_configuration_that_was_edited_is_checked(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text('{"optim": {"lr": -5}}')
    assert main(["train", "--resume", str(folder), "--accept-changes"]) == 2
    assert "optim.lr must be above 0" in capsys.readouterr().err


def test_a_report_is_written_anew(run, capsys):
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert "smoke" in (run / "report.html").read_text()


def test_a_run_is_measured_again_as_it_measured_itself(run, capsys):
    assert main(["eval", str(run), "--pictures", "4", "--json"]) == 0
    results, summary = json.loads(capsys.readouterr().out), RunFolder(run).summary.read()
    assert results["pictures"] == 4 and set(results["strict_by_kind"]) == set(summary["accuracy_by_kind_after"])
    assert results["graded"] == pytest.approx(summary["reward_after"], abs=0.01)  # the LoRA is merged here: rounding
    assert (results["num_inference_steps"], results["guidance_scale"], results["seed"]) == (6, 1.0, 1234)
    assert main(["eval", str(run), "--pictures", "2", "--num-inference-steps", "2", "--seed", "5", "--json"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert (other["num_inference_steps"], other["guidance_scale"], other["seed"]) == (2, 1.0, 5)
    assert (
        main(
            ["eval", "shapes-flow", "--pictures", "1", "--num-inference-steps", "2", "--reward", "jpeg_compressibility"]
        )
        == 0
    )
    table = capsys.readouterr().out
    assert "\n  reward " in table and not any(word in table for word in ("None", "strict", "held_out"))


def test_pictures_are_drawn_with_what_a_run_trained(run, tmp_path, capsys):
    asked = ["--prompt", "a red circle", "a blue square", "--count", "2", "--num-inference-steps", "4"]
    assert main(["sample", "shapes-flow", *asked, "--lora", str(run), "--out", str(tmp_path)]) == 0
    files = capsys.readouterr().out.split()
    assert files == [str(tmp_path / f"{g:03d}-{m:02d}.png") for g in (0, 1) for m in (0, 1)]
    assert {Image.open(file).size for file in files} == {(64, 64)}
    before = {file: Path(file).read_bytes() for file in files}
    assert len(set(before.values())) == 4
    (tmp_path / "notes-00.png").touch()
    assert main(["sample", "shapes-flow", "--prompt", "a green ring", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "002-00.png")]
    assert {file: Path(file).read_bytes() for file in files} == before


def test_a_runs_own_settings_are_taken_where_it_is_named(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_it_evaluates = ["--num-inference-steps", "6", "--guidance-scale", "1", "--seed", "1234"]
    asked = ["sample", "shapes-flow", "--prompt", "a red circle"]
    for out, words in (
        ("run", ["sample", str(run), "--prompt", "a red circle"]),
        ("lora", [*asked, "--lora", str(run)]),
        ("said", [*asked, "--lora", str(run), *as_it_evaluates]),
        ("folder", [*asked, "--lora", str(run / "lora")]),
        ("default", [*asked, "--lora", str(run / "lora"), "--num-inference-steps", "10", "--seed", "0"]),
    ):
        assert main([*words, "--out", out]) == 0
    drawn = {out: (tmp_path / out / "000-00.png").read_bytes() for out in ("run", "lora", "said", "folder", "default")}
    assert drawn["run"] == drawn["lora"] == drawn["said"] != drawn["folder"] == drawn["default"]
    assert main(["sample", str(run), "--prompt", "a red circle", "--lora", str(run), "--out", "both"]) == 2
    assert not (tmp_path / "both").exists()
