"""The example that shows the method in one file runs as it stands, and is short."""

from __future__ import annotations

import runpy
from pathlib import Path

FILE = Path(__file__).parents[2] / "examples" / "minimal_loop.py"


def test_the_minimal_loop_samples_prunes_and_learns(capsys):
    means = runpy.run_path(str(FILE))["train"](1)
    lines = capsys.readouterr().out.splitlines()
    assert len(means) == 1 and 0 < means[0] < 1
    assert sum("48 previews" in line and "24 trajectories go on" in line for line in lines) == 1
    assert all(float(line.rpartition(" ")[2]) > 0 for line in lines if "gradient norm" in line)
    assert lines[-1] == "pruning: 72 network calls per prompt instead of 96"


def test_it_fits_on_a_few_screens():
    assert len(FILE.read_text().splitlines()) < 150
