"""The paper's cost table: its totals by the plans' counts, and what follows from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from progrpo.cli import main
from progrpo.repro.table4 import NOT_PRINTED, PLANS, PRINTED_TFLOPS, UnitCosts, table4


def test_totals_are_the_printed_ones():
    totals = table4()["totals_tflops"]
    assert totals.keys() == PRINTED_TFLOPS.keys()
    for name, printed in PRINTED_TFLOPS.items():
        assert totals[name] == pytest.approx(printed, rel=1e-3)


def test_counts_by_hand():
    counts = table4()["counts_per_prompt"]
    assert counts["flow-grpo"] == {"network_calls": 240, "trained_steps": 240, "decodes": 24}
    assert counts["standard"] == {"network_calls": 48 * 6 + 24 * 2 + 12 * 2, "trained_steps": 120, "decodes": 84}
    assert counts["flash"] == {"network_calls": 24 * 6 + 16 * 2 + 12 * 2, "trained_steps": 120, "decodes": 52}


def test_printed_speeds_are_one_plus_the_share_saved():
    table = table4()
    for name in ("standard", "flash"):
        assert 1 + table["saved"][name] == pytest.approx(table["printed_speed"][name], abs=5e-3)
        assert table["old_over_new"][name] == pytest.approx(1 / (1 - table["saved"][name]))
    assert round(table["old_over_new"]["standard"], 2) == 1.35 and round(table["old_over_new"]["flash"], 2) == 1.70


def test_parts_add_up_and_double_with_the_prompts():
    once, twice = UnitCosts(), UnitCosts(prompts=192)
    for plan in (PLANS | NOT_PRINTED).values():
        assert sum(once.by_stage(plan, 10).values()) == pytest.approx(once.total(plan, 10))
        assert twice.total(plan, 3) == pytest.approx(2 * once.total(plan, 3))
    base = 96 * (3.88 * 240 + 4 * 3.88 * 240 + (2.49 + 0.34) * 24)
    assert once.total(PLANS["flow-grpo"], 10) == pytest.approx(base)


def test_against_a_baseline_that_trains_few_steps_standard_costs_more():
    rows = {
        (r["trained_steps"], r["training_step_in_network_calls"]): r for r in table4()["old_over_new_by_trained_steps"]
    }
    assert rows.keys() == {(10, 4.0), (10, 3.0), (3, 3.0), (2, 3.0), (1, 3.0)}
    assert [round(rows[steps, 3.0]["standard"], 2) for steps in (10, 3, 2, 1)] == [1.25, 0.89, 0.81, 0.72]
    # one trained step, by hand
    old = 3.88 * 240 + 3 * 3.88 * 24 + 2.83 * 24
    new = 3.88 * (24 * 3 + 12 * 7) + 3 * 3.88 * 12 + 2.83 * 36
    assert rows[1, 3.0]["early 24->12"] == pytest.approx(old / new)


def test_the_command_prints_it_as_text_and_as_json(capsys):
    assert main(["repro", "table4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == table4()
    assert main(["repro", "table4"]) == 0
    text = capsys.readouterr().out
    for part in ("1.35x", "1.70x", "1.26x", "1.41x", "fitted", "posthoc 24->12"):
        assert part in text


def test_an_unknown_table_is_refused(capsys):
    assert main(["repro", "table9"]) == 2
    assert "table4" in capsys.readouterr().err


def test_the_page_shows_these_figures():
    page = (Path(__file__).parents[2] / "docs/results/table4.md").read_text()
    table = table4()
    for name in PLANS:
        assert f"{table['totals_tflops'][name]:,.0f}" in page
        assert " | ".join(f"{share:.1%}".replace("%", " %") for share in table["shares"][name].values()) in page
    for row in table["old_over_new_by_trained_steps"]:
        ratios = [
            f"{value:.2f}x"
            for name, value in row.items()
            if name not in ("trained_steps", "training_step_in_network_calls")
        ]
        line = f"| {row['trained_steps']} | {row['training_step_in_network_calls']:g} | " + " | ".join(ratios) + " |"
        assert line in page
