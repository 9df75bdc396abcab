"""A model that raises the trained reward and lowers the held-out one: warned of, shown, and stopped if asked."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest

import progrpo
from progrpo.config import EvalSettings, OptimSettings, PromptSettings, RewardTerm, WatchSettings
from progrpo.tracking.run_folder import RunFolder

MODULE = "held_out_here"
REWARD = """
import numpy as np

def paleness(images, prompts):
    return [1 - float(np.asarray(image)[..., 0].mean()) / 255 for image in images]
"""


@pytest.fixture
def trained(tiny_pipeline, tiny_config, prompts, redness, tmp_path, monkeypatch):
    (tmp_path / f"{MODULE}.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def run(hacking: Any, mode: Any = "new", **more: Any) -> RunFolder:
        evaluation = EvalSettings(
            pictures=8, num_inference_steps=3, every=1, rewards=(RewardTerm(f"{MODULE}:paleness"),), **more
        )
        config = tiny_config(
            iterations=12,
            model=replace(tiny_config().model, weights="full"),
            prompts=PromptSettings(per_iteration=3),
            eval=evaluation,
            optim=OptimSettings(lr=0.01),
            watch=WatchSettings(hacking=hacking),
        )
        return progrpo.train(tiny_pipeline(), prompts, redness, config=config, out=tmp_path / "run", mode=mode)

    yield run
    sys.modules.pop(MODULE, None)


def warnings_of_hacking(run: RunFolder) -> list[str]:
    cheating = "the model may be learning to please the reward alone: "
    return [warning for warning in run.summary.read()["warnings"] if warning.startswith(cheating)]


def test_it_is_said_and_shown_and_training_goes_on(trained, capsys):
    run = trained("warn")
    said = capsys.readouterr().out
    warning = warnings_of_hacking(run)[0]
    assert f"the held-out {MODULE}:paleness fell from " in warning and "trained reward rose" in warning
    assert f"warning: {warning}" in " ".join(said.split())
    assert len(run.metrics.read()) == 12
    assert "the trained reward rose" in (run.path / "report.html").read_text()


def test_it_ends_training_where_that_is_asked_for(trained, capsys):
    run = trained("stop")
    done = len(run.metrics.read())
    assert 3 <= done < 12 and run.summary.read()["status"] == "finished"
    assert run.evaluations["after"].read() and (run.path / "transformer").is_dir()
    assert "training ends here" in capsys.readouterr().out


def test_a_run_that_was_stopped_goes_on_where_a_warning_is_enough(trained, capsys):
    done = len(trained("stop").metrics.read())
    run = trained("stop", "resume")  # as before: it is at its end
    assert len(run.metrics.read()) == done
    assert "training has ended at a sign of reward hacking (watch.hacking stop)" in capsys.readouterr().out
    assert len(trained("warn", "resume_changed").metrics.read()) == 12 > done


def test_the_best_by_the_held_out_reward_is_another(trained):
    run = trained("off", keep_best=True)
    by_reward = run.summary.read()
    assert not warnings_of_hacking(run)
    import shutil

    shutil.rmtree("run")
    held_out = trained("off", keep_best=True, best_by=f"{MODULE}:paleness")
    metrics = [r[f"eval/held_out@{MODULE}:paleness"] for r in held_out.metrics.read()]
    assert held_out.summary.read()["best_iterations"] == 1 + metrics.index(max(metrics))
    assert by_reward["best_iterations"] != held_out.summary.read()["best_iterations"]
