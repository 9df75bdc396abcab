"""The paper's figures and tables: their arms are valid, their pages follow from JSON, and runs are shared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from progrpo.checks import check
from progrpo.cli import main
from progrpo.cli.repro_commands import rendered
from progrpo.config import resolve_plan
from progrpo.repro import fig1
from progrpo.repro.arms import HELD_OUT_KINDS, OtherKinds, arms, folder_of
from progrpo.repro.campaign import Campaign
from progrpo.repro.experiments import EXPERIMENTS, kind_of
from progrpo.repro.page import page, picture
from progrpo.training.build import train_order

DOCS = Path(__file__).parents[2] / "docs"
COMMITTED = [path.stem for path in sorted((DOCS / "results").glob("*.json")) if path.stem in {*EXPERIMENTS, "fig1"}]


@pytest.mark.parametrize("name", COMMITTED)
def test_a_committed_page_is_what_its_json_gives(name):
    text, image = rendered(name, json.loads((DOCS / "results" / f"{name}.json").read_text()))
    assert (DOCS / "results" / f"{name}.md").read_text() == text
    if image is not None:
        assert (DOCS / "images" / f"repro_{name}.svg").read_text() == image


@pytest.mark.parametrize("scale", ["reduced", "paper"])
def test_every_arm_can_be_run(scale):
    configs = arms(scale)
    for config in configs.values():
        check(config)
    assert len({folder_of(name) for name in configs}) == len(configs)


def test_every_experiment_has_its_arms():
    for name, experiment in EXPERIMENTS.items():
        assert set(experiment.arms) <= arms("reduced").keys(), name
        assert name == "table3" or set(experiment.arms) <= arms("paper").keys(), name
        assert all(map(kind_of, experiment.arms)), name  # StopIteration for an arm of no kind
        assert experiment.printed.keys() <= {"the base", *experiment.arms}, name


@pytest.mark.parametrize(("scale", "steps"), [("reduced", (5, 7)), ("paper", (30, 40))])
def test_the_diffusion_plan_is_the_papers(scale, steps):
    plan = resolve_plan(arms(scale)["diffusion 48 -> 8"])
    assert plan.group_size == 48 and plan.survivors == 8
    assert [(point.step, point.keep) for point in plan.prune] == [(steps[0], 32), (steps[1], 8)]


def test_table_3_leaves_kinds_out_of_training():
    config = arms("reduced")["other kinds baseline"]
    order = train_order(config.prompts, 0)
    assert isinstance(order, OtherKinds)
    kinds = {prompt.columns["kind"] for prompt in order.prompts_for(0, 60)}
    assert kinds == {"single", "two", "counting"} and not kinds & set(HELD_OUT_KINDS)


def run_of(arm, seed, reward, nfe=100):
    summary = {
        "reward_before": 0.5,
        "reward_after": reward,
        "held_out_before": {"shapes_taste": 0.25},
        "held_out_after": {"shapes_taste": 0.375},
        "iterations": 2,
        "nfe": nfe,
        "device": "cpu",
        "versions": {"torch": "2"},
    }
    curves = {"eval/graded": [[1, reward], [2, reward + 0.1]]}
    by_kind = {"before": {"single": 0.5}, "after": {"single": 0.75}}
    return {"arm": arm, "seed": seed, "summary": summary, "seconds": 12.0, "curves": curves, "by_kind": by_kind}


def test_a_page_has_means_spreads_the_papers_numbers_and_what_is_missing():
    data = {"runs": [run_of("flow baseline", 0, 0.6), run_of("flow baseline", 1, 0.8), run_of("flow flash", 0, 0.7)]}
    text = page("table1", data)
    assert f"| flow baseline | 0.700 ± {math.sqrt(0.02):.3f} | 0.375 |" in text
    assert "| the base (flow) | 0.500 | 0.250 |" in text and "| flow flash | 0.700 |" in text
    assert "Not run yet: flow standard." in text
    assert "| flow flash | 1 | 12 | 100 | +0.100 |" in text  # against the baseline of its seed, 0.6
    printed = next(line for line in text.splitlines() if line.startswith("| flow standard |"))
    assert all(number in printed for number in ("1.26x", "24.008", "0.322"))
    by_kind = page("table3", {"runs": [run_of("other kinds flash", 0, 0.5)]})
    assert "| arm | single |" in by_kind and "| other kinds flash | 0.75 |" in by_kind
    assert all(len(line) <= 120 for line in text.splitlines())
    rewards = {"flow baseline": (0.6, 0.7, 0.8), "flow uniform 12 of 24": (0.5, 0.62, 0.69)}
    pairs = [run_of(arm, seed, reward) for arm, own in rewards.items() for seed, reward in enumerate(own)]
    verdict = " ".join(page("fig2", {"runs": pairs}).split())
    assert "by more than two standard errors of the seeds' differences: ahead: none; behind: flow uniform" in verdict
    assert "Runs that ended below their base: none." in verdict
    fallen = [run_of(arm, seed, reward - 0.2) for arm, own in rewards.items() for seed, reward in enumerate(own)]
    assert "below their base: flow baseline (seed 0)," in " ".join(page("fig2", {"runs": fallen}).split())
    image = picture("table1", data)
    assert image is not None and image.count("<polyline") == 2 and "flow flash" in image
    assert picture("table1", {"runs": []}) is None and "No run has come to its end" in page("table1", {"runs": []})


def test_figure_1_keeps_the_ends():
    rewards = torch.linspace(0, 1, 24, dtype=torch.float64).repeat(2, 1)
    rewards[1, 0] = torch.nan  # a group with a missing reward is left out
    halves = fig1.kept(rewards)
    assert halves["full 24"].shape == (1, 24) and halves["OVF 12"].shape == halves["uniform 12"].shape == (1, 12)
    full = halves["full 24"].flatten().sort().values
    assert torch.equal(halves["OVF 12"].flatten().sort().values, torch.cat([full[:6], full[-6:]]))
    assert halves["full 24"].var(correction=0).item() == pytest.approx(1)


def test_runs_that_are_finished_are_not_run_again(tmp_path):
    campaign = Campaign(tmp_path, "reduced", (0,))
    todo = [arm for arm, _, _ in campaign.missing("table1")]
    assert todo == list(EXPERIMENTS["table1"].arms)
    done = campaign.path("flow flash", 0)
    done.mkdir(parents=True)
    (done / "summary.json").write_text(json.dumps({"status": "finished"}))
    assert "flow flash" not in [arm for arm, _, _ in campaign.missing("table1")]
    assert "flow flash" not in [arm for arm, _, _ in campaign.missing("fig5")]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["table3", "--scale", "paper"], "progrpo eval RUN --suite geneval"),
        (["fig2", "--page"], "leave --page out"),
        (["table1", "--json"], "--json goes with table4"),
    ],
)
def test_what_cannot_be_done_is_said(words, sentence, tmp_path, capsys):
    assert main(["repro", *words, "--out", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err
