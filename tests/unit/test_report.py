import base64
import json
import os
import re
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from progrpo.pages import charts
from progrpo.pages.report import pruning, write_report
from progrpo.pages.report.film import spread
from progrpo.pages.report.head import verdict
from progrpo.pages.run_data import read_run_data
from progrpo.tracking.decisions import PlanDecision
from progrpo.tracking.lock import only_writer
from progrpo.tracking.run_folder import RunFolder
from tests.support.locks import record

EVIL = '</script><script>alert("x")</script>'
STEPS, GROUP = 3, 4


def pictures(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 8, 8, 3), dtype=np.uint8)


def evaluation(passes):
    return [
        {"prompt": f"{i} {EVIL}", "kind": ("one", "two")[i % 2], "graded": 0.5, "strict": p, "judge": None}
        for i, p in enumerate(passes)
    ]


def audit(iteration, final=(0.1, 0.9, 0.5, 0.4)):
    return {
        "iteration": iteration,
        "prompt": EVIL,
        "steps": list(range(STEPS)),
        "scores": [[0.1, None, 0.3, 0.2], [0.2, 0.8, 0.5, 0.1], list(final)],
        "final": list(final),
        "stopped_at": [None, None, 1, 1],
        "kept_uniform": [0, 2],
        "kept_ovf": [0, 1],
    }


@pytest.fixture
def run(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.log_config({"recipe": EVIL, "seed": 3, "iterations": 2, "model": {"path": "shapes-flow"}})
    return folder


def finish(folder, before, after):
    for i in range(2):
        folder.log({"iteration": i, "seconds": 2.0, "reward/mean": 0.5 + i, "rollout/nfe": 100}, i)
        folder.write_audit(audit(i), pictures(GROUP, STEPS + 1))
    folder.write_evaluation("before", evaluation(before), pictures(len(before)))
    folder.write_evaluation("after", evaluation(after), pictures(len(after)))
    cost = {"nfe": 200, "decodes": 20, "reward_calls": 20, "trained_steps": 8}
    folder.summary.write(
        {
            "status": "finished",
            "wall_seconds": 130,
            "iterations": 2,
            "nfe_saved": 0.25,
            "plan": {"path": [4, 2], "prune_steps": [1], "selector": "ovf", "num_inference_steps": STEPS},
            "cost": {"predicted": cost, "counted": cost, "audit": cost},
            "preview_rank_correlation": {"1": 0.8},
            "seconds_by_stage": {"sample": 3.0, "update": 1.0},
            "versions": {"progrpo": EVIL},
            "command": f"progrpo train {EVIL}",
        }
    )


def text(folder):
    """The report without Plotly's own code."""
    page = write_report(folder.path).read_text(encoding="utf-8")
    head, _, rest = page.partition("<script>")
    return head + rest.partition("</script></head>")[2]


def test_wide_pictures_are_shown_whole(run):
    run.write_evaluation("before", evaluation([True]), pictures(1).repeat(2, axis=2))
    page = text(run)
    (uri,) = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', page)
    assert Image.open(BytesIO(base64.b64decode(uri))).size == (16, 8)
    (style,) = re.findall(r"\.shot img \{([^}]+)\}", page)
    assert "height: auto" in style and "aspect-ratio" not in style and "object-fit" not in style


def test_a_run_that_has_only_begun_has_a_report(run):
    with only_writer(run.path):
        page = text(run)
    assert ">running<" in page
    for words in ("has not been evaluated yet", "No evaluation is written yet", "No iteration is finished yet"):
        assert words in page
    for words in ("No audit group is written yet", "No cost is counted yet", "No time is recorded yet"):
        assert words in page


def test_a_run_under_way_says_what_is_not_there_yet(run):
    run.write_evaluation("before", evaluation([True, False]), pictures(2))
    run.log({"iteration": 0, "seconds": 2.0, "reward/mean": 0.5, "reward/std": None}, 0)
    run.write_audit(audit(0), pictures(GROUP, STEPS + 1))
    with only_writer(run.path):
        page = text(run)
    assert "1 of 2 iterations are done in 2.0 s (" in page
    assert "There is no evaluation after training yet" in page
    assert "mean over finished members" in page  # also of those that `final_keep` drops
    assert "Not recorded: Strict accuracy, Spread within a group, Distance to the reference" in page


def test_the_noise_scale_is_drawn_beside_the_prompts_of_an_iteration(run):
    run.log_config({"recipe": "r", "iterations": 2, "prompts": {"per_iteration": 6}})
    run.log({"iteration": 0, "seconds": 2.0, "update/noise_scale": None}, 0)
    assert "Gradient noise scale" in text(run).partition("Not recorded: ")[2]
    run.log({"iteration": 1, "seconds": 2.0, "update/noise_scale": 70.5}, 1)
    page = text(run)
    assert "<b>Gradient noise scale</b>" in page and "an iteration below it is ruled by noise" in page
    assert '"name": "noise scale"' in page and '"y": [70.5]' in page and '"y": [6.0, 6.0]' in page
    run.log_config({"recipe": "r", "iterations": 2, "prompts": {"per_iteration": "six"}})
    assert '"y": [70.5]' in text(run) and '"name": "prompts per iteration"' not in text(run)


def test_the_agreement_is_of_the_previews_that_decide(run):
    final = audit(0)["final"]
    used = [list(final), [-value for value in final], list(final)]
    run.write_audit({**audit(0), "used": used}, pictures(GROUP, STEPS + 1))
    assert figure_of(text(run), "agreement-by-step")["data"][-1]["y"] == [1, -1, 1]


def test_the_film_and_the_chart_have_one_agreement(run):
    used = [list(audit(0)["final"])] * STEPS
    run.write_audit({**audit(0), "used": used}, pictures(GROUP, STEPS + 1))
    page = text(run)
    assert "Rank correlation of previews and final rewards: 1.00 at step 1." in page and ">iteration 1: " in page


def test_the_agreement_is_drawn_at_each_step_over_the_audits_that_have_one(run):
    final = [0.0, 1.0, 1.0, 0.0]
    alike, right, wrong = [0.0] * GROUP, final, [1 - value for value in final]
    for i, used in enumerate(([alike, right, right], [alike, alike, wrong], [alike, alike, alike])):
        run.write_audit({**audit(i, final), "used": used}, pictures(GROUP, STEPS + 1))
    page = text(run)
    line = figure_of(page, "agreement-by-step")["data"][-1]
    assert (line["x"], line["y"]) == ([1, 2], [1, 0])
    assert "over 2 audit groups, mean and range, at each step of those whose previews differ" in page


def test_without_any_agreement_there_is_a_note(run):
    run.write_audit({**audit(0), "used": [[0.0] * GROUP] * STEPS}, pictures(GROUP, STEPS + 1))
    page = text(run)
    assert "No audit group has previews and rewards that differ" in page and "agreement-by-step" not in page


@pytest.mark.parametrize(("path", "verb"), [([4, 2], "keep"), ([4, 3], "would keep"), ([6, 2], "would keep")])
def test_v_of_another_plan_than_the_audited_one_is_not_its_own(run, path, verb):
    v = {"keep": [2] * STEPS, "variance": [1.0] * STEPS, "variance_final": [1.5] * STEPS}
    run.write_audit({**audit(0), **v}, pictures(GROUP, STEPS + 1))
    run.summary.write({"plan": {"path": path, "prune_steps": [1], "selector": "ovf", "num_inference_steps": STEPS}})
    assert f"variance that 2 of 4 by previews of step 1 {verb};" in text(run)


def test_a_missing_sheet_is_said_and_no_more(run):
    finish(run, [True] * 2, [True] * 2)
    (run.path / "audit/0001.png").unlink()
    assert "The pictures of this audit (audit/0001.png) are missing" in text(run)


def test_members_of_whom_none_has_a_reward_are_said(run):
    run.write_audit(
        {**audit(0, final=(None, None, 0.5, 0.4)), "stopped_at": [None, None, 1, 1]}, pictures(GROUP, STEPS + 1)
    )
    page = text(run)
    assert "Kept by the plan</b><span>no member has a reward</span>" in page and "nan" not in page


def test_kinds_of_prompts_are_names_and_who_has_none_is_left_out(run):
    for when in ("before", "after"):
        records = [{**r, "kind": kind} for r, kind in zip(evaluation([True] * 3), ("2", "10", None), strict=True)]
        run.write_evaluation(when, records, pictures(3))
    page = text(run)
    assert '"x": ["2", "10"]' in page and '"type": "category"' in page


@pytest.mark.parametrize("final", [(0.5, 0.5, 0.5, 0.5), (0.1, 0.1, 0.1, None)])  # numpy's std of three 0.1 is not 0
def test_a_constant_group_is_left_out(run, final):
    run.write_audit(audit(0, final=final), pictures(GROUP, STEPS + 1))
    page = text(run)
    assert "there is no rank correlation to show" in page and "no member has a reward" not in page
    assert "OVF, on final rewards" not in page


def figure_of(page, anchor):
    (figure,) = re.findall(rf'id="{anchor}"[^>]*></div><script type="application/json">(.*?)</script>', page)
    return json.loads(figure)


def drawn(page, anchor):
    """The traces of a chart, by name."""
    return {trace["name"]: trace for trace in figure_of(page, anchor)["data"] if "name" in trace}


def test_v_is_drawn_by_step_over_the_last_audits_and_over_the_run(run):
    for i in range(10):
        v = {"keep": [2] * STEPS, "variance": [i / 10, 1.0, 1.2], "variance_final": [1.5, 1.0 + i / 10, 1.5]}
        run.write_audit({**audit(i), **v}, pictures(GROUP, STEPS + 1))
        at_point = {"preview/variance@1": 1.2, "preview/variance_final@1": 1.6, "preview/rank_correlation@1": 0.5}
        run.log({"iteration": i, "seconds": 2.0, **(at_point if i % 2 else {})}, i)
    page = text(run)
    assert "What a choice gains is V" in page
    traces = drawn(page, "variance-by-step")
    assert traces["by previews"]["y"] == pytest.approx([0.55, 1.0, 1.2])  # of the last eight
    assert traces["by final rewards"]["y"] == pytest.approx([1.5, 1.55, 1.5])
    traces = drawn(page, "variance-over-run")
    assert {name: trace["y"] for name, trace in traces.items()} == {
        "V at step 1": [1.0, 1.2] * 5,  # of the audit where the plan had no point
        "V at most at step 1": pytest.approx([1.0, 1.6, 1.2, 1.6, 1.4, 1.6, 1.6, 1.6, 1.8, 1.6]),
        "agreement at step 1": [0.5] * 5,
    }
    assert traces["agreement at step 1"]["x"] == [2, 4, 6, 8, 10]


def audit_of_v(i, variance, most=1.8, keep=2):
    v = {"keep": [keep] * STEPS, "variance": [variance] * STEPS, "variance_final": [most] * STEPS}
    return {**audit(i), **v, "stopped_at": [None] * GROUP}


def test_v_is_drawn_over_the_run_of_a_plan_that_keeps_all(run):
    for i in range(4):
        run.log({"iteration": i, "seconds": 2.0}, i)
        if i % 2:
            run.write_audit(audit_of_v(i, 1.0 + i / 10), pictures(GROUP, STEPS + 1))
    run.summary.write({"plan": {"path": [4], "prune_steps": [], "selector": "ovf", "num_inference_steps": STEPS}})
    page = text(run)
    traces = drawn(page, "variance-over-run")
    assert {name: (trace["x"], trace["y"]) for name, trace in traces.items()} == {
        "V at step 0": ([2, 4], [1.1, 1.3]),
        "V at step 1": ([2, 4], [1.1, 1.3]),
        "V at most": ([2, 4], [1.8, 1.8]),
    }
    assert "of half of a group, which the plan keeps whole, and the best by final rewards" in page
    value = "<strong>1.20 <em>of</em> 1.80</strong>"
    words = "the rewards’ variance that 2 of 4 by previews of step 1 would keep; 1 is a random choice"
    assert f"<span>Variance of the choice, V</span>{value}<span>{words}</span>" in page


@pytest.mark.parametrize(
    ("path", "prune_steps", "value", "words"),
    [
        ([4, 2], [1], "1.20 <em>of</em> 1.80", "2 of 4 by previews of step 1 keep"),
        ([4, 3, 2], [0, 1], "1.20 <em>of</em> 1.80 <em>·</em> 1.20 <em>of</em> 1.80", "by previews of step 0 and 1"),
        ([4, 2], [], "1.80", "2 of 4 by final rewards keep"),
    ],
)
def test_the_head_has_v_of_the_plans_choice(run, path, prune_steps, value, words):
    run.write_audit(audit_of_v(0, 1.5, keep=3), pictures(GROUP, STEPS + 1))  # under another plan
    run.write_audit(audit_of_v(1, 1.2), pictures(GROUP, STEPS + 1))
    run.summary.write({"plan": {"path": path, "prune_steps": prune_steps, "selector": "ovf", "num_inference_steps": 3}})
    page = text(run)
    assert f"<strong>{value}</strong>" in page and words in page
    assert "V of a choice of 2 of 4 over the last audit group" in page


def test_the_head_says_why_it_has_no_v(run):
    assert "</strong><span>not measured yet</span>" in text(run)
    run.write_audit(audit(0), pictures(GROUP, STEPS + 1))
    assert "</strong><span>no audit has measured it</span>" in text(run)
    for changes, words in (
        ({"audit": {"every": 0}}, "audits are off"),
        ({"prompts": {"pairs": "p"}}, "recorded pairs"),
    ):
        run.log_config({"recipe": "r", "iterations": 2, **changes})
        assert f"</strong><span>{words}" in text(run)


def test_audits_that_did_not_measure_v_have_a_report_without_it(run):
    run.write_audit(audit(0), pictures(GROUP, STEPS + 1))
    page = text(run)
    assert "agreement-by-step" in page and "variance-by-step" not in page and "variance-over-run" not in page
    none = {"keep": [2] * STEPS, "variance": [None] * STEPS, "variance_final": [None] * STEPS}
    run.write_audit({**audit(1), **none}, pictures(GROUP, STEPS + 1))
    assert "variance-by-step" not in text(run)


def judged(i, decision):
    return {"iteration": i, "seconds": 2.0, **decision.metrics()}


CHOICE = PlanDecision(1.0, [24], [], 1.46, [24, 6], [3], 2.0, None, None)
AFTER_IT = PlanDecision(1.5, [24, 6], [3], 1.5, [24, 6], [3], 2.0, 12.0, 0.5)


def test_the_expected_gain_is_drawn_over_the_run_and_decisions_are_named(run):
    run.log_config({"recipe": "r", "iterations": 4, "plan": {"preset": "auto"}})
    run.log({"iteration": 0, "seconds": 2.0}, 0)
    assert "Does the plan pay?" not in text(run)
    for i, decision in ((1, CHOICE), (2, AFTER_IT), (3, replace(AFTER_IT, value=0.9, next_value=0.9))):
        run.log(judged(i, decision), i)
    page = text(run)
    assert '<section id="plan">' in page and '<a href="#plan">' in page
    figure = figure_of(page, "plan-value")
    (line,) = figure["data"]
    assert (line["x"], line["y"]) == ([2, 2, 3, 4], [1.0, 1.46, 1.5, 0.9])  # up at the decision
    at_one, rule = figure["layout"]["shapes"]
    assert (at_one["y0"], at_one["y1"]) == (1, 1) and (rule["x0"], rule["x1"]) == (2, 2)
    (item,) = re.findall("<li>(.*?)</li>", page)
    assert item.startswith("After iteration 2: groups of 24 → 6 (6 after step 3) from here on: 1.46 × the expected")
    assert "(1.00 × until here), since training a member takes 2 × its sampling" in item


def test_a_verdict_that_changes_nothing_is_a_decision_of_auto_alone(run):
    stays = PlanDecision(1.0, [24], [], 1.0, [24], [], 2.0, None, None)
    for i in (1, 2):
        run.log(judged(i, stays), i)
    assert '<section id="plan">' in text(run) and "<li>" not in text(run)
    run.log_config({"recipe": "r", "iterations": 4, "plan": {"preset": "auto"}})
    (item,) = re.findall("<li>(.*?)</li>", text(run))
    assert item.startswith("After iteration 2: groups of 24 (not pruned) as before: 1.00 × ")


def test_of_many_decisions_the_last_are_named(run):
    for i in range(25):
        run.log(judged(i, replace(CHOICE, value=1 + i / 100)), i)
    page = text(run)
    assert page.count("<li>") == 20 and "The last 20 of 25 decisions" in page
    assert '<ol class="decisions" start="6">' in page
    labels = figure_of(page, "plan-value")["layout"]["annotations"]
    assert [(label["x"], label["text"]) for label in labels] == [(i, str(i)) for i in range(6, 26)]


def test_an_older_run_has_the_value_of_its_plan_alone(run):
    run.log({"iteration": 2, "seconds": 2.0, "plan/value": 1.2, "plan/survivors": 6, "plan/path": [24, 6]}, 2)
    page = text(run)
    assert figure_of(page, "plan-value")["data"][0]["y"] == [1.2] and "<li>" not in page


@pytest.mark.parametrize("bad", [{"plan/path": "24"}, {"plan/next_steps": [EVIL]}, {"plan/next_value": EVIL}])
def test_a_damaged_decision_is_one_sentence(run, bad):
    run.log(judged(1, CHOICE) | bad, 1)
    with pytest.raises(ValueError, match="what the report shows as plan, cannot be read as progrpo writes it"):
        text(run)


def test_no_string_of_a_user_becomes_markup(run):
    finish(run, [True, False], [True, True])
    page = write_report(run.path).read_text(encoding="utf-8")
    assert "alert(&#34;x&#34;)" in page
    assert '<script>alert("x")' not in page
    assert not re.search(r"<script[^>]*>alert", page)


def test_the_page_fetches_nothing_and_holds_plotly_once(run):
    finish(run, [True, False], [True, True])
    page = write_report(run.path).read_text(encoding="utf-8")
    assert page.count("plotly.js v") == 1
    body = text(run)
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", body)
    assert "@import" not in body
    assert not re.search(r"url\((?!data:)", body)


def test_every_section_of_a_finished_run_is_there(run):
    finish(run, [False, False, True, False], [True, True, True, False])
    page = text(run)
    for anchor in ("evaluation", "curves", "audits", "agreement", "kept", "cost", "settings"):
        assert f'<section id="{anchor}">' in page
    for words in ("4 → 2 members, selector ovf: 10 of 12 network calls per prompt", "pruned at 1", "2 min 10 s"):
        assert words in page
    assert "<b>2</b> failed, then passed, <b>0</b> passed, then failed" in page
    assert "are missing" not in page and "Predicted and counted costs differ" not in page
    assert "Fewer steps were trained than predicted" not in page


def test_a_wrong_prediction_is_said(run):
    run.summary.write({"cost": {"predicted": {"nfe": 1}, "counted": {"nfe": 2}}})
    assert "Predicted and counted costs differ" in text(run)
    assert "Fewer steps were trained than predicted" not in text(run)


def test_steps_that_were_not_trained_are_explained(run):
    run.summary.write(
        {"cost": {"predicted": {"nfe": 1, "trained_steps": 9}, "counted": {"nfe": 1, "trained_steps": 6}}}
    )
    page = text(run)
    assert "Predicted and counted costs differ" not in page
    assert "Fewer steps were trained than predicted: survivors without an advantage are left out" in page


def test_a_reward_that_gives_no_verdicts_has_a_report(run):
    finish(run, [None, None], [None, None])
    run.summary.write({**run.summary.read(), "reward_before": 0.25, "reward_after": 0.5})
    page = text(run)
    assert "the mean reward went from 0.250 to 0.500 on 2 prompts" in page and "the reward gives no verdicts" in page
    assert "± nan" not in page and "+nan" not in page and "failed, then passed" not in page


def test_pictures_without_a_verdict_are_left_out_of_the_pairs(run):
    finish(run, [False, None, True, False], [True, True, True, None])
    page = text(run)
    assert "Of all 2 evaluated pairs, <b>1</b> failed, then passed" in page and 'data-outcome="unjudged"' in page


def test_who_is_dropped_on_final_rewards_is_out_at_the_end(run):
    run.write_audit({**audit(0), "stopped_at": [None, None, 1, STEPS]}, pictures(GROUP, STEPS + 1))
    page = text(run)
    assert "pruned at 1" in page and "pruned at the end" in page and page.count('<th class="cut">') == 1


@pytest.mark.parametrize(
    "before, after, words",
    [
        (
            [False] * 20 + [True] * 20,
            [True] * 40,
            "rose from 50.0 ± 7.9 % to 100.0 ± 0.0 % (± a standard error) on 40 test prompts",
        ),
        ([True] * 40, [False] * 20 + [True] * 20, "fell from 100.0 ± 0.0 % to 50.0 ± 7.9 %"),
        ([True, False] * 20, [True, False] * 19 + [True, True], "did not measurably change, going from 50.0"),
        ([True, False], [True, False], "did not measurably change"),
        (
            [False],
            [True],
            "did not measurably change, going from 0.0 ± 0.0 % to 100.0 ± 0.0 % (± a standard error) on 1 test prompts",
        ),
    ],
)
def test_the_verdict_claims_no_more_than_two_standard_errors(run, before, after, words):
    finish(run, before, after)
    sentence = verdict(read_run_data(run.path))
    assert words in sentence
    assert sentence.startswith("shapes-flow was trained for 2 iterations in 2 min 10 s (seed 3): strict accuracy ")
    assert sentence.endswith("with 25 % fewer network evaluations than its full groups take.")


def test_of_one_pair_no_error_is_given(run):
    finish(run, [False], [True])
    assert "<span>+100.0 points, picture by picture</span>" in text(run)


def test_a_stopped_run_says_why(run):
    run.log({"iteration": 0, "seconds": 2.0}, 0)
    run.summary.write({"status": "stopped: out of memory", "iterations": 1})
    assert "1 of 2 iterations and stopped: out of memory" in verdict(read_run_data(run.path))


def test_a_killed_run_has_its_figures_and_not_those_of_its_first_evaluation(run):
    """Its summary is of before the first iteration, or of the moment when it was taken up."""
    cost = {"nfe": 300, "decodes": 30, "reward_calls": 30, "trained_steps": 9}
    run.summary.write(
        {
            "status": "running",
            "iterations": 3,
            "wall_seconds": 12.0,
            "nfe": 300,
            "cost": {"predicted": cost, "counted": cost},
            "seconds_by_stage": {"sample": 6.0},
        }
    )
    for i in range(5):
        run.log({"iteration": i, "seconds": 40.0, "rollout/nfe": 100, "time/sample": 30.0}, i)
    data = read_run_data(run.path)
    assert (data.status, data.wall_seconds, len(data.since_summary)) == ("killed", 12 + 2 * 40, 2)
    page = text(run)
    assert "was trained for 5 of 2 iterations in 1 min 32 s, until its process or machine stopped" in page
    assert '<span class="status killed">killed</span>' in page
    for label, value in {"Wall time": "1 min 32 s", "Network evaluations": "500"}.items():
        assert f"<span>{label}</span><strong>{value}</strong>" in page
    assert "Counted after 3 iterations; 2 more are done." in page and "<td>1 min 06 s</td>" in page
    with only_writer(run.path):
        assert read_run_data(run.path).status == "running"


@pytest.mark.parametrize(
    "summary, lock, seconds",
    [
        (1000.0, 1070.0, 12 + 70),  # it was evaluating, or in an iteration that it did not end
        (1000.0, 990.0, 12 + 40),  # a copied folder: its files' times say nothing
        (1000.0, None, 12 + 40),
    ],
)
def test_the_wall_time_of_a_killed_run_is_that_until_its_last_sign_of_life(run, summary, lock, seconds):
    run.summary.write({"status": "running", "iterations": 1, "wall_seconds": 12.0})
    for i in range(2):
        run.log({"iteration": i, "seconds": 40.0}, i)
    os.utime(run.path / "summary.json", (summary, summary))
    if lock is not None:
        (run.path / "run.lock").write_text(record())
        os.utime(run.path / "run.lock", (lock, lock))
    assert read_run_data(run.path).wall_seconds == seconds
    run.summary.write({"status": "finished", "iterations": 2, "wall_seconds": 130.0})
    assert read_run_data(run.path).wall_seconds == 130


def test_of_a_long_curve_the_extremes_of_each_stretch_are_drawn(run):
    values = np.random.default_rng(0).normal(size=10_007)
    values[[0, 5, 777, 10_006]] = 0.0, 9.0, -9.0, 0.1
    kept = charts.thinned(values.tolist())
    assert kept == sorted(set(kept)) and len(kept) <= 2 * charts.BUCKETS + 2 and {0, 5, 777, 10_006} <= set(kept)
    for part in np.array_split(np.arange(len(values)), charts.BUCKETS):
        drawn_part = values[np.intersect1d(part, kept)]
        assert (drawn_part.min(), drawn_part.max()) == (values[part].min(), values[part].max())
    assert charts.thinned([1.0] * (2 * charts.BUCKETS)) == list(range(2 * charts.BUCKETS))
    for i, value in enumerate(values[:1001]):
        run.metrics.append({"reward/mean": value, "seconds": 2.0}, i)
    page = text(run)
    trace = drawn(page, "curve-reward-0")["training samples"]
    assert len(trace["x"]) == len(trace["y"]) <= 1001 and trace["meta"]["seconds"] == [2.0 * i for i in trace["x"]]
    assert "Of a curve over more than 1,000 iterations" in page


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "path, prune_steps, steps, nfe",
    [([48, 24, 12], [5, 7], 10, 360), ([24, 16, 12], [5, 7], 10, 200), ([24], [], 10, 240), ([24, 12], [], 10, 240)],
)
def test_who_is_pruned_after_a_call_has_paid_for_it(path, prune_steps, steps, nfe):
    assert sum(pruning.alive_by_step(path, prune_steps, steps)) == nfe


def test_positions_are_sums_up_to_the_record():
    metrics: Any = [{"iteration": i, "seconds": 2.0, "rollout/nfe": 10} for i in range(3)] + [{"iteration": 3}]
    assert charts.positions(metrics) == {"iteration": [1, 2, 3, 4], "seconds": [2, 4, 6, 6], "nfe": [10, 20, 30, 30]}


def test_histogram_shares_hold_what_lies_outside():
    shares = pruning.histogram_shares(np.array([-9.0, 0.1, 0.2, 7.0]))
    assert shares.sum() == 1
    assert (shares[0], shares[-1]) == (0.25, 0.25)


@pytest.mark.parametrize("count, chosen, places", [(0, 3, []), (1, 3, [0]), (3, 6, [0, 1, 2]), (9, 3, [0, 4, 8])])
def test_spread_has_both_ends(count, chosen, places):
    assert spread(count, chosen) == places
