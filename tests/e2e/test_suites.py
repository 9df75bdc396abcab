"""Evaluations on suites through the command line: figures, pairs, resuming after a kill, formats, several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from progrpo.cli import main
from progrpo.policies.load import load_policy
from progrpo.policies.settings import ModelSettings

QUICK = ("--suite", "shapes", "--num-inference-steps", "2")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """LoRAs of the built-in model: one that changes nothing, and one that does."""

    def save(moved):
        policy = load_policy(ModelSettings(path="shapes-flow", lora_rank=2, lora_alpha=2))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in policy.trainable.values():
                parameter.add_(moved * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("lora") / "lora"
        policy.save(folder)
        return str(folder)

    return save


def evaluated(capsys, *words):
    assert main(["eval", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_lora_is_paired_with_its_base_on_the_same_noise(lora, tmp_path, capsys):
    out = str(tmp_path / "out")
    words = (*QUICK, "--limit", "6", "--per-prompt", "2", "--out", out)
    result = evaluated(capsys, "shapes-flow", "--lora", lora(0.3), *words)
    base, ours = result["models"]
    assert (ours["pictures"], base["pictures"], result["prompts"], result["of_prompts"]) == (12, 12, 6, 128)
    assert base["is_base"] and base["name"] == "shapes-flow" and result["score"] == "accuracy"
    assert set(ours["figures"]) == {
        *("accuracy", "shapes", "shapes_match", "judge"),
        *("diversity", "distance", "vendi", "vendi of all", "kl"),
    }
    assert ours["figures"]["kl"]["value"] > 0 and "kl" not in base["figures"]
    assert 1 <= ours["figures"]["vendi"]["value"] <= 2 and ours["figures"]["vendi of all"]["value"] <= 12
    difference = ours["figures"]["shapes"]["value"] - base["figures"]["shapes"]["value"]
    assert ours["against"]["shapes"]["value"] == pytest.approx(difference)
    assert set(result["kinds"]) == {"single", "two", "counting", "colours", "position", "binding"}
    assert Path(out, "report.html").read_text().count('<figure class="pair">') == 6
    assert json.loads(Path(out, "results.json").read_text()) == result
    assert Path(out, "table.md").read_text().startswith("shapes (")


def test_a_lora_that_changes_nothing_differs_in_nothing(lora, tmp_path, capsys):
    words = (*QUICK, "--limit", "6", "--per-prompt", "2", "--out", str(tmp_path / "out"))
    _, ours = evaluated(capsys, "shapes-flow", "--lora", lora(0.0), *words)["models"]
    assert ours["figures"]["kl"]["value"] == 0
    assert {(change["value"], change["p"]) for change in ours["against"].values()} == {(0.0, 1.0)}


@pytest.mark.slow
def test_another_base_is_measured_anew(lora, tmp_path, capsys):
    """The distance to one model is not shown as that to another, nor where there is no base."""
    near, far = lora(0.05), lora(0.3)
    words = (*QUICK, "--limit", "4", "--per-prompt", "1", "--reward", "shapes", "--out", str(tmp_path / "out"))
    _, first = evaluated(capsys, "shapes-flow", "--lora", near, *words)["models"]
    (alone,) = evaluated(capsys, "shapes-flow", *words)["models"]
    assert "kl" not in alone["figures"] and alone["against"] == {}
    _, again = evaluated(capsys, "shapes-flow", "--lora", near, *words)["models"]
    assert again["figures"]["kl"] == first["figures"]["kl"] and first["figures"]["kl"]["count"] == 4
    _, turned = evaluated(capsys, "shapes-flow", "--lora", far, *words, "--against", "shapes-diffusion")["models"]
    assert "kl" not in turned["figures"]  # a diffusion model's latents mean something else


def test_a_suite_is_a_plain_evaluation_of_several_pictures(tmp_path, capsys):
    """The first picture of each prompt is the one that `eval` without a suite measures."""
    plain = evaluated(capsys, "shapes-flow", "--pictures", "12", "--num-inference-steps", "2")
    words = (*QUICK, "--limit", "12", "--per-prompt", "1", "--out", str(tmp_path))
    (ours,) = evaluated(capsys, "shapes-flow", *words)["models"]
    for name, figure in {"graded": "shapes", "strict": "accuracy", "judge": "judge"}.items():
        assert ours["figures"][figure]["value"] == pytest.approx(plain[name], abs=1e-4)
    assert set(ours["figures"]) == {"accuracy", "shapes", "shapes_match", "judge", "vendi of all"}


def test_more_pictures_prompts_and_rewards_are_added_to_those_that_are_there(tmp_path, capsys):
    out = ("--out", str(tmp_path / "out"))
    evaluated(capsys, "shapes-flow", *QUICK, "--limit", "6", "--per-prompt", "1", "--reward", "shapes", *out)
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    more = ("--limit", "12", "--per-prompt", "1", "--reward", "shapes", "shapes_taste")
    grown = evaluated(capsys, "shapes-flow", *QUICK, *more, *out)
    fresh = evaluated(capsys, "shapes-flow", *QUICK, *more, "--out", str(tmp_path / "fresh"))
    assert len(first) == 6 and all(path.stat().st_mtime_ns == then for path, then in first.items())
    for name in ("accuracy", "shapes", "shapes_taste", "judge"):
        ours, theirs = (result["models"][0]["figures"][name] for result in (grown, fresh))
        assert ours["value"] == pytest.approx(theirs["value"], abs=1e-3) and ours["count"] == theirs["count"] == 12
    assert main(["eval", "shapes-flow", *QUICK, *more, *out, "--seed", "5"]) == 2
    assert "holds pictures by another seed (1234 there, 5 now)" in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_command_goes_on_after_a_kill(tmp_path, capsys):
    words = [*QUICK, "--limit", "96", "--per-prompt", "2", "--out"]
    command = [sys.executable, "-m", "progrpo", "eval", "shapes-flow", *words, str(tmp_path / "killed")]
    scores = tmp_path / "killed" / "shapes-flow" / "scores.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        while process.poll() is None and not (scores.exists() and scores.stat().st_size):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.png")}
    assert len(scores.read_bytes().splitlines()) >= 64 and len(kept) >= 64  # a batch
    on = evaluated(capsys, "shapes-flow", *words, str(tmp_path / "killed"))
    straight = evaluated(capsys, "shapes-flow", *words, str(tmp_path / "straight"))
    assert on["models"][0]["pictures"] == 192
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items() if ".writing" not in path.name)
    for name, figure in straight["models"][0]["figures"].items():
        assert on["models"][0]["figures"][name]["value"] == pytest.approx(figure["value"], abs=5e-3), name


def test_a_local_copy_of_a_benchmark_with_a_reward_of_choice(tmp_path, capsys):
    copy = tmp_path / "drawbench.csv"
    copy.write_text("Prompts,Category\nA red colored car.,Colors\nOne dog on the street.,Counting\nA fox.,Counting\n")
    words = ["--suite", "drawbench", "--prompts", str(copy), "--reward", "jpeg_compressibility", "--features", "pixels"]
    words += ["--per-prompt", "2", "--num-inference-steps", "1", "--out", str(tmp_path / "out")]
    result = evaluated(capsys, "shapes-flow", *words)
    (ours,) = result["models"]
    assert result["kinds"] == ["Colors", "Counting"] and result["score"] == "jpeg_compressibility"
    of_kind = ours["by_kind"]["jpeg_compressibility"]
    assert [of_kind[kind]["count"] for kind in result["kinds"]] == [2, 4] and of_kind["Colors"]["low"] is None
    assert set(ours["figures"]) == {"jpeg_compressibility", "diversity", "distance", "vendi", "vendi of all"}


def test_rewards_that_cannot_be_had_are_named_and_left_out(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rapidocr")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    copy = tmp_path / "test.txt"
    copy.write_text('a sign that says "STOP"\n')
    words = ("--suite", "ocr", "--prompts", str(copy), "--num-inference-steps", "1", "--out", str(tmp_path / "out"))
    assert main(["eval", "shapes-flow", *words, "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["score"] == "accuracy" and result["models"][0]["figures"]["ocr"]["count"] == 1
    for name in ("imagereward", "pickscore", "hpsv2", "aesthetic", "clipscore"):
        assert f"warning: {name} is left out: reward {name!r}: there is no cached copy of" in err
    assert "feature distance and Vendi are left out: reward 'dino'" in err
    assert "LPIPS is left out: reward 'lpips'" in err and len(result["notes"]) == 7
    assert main(["eval", "shapes-flow", *words, "--reward", "clipscore"]) == 2
    assert "reward 'clipscore': there is no cached copy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--suite shapes --pictures 4", "--pictures: a suite has its own; leave it out"),
        ("--suite shapes --column text", "--column: a suite has its own; leave it out"),
        ("--suite shapes --prompts p.txt", "--prompts: those of shapes are part of progrpo; leave it out"),
        ("--suite ocr --split validation", "--split: ocr has no other split than test; leave it out"),
        ("--suite ocr --prompts nowhere.txt", "no prompt file nowhere.txt"),
        ("--suite shapes --reward 0.5*shapes", "a suite gives each reward by itself; leave out weight and needs"),
        ("--suite shapes --reward shapes shapes", "--reward names shapes twice; name it once"),
        ("--suite ocr --prompts {ocr} --reward shapes --features shapes", "the reward `shapes` cannot read the prompt"),
        ("--out x", "--out goes with --suite; give that too"),
        ("--limit 4", "--limit goes with --suite; give that too"),
        ("shapes-diffusion", "a second model, shapes-diffusion, goes with --suite; give that too"),
    ],
)
def test_options_without_effect_are_refused(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ocr.txt").write_text('a sign that says "STOP"\n')
    assert main(["eval", "shapes-flow", *words.format(ocr="ocr.txt").split()]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.slow
def test_several_processes_make_the_same_result(lora, tmp_path, capsys):
    changed = lora(0.3)
    words = ["eval", "shapes-flow", "--lora", changed, *QUICK, "--limit", "40", "--per-prompt", "2", "--json", "--out"]
    assert main([*words, str(tmp_path / "one")]) == 0
    one = json.loads(capsys.readouterr().out)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", "-m", "progrpo"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *words, str(tmp_path / "three")], env=env, stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    three = json.loads(done.stdout)
    for ours, theirs in zip(one["models"], three["models"], strict=True):
        assert (ours["pictures"], ours["missing"]) == (theirs["pictures"], theirs["missing"]) == (80, 0)
        for name, figure in ours["figures"].items():
            assert theirs["figures"][name]["value"] == pytest.approx(figure["value"], abs=5e-3), name
    for path in (tmp_path / "one").rglob("*.png"):
        other = tmp_path / "three" / path.relative_to(tmp_path / "one")
        difference = np.asarray(Image.open(path), int) - np.asarray(Image.open(other), int)
        assert np.abs(difference).max() <= 1


@pytest.mark.slow
def test_the_report_draws_its_charts_in_both_schemes(lora, tmp_path, capsys, browser):
    words = (*QUICK, "--limit", "6", "--per-prompt", "2", "--out", str(tmp_path / "out"))
    evaluated(capsys, "shapes-flow", "--lora", lora(0.3), *words)
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
        errors: list[str] = []
        page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
        page.goto((tmp_path / "out" / "report.html").as_uri())
        for anchor in ("kinds", "frontier"):
            page.locator(f"#{anchor}").scroll_into_view_if_needed()
            page.wait_for_selector(f"#{anchor} svg.main-svg", timeout=60_000)
        assert errors == [] and page.locator(".pair .shot img").count() == 12
        assert page.evaluate("document.documentElement.scrollWidth") <= 1200
        page.close()
