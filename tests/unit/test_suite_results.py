"""The folder of a suite's evaluation, the figures that follow from its records, and their tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from progrpo.suites.formats import SuitePrompt
from progrpo.suites.markdown import tables
from progrpo.suites.records import ModelFolder, slug
from progrpo.suites.results import Grid, ModelRecords, model_results, score_of
from progrpo.types import Prompt

SETTINGS = {"suite": "shapes", "seed": 1, "num_inference_steps": 10}


def record(place, member, value, strict=None, there=True):
    return {"place": place, "member": member, "there": there, "strict": strict, "judge": None, "rewards": {"r": value}}


def opened(tmp_path, name="runs/a"):
    folder = ModelFolder(tmp_path, name)
    folder.open(SETTINGS)
    return folder


def test_a_folder_goes_on_after_a_half_written_line(tmp_path):
    folder = opened(tmp_path)
    picture = np.full((4, 4, 3), 7, np.uint8)
    folder.write([record(0, 0, 0.5, True), record(0, 1, 0.25)], {(0, 0): picture})
    with (folder.path / "scores.jsonl").open("ab") as file:
        file.write(b'{"place": 1, "memb')
    assert set(folder.read()) == {(0, 0), (0, 1)}
    again = opened(tmp_path)
    again.write([record(1, 0, 1.0)], {})
    assert [r["rewards"]["r"] for r in again.read().values()] == [0.5, 0.25, 1.0]
    assert again.has_picture((0, 0)) and not again.has_picture((0, 1))
    assert (again.picture((0, 0)) == picture).all()


def test_a_later_line_adds_rewards_and_keeps_the_verdict(tmp_path):
    folder = opened(tmp_path)
    folder.write([record(0, 0, 0.5, True)], {})
    folder.write([{"place": 0, "member": 0, "there": True, "rewards": {"other": 2.0}}], {})
    (merged,) = folder.read().values()
    assert merged["rewards"] == {"r": 0.5, "other": 2.0} and merged["strict"] is True


def test_pictures_by_other_settings_are_refused(tmp_path):
    opened(tmp_path)
    with pytest.raises(
        ValueError, match=r"runs-a holds pictures by another seed \(1 there, 2 now\); give another --out"
    ):
        ModelFolder(tmp_path, "runs/a").open({**SETTINGS, "seed": 2})


def test_a_damaged_line_is_named(tmp_path):
    folder = opened(tmp_path)
    (folder.path / "scores.jsonl").write_text('{"place": 0\n{}\n')
    with pytest.raises(ValueError, match=r"scores\.jsonl: line 1 is not JSON"):
        folder.read()


def test_names_of_folders():
    assert slug("runs/a b/out") == "runs-a-b-out" and slug("../x") == "x" and slug("///") == "model"


# --- figures ----------------------------------------------------------------------------------------------------------

PROMPTS = [SuitePrompt(n, Prompt(f"p{n}", {"kind": kind})) for n, kind in enumerate("aabb")]
GRID = Grid(PROMPTS, per_prompt=2, mean_of_kinds=False)


def model(name, values, is_base=False, strict=None, measures: Any = None):
    records = {
        (n, m): record(n, m, values[n][m], None if strict is None else strict[n][m]) for n in range(4) for m in range(2)
    }
    no_measures: Any = {}
    return ModelRecords(name, name, records, measures or no_measures, is_base)


def test_figures_are_means_by_kind_and_differences_of_the_same_noise():
    base = [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    better = [[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    measures = {"kl": {"0": 0.1, "1": 0.3}, "diversity": {str(n): {"diversity": 0.5, "vendi": 2.0} for n in range(4)}}
    results = model_results(
        GRID, [model("m", better, strict=[[bool(v) for v in row] for row in better], measures=measures),
               model("b", base, is_base=True, strict=[[bool(v) for v in row] for row in base])], ["r"]
    )  # fmt: skip
    ours, base_result = results
    assert ours["figures"]["r"]["value"] == pytest.approx(7 / 8) and ours["figures"]["r"]["count"] == 8
    assert ours["figures"]["accuracy"]["value"] == pytest.approx(7 / 8)
    assert {kind: f["value"] for kind, f in ours["by_kind"]["accuracy"].items()} == {"a": 0.75, "b": 1.0}
    assert ours["figures"]["kl"] | {"low": 0, "high": 0} == {
        "value": pytest.approx(0.2),
        "low": 0,
        "high": 0,
        "count": 2,
    }
    assert ours["figures"]["vendi"]["value"] == 2 and "distance" not in ours["figures"]
    change = ours["against"]["r"]
    assert change["value"] == pytest.approx(2 / 8) and change["count"] == 8
    assert change["p"] == 0.5  # of four assignments of signs to two differences of one sign, two are as far
    assert change["p_holm"] == 1.0 and "kl" not in ours["against"]
    assert base_result["against"] == {} and base_result["is_base"]
    assert score_of(results, ["r"]) == "accuracy"


def test_missing_pictures_are_counted_and_left_out():
    given = model("m", [[1.0, 1.0]] * 4)
    records = {**given.records, (0, 0): record(0, 0, None, there=False)}
    del records[3, 1]
    (result,) = model_results(GRID, [ModelRecords("m", "m", records, {})], ["r"])
    assert (result["pictures"], result["missing"]) == (6, 2)
    assert result["figures"]["r"]["count"] == 6 and "accuracy" not in result["figures"]
    assert score_of([result], ["r"]) == "r"


def test_tables_are_markdown_with_all_models():
    models = [model("runs/a|b", [[1.0, 1.0]] * 4), model("base", [[0.0, 1.0]] * 4, is_base=True)]
    results = model_results(GRID, models, ["r"])
    whole: Any = {
        **dict(suite="shapes", paper="arXiv 1", score="r", mean_of_kinds=False, prompts=4, of_prompts=9),
        **dict(pictures_per_prompt=2, num_inference_steps=10, guidance_scale=1.0, seed=3, kinds=["a", "b"]),
        "models": results,
    }
    text = tables(whole)
    lines = text.splitlines()
    assert lines[0].startswith("shapes (arXiv 1): 4 of 9 prompts, 2 pictures each, 10 steps, guidance 1, seed 3;")
    assert r"runs/a\|b" in text and "base (base)" in text
    assert "0.500 [0.500, 0.500]" in text and "r by kind:" in text
    assert "+0.500 [0.500, 0.500]" in text and "0.125" in text  # every prompt is better: 2 of 2^4 assignments
    columns = {line.count(" | ") for line in lines if line.startswith("|")}
    assert columns <= {1, 3}
