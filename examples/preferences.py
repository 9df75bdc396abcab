"""From pairs of pictures to an aligned model: draw, compare, learn a reward, train with it.

    python examples/preferences.py [--by-hand] [--pairs 200] [--folder runs/preferences]

A program with a hidden taste (large, centred, warm) compares the pictures, so that the result can be judged. With
`--by-hand` you compare them on a local page instead. Every step is a command of progrpo, printed before it runs; a
step whose result is there is left out, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from PIL import Image

from progrpo.cli import main as progrpo
from progrpo.preferences.pairs import Pair, write_pairs
from progrpo.types import Prompt
from progrpo.zoo.shapes.taste import taste


def run(*command: str) -> None:
    print(f"\n$ progrpo {shlex.join(command)}", flush=True)
    # what `sample` prints is the name of every picture
    with redirect_stdout(None if command[0] == "sample" else sys.stdout):
        code = progrpo(list(command))
    if code:
        raise SystemExit(code)


def compare(pictures: Path) -> None:
    """Write what a program prefers to votes.jsonl, as `progrpo label` would write a person's votes."""
    rows = [json.loads(line) for line in (pictures / "samples.jsonl").read_text().splitlines()]
    pairs = []
    for row in rows:
        a, b = (pictures / f"{row['number']:03d}-{member:02d}.png" for member in range(2))
        first, second = taste(np.stack([np.asarray(Image.open(path)) for path in (a, b)]))
        pairs.append(Pair(Prompt(row["prompt"]), a, b, 0.5 if first == second else float(first > second)))
    write_pairs(pictures / "votes.jsonl", pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by-hand", action="store_true", help="compare the pictures yourself, in the browser")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("runs/preferences"), help="everything is written here")
    parser.add_argument("--iterations", type=int, default=60)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(args.folder)
    pictures = Path("pictures")
    if not pictures.exists():
        limit = ("--limit", str(args.pairs))
        run("sample", "shapes-flow", "--prompts", "shapes", *limit, "--count", "2", "--out", str(pictures))
    if args.by_hand:
        run("label", str(pictures))  # it ends with Ctrl-C, or when every pair has a vote
    elif not (pictures / "votes.jsonl").exists():
        compare(pictures)
    if not Path("reward-model").exists():
        run("reward-model", "train", str(pictures / "votes.jsonl"), "--out", "reward-model")
    if not Path("run").exists():
        run("train", "preferences", "--iterations", str(args.iterations), "--out", "run")
    summary = json.loads(Path("run/summary.json").read_text())
    before, after = (summary[f"held_out_{when}"]["shapes_taste"] for when in ("before", "after"))
    print(f"\nhidden taste: {before:.3f} -> {after:.3f}; report: {args.folder}/run/report.html")


if __name__ == "__main__":
    main()
