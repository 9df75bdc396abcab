"""The same work by progrpo and by TRL's DDPOTrainer, in turn on one thread.

    python benchmarks/frameworks.py --peer-python PATH [--arms progrpo TRL] [--seeds 0 1 2]
                                    [--iterations 8] [--out docs/results/frameworks.json]
    python benchmarks/frameworks.py --page     # the tables of the page beside --out; runs nothing

The model is `shapes-diffusion`, a StableDiffusionPipeline that both read from its folder. Each seed runs both, in an
order that changes from seed to seed, each in a process and a Python of its own (frameworks_work.py). Seconds are those
of a processor. A first iteration is not counted in them. Finished runs in `--out` are kept, so that the same command
goes on. Without the other Python it prints the commands that make one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from frameworks_work import Work
from high_resolution import write_page

from progrpo.durable import write_text
from progrpo.policies.load import locate
from progrpo.repro.page import wrapped

ARMS = {
    "progrpo": ("progrpo", 1e-3, False),
    "TRL": ("trl", 1e-3, True),
    "TRL, lr 3e-4": ("trl", 3e-4, True),
    "TRL, not the last step": ("trl", 1e-3, False),
}
"""The framework of each arm, its learning rate (3e-4 is TRL's default), and whether it learns from the last step."""
COMPARED = ("progrpo", "TRL")
PEER = "trl==0.23.1 torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2"
PROMPTS = ("a red circle", "a blue square", "two green triangles", "a yellow star above a red square")


def work_of(arm: str, seed: int, iterations: int) -> Work:
    _, lr, last_step = ARMS[arm]
    return Work(
        model=locate("shapes-diffusion"),
        prompts=PROMPTS,
        group_size=8,
        steps=8,
        guidance=4.5,
        microbatch=8,
        lr=lr,
        iterations=iterations,
        seed=seed,
        last_step=last_step,
    )


def run(name: str, python: str, work: Work) -> dict[str, Any]:
    """The result of one framework's process."""
    one_thread = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "HF_HUB_OFFLINE")}
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "work.json", Path(folder) / "result.json"
        given.write_text(json.dumps(asdict(work)))
        script = Path(__file__).with_name("frameworks_work.py")
        command = [python, str(script), name, str(given), str(result)]
        subprocess.run(command, check=True, env={**os.environ, **one_thread}, stdout=sys.stderr)
        read: dict[str, Any] = json.loads(result.read_text())
    return read


def measure(
    pythons: dict[str, str], arms: Sequence[str], seeds: Sequence[int], iterations: int, out: Path
) -> dict[str, Any]:
    """Run what the file lacks, seed by seed."""
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"runs": {}}
    work: dict[str, Any] = json.loads(json.dumps(asdict(work_of("progrpo", 0, iterations))))
    for own in ("model", "lr", "seed", "last_step"):
        del work[own]
    if results.setdefault("work", work) != work:
        raise SystemExit(f"{out} holds figures of other work; move it away, or give its --iterations")
    for turn, seed in enumerate(seeds):
        runs = results["runs"].setdefault(str(seed), {})
        for arm in arms if turn % 2 == 0 else reversed(arms):
            if arm not in runs:
                name = ARMS[arm][0]
                runs[arm] = run(name, pythons[name], work_of(arm, seed, iterations))
                write_text(out, json.dumps(results, indent=1) + "\n")
                print(f"seed {seed}, {arm}: done", file=sys.stderr, flush=True)
    return results


# --- the page ---------------------------------------------------------------------------------------------------------

Figure = Callable[[dict[str, Any]], float]


def per_iteration(stage: str) -> Figure:
    return lambda run: median(row[stage] for row in run["iterations"][1:])


ROWS: dict[str, Figure] = {
    "sampling, decoding and rewards of an iteration, s": per_iteration("pictures"),
    "update, s": per_iteration("update"),
    "iteration, s": per_iteration("iteration"),
    "before and after all iterations, s": lambda run: run["around"],
    "most memory of the process, MB": lambda run: run["peak_mb"],
}


def tables(results: dict[str, Any]) -> str:
    """Costs with their ratio, and the reward by iteration."""
    by_seed = list(results["runs"].values())
    lines = ["| | progrpo | TRL | progrpo over TRL |", "|---|---|---|---|"]
    for title, figure in ROWS.items():
        ours, theirs = ([figure(runs[arm]) for runs in by_seed] for arm in COMPARED)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        spread = f"{mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {title} | {mean(ours):.4g} | {mean(theirs):.4g} | {spread} |")
    lines += [
        "",
        "Mean reward of an iteration's pictures, before its update (mean over seeds ± its standard error):",
        "",
    ]
    lines += [f"| iteration | {' | '.join(ARMS)} |", "|---" * (1 + len(ARMS)) + "|"]
    for iteration in range(results["work"]["iterations"]):
        cells = [rewards_of([runs[arm] for runs in by_seed], iteration) for arm in ARMS]
        lines.append(f"| {iteration + 1} | {' | '.join(cells)} |")
    versions = {arm: by_seed[0][arm]["versions"] for arm in COMPARED}
    named = ("; ".join(f"{package} {number}" for package, number in versions[arm].items()) for arm in COMPARED)
    lines += ["", wrapped(f"{len(by_seed)} seeds. Versions: {'. '.join(named)}.")]
    return "\n".join(lines)


def rewards_of(runs: Sequence[dict[str, Any]], iteration: int) -> str:
    rewards = [run["iterations"][iteration]["reward"] for run in runs]
    spread = f" ± {stdev(rewards) / len(rewards) ** 0.5:.2f}" if len(rewards) > 1 else ""
    return f"{mean(rewards):.2f}{spread}"


def missing(python: Path | None) -> str:
    """Why the other Python cannot be used, and how to make one; empty if it can."""
    if python is None:
        problem = "--peer-python is missing"
    elif not _imports_trl(python):
        problem = f"{python} does not import trl's DDPOTrainer"
    else:
        return ""
    return (
        f"{problem}; make one: python -m venv trl-venv && trl-venv/bin/pip install {PEER}, then give"
        " trl-venv/bin/python"
    )


def _imports_trl(python: Path) -> bool:
    try:
        return subprocess.run([python, "-c", "from trl import DDPOTrainer"], capture_output=True).returncode == 0
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="the Python of an environment that has trl's DDPOTrainer")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("docs/results/frameworks.json"))
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    if args.page:
        write_page(args.out.with_suffix(".md"), tables(json.loads(args.out.read_text())))
        return
    if problem := missing(args.peer_python):
        parser.error(problem)
    pythons = {"progrpo": sys.executable, "trl": str(args.peer_python)}
    measure(pythons, args.arms, args.seeds, args.iterations, args.out)


if __name__ == "__main__":
    main()
