"""The pictures of README, made from a run folder: `python docs/pictures.py runs/quickstart`.

docs/images/film.png           an audit group: previews by step, and where the plan stops each member
docs/images/before_after.png   test prompts before and after, from the same noise
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

OUT = Path("docs/images")
INK, QUIET, GREEN, RED = (40, 44, 52), (128, 134, 144), (30, 140, 80), (200, 60, 50)
CELL, GAP = 64, 6


def font(size: int) -> Any:
    return ImageFont.load_default(size)


def film(run: Path, rows: int = 8) -> Image.Image:
    """The last audit group: `rows` of its members from the best final reward to the worst, one row a member."""
    record = json.loads(sorted((run / "audit").glob("*.json"))[-1].read_text())
    sheet = Image.open(run / record["strip"]).convert("RGB")
    order = sorted(range(len(record["final"])), key=lambda m: -(record["final"][m] or 0))
    order = [order[round(i * (len(order) - 1) / (rows - 1))] for i in range(rows)]
    columns = len(record["steps"]) + 1
    picture = Image.new("RGB", (columns * (CELL + GAP) + 96, rows * (CELL + GAP + 14) + 46), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((0, 0), f'"{record["prompt"]}"', INK, font(15))
    for c in range(columns):
        name = "final" if c == columns - 1 else f"step {c}"
        draw.text((c * (CELL + GAP) + 8, 24), name, QUIET, font(12))
    for r, member in enumerate(order):
        y = 44 + r * (CELL + GAP + 14)
        stop = record["stopped_at"][member]
        for c in range(columns):
            x = c * (CELL + GAP)
            cell = sheet.crop((c * CELL, member * CELL, (c + 1) * CELL, (member + 1) * CELL))
            gone = stop is not None and c > stop
            picture.paste(Image.blend(cell, Image.new("RGB", cell.size, "white"), 0.72 if gone else 0.0), (x, y))
            score = record["final"][member] if c == columns - 1 else record["scores"][c][member]
            draw.text((x + 18, y + CELL), "-" if score is None else f"{score:.2f}", QUIET if gone else INK, font(11))
            if stop == c:
                draw.rectangle((x - 2, y - 2, x + CELL + 1, y + CELL + 1), outline=RED, width=2)
        word, colour = ("survives", GREEN) if stop is None else (f"stopped after {stop}", RED)
        draw.text((columns * (CELL + GAP), y + 24), word, colour, font(12))
    return picture


def before_after(run: Path, count: int = 12) -> Image.Image:
    """Pairs on the same noise, with the strict verdict."""
    before, after = (json.loads((run / f"evaluation/{when}.json").read_text()) for when in ("before", "after"))
    shown = [i for i, r in enumerate(before) if r["picture"]][:count]
    per_row, width, height = 4, 2 * CELL + 3 * GAP + 70, CELL + 44
    picture = Image.new("RGB", (per_row * width, -(-len(shown) // per_row) * height), "white")
    draw = ImageDraw.Draw(picture)
    for place, i in enumerate(shown):
        x, y = place % per_row * width, place // per_row * height
        draw.text((x, y + CELL + 18), before[i]["prompt"], INK, font(12))
        for k, records in enumerate((before, after)):
            left = x + k * (CELL + 2 * GAP)
            picture.paste(Image.open(run / records[i]["picture"]).convert("RGB"), (left, y + 2))
            passed = records[i]["strict"]
            word = f"{('before', 'after')[k]}: {'pass' if passed else 'fail'}"
            draw.text((left, y + CELL + 4), word, GREEN if passed else RED, font(11))
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    OUT.mkdir(parents=True, exist_ok=True)
    film(run).save(OUT / "film.png", optimize=True)
    before_after(run).save(OUT / "before_after.png", optimize=True)


if __name__ == "__main__":
    main()
