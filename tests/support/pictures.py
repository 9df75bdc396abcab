"""Folders of small pictures, as `progrpo sample` names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from progrpo.preferences.questions import PROMPTS, prompt_line
from progrpo.types import Prompt


def sampled(folder: Path, prompts: Sequence[str] = ("a cat", "a dog"), members: int = 3) -> Path:
    """A folder with `members` pictures of each prompt, no two of them alike."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(len(prompts)):
        for member in range(members):
            colour = (40 * number % 256, 30 * member % 256, 99)
            Image.new("RGB", (8, 8), colour).save(folder / f"{number:03d}-{member:02d}.png")
    lines = [prompt_line(number, Prompt(text), folder) for number, text in enumerate(prompts)]
    (folder / PROMPTS).write_text("".join(lines), encoding="utf-8")
    return folder
