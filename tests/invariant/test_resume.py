"""Stop and resume is a straight run, bit for bit; and how a batch is cut makes no difference to what is learnt."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from progrpo import storage
from progrpo.cli import main
from progrpo.config import (
    AuditSettings,
    CheckpointSettings,
    Config,
    OptimSettings,
    PlanSettings,
    PreviewSettings,
    PromptSettings,
    RewardSettings,
    RewardTerm,
    config_to_json,
)
from progrpo.objectives.grpo import GRPO
from progrpo.objectives.settings import GRPOSettings
from progrpo.pages.report import write_report
from progrpo.rewards.base import Refusal
from progrpo.storage import load_state
from progrpo.tracking.lock import only_writer
from progrpo.tracking.run_folder import RunFolder
from progrpo.training import checkpoints
from progrpo.training.distributed import Ranks
from progrpo.training.entry import resume_run, train_run
from progrpo.training.errors import MissingScoresError
from progrpo.training.update import Updater
from tests.support.states import same_state

ITERATIONS = 4
REWARD = """
import numpy as np

calls, fails, disturbs = 0, {}, lambda: None

def redness(images, prompts):
    global calls
    calls += 1
    disturbs()
    if calls in fails:
        if fails[calls] is None:
            return [None for image in images]
        raise fails[calls]
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]

class Closing:
    closed = 0

    def score(self, images, prompts):
        return redness(images, prompts)

    def close(self):
        Closing.closed += 1

def redness_and_length(images, prompts):
    return [red + len(prompt) for red, prompt in zip(redness(images, prompts), prompts, strict=True)]
"""


@pytest.fixture(scope="module")
def reward_module(tmp_path_factory):
    """A module on the path whose reward can fail at its n-th call in a way of choice."""
    import importlib
    import sys

    folder = tmp_path_factory.mktemp("reward")
    (folder / "failing_reward.py").write_text(REWARD)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("failing_reward")
    sys.path.remove(str(folder))
    del sys.modules["failing_reward"]


@pytest.fixture(scope="module")
def config(tiny_sd3, tiny_config, prompts, reward_module, tmp_path_factory) -> Config:
    """A run with everything that one can have.

    Checkpoints, audits, an average of the weights, the best kept, prompts by signal, two updates.
    """
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(prompts))
    base = tiny_config()
    return replace(
        base,
        iterations=ITERATIONS,
        model=replace(base.model, path=str(tiny_sd3)),
        prompts=PromptSettings(source=str(file), per_iteration=2, order="signal"),
        reward=RewardSettings((RewardTerm("failing_reward:redness"),)),
        # given, since two runs that measure theirs may choose differently, and then differ by rounding
        sampling=replace(base.sampling, num_inference_steps=3, microbatch=8),
        optim=OptimSettings(ema_decay=0.5, updates_per_rollout=2, microbatch=8),
        audit=AuditSettings(every=2),
        eval=replace(base.eval, prompts=str(file), every=1, keep_best=True, num_inference_steps=2),
        checkpoint=CheckpointSettings(every=2),
    )


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory) -> Path:
    return train_run(config, tmp_path_factory.mktemp("runs") / "straight").path


def untimed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "seconds" and not k.startswith("time/")} for r in records]


def lora(folder: Path) -> dict[str, Any]:
    """The tensors and metadata: safetensors fixes no order of its header's entries, so that a file's bytes differ."""
    with safe_open(folder / "lora" / "pytorch_lora_weights.safetensors", framework="pt") as file:
        return {**file.metadata(), **{name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118


def assert_the_same_run(folder: Path, straight: Path) -> None:
    for name in ("iteration", "policy", "optimizer", "noise_scale", "order", "best"):
        states = [load_state(f / "checkpoints" / f"iteration_{ITERATIONS:06d}") for f in (folder, straight)]
        assert same_state(states[0][name], states[1][name]), name
    assert set(states[0]["policy"]) == {"current", "reference", "ema", "best"}
    ours, theirs = RunFolder(folder), RunFolder(straight)
    assert untimed(ours.metrics.read()) == untimed(theirs.metrics.read())
    assert len(ours.metrics.read()) == ITERATIONS
    for when in ("before", "after"):
        assert ours.evaluations[when].read() == theirs.evaluations[when].read() != []
    assert ours.read_audits() == theirs.read_audits() != []
    assert same_state(lora(folder), lora(straight))
    for file in ("evaluation/after/000.png", "audit/0003.png"):
        assert (folder / file).read_bytes() == (straight / file).read_bytes(), file
    summaries = [run.summary.read() for run in (ours, theirs)]
    for key in ("status", "iterations", "nfe", "cost", "reward_after", "best_iterations", "preview_rank_correlation"):
        assert summaries[0][key] == summaries[1][key], key
    assert all(summary["seconds_by_stage"]["checkpoint"] > 0 for summary in summaries)


def test_a_run_that_is_lengthened_is_a_longer_run(config, straight, tmp_path):
    train_run(replace(config, iterations=2), tmp_path / "run")
    resume_run(tmp_path / "run", ITERATIONS)
    assert_the_same_run(tmp_path / "run", straight)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["iterations"] == ITERATIONS


def test_a_run_that_was_cut_off_is_taken_up_at_its_last_checkpoint(config, straight, tmp_path, reward_module):
    power_is_out = KeyboardInterrupt("the power is out")  # no failure of a reward, which the run would survive
    reward_module.calls, reward_module.fails = (
        0,
        {16: power_is_out},
    )  # in the fourth iteration, with checkpoints after two
    with pytest.raises(KeyboardInterrupt, match="the power is out"):
        train_run(config, tmp_path / "run")
    reward_module.fails = {}
    stopped = RunFolder(tmp_path / "run")
    assert stopped.summary.read()["status"] == "stopped: the power is out"
    assert [r["iteration"] for r in stopped.metrics.read()] == [0, 1, 2]
    resume_run(tmp_path / "run")
    assert_the_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize(
    ("fails", "says", "goes_on"),
    [
        ({15: None, 16: None}, "^iteration 4: 14 of 14 scores of reward failing_reward:redness are missing", 3),
        pytest.param({16: Refusal("no licence")}, "^no licence", 3, marks=pytest.mark.slow),
        ({19: Refusal("no licence")}, "^no licence", 2),  # by an audit, after its iteration's update
        ({2: Refusal("no licence")}, "^no licence$", None),  # before anything was trained
    ],
)
def test_a_reward_that_ends_the_run_costs_no_finished_iteration(
    config, straight, tmp_path, reward_module, fails, says, goes_on
):
    """Checkpoints are after two iterations."""
    run = tmp_path / "run"
    reward_module.calls, reward_module.fails = 0, fails
    with pytest.raises((MissingScoresError, Refusal), match=says) as stopped:
        train_run(config, run)
    reward_module.fails = {}
    assert RunFolder(run).summary.read()["status"] == f"stopped: {stopped.value}"
    if goes_on is None:
        assert not (run / "checkpoints").exists()
        return
    assert str(stopped.value).endswith(
        f"; mend that, and go on from iteration_00000{goes_on} with: progrpo train --resume {run}"
    )
    resume_run(run)
    assert_the_same_run(run, straight)
    assert RunFolder(run).summary.read()["rewards"] == RunFolder(straight).summary.read()["rewards"]


def test_what_a_reward_says_in_lines_is_one_sentence(config, tmp_path, reward_module, capsys):
    """SystemExit among it, which ended the run without a word."""
    reward = RewardSettings((RewardTerm("failing_reward:redness", retries=0),))
    (tmp_path / "config.json").write_text(config_to_json(replace(config, reward=reward)))
    reward_module.calls, reward_module.fails = 0, dict.fromkeys(range(1, 9), SystemExit("the judge\nis out"))
    assert main(["train", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]) == 1
    reward_module.fails = {}
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("progrpo: stopped: evaluation after 0 iterations: 3 of 3 scores of reward")
    cause = r"last error: reward failing_reward:redness: \S+failing_reward\.py, line \d+: SystemExit: the judge is out$"
    assert re.search(cause, said)


def test_the_global_generators_change_nothing(config, straight, tmp_path, monkeypatch, reward_module):
    """So their state is no part of a run's."""

    def disturb():
        random.seed()
        np.random.seed()
        torch.seed()

    monkeypatch.setattr(reward_module, "disturbs", disturb)
    disturb()
    train_run(config, tmp_path / "run")
    assert_the_same_run(tmp_path / "run", straight)


def test_other_versions_are_said_and_go_on(straight, tmp_path, monkeypatch, capsys):
    shutil.copytree(straight, tmp_path / "run")
    monkeypatch.setattr(checkpoints, "versions", lambda config: {"torch": "9.9"})
    resume_run(tmp_path / "run")
    said = f"torch {torch.__version__.partition('+')[0]}"
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert said in warning and warning.endswith(" -> 9.9")


def test_a_damaged_checkpoint_costs_its_iterations_and_no_more(config, straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "run")
    os.truncate(tmp_path / "run" / "checkpoints" / "iteration_000004" / "tensors.safetensors", 100)
    resume_run(tmp_path / "run")
    assert "warning: checkpoint passed over: " in capsys.readouterr().out
    assert_the_same_run(tmp_path / "run", straight)


def test_a_changed_configuration_is_refused_unless_accepted(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    changed = json.loads(file.read_text())
    changed["optim"]["lr"], changed["iterations"] = 2e-3, ITERATIONS + 1
    file.write_text(json.dumps(changed))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=r"config\.json was changed .*: optim\.lr was 0\.001 and is 0\.002; put it back"
    ):
        resume_run(tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert main(["train", "--resume", str(tmp_path / "run"), "--accept-changes"]) == 0
    records = RunFolder(tmp_path / "run").metrics.read()
    assert [r["update/lr"] for r in records] == [1e-3] * ITERATIONS + [2e-3]
    resume_run(tmp_path / "run")  # the change is the run's own now


def test_changed_prompts_are_refused_unless_accepted(config, prompts, tmp_path):
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    for file in (train, test):
        file.write_text("\n".join(prompts))
    own = replace(config.prompts, source=str(train)), replace(config.eval, prompts=str(test))
    run = train_run(replace(config, iterations=1, prompts=own[0], eval=own[1]), tmp_path / "run")
    resume_run(run.path)  # what is unchanged is not asked about
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    test.write_text("\n".join(reversed(prompts)))
    with pytest.raises(ValueError, match=rf"^the evaluation prompts \({test}\) of {run.path} are not those"):
        resume_run(run.path)
    train.write_text(prompts[0])
    with pytest.raises(ValueError, match=rf"^the training prompts \({train}\) and evaluation prompts \({test}\) of"):
        resume_run(run.path)
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()} == before
    resume_run(run.path, 2, accept_changes=True)
    assert any("before and after are of different prompts" in w for w in run.summary.read()["warnings"])
    assert "different prompts" in (run.path / "report.html").read_text()
    assert run.metrics.read()[1]["prompts/seen"] == 1  # what was observed of the others is forgotten
    resume_run(run.path)  # these are the run's own now


@pytest.fixture(scope="module")
def of_one_iteration(config, tmp_path_factory) -> Path:
    """A run of one iteration, whose reward is the number of a prompt's letters, and a little more."""
    rewards = RewardTerm("failing_reward:redness_and_length"), RewardTerm("failing_reward:redness")
    short = replace(
        config, iterations=1, reward=RewardSettings(rewards[:1]), eval=replace(config.eval, rewards=rewards[1:])
    )
    return train_run(short, tmp_path_factory.mktemp("runs") / "short").path


@pytest.mark.parametrize(
    ("section", "changes", "best"),
    [
        ("eval", {"prompts": "short.txt"}, 2),
        ("eval", {"best_by": "failing_reward:redness"}, 2),
        ("reward", {"terms": [{"name": "failing_reward:redness"}]}, 2),
        ("model", {"resolution": 32}, 2),
        ("sampling", {"negative_prompt": "fish", "guidance_scale": 2.0}, 2),
        ("eval", {"keep_best": False}, None),
        ("eval", {"every": 9}, 1),
    ],
)
def test_the_best_is_chosen_anew_where_evaluations_do_not_compare(
    of_one_iteration, tmp_path, monkeypatch, section, changes, best
):
    """Those after the second iteration have the lower rewards."""
    run = RunFolder(shutil.copytree(of_one_iteration, tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("a\nb\nc")
    changed = json.loads((run.path / "config.json").read_text())
    changed[section] |= changes
    (run.path / "config.json").write_text(json.dumps(changed))
    assert run.summary.read()["best_iterations"] == 1
    resume_run(run.path, 2, accept_changes=True)
    summary = run.summary.read()
    assert summary["best_iterations"] == best
    assert any("chosen anew" in warning for warning in summary["warnings"]) == (best == 2)


@pytest.mark.parametrize(
    ("section", "changes", "audits"),
    [
        ("reward", {"terms": [{"name": "failing_reward:redness_and_length"}]}, 1),
        ("preview", {"ode_steps": 2}, 1),
        ("eval", {"seed": 5}, 2),
    ],
)
def test_audits_are_forgotten_where_later_ones_do_not_compare(config, tmp_path, section, changes, audits):
    """By them a plan is judged, and a run whose previews have collapsed is stopped."""
    plan, preview = PlanSettings("custom", group_size=4, prune=((1, 3),)), PreviewSettings(probe=True)
    audited = replace(config, iterations=1, plan=plan, preview=preview, audit=AuditSettings(every=1))
    run = train_run(audited, tmp_path / "run")
    changed = json.loads((run.path / "config.json").read_text())
    changed[section] |= changes
    (run.path / "config.json").write_text(json.dumps(changed))
    resume_run(run.path, 2, accept_changes=True)
    state = load_state(run.path / "checkpoints" / "iteration_000002")
    assert len(state["judge"]["finals"]) == len(state["checks"]["agreements"]) == audits
    assert len(state["probe"]["learnt"]["lessons"]) == 3 * audits  # two groups and an audit


def test_one_run_writes_to_a_folder(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    with only_writer(tmp_path / "run"):
        with pytest.raises(ValueError, match="is being written to by process"):
            resume_run(tmp_path / "run")
        assert write_report(tmp_path / "run").is_file()
    assert len(RunFolder(tmp_path / "run").metrics.read()) == ITERATIONS


def test_a_disk_that_is_full_stops_the_run_in_one_sentence(config, straight, tmp_path, monkeypatch, capsys):
    """In the second checkpoint of the run: the first is the one to go on from, with the space that is then made."""
    write, written = storage.save_file, []

    def fill(tensors, path):
        written.append(path)
        if len(written) == 2:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(tensors, path)

    (tmp_path / "config.json").write_text(config_to_json(config))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", fill)
        assert main(["train", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    said = err.splitlines()[-1]
    assert "Traceback" not in err and said.startswith(f"progrpo: stopped: {tmp_path / 'run' / 'checkpoints'}")
    assert said.endswith(
        "tensors.safetensors cannot be written: No space left on device; the last good checkpoint is iteration_000002:"
        f" make space, then go on with progrpo train --resume {tmp_path / 'run'}"
    )
    assert not list((tmp_path / "run").rglob("*.writing")) and not (tmp_path / "run" / "run.lock").exists()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert_the_same_run(tmp_path / "run", straight)


def test_a_finished_run_can_be_resumed_and_does_nothing_more(straight):
    before = lora(straight)
    resume_run(straight)
    assert same_state(lora(straight), before)
    assert len(RunFolder(straight).metrics.read()) == ITERATIONS


def test_what_cannot_be_resumed_is_refused(straight, tmp_path):
    with pytest.raises(ValueError, match="is at iteration 4, past 3 iterations"):
        resume_run(straight, 3)
    empty = RunFolder.create(tmp_path / "empty")
    empty.log_config(json.loads((straight / "config.json").read_text()))
    with pytest.raises(ValueError, match="holds no checkpoint yet; start it anew"):
        resume_run(empty.path)


def test_fewer_iterations_than_were_made_are_refused_without_a_rate_beyond_the_end(straight, tmp_path, capsys):
    run = shutil.copytree(straight, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["optim"]["decay"] = 1.0
    (run / "config.json").write_text(json.dumps(config))
    assert main(["train", "--resume", str(run), "--iterations", "3", "--accept-changes"]) == 2
    said = capsys.readouterr()
    assert "is at iteration 4, past 3 iterations" in said.err and "learning rate" not in said.out


def test_a_run_is_not_overwritten_unless_asked(config, straight):
    with pytest.raises(ValueError, match="already holds a run"):
        train_run(config, straight)


@pytest.mark.parametrize("microbatch", [1, 5])
def test_many_small_microbatches_are_one_large(tiny_trainer, tiny_config, tiny_policy, first_experience, microbatch):
    """By plain gradient descent, whose step is the gradient: Adam's divides by it and magnifies rounding."""
    moves = []
    for size in (microbatch, 64):
        policy = tiny_policy(moved=0.1)
        start = {name: p.detach().clone() for name, p in policy.trainable.items()}
        descent = torch.optim.SGD(policy.trainable.values(), lr=1.0)
        experience = first_experience(tiny_trainer(tiny_config(), policy))
        config = OptimSettings(microbatch=size)
        Updater(policy, GRPO(GRPOSettings(clip_range=3e-3)), descent, config, Ranks()).update(experience)
        moves.append(torch.cat([(p.detach() - start[name]).flatten() for name, p in policy.trainable.items()]))
    assert moves[1].norm() > 0
    assert (moves[0] - moves[1]).norm() <= 1e-5 * moves[1].norm()


def test_a_run_that_is_refused_closes_its_rewards_once(config, reward_module, tmp_path):
    asked = replace(config, iterations=1, reward=RewardSettings((RewardTerm("failing_reward:Closing"),)))
    asked = replace(asked, eval=replace(asked.eval, every=0, keep_best=False))
    run, closing = tmp_path / "run", reward_module.Closing
    train_run(asked, run)
    assert closing.closed == 1
    cannot = replace(asked, sampling=replace(asked.sampling, sampler="cps", train_last_step=True))
    lacking = replace(asked, eval=replace(asked.eval, rewards=(RewardTerm("failing_reward:gone"),)))
    for refused, sentence in (
        (asked, "already holds a run"),
        (cannot, "^sampling.train_last_step must be false"),
        (lacking, "no function or class 'gone'"),
    ):
        before = closing.closed
        with pytest.raises(ValueError, match=sentence):
            train_run(refused, run)
        assert closing.closed == before + 1, sentence
    file = Path(asked.prompts.source)
    texts = file.read_text()
    file.write_text(texts.replace("red", "purple"))
    try:
        with pytest.raises(ValueError, match=r"prompts .* are not those that it had"):
            resume_run(run, 2)
    finally:
        file.write_text(texts)
    assert closing.closed == before + 2
