"""The report of a run: one HTML file that needs nothing else, written from the run folder at any time of the run."""

from __future__ import annotations

from pathlib import Path

from progrpo.tracking.report import audits, cost, curves, evaluation, head, page, settings
from progrpo.tracking.report.run import read_run
from progrpo.tracking.run_folder import RunFolder

_SECTIONS = (head, evaluation, curves, audits, cost, settings)


def write_report(run: Path) -> Path:
    """Write report.html into the run folder `run` and give its path; ValueError if there is no run."""
    read = read_run(run)
    body = "".join(section.write(read) for section in _SECTIONS)
    return RunFolder(run).write_text("report.html", page.document(f"{read.recipe}: progrpo run report", body))
