"""progrpo label as a process: a browser votes by keyboard, two people vote at once, and nothing is lost in a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from statistics import median
from threading import Timer
from typing import Any
from urllib.request import Request, urlopen

import pytest

from progrpo.cli import main
from progrpo.preferences.pairs import read_pairs
from progrpo.preferences.votes import VOTES
from tests.support.pictures import sampled


@contextmanager
def label(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process of `progrpo label`, and its address."""
    command = [sys.executable, "-m", "progrpo", "label", str(folder), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = re.search(r"http://\S+/", process.stdout.readline())
            assert address
            yield process, address[0]
        finally:
            process.kill()


def post(address: str, path: str, **body: object) -> Any:
    request = Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urlopen(request, timeout=10))


def test_a_browser_votes_by_keyboard(browser, tmp_path):
    folder = sampled(tmp_path / "pictures", [f"prompt {i}" for i in range(6)])
    with label(folder, "--annotator", "ann", "--count", "12") as (_, address):
        wrong: list[str] = []
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#ask:not([hidden])")

        def press(key: str) -> float:
            """The seconds until the next pair is shown with its pictures."""
            before, start = shown(), time.perf_counter()
            page.keyboard.press(key)
            page.wait_for_function(
                "before => document.body.dataset.shown !== before"
                " && [...document.querySelectorAll('.choice img')].every((picture) => picture.complete)",
                arg=before,
                polling=2,
            )
            return time.perf_counter() - start

        def shown() -> str:
            return str(page.evaluate("document.body.dataset.shown"))

        seconds = [press(key) for key in ("ArrowLeft", "b", "ArrowDown", "t")]
        fifth = shown()
        seconds.append(press("s"))
        assert page.text_content("#count") == "4 of 12"
        press("u")
        assert shown() == fifth
        press("Backspace")
        assert page.text_content("#count") == "3 of 12" and len(read_pairs(folder / VOTES)) == 3
        print(f"from a key to the next pair: {1000 * median(seconds):.0f} ms")
        assert median(seconds) < 1  # 0.06 s on a busy machine; 200 pairs in 15 minutes leave 4.5 s for each
        for choice in ("#tie", "#left", "#choose-right"):
            page.click(choice)
            page.wait_for_timeout(100)
        assert [pair.preference for pair in read_pairs(folder / VOTES)].count(0.5) == 2
        page.reload()  # a page that is loaded again goes on where it was
        page.wait_for_selector("#ask:not([hidden])")
        assert page.text_content("#count") == "6 of 12"

        other = browser.new_page()  # a second person, at the same time
        other.goto(address)
        other.wait_for_selector("#ask:not([hidden])")
        other.fill("#annotator", "bob")
        other.press("#annotator", "Enter")
        other.wait_for_function("() => document.getElementById('count').textContent === '0 of 12'")
        other.keyboard.press("b")  # the name's field has let the keys go
        other.wait_for_function("() => document.getElementById('count').textContent === '1 of 12'")
        assert "1 pairs of 2 annotators" in str(other.text_content("#agreement"))
        assert {pair.annotator for pair in read_pairs(folder / VOTES)} == {"ann", "bob"}
        for _ in range(6):
            press("t")
        assert "All pairs are done" in str(page.text_content("#message")) and shown() == ""
        assert wrong == []
        page.close()
        other.close()


def test_a_prompt_with_html_is_text(browser, tmp_path):
    evil = "<img src=x onerror=\"document.title = 'bad'\"><b>bold</b>"
    folder = sampled(tmp_path / "pictures", [evil])
    with label(folder) as (_, address):
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#ask:not([hidden])")
        assert page.text_content("#prompt") == evil and page.query_selector("#prompt *") is None
        assert page.title() != "bad"
        page.close()


def test_what_was_answered_survives_a_kill(tmp_path):
    """Killed three times in the midst of votes and undos, and started again: the file is what was answered."""
    folder = sampled(tmp_path / "pictures", [f"prompt {i}" for i in range(12)], members=5)
    possible = {0}
    for delay in (0.01, 0.04, 0.02, None):
        with label(folder, "--annotator", "ann") as (process, address):
            done = json.load(urlopen(f"{address}state.json?annotator=ann", timeout=10))["done"]
            assert done in possible
            if delay is None:
                break
            timer = Timer(delay, process.send_signal, [signal.SIGKILL])
            timer.start()
            with suppress(OSError, HTTPException, ValueError):  # what urlopen raises when the server dies
                while True:
                    possible = {done, done + 1}  # a vote that was not answered is there or not
                    done = vote(address)
                    assert done == max(possible)
                    if done % 5 == 4:
                        possible = {done, done - 1}
                        done = post(address, "undo", annotator="ann")["done"]
                        assert done == min(possible)
            timer.join()
    pairs = read_pairs(folder / VOTES)
    assert len(pairs) == done and {pair.annotator for pair in pairs} == {"ann"}
    assert [name for name in os.listdir(folder) if VOTES in name] == [VOTES]


def vote(address: str) -> int:
    """Prefer the left picture of the next pair; the number of votes."""
    state = json.load(urlopen(f"{address}state.json?annotator=ann", timeout=10))
    return int(post(address, "vote", annotator="ann", id=state["next"][0]["id"], choice="left")["done"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("none",), "none is no folder"),
        ((".", "--annotator", "a\nb"), "--annotator must be a name of one line"),
        ((".", "--count", "0"), "--count must be between 1"),
        ((".",), "holds no run, no pairs.jsonl and no two pictures"),
    ],
)
def test_what_cannot_be_labelled_is_refused(tmp_path, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    assert main(["label", *words, "--port", "0"]) == 2
    assert sentence in capsys.readouterr().err


def test_pairs_are_checked_by_the_command_line(tmp_path, capsys):
    folder = sampled(tmp_path)
    rows = [
        {"prompt": "a cat", "image_a": "000-00.png", "image_b": "000-01.png", "preference": "a", "annotator": "ann"}
    ]
    rows.append({**rows[0], "annotator": "bob"})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["pairs", "check", str(path)]) == 0
    out = capsys.readouterr().out
    assert "pairs       2" in out and "100 % equal votes on 1 pairs of 2 annotators" in out
    path.write_text("".join(json.dumps({**row, "image_b": "9.png"}) + "\n" for row in rows))
    assert main(["pairs", "check", str(path), "--prompts", "shapes"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "2 lines are wrong" in lines[0] and lines[1].startswith("  line 1: ") and lines[2].startswith("  line 2: ")
    assert "none of the known prompts" in lines[1] and "no picture" in lines[1]
