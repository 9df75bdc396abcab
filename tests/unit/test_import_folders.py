"""`benchmarks/imports.py` counts what is translated below a folder, and gathers what is refused by its reason."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GOOD = "train: {group_size: 4}\nrewards: [{reward_model: PickScore}]\n"
FUNCTIONS = """
def small():
    config = {"sample": {}, "reward_fn": {"ocr": 1.0}}
    config["sample"]["num_image_per_prompt"] = 1
    return config
def get_config():
    return small()
def with_name(name):
    return small()
"""


def table(monkeypatch, capsys, *arguments: object) -> list[str]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["imports.py", *map(str, arguments)])
    importlib.import_module("imports").main()
    return capsys.readouterr().out.splitlines()


def test_files_below_a_folder_are_counted_by_reason(tmp_path, monkeypatch, capsys):
    (tmp_path / "more").mkdir()
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "notes.txt").write_text("no settings")
    for name in ("more/one.yaml", "more/two.yaml"):
        (tmp_path / name).write_text("train: {trainer_type: crd}\n")
    lines = table(monkeypatch, capsys, "flow-factory", tmp_path)
    assert lines[-2:] == ["3 read, 1 translated, 2 refused", "   2  train.trainer_type 'crd' has no equal here"]
    assert lines[0].endswith("good.yaml") and lines[0].split()[0].isdigit()
    assert lines[1].endswith("one.yaml: train.trainer_type 'crd' has no equal here")


@pytest.mark.parametrize("whole", [True, False])
def test_each_function_without_arguments_is_read(tmp_path, monkeypatch, capsys, whole):
    file = tmp_path / "grpo.py"
    file.write_text(FUNCTIONS)
    lines = table(monkeypatch, capsys, "flow_grpo", tmp_path if whole else file)
    assert len([line for line in lines if "grpo.py:" in line]) == 1 and "grpo.py:small" in lines[0]
    assert lines[-2] == "1 read, 0 translated, 1 refused" and "plan.group_size" in lines[-1]
