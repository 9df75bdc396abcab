"""A reward server under many clients, killed on the way: `python benchmarks/reward_server.py [--pictures N] [--json]`.

The reward is a checksum of a picture and its prompt, so that every score differs from every other. Clients score
distinct pictures at once, and meanwhile the server is killed (SIGKILL) and started again. The goals: each picture gets
its own score, once; the server's memory stays flat through each of its lives.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import psutil
from PIL import Image

from progrpo.rewards.remote import TOKEN, RemoteReward
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

NAME = f"{Path(__file__).stem}:checksum"
CALL = 64  # pictures of one call of score()


def checksum(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """The reward that is served."""
    return [
        float(zlib.crc32(np.asarray(i).tobytes(), zlib.crc32(p.encode()))) for i, p in zip(images, prompts, strict=True)
    ]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


class Server:
    """The command in a process, and its memory in MB at the start, the quarters and the end of each of its lives."""

    def __init__(self, port: int, *options: str, stderr: int | IO[str] | None = None) -> None:
        self._command = [sys.executable, "-m", "progrpo", "serve-reward", NAME, "--port", str(port), *options]
        self._stderr = stderr
        self.lives: list[list[float]] = []
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=self._stderr, text=True
        )
        assert self._process.stdout is not None and self._process.stdout.readline(), "the server did not start"
        self.lives.append([])
        self.weigh()

    def weigh(self) -> None:
        self.lives[-1].append(psutil.Process(self._process.pid).memory_info().rss / 1e6)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """Ask the server to end; return its exit code."""
        self._process.terminate()
        return self._process.wait(30)


class Client(threading.Thread):
    """A client that scores its own pictures and counts their scores: right, wrong or missing."""

    def __init__(self, number: int, pictures: int, size: int, url: str) -> None:
        super().__init__()
        self._number, self._pictures, self._size = number, pictures, size
        self._reward = RemoteReward.make(RewardTerm(NAME, url=url))
        self.verdicts: list[Counter[str]] = [Counter() for _ in range(pictures)]
        self.answered = 0

    def run(self) -> None:
        generator = np.random.default_rng(self._number)
        for start in range(0, self._pictures, CALL):
            rows = range(start, min(start + CALL, self._pictures))
            drawn_NHWC = generator.integers(0, 256, (len(rows), self._size, self._size, 3), dtype=np.uint8)
            prompts = [Prompt(f"picture {row} of client {self._number}", {"row": row}) for row in rows]
            own = checksum([Image.fromarray(p) for p in drawn_NHWC], [p.text for p in prompts])
            scores = self._reward.score(drawn_NHWC, prompts)
            for i, score in enumerate(scores):
                verdict = "missing" if score.value is None else "right" if score.value == own[i] else "wrong"
                self.verdicts[rows[i]][verdict] += 1
            self.answered += len(scores)
        self._reward.close()


def measure(pictures: int, clients: int, size: int, kills: int) -> dict[str, object]:
    os.environ[TOKEN] = "a secret of the benchmark"
    port = free_port()
    server = Server(port)
    shares = [len(part) for part in np.array_split(np.arange(pictures), clients)]
    threads = [Client(n, share, size, f"http://127.0.0.1:{port}") for n, share in enumerate(shares)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    quarters = 4 * (kills + 1)
    for quarter in range(1, quarters + 1):
        while sum(t.answered for t in threads) < pictures * quarter / quarters and any(t.is_alive() for t in threads):
            time.sleep(0.02)
        server.weigh()
        if quarter % 4 == 0 and quarter < quarters:
            server.kill()
            server.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    server.stop()
    verdicts = [counts for thread in threads for counts in thread.verdicts]
    total = sum(verdicts, Counter[str]())
    return {
        "pictures": pictures,
        "clients": clients,
        "kills": kills,
        "right": total["right"],
        "wrong": total["wrong"],
        "missing": total["missing"],
        "never_answered": sum(not counts for counts in verdicts),
        "answered_twice": sum(counts.total() > 1 for counts in verdicts),
        "pictures_a_second": round(pictures / seconds, 1),
        "server_MB_at_0_25_50_75_100_percent_of_its_lives": [[round(mb, 1) for mb in life] for life in server.lives],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    result = measure(options.pictures, options.clients, options.size, options.kills)
    lines = (f"{name:50s} {value}" for name, value in result.items())
    print(json.dumps(result) if options.json else "\n".join(lines))


if __name__ == "__main__":
    main()
