"""The variance that a choice by previews keeps: as audits measure it, and as the judge of plans simulates it.

    python benchmarks/audited_variance.py runs/quickstart-seeds/*

The judge of plans (`plan.preset auto`, `plan/value`) does not average the V of a few audits. It simulates groups from
the mean correlation of previews by step and from the final rewards, so that it can reckon with plans that no audit
has tried. The table has both for the same audits: V is in units of the full group's variance, with the standard error
over audits, by the step of the choice. The runs must have audits of groups of one size under one plan.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from progrpo.rollout.plan import Plan, PrunePoint
from progrpo.rollout.plan_value import Simulation
from progrpo.rollout.prune import ovf
from progrpo.tracking.statistics import spearman, standardised


def table(audits: Sequence[dict[str, Any]]) -> str:
    """A row for each step: the agreement of previews, and V as audited and as simulated."""
    steps = audits[0]["steps"]
    agreements = [[spearman(a["used"][step], a["final"]) or 0.0 for a in audits] for step in range(len(steps))]
    standard = [standardised(a["final"]) for a in audits]
    finals = [values.tolist() for values in standard if values is not None]
    size, keep = len(audits[0]["final"]), audits[0]["keep"][0]
    simulation = Simulation.of([mean(row) for row in agreements], finals, size)
    lines = ["| choice after step | agreement | V, audited | V, simulated |", "|---|---|---|---|"]
    for step, row in zip(steps, agreements, strict=True):
        lengths = [a["variance"][step] ** 0.5 for a in audits]
        audited, error = mean(lengths) ** 2, 2 * mean(lengths) * stdev(lengths) / len(lengths) ** 0.5
        simulated = simulation.signal(Plan(size, (PrunePoint(step, keep),)), ovf) / keep
        lines.append(f"| {step} | {mean(row):.2f} | {audited:.2f} ± {error:.2f} | {simulated:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders with audits")
    paths = [path for run in parser.parse_args().runs for path in sorted((run / "audit").glob("*.json"))]
    audits = [json.loads(path.read_text()) for path in paths]
    audits = [audit for audit in audits if audit.get("used") and None not in (*audit["variance"], *audit["final"])]
    if len(audits) < 2:
        parser.error("these runs have fewer than two audits with previews and final rewards")
    print(f"{len(audits)} audits of groups of {len(audits[0]['final'])}, of which {audits[0]['keep'][0]} are kept")
    print(table(audits))


if __name__ == "__main__":
    main()
