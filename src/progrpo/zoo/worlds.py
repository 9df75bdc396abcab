"""The built-in worlds, whose names may stand where prompts are asked for."""

from __future__ import annotations

from typing import Protocol

from progrpo.types import Prompt
from progrpo.zoo.shapes import world as shapes
from progrpo.zoo.words import world as words


class World(Protocol):
    """Prompts by kind, in three splits."""

    def prompts(self, split: str) -> dict[str, tuple[Prompt, ...]]:
        """All prompts of a split, by kind."""
        ...

    def sample_prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        """Sample prompts of a split: the kinds in turn."""
        ...


WORLDS: dict[str, World] = {"shapes": shapes, "words": words}
