"""The pictures of README and docs, made from a run folder:

    progrpo train quickstart
    python docs/pictures.py runs/quickstart

docs/images/film.png           an audit group: previews by step, and where the plan stops each member
docs/images/before_after.png   test prompts before and after training, from the same noise
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import pstdev

from PIL import Image, ImageDraw, ImageFont

OUT = Path("docs/images")
INK = (40, 44, 52)
QUIET = (128, 134, 144)
GREEN = (30, 140, 80)
RED = (200, 60, 50)
CELL = 64
GAP = 6


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def film(run: Path, num_rows: int = 8) -> Image.Image:
    """The audit group whose final rewards differ most: a row per member, `num_rows` of them, the best reward first."""
    records = [json.loads(path.read_text()) for path in sorted((run / "audit").glob("*.json"))]
    record = max(records, key=lambda r: pstdev(reward or 0 for reward in r["final"]))
    sheet = Image.open(run / record["strip"]).convert("RGB")
    order = sorted(range(len(record["final"])), key=lambda m: -(record["final"][m] or 0))
    order = [order[round(i * (len(order) - 1) / (num_rows - 1))] for i in range(num_rows)]
    columns = len(record["steps"]) + 1
    picture = Image.new("RGB", (columns * (CELL + GAP) + 96, num_rows * (CELL + GAP + 14) + 46), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((0, 0), f'"{record["prompt"]}"', INK, font(15))
    for column in range(columns):
        name = "final" if column == columns - 1 else f"step {column}"
        draw.text((column * (CELL + GAP) + 8, 24), name, QUIET, font(12))
    for row, member in enumerate(order):
        y = 44 + row * (CELL + GAP + 14)
        stop = record["stopped_at"][member]
        for column in range(columns):
            x = column * (CELL + GAP)
            cell = sheet.crop((column * CELL, member * CELL, (column + 1) * CELL, (member + 1) * CELL))
            gone = stop is not None and column > stop
            faded = Image.blend(cell, Image.new("RGB", cell.size, "white"), 0.72 if gone else 0.0)
            picture.paste(faded, (x, y))
            score = record["final"][member] if column == columns - 1 else record["scores"][column][member]
            draw.text((x + 18, y + CELL), "-" if score is None else f"{score:.2f}", QUIET if gone else INK, font(11))
            if stop == column:
                draw.rectangle((x - 2, y - 2, x + CELL + 1, y + CELL + 1), outline=RED, width=2)
        label, colour = ("survives", GREEN) if stop is None else (f"stopped after {stop}", RED)
        draw.text((columns * (CELL + GAP), y + 24), label, colour, font(12))
    return picture


def before_after(run: Path, count: int = 12) -> Image.Image:
    """Pairs of pictures from the same noise, before and after training, with the strict verdict."""
    before, after = (json.loads((run / f"evaluation/{when}.json").read_text()) for when in ("before", "after"))
    shown = [i for i, record in enumerate(before) if record["picture"]][:count]
    per_row = 4
    width = 2 * CELL + 3 * GAP + 70
    height = CELL + 44
    picture = Image.new("RGB", (per_row * width, -(-len(shown) // per_row) * height), "white")
    draw = ImageDraw.Draw(picture)
    for place, i in enumerate(shown):
        x = place % per_row * width
        y = place // per_row * height
        draw.text((x, y + CELL + 18), before[i]["prompt"], INK, font(12))
        for k, (when, records) in enumerate((("before", before), ("after", after))):
            left = x + k * (CELL + 2 * GAP)
            picture.paste(Image.open(run / records[i]["picture"]).convert("RGB"), (left, y + 2))
            passed = records[i]["strict"]
            draw.text(
                (left, y + CELL + 4), f"{when}: {'pass' if passed else 'fail'}", GREEN if passed else RED, font(11)
            )
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run whose audit group and test pictures are shown")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    film(arguments.run).save(OUT / "film.png", optimize=True)
    before_after(arguments.run).save(OUT / "before_after.png", optimize=True)


if __name__ == "__main__":
    main()
