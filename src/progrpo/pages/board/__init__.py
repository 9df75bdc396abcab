"""The board: a local page of the runs in a folder, which follows them, and opens their reports and comparisons.

It reads run folders alone, so it may be started and ended at any time, and on another machine that sees the folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from progrpo.environment import is_loopback
from progrpo.messages import named
from progrpo.pages.board.server import listening


def serve(folder: Path, host: str, port: int) -> None:
    """Serve the board until the process is asked to end. ValueError if it cannot start."""
    if not os.path.isdir(folder):
        raise ValueError(
            f"{named(folder)} is no folder; train a run first (progrpo train quickstart), or name the folder of your"
            " runs"
        )
    with listening(folder, host, port) as server:
        where = f"[{host}]" if ":" in host else host
        reach = "" if is_loopback(host) else "; all who can reach this address can read these runs"
        print(
            f"runs of {named(folder)} at http://{where}:{server.server_address[1]}/ (Ctrl-C ends it{reach})", flush=True
        )
        server.serve_forever()
