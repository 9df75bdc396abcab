"""The report of a run: one HTML file that needs nothing else, written from the run folder at any time of the run.

The folder may be a stranger's: texts are escaped, numbers are numbers or refused, and pictures are read from inside the folder alone.
"""

from __future__ import annotations

from pathlib import Path

from progrpo.messages import named
from progrpo.tracking.report import audits, cost, curves, evaluation, head, page, settings
from progrpo.tracking.report.run import read_run, readable
from progrpo.tracking.run_folder import RunFolder

_SECTIONS = (head, evaluation, curves, audits, cost, settings)


def write_report(run: Path) -> Path:
    """Write report.html into the run folder `run` and give its path; ValueError if there is no run, or not as a run writes it."""
    read = read_run(run)
    body = ""
    for section in _SECTIONS:
        with readable(f"{named(run)}, what the report shows as {section.__name__.rpartition('.')[2]},"):
            body += section.write(read)
    return RunFolder(run).write_text("report.html", page.document(f"{read.recipe}: progrpo run report", body))
