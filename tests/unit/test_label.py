"""The label page's questions, votes and server, against what people, browsers and strangers may do."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image

from progrpo.pages.serving import listening
from progrpo.preferences.label import serve
from progrpo.preferences.label.server import LabelServer
from progrpo.preferences.pairs import Pair, read_pairs, write_pairs
from progrpo.preferences.questions import ALIVE, WAITING, Question, Questions, write_waiting
from progrpo.preferences.votes import VOTES, Votes, is_turned, only_labeller, votes_on
from progrpo.tracking.run_folder import RunFolder
from progrpo.types import Prompt
from tests.support.pictures import sampled

EVIL = '</title><script>alert(1)</script><img src=x onerror="alert(2)"> \u202eمرحبا'


# --- questions --------------------------------------------------------------------------------------------------------


def test_every_two_pictures_of_a_prompt_are_asked_once_and_prompts_take_turns(tmp_path):
    asked = Questions(sampled(tmp_path, ("a cat", "a dog", "a bird"), 4)).now()
    assert len(asked) == len({question.key for question in asked}) == 3 * 6
    assert [question.prompt.text for question in asked[:6]] == ["a cat", "a dog", "a bird"] * 2
    assert all(question.image_a.name[:3] == question.image_b.name[:3] for question in asked)
    assert any(question.image_a > question.image_b for question in asked)  # the earlier one is not always a
    assert Questions(tmp_path, count=4).now() == asked[:4]


def test_a_run_is_asked_about_before_and_after(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    run.log_config({})
    records: Any = [{"prompt": "a cat"}, {"prompt": "a dog"}, {"prompt": "a bird"}]
    for i, when in enumerate(("before", "after")):
        run.write_evaluation(when, records, np.full((2, 8, 8, 3), 90 * i, np.uint8))
    asked = Questions(run.path).now()
    assert [question.prompt.text for question in asked] == ["a cat", "a dog"]  # the third has no pictures
    assert {path.parent.name for path in asked[0].pictures} == {"before", "after"}


def test_a_stranger_s_run_cannot_name_files_outside(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    run.log_config({})
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    for when in ("before", "after"):
        run.evaluations[when].write([{"prompt": "a cat", "picture": "../secret.png"}])
    with pytest.raises(ValueError, match="has no pictures before and after"):
        Questions(run.path)


def test_links_out_of_a_folder_of_pictures_are_not_followed(tmp_path):
    folder = sampled(tmp_path / "pictures", ["a cat"], 2)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (folder / "000-02.png").symlink_to(tmp_path / "secret.png")
    assert len(Questions(folder).now()) == 1


def test_the_pairs_of_a_file_are_asked_again_without_their_preferences(tmp_path):
    sampled(tmp_path)
    pictures = tmp_path / "000-00.png", tmp_path / "000-01.png"
    pairs = [
        Pair(Prompt("a cat"), *pictures, preference, annotator=name) for name, preference in (("x", 0.0), ("y", 1))
    ]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert Questions(tmp_path).now() == (Question(Prompt("a cat"), *pictures),)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a cat", "image_a": "000-00.png", "image_b": "000-01.png"}\n')
    assert Questions(tmp_path).now() == (Question(Prompt("a cat"), *pictures),)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: [path.unlink() for path in folder.glob("*.png")], "holds no run, no pairs.jsonl and no two"),
        (lambda folder: (folder / "samples.jsonl").unlink(), "has no prompt number 0; write a line for each"),
        (lambda folder: (folder / "samples.jsonl").write_text('{"number": "x", "prompt": "a"}'), "a whole number"),
        (lambda folder: (folder / "pairs.jsonl").write_text("{}\n"), "prompt"),
        (lambda folder: (folder / VOTES).write_text('{"prompt": "a cat"}\n'), "votes.jsonl: 1 line is wrong"),
    ],
)
def test_a_folder_that_cannot_be_labelled_says_why(tmp_path, spoil, reason):
    spoil(sampled(tmp_path))
    with pytest.raises(ValueError, match=reason):
        serve(tmp_path, "", None, "127.0.0.1", 0)


def test_questions_of_a_run_come_and_go(tmp_path):
    sampled(tmp_path)
    (tmp_path / WAITING).mkdir()
    questions = Questions(tmp_path)
    assert not questions.now() and not questions.run_waits
    path = tmp_path / WAITING / "1.jsonl"
    asked = Question(Prompt("a cat"), tmp_path / "000-00.png", tmp_path / "000-01.png")
    write_waiting(path, [asked])
    assert [question.key for question in questions.now()] == [asked.key] and questions.run_waits
    os.utime(path, (0, os.stat(path).st_mtime - ALIVE - 1))
    assert not questions.now() and not questions.run_waits  # its run has ended without a word
    path.unlink()
    assert not questions.now()


# --- votes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path: Path) -> list[Question]:
    return list(Questions(sampled(tmp_path)).now())


def test_votes_are_a_pairs_file_and_can_be_taken_back(tmp_path, asked):
    votes = Votes(tmp_path)
    votes.add(asked[0], 1.0, "ann")
    votes.add(asked[1], 0.5, "ann")
    votes.add(asked[0], 0.0, "bob")
    votes.add(asked[0], 0.0, "ann")  # a second vote of the same person is not counted
    assert [(pair.annotator, pair.preference) for pair in read_pairs(tmp_path / VOTES)] == [
        ("ann", 1.0),
        ("ann", 0.5),
        ("bob", 0.0),
    ]
    votes.remove(asked[0].key, "ann")
    votes.remove(asked[2].key, "ann")  # there is none
    assert [(pair.annotator, pair.preference) for pair in read_pairs(tmp_path / VOTES)] == [("ann", 0.5), ("bob", 0.0)]
    assert list(Votes(tmp_path).of("ann")) == [asked[1].key]


@pytest.mark.parametrize(("end", "left"), [('{"prompt": "a c', 1), ("\udcff\udcfe", 1), (None, 2)])
def test_what_a_killed_writer_left_is_mended(tmp_path, asked, end, left):
    votes = Votes(tmp_path)
    votes.add(asked[0], 1.0, "ann")
    path = tmp_path / VOTES
    whole = path.read_bytes()
    if end is None:  # a whole vote without its line end
        votes.add(asked[1], 1.0, "ann")
        path.write_bytes(path.read_bytes().rstrip(b"\n"))
    else:
        path.write_bytes(whole + end.encode(errors="surrogateescape"))
    assert len(Votes(tmp_path).pairs) == left
    assert path.read_bytes().startswith(whole) and path.read_bytes().endswith(b"}\n")


def test_votes_on_some_pictures(tmp_path, asked):
    assert votes_on(tmp_path, {"000-00.png"}) == []
    votes = Votes(tmp_path)
    for question in asked:
        votes.add(question, 1.0, "ann")
    (tmp_path / VOTES).write_bytes((tmp_path / VOTES).read_bytes() + b'{"image_a": "000-00')
    selected = votes_on(tmp_path, {"000-00.png", "000-01.png"})
    assert len(selected) == 1 and selected[0][2] == 1.0


def test_one_process_votes_in_a_folder(tmp_path):
    with only_labeller(tmp_path), pytest.raises(ValueError, match="another progrpo label already serves"):
        serve(sampled(tmp_path), "", None, "127.0.0.1", 0)
    with only_labeller(tmp_path):
        pass


def test_sides_are_drawn_for_each_annotator(tmp_path):
    questions = Questions(sampled(tmp_path, [f"prompt {i}" for i in range(40)])).now()
    turned = {name: [is_turned(question, name) for question in questions] for name in ("ann", "bob")}
    assert turned["ann"] == [is_turned(question, "ann") for question in questions] != turned["bob"]
    assert all(0.3 < np.mean(sides) < 0.7 for sides in turned.values())


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path: Path) -> Iterator[LabelServer]:
    folder = sampled(tmp_path / EVIL.replace("/", "_")[:60], ("a cat", EVIL))

    def server(folder: Path, host: str, port: int) -> LabelServer:
        return LabelServer(folder, host, port, Questions(folder), Votes(folder), EVIL[:40])

    with listening(server, folder, *HERE) as s:
        thread = Thread(target=s.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield s
        s.shutdown()
        thread.join()


HERE = ("127.0.0.1", 0)


def ask(
    page: LabelServer, path: str, body: object = None, host: str = "localhost", **headers: str
) -> tuple[int, bytes, Any]:
    """The status, the body and the headers of an answer. With a body it is a POST."""
    connection = http.client.HTTPConnection("127.0.0.1", page.server_address[1], timeout=20)
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.putrequest("GET" if body is None else "POST", path, skip_host=True)
        given = {"Host": host, "Content-Type": "application/json", "Content-Length": str(len(data))}
        for name, value in (given | {name.replace("_", "-"): value for name, value in headers.items()}).items():
            connection.putheader(name, value)
        connection.endheaders(data)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def state(page: LabelServer, path: str = "/state.json?annotator=ann", body: object = None) -> Any:
    status, answer, _ = ask(page, path, body)
    assert status == 200, answer
    return json.loads(answer)


def vote(page: LabelServer, choice: str, annotator: str = "ann") -> Any:
    first = state(page, f"/state.json?annotator={annotator}")["next"][0]
    return state(page, "/vote", {"annotator": annotator, "id": first["id"], "choice": choice})


def test_votes_skips_and_undo(page):
    start = state(page)
    assert (start["done"], start["total"], start["undo"], len(start["next"])) == (0, 6, False, 4)
    shown = start["next"][0]
    after = vote(page, "left")
    assert (after["done"], after["undo"]) == (1, True) and after["next"][0] != shown
    (pair,) = read_pairs(page.folder / VOTES)
    preferred = pair.image_a if pair.preference == 1 else pair.image_b
    assert ask(page, shown["left"])[1] == preferred.read_bytes()
    skipped = after["next"][0]
    assert vote(page, "skip")["skipped"] == 1
    assert state(page, "/undo", {"annotator": "ann"})["next"][0] == skipped
    assert state(page, "/undo", {"annotator": "ann"})["next"][0] == shown
    assert read_pairs_or_none(page.folder) == []
    assert state(page, "/undo", {"annotator": "ann"})["done"] == 0  # nothing is left to take back


def read_pairs_or_none(folder: Path) -> list[Pair]:
    return read_pairs(folder / VOTES) if (folder / VOTES).stat().st_size else []


def test_the_last_pair_and_a_new_start(page):
    for _ in range(6):
        last = vote(page, "tie")
    assert last["next"] == [] and last["done"] == 6
    again = LabelServer(page.folder, *HERE, Questions(page.folder), Votes(page.folder))
    try:
        assert again._state("ann")["done"] == 6 and again._state("ann")["undo"]
        assert again._state("bob")["done"] == 0
    finally:
        again.server_close()


def test_a_vote_that_is_sent_twice_counts_once(page):
    first = state(page)["next"][0]["id"]
    for _ in range(2):
        assert state(page, "/vote", {"annotator": "ann", "id": first, "choice": "left"})["done"] == 1
    assert len(read_pairs(page.folder / VOTES)) == 1
    assert state(page, "/undo", {"annotator": "ann"})["done"] == 0


def test_agreement_of_two(page):
    for _ in range(4):
        vote(page, "tie", "ann")
        last = vote(page, "tie", "bob")
    assert last["agreement"] == "100 % equal votes on 4 pairs of 2 annotators, Cohen's kappa undefined"


def test_texts_of_others_are_escaped(page):
    status, body, headers = ask(page, "/")
    assert status == 200 and b"<script>alert" not in body and b"onerror=" in body.replace(b"&#34;", b'"')
    assert b'value="&lt;/title&gt;' in body
    policy = headers["Content-Security-Policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy and headers["X-Content-Type-Options"] == "nosniff"
    assert state(page)["next"][1]["prompt"] == EVIL  # as JSON, which the page sets as text
    for path in ("/label.css", "/label.js"):
        assert ask(page, path)[0] == 200
    script = ask(page, "/label.js")[1]
    assert b"innerHTML" not in script and b"eval" not in script


def test_pictures_of_other_kinds_are_shown_as_png(page):
    Image.new("RGB", (8, 8)).save(page.folder / "000-00.bmp")
    page._pictures["x"] = page.folder / "000-00.bmp"
    status, body, headers = ask(page, "/picture/x")
    assert status == 200 and headers["Content-Type"] == "image/png" and body.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "path",
    ["/picture/../samples.jsonl", "/picture/%2e%2e/votes.jsonl", "/picture/000-00.png", "/picture/", "/x", "//["],
)
def test_a_name_is_no_path(page, path):
    assert ask(page, path)[0] in (404, 422)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"[]", 422),
        (b"[" * 50_000, 422),
        ({"annotator": 3}, 422),
        ({"annotator": "x" * 61}, 422),
        ({"annotator": "a\nb"}, 422),
        ({"annotator": "ann", "id": "none", "choice": "left"}, 404),
        (b"x" * 100_001, 413),
    ],
)
def test_a_wrong_vote_is_refused_and_nothing_is_written(page, body, status):
    assert ask(page, "/vote", body)[0] == status
    assert not (page.folder / VOTES).exists()


def test_a_wrong_choice_is_refused(page):
    first = state(page)["next"][0]["id"]
    assert ask(page, "/vote", {"annotator": "ann", "id": first, "choice": "up"})[0] == 422
    assert not (page.folder / VOTES).exists()


@pytest.mark.parametrize("host", ["evil.example", "", "127.0.0.1.evil.example", "["])
def test_a_name_that_was_resolved_to_this_machine_is_refused(page, host):
    first = state(page)["next"][0]["id"]
    assert ask(page, "/", host=host)[0] == ask(page, "/state.json", host=host)[0] == 403
    assert ask(page, "/vote", {"annotator": "ann", "id": first, "choice": "left"}, host=host)[0] == 403
    assert not (page.folder / VOTES).exists()


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Content_Type": "text/plain"}, 415)],
)
def test_another_site_cannot_vote(page, headers, status):
    body = {"annotator": "ann", "id": state(page)["next"][0]["id"], "choice": "left"}
    assert ask(page, "/vote", body, **headers)[0] == status
    assert not (page.folder / VOTES).exists()
    assert ask(page, "/vote", body, Origin="http://localhost")[0] == 200
