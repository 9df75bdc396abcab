"""The studio's trials against the commands that do the same, and its page."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from progrpo.cli import main
from progrpo.rewards.shapes import ShapesReward
from progrpo.rollout.meter import Meter
from progrpo.rollout.noise import NoiseKey
from progrpo.rollout.plan import Plan, PrunePoint
from progrpo.rollout.rollout import rollout
from progrpo.rollout.sampler import Sampler
from progrpo.rollout.sampling import Record, sampling_for
from progrpo.studio.model import RESULT, TunedModel
from progrpo.studio.trial import Studio, Weights, trusted_config

TEXT = "a red circle"
TRAINED = Weights(RESULT, 1.0)


def train(out: Path, *options: str) -> Path:
    smoke = ["train", "smoke", "--out", str(out), "--audit.every", "0", "--eval.pictures", "2"]
    assert main([*smoke, "--optim.lr", "3e-3", *options]) == 0
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "lora": train(folder / "lora"),
        "full": train(folder / "full", "--model.weights", "full", "--optim.ema-decay", "0.5", "--checkpoint.keep", "2"),
    }


def studio_of(run: Path) -> Studio:
    return Studio(run, trusted_config(run, ()))


def drawn(model: str, out: Path) -> Any:
    """The picture that `progrpo sample` draws by the settings of the runs' evaluations."""
    settings = ["--seed", "1234", "--num-inference-steps", "6"]
    assert main(["sample", model, "--prompt", TEXT, "--out", str(out), *settings]) == 0
    return np.asarray(Image.open(out / "000-00.png")).astype(int)


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_the_ends_of_strength_are_what_sample_draws_of_the_base_and_of_the_run(runs, tmp_path, kind):
    studio = studio_of(runs[kind])
    before, after = (studio.draw(TEXT, Weights(RESULT, share), studio.config.eval) for share in (0.0, 1.0))
    assert before.picture is not None and after.picture is not None
    base, trained = drawn("shapes-flow", tmp_path / "base"), drawn(str(runs[kind]), tmp_path / "run")
    assert np.abs(before.picture - base).max() <= 1 and np.abs(after.picture - trained).max() <= 1
    assert np.abs(base - trained).max() > 5
    for shot in (before, after):
        (score,) = ShapesReward().score(np.asarray(shot.picture)[None], [studio.prompt(TEXT)])
        assert shot.rewards == {"shapes": score.value}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_strength_scales_what_training_added_to_each_weight(runs, kind):
    model = TunedModel(runs[kind])

    def product() -> Any:
        """A layer's weights, or for a LoRA what it adds to them."""
        names = sorted(model.policy.trainable)
        first = model.policy.trainable[names[0]].detach().clone()
        return first if kind == "full" else model.policy.trainable[names[1]].detach() @ first

    products = []
    for strength in (0.0, 0.5, 1.0, 1.5):
        model.show(RESULT, strength)
        products.append(product())
    change = products[2] - products[0]
    assert change.abs().max() > 0
    for strength, there in zip((0.5, 1.5), (products[1], products[3]), strict=True):
        torch.testing.assert_close(there - products[0], strength * change, rtol=1e-3, atol=1e-7)


def test_checkpoints_come_with_the_weights_that_evaluations_measure(runs):
    model = TunedModel(runs["full"])
    assert model.names == [RESULT, "iteration 2", "iteration 1"]
    result = {name: p.detach().clone() for name, p in model.show(RESULT, 1.0).trainable.items()}
    last = {name: p.detach().clone() for name, p in model.show("iteration 2", 1.0).trainable.items()}
    earlier = {name: p.detach().clone() for name, p in model.show("iteration 1", 1.0).trainable.items()}
    assert all(torch.equal(result[name], last[name]) for name in result)
    assert any(not torch.equal(result[name], earlier[name]) for name in result)


PLAN = Plan(6, (PrunePoint(1, 4), PrunePoint(3, 3)))


def test_a_plan_stops_whom_a_rollout_with_that_plan_stops(runs):
    studio = studio_of(runs["lora"])
    text = studio.examples[3]
    outcome = studio.outcome(text, TRAINED, 5, PLAN, "ovf")
    policy = studio.model.show(RESULT, 1.0)
    sampling = sampling_for(policy, studio.config.sampling, range(6), Record())
    meter, prompt = Meter(), studio.prompt(text)
    sampler = Sampler(policy, studio.reward, sampling, PLAN)
    rolled = rollout(sampler, [prompt], torch.tensor([0]), NoiseKey(5, 0), meter)
    stopped = outcome.record["stopped_at"]
    assert rolled.trajectories.member_N.tolist() == [member for member, step in enumerate(stopped) if step is None]
    assert outcome.nfe == meter.cost.nfe and outcome.plain_nfe == 36 and outcome.survivors == 3
    finals = [outcome.record["final"][member] for member in rolled.trajectories.member_N.tolist()]
    assert rolled.survivors.value_N.tolist() == pytest.approx(finals)
    assert outcome.sheet.shape == (6 * 64, 7 * 64, 3)


def test_another_plan_samples_nothing_again(runs, monkeypatch):
    studio = studio_of(runs["lora"])
    text = studio.examples[3]
    first = studio.outcome(text, TRAINED, 5, Plan(6), "ovf")
    policy = studio.model.policy
    monkeypatch.setattr(type(policy), "predict", lambda *args, **options: pytest.fail("sampled again"))
    pruned = studio.outcome(text, TRAINED, 5, PLAN, "uniform")
    assert pruned.record["final"] == first.record["final"] and pruned.survivors == 3
    assert first.variance == pytest.approx(1.0) and first.best_variance == pytest.approx(1.0)


def test_what_cannot_be_tried_is_a_sentence(runs, tmp_path, capsys):
    studio = studio_of(runs["lora"])
    assert "cannot read the prompt" in studio.refusal("a cat")
    assert studio.draw("a cat", TRAINED, studio.config.eval).rewards == {}
    with pytest.raises(ValueError, match="cannot read the prompt"):
        studio.outcome("a cat", TRAINED, 0, PLAN, "ovf")
    with pytest.raises(ValueError, match="saves no network call"):
        studio.outcome(TEXT, TRAINED, 0, Plan(6, (PrunePoint(5, 3),)), "ovf")
    assert main(["studio", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_a_run_of_a_stranger_runs_no_code_of_its_own(runs, tmp_path):
    """Names of modules in config.json are not followed; a reward's must be named again."""
    run = tmp_path / "run"
    run.mkdir()
    for file in ("config.json", "summary.json"):
        text = (runs["lora"] / file).read_text()
        text = text.replace('"selector": "ovf"', '"selector": "evil:f"').replace(
            '"sampler": "auto"', '"sampler": "evil:s"'
        )
        (run / file).write_text(text)
    trusted = trusted_config(run, ())
    assert trusted.plan.selector == "ovf" and trusted.sampling.sampler == "auto"
    (run / "config.json").write_text((run / "config.json").read_text().replace('"name": "shapes"', '"name": "evil:r"'))
    with pytest.raises(ValueError, match="runs code of yours"):
        trusted_config(run, ())
    assert trusted_config(run, ("jpeg_compressibility",)).reward.terms[0].name == "jpeg_compressibility"


@pytest.fixture(scope="module")
def address(runs: dict[str, Path]) -> Iterator[str]:
    command = [sys.executable, "-m", "progrpo", "studio", str(runs["lora"]), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            where = re.search(r"at (http://127\.0\.0\.1:\d+/)", line)
            assert where, line
            yield where[1]
        finally:
            process.terminate()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(60_000)
    wrong: list[str] = []
    own = (address, "data:", "blob:")
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith(own) else wrong.append(asked.url))
    page.goto(address)
    page.get_by_role("button", name="Draw").wait_for()
    yield page
    page.close()
    assert wrong == []


def test_a_prompt_is_drawn_before_and_after(page):
    page.get_by_role("button", name="Draw").click()
    page.locator("table td").first.wait_for()
    assert page.locator("table td").first.inner_text() == "shapes"
    assert page.get_by_role("tabpanel").locator("img").count() == 2


def test_a_text_of_a_stranger_is_a_text(page):
    text = """<b>bold</b> "q" <script>alert(1)</script> \u05e9\u05dc \U0001f98a"""
    prompt = page.get_by_label("Prompt")
    prompt.fill(text)
    prompt.press("Enter")
    page.get_by_text("No rewards: the reward `shapes` cannot read the prompt").wait_for()
    page.get_by_role("tab", name="Film of a group").click()
    page.get_by_role("button", name="Show the group").click()
    page.locator("[data-testid=toast-body]", has_text="cannot read the prompt '<b>bold</b>").wait_for()
    assert page.locator("b", has_text="bold").count() == 0


@pytest.mark.slow
def test_a_film_shows_who_is_stopped(page):
    page.get_by_role("tab", name="Film of a group").click()
    page.get_by_label("number input for Group size").fill("8")
    page.get_by_label("number input for First prune point: keep (0: no point)").fill("4")
    page.get_by_role("button", name="Show the group").click()
    page.get_by_text("4 of 8 members are trained on").wait_for()
    film = page.frame_locator("iframe[title='film of a group']")
    film.locator("tbody tr").first.wait_for()
    assert film.locator("tbody tr").count() == 8 and film.locator("td.out").count() == 4
    assert film.locator("th.cut").inner_text() == "step 3"
