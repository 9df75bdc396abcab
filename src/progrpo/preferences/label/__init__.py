"""The label page: two pictures of a prompt, and which is better, for one person or several at once."""

from __future__ import annotations

from pathlib import Path

from progrpo.messages import is_one_line, named, quoted
from progrpo.pages.serving import listening, require_folder, serve_until_asked_to_end
from progrpo.preferences.label.server import LONGEST_NAME, LabelServer
from progrpo.preferences.questions import Questions
from progrpo.preferences.votes import VOTES, Votes, only_labeller


def serve(folder: Path, annotator: str, count: int | None, host: str, port: int) -> None:
    """Serve the page of a folder until the process is asked to end. ValueError if it cannot start."""
    require_folder(folder, "give a run's folder, or one of pictures (progrpo sample makes one)")
    if not is_one_line(annotator) or len(annotator) > LONGEST_NAME:
        raise ValueError(f"--annotator must be a name of one line and {LONGEST_NAME} characters at most")
    with only_labeller(folder):
        questions, votes = Questions(folder, count), Votes(folder)

        def server(folder: Path, host: str, port: int) -> LabelServer:
            return LabelServer(folder, host, port, questions, votes, annotator)

        with listening(server, folder, host, port) as page:
            who = f" as {quoted(annotator)}" if annotator else ""
            serve_until_asked_to_end(page, f"pairs of {named(folder)}{who}, votes in {VOTES},", "see them and vote")
