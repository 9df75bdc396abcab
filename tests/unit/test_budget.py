"""Runs of equal hours: what they take by prediction, and how long they are by measurement."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from progrpo.checks import check
from progrpo.config import PlanSettings, PromptSettings, RewardSettings, RewardTerm, resolve_plan
from progrpo.recipes import load_recipe, sd35m_ocr
from progrpo.repro.budget import BEGINNING, _further_iterations, predict, train_for, training_seconds
from progrpo.tracking.run_folder import RunFolder
from progrpo.training.estimate import estimate
from progrpo.training.gpus import GPUS


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("real")


def test_the_seconds_of_an_iteration_are_those_of_the_plan_command():
    config = replace(sd35m_ocr(), plan=PlanSettings("flash"))
    budget = predict(config, 24, GPUS["h100"], 0.35)
    seconds = estimate(config, "h100", 0.35, 1)["seconds_per_iteration"]
    assert budget.seconds == pytest.approx(seconds)
    assert budget.iterations == int(24 * 3600 / seconds)
    assert budget.training_hours == pytest.approx(24, abs=seconds / 3600) and budget.training_hours <= 24


def test_evaluations_and_audits_are_counted_beside_training():
    config = sd35m_ocr()
    bare, more = (
        predict(
            replace(config, audit=replace(config.audit, every=n), eval=replace(config.eval, every=n)),
            24,
            GPUS["h100"],
            0.35,
        )
        for n in (0, 10)
    )
    assert 0 < bare.other_hours < more.other_hours and bare.training_hours == more.training_hours


def test_as_many_iterations_follow_as_fit_at_the_pace_of_the_later_half():
    assert _further_iterations([9.0, 1.0, 1.0, 1.0], 20) == 8
    assert _further_iterations([9.0, 1.0, 1.0, 1.0], 12.5) == 0
    assert _further_iterations([1.0], 0.0) == 0


def test_a_run_goes_on_until_its_seconds_are_spent(on_a_tiny_model, tiny_config, tiny_sd3, tmp_path):
    texts = tmp_path / "prompts.txt"
    texts.write_text("red cat\nblue dog\n")
    base = tiny_config()
    config = replace(
        base,
        iterations=BEGINNING,
        model=replace(base.model, path=str(tiny_sd3)),
        prompts=PromptSettings(source=str(texts), per_iteration=1),
        reward=RewardSettings((RewardTerm("jpeg_incompressibility"),)),
        eval=replace(base.eval, prompts=str(texts)),
    )
    run = tmp_path / "run"
    train_for(config, run, 0)
    begun = training_seconds(run)
    assert len(begun) == BEGINNING and all(seconds > 0 for seconds in begun)
    train_for(config, run, 1.5 * sum(begun))
    longer = training_seconds(run)
    assert longer[:BEGINNING] == begun and len(longer) > BEGINNING
    assert RunFolder(run).summary.read()["iterations"] == len(longer)
    train_for(config, run, 0)  # what is spent is spent
    assert training_seconds(run) == longer
    with pytest.raises(ValueError, match=r"optim\.decay must be 0"):
        train_for(replace(config, optim=replace(config.optim, decay=0.5)), run, 0)


@pytest.mark.slow
def test_every_arm_on_real_weights_can_be_run_and_differs_as_published(real):
    scale = real.real()
    configs = real.arms(scale.base, scale.plans)
    assert tuple(configs) == real.ARMS
    for config in configs.values():
        check(config)
        assert config.model == replace(sd35m_ocr().model, keep_text_encoders=True) and config.optim.decay == 0
    fast = configs["flow_grpo fast"]
    assert (fast.sampling.sampler, fast.sampling.sde_window, fast.sampling.sde_window_size) == (
        "cps_reduced",
        "random",
        3,
    )
    assert fast.sampling.guidance_scale == fast.eval.guidance_scale == 1 and fast.objective.grpo.kl_beta == 0
    assert resolve_plan(configs["plain GRPO"]).survivors == 24
    assert resolve_plan(configs["Pro-GRPO standard"]) == resolve_plan(load_recipe("sd35m-ocr"))
    # the arm with most members, guidance and a KL
    assert estimate(configs["Pro-GRPO standard"], "h100", 0.35, 1)["fits"]
    assert configs["Pro-GRPO auto"].plan.follows_audits and configs["DGPO"].objective.name == "dgpo"


@pytest.mark.parametrize("world", ["words", "shapes"])
def test_every_arm_of_a_rehearsal_can_be_run(real, world):
    scale = real.rehearsal(world)
    for config in real.arms(scale.base, scale.plans).values():
        check(config)


@pytest.mark.slow
def test_the_dry_run_prints_the_hours_and_trains_nothing(real, tmp_path, capsys):
    real.main(["--dry-run", "--arms", "plain GRPO", "--runs", str(tmp_path / "runs"), "--hours", "2"])
    said = capsys.readouterr().out
    assert "| plain GRPO |" in said and "GPU-hours for 3 seeds on one h100" in said and not (tmp_path / "runs").exists()


def test_judges_that_cannot_be_had_are_named_and_left_out(real, capsys):
    scale = replace(real.rehearsal("shapes"), judges=("shapes_taste", "no_such_module:reward"))
    assert [term.name for term in real.with_judges(scale).base.eval.rewards] == ["shapes_taste"]
    assert "no_such_module:reward is left out" in capsys.readouterr().out


def test_the_page_says_what_was_run_and_nothing_else(real):
    summary = {
        "iterations": 7, "nfe": 100, "reward_before": 0.2, "reward_after": 0.4, "held_out_before": {"taste": 0.5},
        "held_out_after": {"taste": 0.25}, "device": "a card", "versions": {"torch": "2"},
    }  # fmt: skip
    points = [{"iterations": 4, "gpu_hours": 0.5, "score": 0.3, "kl": 0.01, "held_out": {}}]
    runs = [
        {"arm": "DGPO", "seed": seed, "summary": summary, "gpu_hours": 1.0, "points": points, "agreement": [[0.5, rho]]}
        for seed, rho in enumerate((0.8, 1.0, None))
    ]
    config = {"eval": {"guidance_scale": 1.0}}
    data = {"scale": "real", "model": "m", "reward": "ocr", "hours": 1.0, "configs": {"DGPO": config}, "runs": runs}
    text = real.page(data)
    assert "| DGPO | 3 | 7 | 1 | 100 | 0.200 | 0.400 | 0.01 |" in text and "| DGPO | taste | 0.500 | 0.250 |" in text
    # of 0.8, 1 and a preview that tells nothing: Student's interval of three
    assert "| 0 | 0.50 ± 0.00 |" in text and "| 1 | 0.60 ± 1.31 |" in text
    assert "plain GRPO" not in text and "rehearsal" not in text.lower()
    assert set(real.pictures(data)) == {"real_hours.svg", "real_kl.svg"}
