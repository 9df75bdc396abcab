import io

import pytest

from progrpo.tracking.console import Console
from progrpo.tracking.records import Metrics, Summary

RECORD: Metrics = {
    "iteration": 0,
    "seconds": 4.0,
    "reward/mean": 0.5,
    "reward/strict": 0.25,
    "rollout/nfe": 4320,
    "preview/variance@7": 1.41,
    "preview/variance@5": 1.2,
    "preview/variance_final@7": 1.7,
    "preview/variance_final@5": 1.6,
}
SUMMARY: Summary = {
    "reward_before": 0.6,
    "reward_after": 0.7,
    "accuracy_before": 0.5,
    "accuracy_after": 0.625,
    "nfe": 86400,
    "nfe_saved": 0.25,
    "nfe_ratio_to_none": 1.5,
    "wall_seconds": 130,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_an_iteration_is_one_plain_line(capsys):
    console = Console(iterations=20)
    console.nfe_unpruned = 5760
    console.log(RECORD, 0)
    console.log({**RECORD, "iteration": 1, "reward/mean": 0.53, "seconds": 6.0, "eval/strict": 0.4}, 1)
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        "iteration  1/20  reward 0.500 (+0.000)  strict  25.0 %  4,320 NFE (25 % saved)  4.0 s/it  1 min 16 s left"
        "  V 1.20 of 1.60@5, 1.41 of 1.70@7"
    )
    assert "iteration  2/20  reward 0.530 (+0.030)" in second
    assert "6.0 s/it  1 min 30 s left" in second  # 18 iterations of 5 s
    assert second.endswith("eval strict 40.0 %")


def test_a_resumed_run_counts_from_its_first_iteration(capsys):
    console = Console(iterations=3, history=[RECORD])
    console.log({**RECORD, "iteration": 2, "reward/mean": 0.4}, 2)
    line = capsys.readouterr().out
    assert "reward 0.400 (-0.100)" in line
    assert "left" not in line


def test_what_is_missing_is_a_dash(capsys):
    Console(iterations=2).log({"iteration": 0, "reward/mean": None}, 0)
    assert capsys.readouterr().out == "iteration 1/2  reward –  – NFE\n"


def test_the_summary_is_a_table_and_what_was_spent(capsys):
    Console(iterations=20).summary_table(SUMMARY, "runs/x/report.html")
    assert capsys.readouterr().out.splitlines() == [
        "                 before   after        change",
        "reward            0.600   0.700        +0.100",
        "strict accuracy  50.0 %  62.5 %  +12.5 points",
        "86,400 NFE, 25 % fewer than full groups, 1.50 x plain GRPO's, 2 min 10 s",
        "report: runs/x/report.html",
    ]


def test_a_run_of_full_groups_saved_nothing(capsys):
    Console(iterations=20).summary_table({**SUMMARY, "nfe_saved": 0.0})
    assert "86,400 NFE, 1.50 x plain GRPO's, 2 min 10 s" in capsys.readouterr().out


def test_a_reward_without_a_verdict_has_no_strict_accuracy(capsys):
    console = Console(iterations=20)
    console.log({name: value for name, value in RECORD.items() if name != "reward/strict"}, 0)
    console.summary_table({**SUMMARY, "accuracy_before": None, "accuracy_after": None})
    output = capsys.readouterr().out
    assert "strict" not in output and "reward 0.500" in output and "0.700" in output


def test_rewards_of_millions_are_short(capsys):
    large: Summary = {"reward_before": 1e12, "reward_after": -3e15, "held_out_before": {"size": 1234567.0}}
    Console(iterations=20).summary_table({**SUMMARY, **large})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["reward", "1e+12", "-3e+15", "-3.001e+15"]
    assert lines[3] == ["held", "out:", "size", "1.23457e+06", "–", "–"]


def test_the_judge_is_shown_where_there_is_one(capsys):
    Console(iterations=20).summary_table({**SUMMARY, "judge_before": 0.5})
    assert "judge            50.0 %       –             –" in capsys.readouterr().out


def test_only_the_main_process_prints(capsys):
    console = Console(iterations=1, enabled=False)
    console.say("hello")
    console.warn("careful")
    console.log(RECORD, 0)
    console.summary_table(SUMMARY)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("message", ["a [bold]name[/bold] [/x]", "50 %"])
def test_messages_are_printed_as_they_are(capsys, message):
    terminal = Terminal()
    Console(iterations=1, file=terminal).say(message)
    Console(iterations=1).warn(message)
    assert message in terminal.getvalue()
    assert capsys.readouterr().out == f"warning: {message}\n"


def test_a_terminal_gets_the_same_words():
    terminal = Terminal()
    console = Console(iterations=20, file=terminal)
    console.nfe_unpruned = 5760
    console.log(RECORD, 0)
    console.summary_table(SUMMARY, "runs/x/report.html")
    for words in ("0.500", "4,320", "62.5 %", "+12.5 points", "runs/x/report.html"):
        assert words in terminal.getvalue()
