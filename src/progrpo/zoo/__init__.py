"""The built-in models: the worlds they live in, how they were pretrained, and their weights."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

WEIGHTS = Path(str(files("progrpo"))) / "zoo" / "weights"
"""Where the shipped weights lie: a folder a model."""
