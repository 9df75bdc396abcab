"""The size of a long run's report, and the time that it takes to write and to open.

    python benchmarks/report_size.py [--iterations 10000] [--audit-every 5] [--members 48] [--opens 3] [--json]

The run is made up: as many curves as a run can have, each of noise; pictures of 512 pixels with the spectrum of
photographs, 1/f; groups of --members members that are previewed at ten steps.

megabytes  of report.html; `plotly` is its script, and a run of one iteration is there for comparison
writing    seconds of this process until report.html is written, the records read
opening    seconds from the call until Chromium has loaded the page and shown two frames; the median of --opens new
           browsers. It needs the package playwright and a chromium in PATH.
processors seconds of processors that Chromium's processes took until then, which other work on the machine changes less
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from playwright.sync_api import sync_playwright

from progrpo.pages.report import write_report
from progrpo.tracking.files import JsonFile
from progrpo.tracking.run_folder import RunFolder

STEPS, PICTURES, SIDE = 10, 36, 512
CURVES = (
    *("reward/mean", "reward/std", "reward/strict", "reward/group_std_full", "reward/mean@pickscore"),
    *("reward/mean@clipscore", "reward/mean@aesthetic", "update/clip_fraction", "update/kl", "update/grad_norm"),
    *("update/ratio_max_deviation", "update/noise_scale", "update/loss", "update/lr", "prompts/seen"),
    *("prompts/share@single", "prompts/share@two", "prompts/share@counting", "rollout/diversity"),
    *("time/sample", "time/preview", "time/reward", "time/update", "time/audit", "time/other"),
)
AT_AUDITS = tuple(f"preview/{name}@{step}" for step in (5, 7) for name in ("variance", "variance_final"))
AT_AUDITS += tuple(f"preview/rank_correlation@{step}" for step in (5, 7))
EVALUATED = ("eval/graded", "eval/strict", "eval/judge", "eval/kl", "eval/held_out@hpsv2")


def pictures(count: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """Pictures, uint8 (count, side, side, 3), of photographs' statistics.

    Amplitudes fall as 1/f, and colours vary less than brightness.
    """
    frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij"))
    frequencies[0, 0] = 1.0
    brightness, colours = (rng.standard_normal((count, channels, side, side)) for channels in (1, 3))
    noise = np.fft.rfft2(brightness + 0.3 * colours)
    values_NCHW = np.fft.irfft2(noise / frequencies, s=(side, side))
    values_NCHW = 128 + 50 * values_NCHW / values_NCHW.std(axis=(2, 3), keepdims=True)
    return values_NCHW.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def write_run(folder: Path, iterations: int, audit_every: int, members: int) -> None:
    rng = np.random.default_rng(0)
    run = RunFolder.create(folder)
    run.log_config({"recipe": "long", "seed": 0, "iterations": iterations, "model": {"path": "model"}})
    for when in ("before", "after"):
        records: Any = [
            {"prompt": f"prompt {i}", "kind": "one", "graded": 0.5, "strict": bool(rng.integers(2)), "judge": None}
            for i in range(PICTURES)
        ]
        run.write_evaluation(when, records, pictures(PICTURES, SIDE, rng))
    sheet = pictures(STEPS + 1, 256, rng)[None].repeat(members, axis=0)
    lines = []
    for i in range(iterations):
        audited = i % audit_every == 0
        names = (*CURVES, *(AT_AUDITS if audited else ()), *(EVALUATED if i % 50 == 0 else ()))
        record = dict(zip(names, rng.uniform(0.1, 1, len(names)).tolist(), strict=True))
        lines.append(json.dumps({"iteration": i, "seconds": 20.0, "rollout/nfe": 1000, **record}) + "\n")
        if audited:
            audit = audit_record(i, members, rng)
            if i == 0:
                run.write_audit(audit, sheet)
            else:
                JsonFile(run, f"audit/{i:04d}.json", dict).write({**audit, "strip": "audit/0000.png"})
    run.write_text("metrics.jsonl", "".join(lines))
    plan: Any = {"path": [members, members // 2], "prune_steps": [5], "selector": "ovf", "num_inference_steps": STEPS}
    run.summary.write({"status": "finished", "iterations": iterations, "wall_seconds": 2e5, "plan": plan})


def audit_record(iteration: int, members: int, rng: np.random.Generator) -> Any:
    scores = rng.uniform(0, 1, (STEPS + 1, members)).tolist()
    return {
        "iteration": iteration,
        "prompt": f"prompt {iteration}",
        "steps": list(range(STEPS)),
        "scores": scores[:-1],
        "final": scores[-1],
        "stopped_at": [5 if member % 2 else None for member in range(members)],
        "kept_uniform": list(range(0, members, 2)),
        "kept_ovf": list(range(members // 2)),
        "keep": [members // 2] * STEPS,
        "variance": rng.uniform(0.8, 1.5, STEPS).tolist(),
        "variance_final": rng.uniform(1.5, 2, STEPS).tolist(),
    }


def opening(report: Path) -> tuple[float, float]:
    """The seconds until a new browser shows the report, and the processors' seconds in its processes until then."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("no chromium in PATH; install one (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        start, start_of_processors = time.perf_counter(), processor_seconds()
        page.goto(report.as_uri(), wait_until="load", timeout=300_000)
        page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        seconds = time.perf_counter() - start, processor_seconds() - start_of_processors
        browser.close()
    return seconds


def processor_seconds() -> float:
    """Seconds of processors of all processes that this one has started."""
    times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return sum(spent.user + spent.system for spent in times)


def measure(iterations: int, audit_every: int, members: int, opens: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        write_run(run, iterations, audit_every, members)
        start = time.process_time()
        report = write_report(run)
        writing = time.process_time() - start
        seconds, processors = zip(*(opening(report) for _ in range(opens)), strict=True)
        return {
            "iterations": iterations,
            "megabytes": report.stat().st_size / 1e6,
            "writing": writing,
            "opening": statistics.median(seconds),
            "processors": statistics.median(processors),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--audit-every", type=int, default=5)
    parser.add_argument("--members", type=int, default=48)
    parser.add_argument("--opens", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    from plotly.offline import get_plotlyjs

    runs = [measure(n, args.audit_every, args.members, args.opens) for n in (1, args.iterations)]
    result = {"plotly": len(get_plotlyjs().encode()) / 1e6, "runs": runs}
    if args.json:
        print(json.dumps(result))
        return
    print(f"Plotly's script: {result['plotly']:.1f} MB")
    for run in runs:
        print(
            f"{run['iterations']:6,.0f} iterations: {run['megabytes']:5.1f} MB, written in {run['writing']:.1f} s,"
            f" opened in {run['opening']:.2f} s by {run['processors']:.2f} s of processors"
        )


if __name__ == "__main__":
    main()
