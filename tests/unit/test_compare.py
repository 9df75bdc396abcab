"""The comparison: its figures against closed forms, and its page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import isnan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from progrpo.pages.compare import compare, comparison_page, figures_of
from progrpo.pages.compare.cautions import cautions
from progrpo.pages.compare.figures import AXES, Point, arrival, curve, finals, levels, spread
from progrpo.pages.compare.recipes import differences, grouped, measures_that_differ
from progrpo.pages.run_data import RunData
from progrpo.tracking.lock import only_writer
from progrpo.tracking.run_folder import RunFolder

CONFIG: dict[str, Any] = {
    "recipe": "mine",
    "seed": 0,
    "iterations": 4,
    "model": {"path": "m", "dtype": "float32"},
    "sampling": {"microbatch": 8},
    "optim": {"lr": 0.1, "microbatch": 4},
    "reward": {"terms": [{"name": "shapes", "weight": 1.0, "device": "auto"}]},
    "eval": {"prompts": "shapes", "seed": 1, "every": 2},
    "checkpoint": {"every": 5},
    "tracking": {"to": []},
}


def config(**changes: Any) -> dict[str, Any]:
    """CONFIG with sections or values replaced."""
    return {
        key: {**value, **changes.get(key, {})} if isinstance(value, dict) else changes.get(key, value)
        for key, value in CONFIG.items()
    }


def data(rewards: Any = (), seconds: float = 10.0, processes: int = 1, **changes: Any) -> RunData:
    """A finished run whose iterations have these evaluated rewards, None where there was no evaluation."""
    metrics: list[Any] = [
        {"iteration": i, "seconds": seconds, "rollout/nfe": 100, **({} if r is None else {"eval/graded": r})}
        for i, r in enumerate(rewards)
    ]
    summary: Any = {"status": "finished", "processes": processes, "device": "cpu, 1 threads"}
    return RunData(Path("run"), config(**changes), metrics, summary, [], [], [])


def with_pictures(before: Any, after: Any, **changes: Any) -> RunData:
    """A run whose test prompts had these rewards before and after it."""
    records: Any = [
        [{"prompt": str(i), "graded": r, "strict": None, "judge": None} for i, r in enumerate(rewards)]
        for rewards in (before, after)
    ]
    return replace(data(**changes), before=records[0], after=records[1])


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_seed_and_in_what_the_machine_chose_are_one_recipe():
    runs = [
        data(),
        data(seed=1, model={"dtype": "bfloat16"}, sampling={"microbatch": 2}, optim={"microbatch": 1}),
        data(seed=2, checkpoint={"every": 1}, tracking={"to": ["wandb"]}),
        data(seed=3, optim={"lr": 0.2}),
    ]
    recipes = grouped(runs)
    assert [recipe.seeds for recipe in recipes] == [[0, 1, 2], [3]]
    assert [recipe.label for recipe in recipes] == ["mine, lr 0.1", "mine, lr 0.2"]


@pytest.mark.parametrize(
    "changes, labels",
    [
        ({"recipe": "other"}, ["mine", "other"]),
        ({"optim": {"lr": 0.2}, "iterations": 8}, ["mine, iterations 4, lr 0.1", "mine, iterations 8, lr 0.2"]),
        ({"optim": {"a": 1, "b": 2, "c": 3, "d": 4}}, ["run (1)", "run (2)"]),  # too much for a name
        ({"reward": {"terms": "x" * 99}}, None),
    ],
)
def test_labels_tell_recipes_apart(changes, labels):
    names = [recipe.label for recipe in grouped([data(), data(**changes)])]
    assert len(set(names)) == 2 and all(len(label) < 120 for label in names)
    assert labels is None or names == labels


def test_only_settings_that_differ_are_listed():
    recipes = grouped([data(), data(optim={"lr": 0.2}, eval={"column": "text"})])
    assert differences(recipes) == {"optim.lr": ["0.1", "0.2"], "eval.column": ["–", "text"]}


@pytest.mark.parametrize(
    "changes, alike",
    [
        ({"optim": {"lr": 0.2}, "eval": {"every": 9, "keep_best": True}}, True),
        ({"reward": {"terms": [{"name": "shapes", "weight": 1.0, "device": "cuda"}]}, "iterations": 5}, True),
        ({"reward": {"terms": [{"name": "shapes", "weight": 2.0, "device": "auto"}]}}, False),
        ({"reward": {"terms": [{"name": "hpsv2", "weight": 1.0, "device": "auto"}]}}, False),
        ({"eval": {"seed": 2}}, False),
        ({"eval": {"prompts": "mine.txt"}}, False),
    ],
)
def test_rewards_are_compared_where_reward_prompts_and_noise_are_one(changes, alike):
    rewards = (0.1, 0.5, 0.7)
    recipes = grouped([data(rewards), data(rewards, **changes)])
    assert (not measures_that_differ(recipes)) == alike
    assert (figures_of(recipes)["equal_reward"] is not None) == alike
    assert any("not measured alike" in sentence for sentence in cautions(recipes)) != alike


# --- curves and spread ------------------------------------------------------------------------------------------------


def test_places_are_sums_and_hours_count_processes():
    points = curve(data((None, 0.5, None, 0.7), processes=8), "eval/graded")
    assert [point.value for point in points] == [0.5, 0.7]
    assert points[0].at == {"seconds": 20, "nfe": 200, "iteration": 2, "hours": 20 * 8 / 3600}
    assert points[1].at == {"seconds": 40, "nfe": 400, "iteration": 4, "hours": 40 * 8 / 3600}


def test_the_band_is_of_the_iterations_that_all_seeds_have():
    seeds = [data((0.1, 0.2, 0.3)), data((0.3, 0.6), seconds=20, seed=1), data((), seed=2)]
    over = spread([curve(run, "eval/graded") for run in seeds])  # the third has not begun
    assert over.mean == pytest.approx([0.2, 0.4]) and over.low == [0.1, 0.2] and over.high == [0.3, 0.6]
    assert over.at["seconds"] == [15, 30] and over.at["iteration"] == [1, 2]
    assert spread([[], []]).mean == []


# --- equal reward -----------------------------------------------------------------------------------------------------


def points(*values: float) -> list[Point]:
    return [Point(dict.fromkeys(AXES, 10.0 * (i + 1)), value) for i, value in enumerate(values)]


@pytest.mark.parametrize(
    "values, level, place, at_first",
    [
        ((0.2, 0.4, 0.8), 0.4, 20.0, False),
        ((0.2, 0.4, 0.8), 0.5, 22.5, False),
        ((0.2, 0.1, 0.3, 0.0, 0.9), 0.25, 27.5, False),  # the first time, though it is lost again
        ((0.5, 0.4), 0.5, 10.0, True),
        ((0.2, 0.4), 0.41, None, False),
        ((), 0.4, None, False),
    ],
)
def test_arrivals_are_interpolated(values, level, place, at_first):
    reached = arrival(points(*values), level)
    assert (reached is None) == (place is None)
    if reached is not None:
        assert reached.at == pytest.approx(dict.fromkeys(AXES, place)) and reached.at_first == at_first


def test_levels_are_shares_of_the_smallest_gain_by_hand():
    slow = [data((0.2, 0.4, 0.6)), data((0.2, 0.2, 0.4), seed=1)]  # mean 0.2 -> 0.5
    fast = [data((0.4, 0.8, 1.0), optim={"lr": 1.0})]
    equal_reward = levels(grouped([*slow, *fast]))
    assert equal_reward is not None and (equal_reward.start, equal_reward.end) == pytest.approx((0.2, 0.5))
    assert equal_reward.rewards == pytest.approx([0.275, 0.35, 0.425, 0.5])
    first, second = equal_reward.arrivals["mine, lr 0.1"][1]  # 0.35
    assert first and second and first.at["seconds"] == pytest.approx(10 + 10 * 0.75)
    assert second.at["seconds"] == pytest.approx(20 + 10 * 0.75)
    assert equal_reward.arrivals["mine, lr 0.1"][3][1] is None  # one seed ends at 0.4
    (quick,) = equal_reward.arrivals["mine, lr 1.0"][0]
    assert quick and quick.at_first and quick.at["nfe"] == 100


@pytest.mark.parametrize("rewards", [(), (0.5,), (None, 0.5), (0.5, 0.4)])
def test_without_two_evaluations_or_a_gain_there_are_no_levels(rewards):
    assert levels(grouped([data(rewards), data(rewards, optim={"lr": 1.0})])) is None


# --- final figures ----------------------------------------------------------------------------------------------------


def test_intervals_are_over_seeds_or_over_the_pictures_of_one_run():
    seeds = [with_pictures([0.0, 0.2], [0.4, 0.6], seed=0), with_pictures([0.0, 0.2], [0.6, 0.8], seed=1)]
    one = with_pictures([0.0, 0.2], [0.2, 0.6], optim={"lr": 1.0})
    several, single = finals(grouped([*seeds, one]))["reward"]
    t = 12.706204736432095  # the 97.5 % quantile with one degree of freedom
    assert several.after is not None and several.change is not None and several.against_first is None
    assert (several.before, several.after.value) == pytest.approx((0.1, 0.6))
    assert several.after.half == pytest.approx(t * 0.1) == several.change.half
    assert single.after is not None and single.change is not None and single.against_first is not None
    assert single.after.half == pytest.approx(t * 0.2)  # over two pictures
    assert (single.change.value, single.change.half) == pytest.approx((0.3, t * 0.1))
    assert single.against_first.value == pytest.approx(-0.2) and isnan(single.against_first.half)


def test_single_runs_are_compared_picture_by_picture_and_seeds_by_welch():
    a, b = with_pictures([0, 0, 0], [0.1, 0.5, 0.9]), with_pictures([0, 0, 0], [0.2, 0.6, 1.0], optim={"lr": 1})
    against = finals(grouped([a, b]))["reward"][1].against_first
    assert against is not None and (against.value, against.half) == pytest.approx((0.1, 0.0))
    seeds = [with_pictures([0], [r], seed=s, optim={"lr": lr}) for lr, r, s in [(1, 0.1, 0), (1, 0.3, 1)]]
    others = [with_pictures([0], [r], seed=s, optim={"lr": 2}) for r, s in [(0.5, 0), (0.7, 1)]]
    welch = finals(grouped([*seeds, *others]))["reward"][1].against_first
    # two degrees of freedom, since both variances are equal
    assert welch is not None and (welch.value, welch.half) == pytest.approx((0.4, 4.302652729911275 * sqrt(0.02)))


# --- sentences, JSON and the page -------------------------------------------------------------------------------------


def test_cautions_say_what_does_not_fit():
    running = replace(data((0.1,), model={"path": "n"}), held=True)
    running.summary["status"] = "running"
    running.summary["device"] = "NVIDIA H200"
    del running.summary["processes"]
    said = "\n".join(cautions(grouped([data(), data(), running])))
    for words in (
        "The models differ (m, n)",
        "mine, path m has seed 0 more than once",
        "different devices (cpu, 1 threads, NVIDIA H200)",
        "run did not record how many processes ran",
        "run (seed 0) is running: 1 of 4 iterations are shown.",
    ):
        assert words in said


def write(folder: Path, rewards: Any, status: str = "finished", **changes: Any) -> Path:
    run = RunFolder.create(folder)
    run.log_config(config(**changes))
    run_data = data(rewards)
    for i, record in enumerate(run_data.metrics):
        run.log({**record, "eval/kl": 0.1 * i, "reward/mean": 0.5}, i)
    if status == "finished":
        records: Any = [{"prompt": f"p{i}", "graded": 0.5, "strict": i == 0, "judge": None} for i in range(2)]
        for when in ("before", "after"):
            run.write_evaluation(when, records, np.zeros((2, 8, 8, 3), np.uint8))
    run.summary.write({"status": status, "iterations": len(rewards), "wall_seconds": 40.0, "processes": 2})
    return folder


def text(page: str) -> str:
    """The page without Plotly's own code."""
    head, _, rest = page.partition("<script>")
    return head + rest.partition("</script></head>")[2]


def test_the_page_has_every_section_and_loads_nothing(tmp_path):
    folders = [write(tmp_path / f"a{s}", (0.1 + s / 10, 0.3, 0.5), seed=s) for s in range(2)]
    folders.append(write(tmp_path / "b", (0.2, 0.6, 0.8), optim={"lr": 0.2}))
    page = comparison_page(compare(folders))
    body = text(page)
    assert page.count("plotly.js v") == 1 and not re.search(r"(src|href)=[\"']?(https?:)?//", body)
    for anchor in ("results", "curves", "equal", "distance", "pictures", "settings"):
        assert f'<section id="{anchor}">' in body
    assert "mine, lr 0.1" in body and "GPU-hours" in body and "from the same noise" in body
    assert body.count("<img ") == 2 * (1 + 3)  # two prompts: before, and after each run
    assert '"fill":"toself"' in body.replace(" ", "")  # the band of the recipe with two seeds


def test_running_and_killed_runs_are_compared_as_far_as_they_are(tmp_path):
    folders = [write(tmp_path / "a", (0.1, 0.3), "running"), write(tmp_path / "b", (), "running", optim={"lr": 1.0})]
    with only_writer(folders[0]):
        body = text(comparison_page(compare(folders)))
    assert "a (seed 0) is running: 2 of 4" in body and "b (seed 0) is killed: 0 of 4" in body
    assert "No run has been evaluated yet" in body and "No run has pictures" in body


def test_json_has_the_figures_and_no_nan(tmp_path):
    folders = [write(tmp_path / "a", (0.1, 0.5)), write(tmp_path / "b", (0.1, 0.9), optim={"lr": 0.2})]
    figures: Any = json.loads(json.dumps(figures_of(compare(folders)), allow_nan=False))
    assert [recipe["label"] for recipe in figures["recipes"]] == ["mine, lr 0.1", "mine, lr 0.2"]
    assert figures["differences"] == {"optim.lr": {"mine, lr 0.1": "0.1", "mine, lr 0.2": "0.2"}}
    assert figures["equal_reward"]["rewards"] == pytest.approx([0.2, 0.3, 0.4, 0.5])
    arrivals = figures["equal_reward"]["arrivals"]
    assert arrivals["mine, lr 0.2"][3][0]["seconds"] == pytest.approx(15)
    curve_of_first = figures["recipes"][0]["curves"]["eval/graded"]
    assert curve_of_first["mean"] == [0.1, 0.5] and curve_of_first["at"]["hours"][1] == pytest.approx(20 * 2 / 3600)


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    folder = write(tmp_path / "a", (0.1,))
    with pytest.raises(ValueError, match="needs two runs"):
        compare([folder])
    with pytest.raises(ValueError, match="is given twice"):
        compare([folder, tmp_path / "a" / ".." / "a"])
    with pytest.raises(ValueError, match=r"no config\.json"):
        compare([folder, tmp_path])


def test_other_prompts_are_not_put_side_by_side(tmp_path):
    folders = [write(tmp_path / "a", (0.1, 0.5)), write(tmp_path / "b", (0.1, 0.9), eval={"prompts": "other"})]
    run = RunFolder(folders[1])
    records = run.evaluations["after"].read()
    run.evaluations["after"].write([{**record, "prompt": "another"} for record in records])
    body = text(comparison_page(compare(folders)))
    assert "evaluated on different prompts" in body and "Not given: the recipes are not measured" in body
