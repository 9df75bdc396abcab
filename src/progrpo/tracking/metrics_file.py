"""The file of a run's metrics: a JSON object for each iteration, one a line."""

from __future__ import annotations

import json
from collections.abc import Mapping

from progrpo.durable import append
from progrpo.tracking.files import Folder, encode, in_bytes
from progrpo.tracking.records import Metrics, MetricValue, iteration_of


class MetricsFile:
    """metrics.jsonl in a run folder. Without the file there are no records."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._path = folder.path / "metrics.jsonl"

    def append(self, metrics: Mapping[str, MetricValue], iteration: int) -> None:
        append(self._path, in_bytes(encode({"iteration": iteration, **metrics})))

    def read(self) -> list[Metrics]:
        """All records, without an unfinished last line. ValueError for another line that is no record."""
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        records: list[Metrics] = []
        for i, line in enumerate(lines):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # not JSON, or the line ends inside a character
                if i + 1 < len(lines):
                    raise ValueError(f"{self._path}: line {i + 1} is not JSON; delete that line") from None
                continue
            if not (isinstance(record, dict) and isinstance(record.get("iteration"), int)):
                raise ValueError(f"{self._path}: line {i + 1} is no record of an iteration; delete that line")
            records.append(record)
        return records

    def truncate(self, iteration: int) -> None:
        """Drop the records of `iteration` and later."""
        kept = [record for record in self.read() if iteration_of(record) < iteration]
        self._folder.write_text(self._path.name, "".join(map(encode, kept)))
