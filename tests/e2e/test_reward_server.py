"""The reward server as a process: clients that kill it, SIGTERM, and what a socket may send it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import pytest

from progrpo.rewards.remote import RemoteReward
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "reward_server.py"
PICTURES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
PROMPTS = [Prompt("a")] * 3
REWARD = """
import time
from pathlib import Path
import numpy as np

def mean(images, prompts):
    return [float(np.asarray(i).mean()) for i in images]

def together(images, prompts):
    return [len(images)] * len(images)

def slow(images, prompts):
    Path("busy").touch()
    time.sleep(1)
    return mean(images, prompts)
"""


@contextmanager
def server(folder: Path, name: str, *options: str, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL."""
    (folder / "served_reward.py").write_text(REWARD)
    command = [sys.executable, "-m", "progrpo", "serve-reward", f"served_reward:{name}", "--port", str(port), *options]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"reward served_reward:{name} at http://127.0.0.1:"), process.communicate()
        yield process, line.split(" at ")[1].split()[0]
    finally:
        process.kill()
        process.communicate()


def client(name: str, url: str) -> RemoteReward:
    return RemoteReward.make(RewardTerm(f"served_reward:{name}", url=url))


def test_nothing_is_lost_and_nothing_twice_though_the_server_is_killed():
    command = [sys.executable, str(BENCHMARK), "--pictures", "400", "--clients", "4", "--kills", "1", "--json"]
    results = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
    assert (results["pictures"], results["right"], results["kills"]) == (400, 400, 1)
    assert results["wrong"] == results["missing"] == results["never_answered"] == results["answered_twice"] == 0
    lives = results["server_MB_at_0_25_50_75_100_percent_of_its_lives"]
    assert [len(life) for life in lives] == [5, 5]


def test_hostile_requests_are_refused_and_hurt_no_other():
    command = [sys.executable, str(BENCHMARK.with_name("fuzz.py")), "--requests", "100", "--seed", "3", "--json"]
    results = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
    assert results["requests"] == sum(results["by_kind"].values()) == 100 and len(results["by_kind"]) == 13
    assert results["errors_500"] == results["not_answered_as_promised"] == results["tracebacks"] == 0
    assert (results["honest_pictures_right"], results["honest_pictures_wrong_or_missing"]) == (64, 0)
    assert results["ended_by_sigterm"] and {"400", "401", "413", "422"} <= set(results["answers"])


def test_a_server_that_is_started_again_goes_on_under_its_client(tmp_path):
    expected = [float(p.mean()) for p in PICTURES]
    with server(tmp_path, "mean") as (process, url):
        reward = client("mean", url)
        assert [s.value for s in reward.score(PICTURES, PROMPTS)] == expected
        process.kill()
        process.wait()
        again: list[float | None] = []
        asking = threading.Thread(target=lambda: again.extend(s.value for s in reward.score(PICTURES, PROMPTS)))
        asking.start()
        time.sleep(0.5)
        assert not again
        with server(tmp_path, "mean", port=int(url.rpartition(":")[2])):
            asking.join(60)
    assert again == expected
    reward.close()


def test_at_sigterm_it_answers_what_is_being_scored(tmp_path):
    with server(tmp_path, "slow") as (process, url):
        reward = client("slow", url)
        reward._meet()
        values: list[float | None] = []
        asking = threading.Thread(target=lambda: values.extend(s.value for s in reward.score(PICTURES, PROMPTS)))
        asking.start()
        deadline = time.monotonic() + 20
        while not (tmp_path / "busy").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
        asking.join(20)
        assert process.returncode == -signal.SIGTERM and out == err == ""
    assert values == [float(p.mean()) for p in PICTURES]
    reward.close()


@pytest.mark.slow
def test_its_options_reach_the_server(tmp_path):
    four = np.concatenate([PICTURES, PICTURES[:1]])
    with server(tmp_path, "together", "--batch-size", "2", "--max-pictures", "3") as (_, url):
        reward = client("together", url)
        assert [s.value for s in reward.score(PICTURES, PROMPTS)] == [2, 2, 1]
        with pytest.raises(ValueError, match="says 413 4 pictures in one request; this server takes 3 at most"):
            reward.score(four, [Prompt("a")] * 4)
        reward.close()


@pytest.mark.slow
def test_a_token_is_set_at_the_start_and_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PROGRPO_REWARD_TOKEN", "s3cret")
    with server(tmp_path, "mean") as (process, url):
        knows = client("mean", url)
        assert [s.error for s in knows.score(PICTURES, PROMPTS)] == [None] * 3
        monkeypatch.setenv("PROGRPO_REWARD_TOKEN", "another")
        with pytest.raises(ValueError, match="says 401 the token is missing or wrong; set PROGRPO_REWARD_TOKEN"):
            client("mean", url).score(PICTURES, PROMPTS)
        process.terminate()
        assert process.communicate(timeout=20) == ("", "")
        knows.close()


def raw(url: str, data: bytes) -> bytes:
    """The start of what comes back."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(data)
        return connection.recv(4096)


def test_lengths_that_lie_are_refused(tmp_path):
    head = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with server(tmp_path, "mean", "--max-megabytes", "1") as (_, url):
        assert raw(url, head + b"Content-Length: 99999999999\r\n\r\n").startswith(b"HTTP/1.1 413 ")
        assert raw(url, head + b"Content-Length: -5\r\n\r\n").startswith(b"HTTP/1.1 400 ")
        assert raw(url, head + b"Content-Length: 9\r\nContent-Length: 8\r\n\r\n").startswith(b"HTTP/1.1 400 ")
        longer = raw(url, head + b"Content-Length: 2\r\n\r\n{}" + b"x" * 2**20)  # the rest is no second request
        assert longer.startswith(b"HTTP/1.1 422 ")
        chunks = b"".join(b"%x\r\n%s\r\n" % (2**16, b" " * 2**16) for _ in range(17))
        assert raw(url, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks).startswith(b"HTTP/1.1 413 ")
        assert raw(url, os.urandom(100) + b"\r\n\r\n").startswith(b"HTTP/1.1 400 ")
        assert httpx2.get(f"{url}/health").status_code == 200


def test_the_commands_help_needs_neither_torch_nor_the_server():
    script = (
        "import sys; from progrpo.cli import main; main(['--help'])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'fastapi', 'uvicorn', 'httpx2')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "serve-reward" in done.stdout
