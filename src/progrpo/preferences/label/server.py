"""The server of the label page: it tells what to ask next, and answers a vote when it is safe on the disk.

It shows nothing but the pictures of its questions, which have numbers for addresses: a name is never made a path.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.resources import files
from io import BytesIO
from itertools import islice
from pathlib import Path
from threading import RLock

from progrpo.messages import is_one_line
from progrpo.pages.page import escape
from progrpo.pages.serving import CSS, HTML, JAVASCRIPT, JSON, OWN, Answer, Fields, NotFound, PageServer
from progrpo.preferences.agreement import agreement
from progrpo.preferences.questions import Question, Questions
from progrpo.preferences.votes import Votes, is_turned
from progrpo.prompts.pictures import open_picture
from progrpo.tracking.files import in_bytes

LONGEST_NAME = 60
_AHEAD = 4
"""The questions that a page gets at once, so that it can load their pictures before they are shown."""
_CHOICES = {"left": 1.0, "right": 0.0, "tie": 0.5}
_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass
class _Session:
    """An annotator's votes and skips that can be taken back: those since the start, and the votes in the file."""

    actions: list[str] = field(default_factory=list)
    """The keys of the questions, in the order of votes and skips."""
    skipped: set[str] = field(default_factory=set)


class LabelServer(PageServer):
    """The server of one folder's questions."""

    name = "label"
    takes_post = True

    def __init__(
        self, folder: Path, host: str, port: int, questions: Questions, votes: Votes, annotator: str = ""
    ) -> None:
        self.questions, self.votes, self.annotator = questions, votes, annotator
        self._sessions: dict[str, _Session] = {}
        self._pictures: dict[str, Path] = {}
        self._acting = RLock()
        super().__init__(folder, host, port)

    def get(self, path: str, fields: Fields) -> Answer:
        if path.startswith("/picture/"):
            return self._picture(path.removeprefix("/picture/"))
        if path == "/state.json":
            return _json(self._state(_name(fields.get("annotator", [""])[0])))
        if path not in _FILES:
            raise NotFound("there is no such page")
        return _FILES[path](self)

    def post(self, path: str, body: bytes) -> Answer:
        if path not in ("/vote", "/undo"):
            raise NotFound("there is no such page")
        request = _object(body)
        annotator = _name(request.get("annotator", ""))
        with self._acting:
            if path == "/undo":
                self._undo(annotator)
            else:
                self._vote(annotator, str(request.get("id")), str(request.get("choice")))
            return _json(self._state(annotator))

    # --- what an annotator does ---------------------------------------------------------------------------------------

    def _vote(self, annotator: str, key: str, choice: str) -> None:
        question = next((q for q in self.questions.now() if q.key == key), None)
        if question is None:
            if self.questions.follows_a_run:  # it has gone on meanwhile
                return
            raise NotFound("there is no such pair")
        session = self._session(annotator)
        if choice == "skip":
            session.skipped.add(key)
        elif choice in _CHOICES:
            for_left = _CHOICES[choice]
            self.votes.add(question, 1 - for_left if is_turned(question, annotator) else for_left, annotator)
        else:
            raise ValueError("choice must be left, right, tie or skip")
        if key not in session.actions:
            session.actions.append(key)

    def _undo(self, annotator: str) -> None:
        """Take the last vote or skip back."""
        session = self._session(annotator)
        if session.actions:
            key = session.actions.pop()
            session.skipped.discard(key)
            self.votes.remove(key, annotator)

    def _session(self, annotator: str) -> _Session:
        """The annotator's session, which begins with the votes that are there."""
        return self._sessions.setdefault(annotator, _Session(list(self.votes.of(annotator))))

    # --- answers ------------------------------------------------------------------------------------------------------

    def _state(self, annotator: str) -> dict[str, object]:
        with self._acting:
            voted, session = self.votes.of(annotator), self._session(annotator)
            questions = self.questions.now()
            left = [q for q in questions if q.key not in voted and q.key not in session.skipped]
            of_annotators = agreement(self.votes.pairs)
            return {
                "next": list(islice(self._shown(left, annotator), _AHEAD)),
                "done": len(voted) if self.questions.follows_a_run else sum(q.key in voted for q in questions),
                "skipped": len(session.skipped),
                "total": None if self.questions.follows_a_run else len(questions),
                "undo": bool(session.actions),
                "follows": self.questions.follows_a_run,
                "waits": self.questions.run_waits,
                "agreement": None if of_annotators is None else str(of_annotators),
            }

    def _shown(self, questions: list[Question], annotator: str) -> Iterator[dict[str, str]]:
        for question in questions:
            pictures = question.pictures[::-1] if is_turned(question, annotator) else question.pictures
            left, right = map(self._address, pictures)
            yield {"id": question.key, "prompt": question.prompt.text, "left": left, "right": right}

    def _address(self, path: Path) -> str:
        number = sha256(str(path).encode(errors="surrogateescape")).hexdigest()[:24]
        self._pictures[number] = path
        return f"/picture/{number}"

    def _picture(self, number: str) -> Answer:
        path = self._pictures.get(number)
        if path is None:
            raise NotFound("there is no such picture")
        data = path.read_bytes()
        kind = next((kind for start, kind in _TYPES.items() if data.startswith(start)), None)
        if kind is None:  # the others, as PNG: not every browser shows them all
            file = BytesIO()
            open_picture(data, path.name).save(file, "PNG")
            kind, data = "image/png", file.getvalue()
        return kind, OWN, data


def _page(server: LabelServer) -> Answer:
    title = escape(server.folder.resolve().name or server.folder)
    body = (files(__package__) / "label.html").read_text(encoding="utf-8")
    body = body.replace("{folder}", title).replace("{annotator}", escape(server.annotator))
    return HTML, OWN, in_bytes(server.document(f"{title}: progrpo label", body))


def _style(server: LabelServer) -> Answer:
    shared = (files("progrpo.pages") / "page.css").read_bytes()
    return CSS, OWN, shared + (files(__package__) / "label.css").read_bytes()


def _script(server: LabelServer) -> Answer:
    return JAVASCRIPT, OWN, (files(__package__) / "label.js").read_bytes()


_FILES: dict[str, Callable[[LabelServer], Answer]] = {"/": _page, "/label.css": _style, "/label.js": _script}


def _json(value: object) -> Answer:
    return JSON, OWN, json.dumps(value, allow_nan=False).encode()


def _object(body: bytes) -> dict[str, object]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError("the body must be a JSON object")
    return value


def _name(value: object) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_NAME or not is_one_line(value):
        raise ValueError(f"annotator must be a name of one line and {LONGEST_NAME} characters at most")
    return value.strip()
