"""The report of a run: one HTML file without dependencies, which can be written at any time of the run.

The folder may come from a stranger: texts are escaped, numbers are checked, and only pictures inside the folder are
read.
"""

from __future__ import annotations

from pathlib import Path

from progrpo.messages import named
from progrpo.pages import page
from progrpo.pages.report import audits, cost, curves, evaluation, head, plan, settings
from progrpo.pages.run_data import read_run_data, readable
from progrpo.tracking.run_folder import RunFolder

_SECTIONS = (head, evaluation, curves, audits, plan, cost, settings)


def report_page(folder: Path) -> str:
    """The report as HTML. ValueError if there is no run, or a damaged one."""
    data = read_run_data(folder)
    body = ""
    for section in _SECTIONS:
        with readable(f"{named(folder)}, what the report shows as {section.__name__.rpartition('.')[2]},"):
            body += section.write(data)
    return page.document(f"{data.recipe}: progrpo run report", body)


def write_report(folder: Path) -> Path:
    """Write report.html into a run folder and return its path."""
    return RunFolder(folder).write_text("report.html", report_page(folder))
