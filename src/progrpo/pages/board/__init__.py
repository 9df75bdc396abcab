"""The board: a local page of the runs in a folder, which follows them, and opens their reports and comparisons.

It reads run folders alone, so it may be started and ended at any time, and on another machine that sees the folder.
"""

from __future__ import annotations

from pathlib import Path

from progrpo.messages import named
from progrpo.pages.board.server import BoardServer
from progrpo.pages.serving import listening, require_folder, serve_until_asked_to_end


def serve(folder: Path, host: str, port: int) -> None:
    """Serve the board until the process is asked to end. ValueError if it cannot start."""
    require_folder(folder, "train a run first (progrpo train quickstart), or name the folder of your runs")
    with listening(BoardServer, folder, host, port) as server:
        serve_until_asked_to_end(server, f"the runs in {named(folder)}", "read these runs")
