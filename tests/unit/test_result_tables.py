"""Tables of results whose benchmarks print them follow from their JSON."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_committed_tables_are_what_the_json_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    study = importlib.import_module("high_resolution")
    results = ROOT / "docs/results/high_resolution.json"
    tables = study.tables(json.loads(results.read_text()))
    assert f"<!-- tables:begin -->\n{tables}\n<!-- tables:end -->" in results.with_suffix(".md").read_text()


def test_the_table_of_stale_sampling_is_what_its_json_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    study = importlib.import_module("stale_sampling")
    results = ROOT / "docs/results/stale_sampling.json"
    assert study.page_table(json.loads(results.read_text())) in results.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("study", "reward", "model"),
    [
        ("dgpo", "shapes_match", "shapes-flow"),
        ("grpo", "shapes_match", "shapes-flow"),
        ("grpo", "shapes_match", "shapes-diffusion"),
        ("dgpo", "shapes_strict", "shapes-flow"),
        ("dgpo", "flipped_reward:FlippedStrict", "shapes-flow"),
        ("grpo", "shapes_strict", "shapes-flow"),
        ("grpo", "flipped_reward:FlippedStrict", "shapes-flow"),
    ],
)
def test_the_tables_of_the_road_are_what_its_json_gives(
    monkeypatch: pytest.MonkeyPatch, study: str, reward: str, model: str
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    road = importlib.import_module("road_to_reward")
    results = ROOT / "docs/results/road_to_reward.json"
    of_task = road.of_task(json.loads(results.read_text()), model, reward)
    assert road.table(road.STUDIES[study], of_task) in results.with_suffix(".md").read_text()


def test_the_tables_beside_the_map_are_what_their_json_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    study = importlib.import_module("pruning_page")
    monkeypatch.setattr(study.Map, "signal", lambda survey, cell: 1.0)  # predictions take a pretrained network
    survey = study.Map(study.Results(ROOT / "docs/results/when_pruning_pays.json"), study.ToyNetwork())
    page = (ROOT / "docs/results/when_pruning_pays.md").read_text()
    assert f"{len(survey.results.runs):,} short runs" in page
    previews = json.loads(study.PREVIEWS.read_text())
    tables = {
        "prompts": study.prompts_table(survey.results),
        "previews": study.previews_table(survey, previews),
        "preview costs": study.preview_costs_table(survey),
        "norms": study.norms_table(survey),
        "groups": study.groups_table(survey),
        "gradients": study.gradients_table(json.loads(study.GRADIENTS.read_text())),
        "negatives": study.negatives_table(study.Results(study.NEGATIVES)),
    }
    for mark, lines in tables.items():
        table = "\n".join(lines)
        assert f"<!-- {mark}:begin -->\n\n{table}\n\n<!-- {mark}:end -->" in page, mark
    promises = {
        "promise": study.promise_table(survey, json.loads(study.GRADIENTS.read_text()), previews),
        "promises": study.promises_table(survey),
    }
    for mark, lines in promises.items():
        part = page.split(f"<!-- {mark}:begin -->\n\n")[1].split("\n\n<!--")[0]
        assert _measured(part.splitlines()) == _measured(lines), mark


def _measured(table: list[str]) -> list[list[str]]:
    """A table without its columns of predictions, which depend on a network that each machine pretrains."""
    rows = [line.split("|")[1:-1] for line in table]
    return [
        [cell for cell, head in zip(row, rows[0], strict=True) if not head.endswith((" k V ", "promise "))]
        for row in rows
    ]


def test_the_road_to_plain_grpos_gain_is_what_its_json_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    road = importlib.import_module("road_to_reward")
    page = (ROOT / "docs/results/road_to_reward.md").read_text()
    header, _, *rows = page[page.index("| to 25 / 50 / 75 / 100 %") :].split("\n\n")[0].splitlines()
    arms = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    results = road.of_task(
        json.loads((ROOT / "docs/results/road_to_reward.json").read_text()), "shapes-flow", "shapes_match"
    )
    assert road.arrivals(results, arms, "first 3, plain 12").splitlines() == [header, _, *rows] and len(arms) > 8


def test_the_table_of_noise_scales_is_what_its_json_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    study = importlib.import_module("noise_scale")
    scales = json.loads((ROOT / "docs/results/noise_scale.json").read_text())
    assert study.table(scales) in (ROOT / "docs/results/road_to_reward.md").read_text()


def test_the_trials_have_the_settings_that_they_were_run_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    search = importlib.import_module("search")
    learning = ("iterations", "plan", "objective", "optim")
    measured = ("microbatch", "offload_optimizer")  # how much at once, not what is learnt
    for entry in json.loads((ROOT / "docs/results/search.json").read_text()):
        trial = json.loads(json.dumps(search.changed(search.to_dict(search.Config()), search.TRIALS[entry["trial"]])))
        for name in learning:
            ran = entry["changes"].get(name, {})
            now = trial[name]
            fields = ran.items() if isinstance(ran, dict) else []
            differ = {f: (v, now[f]) for f, v in fields if f not in measured and f in now and not _agree(v, now[f])}
            assert not differ, (entry["trial"], name, differ)
            assert isinstance(ran, dict) or ran == now, entry["trial"]


def _agree(ran: object, now: object) -> bool:
    """Whether settings of a run agree with those of a trial, which may have fields that did not exist then."""
    if isinstance(ran, dict) and isinstance(now, dict):
        return all(_agree(value, now[name]) for name, value in ran.items() if name in now)
    return ran == now
