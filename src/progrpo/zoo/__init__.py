"""The built-in models: their world, their pretraining and their weights."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

WEIGHTS = Path(str(files("progrpo"))) / "zoo" / "weights"
"""The folder of the shipped weights, one folder per model."""
