"""Bad input by the thousand: `python -m tests.mutation [--seed 0] [--cases 5000] [--processes 24] [--json]`.

Recipes, arguments, library calls, files and models are mutated at random or damaged on purpose. A case is accepted
(a mutation may be harmless), or refused by one sentence that names a field, an option or a file: a ValueError of the
library, exit code 2 of the command line. The goals are 0 tracebacks, 0 unclear sentences and 0 files left by a refused
case. Training and sampling are cut off at their model, where they would begin to cost time. `--processes` cases run in
processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections import Counter

from tests.mutation.cases import tally, workplace
from tests.mutation.command_lines import cut_off, process_case
from tests.mutation.makers import SHARES, random_cases
from tests.mutation.models import model_cases


def measure(seed: int, cases: int, processes: int) -> tuple[dict[str, Counter[str]], list[str]]:
    wrong: list[str] = []
    with workplace() as work:
        with cut_off():
            counts = tally(random_cases(seed, cases, work, SHARES), work, wrong)
        counts |= tally(model_cases(work), work, wrong)
        apart = (process_case(random.Random(f"{seed} process {i}"), work) for i in range(processes))
        counts |= tally(apart, work, wrong)
    return counts, wrong


COLUMNS = ("cases", "refused", "accepted", "unclear", "traceback", "files_left")


def report() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--processes", type=int, default=24)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # a mistyped name is looked for in no hub
    counts, wrong = measure(options.seed, options.cases, options.processes)
    total: Counter[str] = sum(counts.values(), Counter())
    rows = {kind: {column: row[column] for column in COLUMNS} for kind, row in (*counts.items(), ("all", total))}
    if options.json:
        print(json.dumps({"by_kind": rows, "wrong": wrong}))
        return
    print(f"{'':12}" + "".join(f"{column:>12}" for column in COLUMNS))
    for kind, row in rows.items():
        print(f"{kind:12}" + "".join(f"{value:12,}" for value in row.values()))
    print("\n".join(wrong[:40]))


if __name__ == "__main__":
    report()
