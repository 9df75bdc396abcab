"""Hostile requests to a reward server: `python benchmarks/fuzz.py [--requests N] [--seed S] [--json]`.

Several clients send random bytes, damaged headers and bodies, wrong fields, pictures that are none or would be far too
large, lengths that lie, bodies that end early or never, other methods and paths, and wrong tokens. Meanwhile an honest
client has pictures scored. The goals: every request is answered by a refusal of one sentence (or by scores, where
damage left it whole) or by a closed connection; no answer is a 500; no traceback is written; every score of the honest
client is right; memory stays flat; and the server still ends on its signal.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import re
import signal
import socket
import struct
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from typing import Any

from PIL import Image
from reward_server import Client, Server, free_port

from progrpo.rewards.remote import TOKEN

SECRET = "a secret of the benchmark"
MEGABYTES = 1  # that the server takes in one request
WAIT, PATIENCE = 0.5, 20.0  # seconds for an answer, before and after the server hears that no more will come


def png(mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> bytes:
    file = BytesIO()
    Image.new(mode, size, 3).save(file, "PNG")
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG whose header promises side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


WHOLE, OTHERS = png(), (png("L"), png("RGBA"), png("P"), bomb(4097), bomb(60_000))
NONSENSE: tuple[Callable[[random.Random], Any], ...] = (
    lambda r: None,
    lambda r: r.choice((True, -1, 0, 1e308, -(10**40), float("nan"), float("inf"))),
    lambda r: "".join(chr(r.randrange(1, 0xD7FF)) for _ in range(r.randrange(40))),
    lambda r: "\ud800",
    lambda r: "x" * r.randrange(200_000),
    lambda r: [[]] * r.randrange(50),
    lambda r: {str(i): {} for i in range(r.randrange(50))},
    lambda r: json.loads("[" * 200 + "]" * 200),
)


def question(r: random.Random, picture: bytes = WHOLE, count: int = 2) -> dict[str, Any]:
    item = {"png": base64.b64encode(picture).decode(), "prompt": "a red cat", "columns": {"n": 1}}
    return {"version": 1, "items": [{**item, "id": i} for i in range(count)]}


def request(body: bytes, *headers: str, line: str = "POST /v1/score HTTP/1.1", length: int | None = None) -> bytes:
    fixed = (f"Authorization: Bearer {SECRET}", "Content-Type: application/json", "Connection: close", "Host: here")
    size = (
        ()
        if length is None and "Transfer-Encoding" in " ".join(headers)
        else (f"Content-Length: {len(body) if length is None else length}",)
    )
    return "\r\n".join((line, *fixed, *size, *headers, "", "")).encode() + body


def damaged(r: random.Random, data: bytes) -> bytes:
    """The content with up to eight places overwritten, left out, doubled or swapped."""
    changed = bytearray(data)
    for _ in range(r.randrange(1, 9)):
        at, size = r.randrange(len(changed) + 1), r.randrange(1, 9)
        changed[at : at + r.choice((0, size))] = r.choice((r.randbytes(size), b"", bytes(changed[at : at + size]) * 2))
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def asked(r: random.Random, **more: Any) -> bytes:
    return json.dumps(question(r, **more)).encode()


def wrong_field(r: random.Random) -> bytes:
    whole = question(r)
    place: Any = r.choice((whole, whole["items"][0], whole["items"][0]["columns"]))
    name = r.choice((*place, "another"))
    place[name] = r.choice(NONSENSE)(r)
    return request(json.dumps(whole).encode())


def lying_length(r: random.Random) -> bytes:
    body = asked(r)
    length = r.choice((0, 1, len(body) - 1, len(body) + 1, -1, 10**12, 2**64))
    return request(body, length=length)


def chunks(r: random.Random) -> bytes:
    body = asked(r)
    length = r.choice((len(body), 1, 10**9, 2**70))
    end = r.choice((b"\r\n0\r\n\r\n", b"", b"\r\n"))
    return request(b"%x\r\n%s%s" % (length, body, end), "Transfer-Encoding: chunked")


def other_line(r: random.Random) -> bytes:
    method = r.choice(("GET", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "HEAD", "BREW", "POST"))
    path = r.choice(
        ("/", "/health", "/docs", "/v1/score/", "/v1/../score", "/%00", "*", "/v1/score?" + "x" * r.randrange(70_000))
    )
    return request(asked(r), line=f"{method} {path} {r.choice(('HTTP/1.1', 'HTTP/1.0', 'HTTP/9.9', ''))}")


def wrong_token(r: random.Random) -> bytes:
    token = r.choice(
        ("", "Bearer", "Bearer wrong", "Basic " + SECRET, "Bearer " + "x" * r.randrange(60_000), "Bearer \xff")
    )
    return request(asked(r)).replace(f"Bearer {SECRET}".encode(), token.encode("latin-1"))


KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "random bytes": lambda r: r.randbytes(r.randrange(1, 2000)) + r.choice((b"", b"\r\n\r\n")),
    "damaged head and body": lambda r: damaged(r, request(asked(r))),
    "damaged body": lambda r: request(damaged(r, asked(r))),
    "wrong field": wrong_field,
    "damaged picture": lambda r: request(asked(r, picture=damaged(r, WHOLE))),
    "another picture": lambda r: request(asked(r, picture=r.choice(OTHERS))),
    "lying length": lying_length,
    "chunks": chunks,
    "cut off": lambda r: (whole := request(asked(r)))[: r.randrange(len(whole))],
    "too large": lambda r: request(b" " * (MEGABYTES * 2**20 + r.randrange(1, 2**20)) + asked(r)),
    "too many pictures": lambda r: request(asked(r, count=r.randrange(65, 500))),
    "another line": other_line,
    "wrong token": wrong_token,
}


def outcome(port: int, data: bytes) -> str:
    """The answer's status, or `closed` for a connection that ends without one.

    After a `!` stands what is wrong with the answer.
    """
    answer = b""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
            with suppress(BrokenPipeError, ConnectionResetError):  # it may answer before it has read all
                connection.sendall(data)
            connection.settimeout(WAIT)
            with suppress(TimeoutError):
                answer = connection.recv(65_536)
            if not answer:  # it waits for more, and hears that none will come
                connection.shutdown(socket.SHUT_WR)
            connection.settimeout(WAIT if answer else PATIENCE)
            while part := connection.recv(65_536):
                answer += part
    except TimeoutError:
        if not answer:
            return "! no answer"  # else damage took "Connection: close" away, and it waits for the next request
    except OSError:  # reset, or closed already
        pass
    if not answer:
        return "closed"
    match = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    if match is None:
        return "! no HTTP"
    status, body = match[1].decode(), answer.partition(b"\r\n\r\n")[2]
    if status[0] in "45" and body.startswith(b"{"):
        detail = json.JSONDecoder().raw_decode(body.decode())[0]["detail"]  # what follows answers another request
        if not isinstance(detail, str) or "\n" in detail or not 0 < len(detail) <= 2000:
            return f"! unclear {status}"
    return status


def fuzz(requests: int, clients: int, seed: int) -> dict[str, Any]:
    os.environ[TOKEN] = SECRET
    port, answers, counts, slowest, lock = free_port(), Counter[str](), Counter[str](), [0.0], threading.Lock()
    with tempfile.TemporaryFile("w+") as said:
        server = Server(port, "--max-megabytes", str(MEGABYTES), stderr=said)

        def attack(number: int) -> None:
            r = random.Random(f"{seed} {number}")
            for i in range(number, requests, clients):
                kind = r.choice(list(KINDS))
                data, start = KINDS[kind](r), time.perf_counter()
                result = outcome(port, data)
                with lock:
                    answers[result] += 1
                    counts[kind] += 1
                    slowest[0] = max(slowest[0], time.perf_counter() - start)
                    if (i + 1) % max(1, requests // 4) == 0:
                        server.weigh()

        honest = Client(0, max(64, requests // 10), 32, f"http://127.0.0.1:{port}")
        threads = [honest, *(threading.Thread(target=attack, args=(n,)) for n in range(clients))]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds, code = time.perf_counter() - start, server.stop()
        said.seek(0)
        tracebacks = said.read().count("Traceback")
    scored = sum(honest.verdicts, Counter[str]())
    return {
        "requests": sum(answers.values()),
        "by_kind": dict(sorted(counts.items())),
        "answers": dict(sorted(answers.items())),
        "errors_500": answers["500"],
        "not_answered_as_promised": sum(n for name, n in answers.items() if name.startswith("!")),
        "tracebacks": tracebacks,
        "honest_pictures_right": scored["right"],
        "honest_pictures_wrong_or_missing": scored.total() - scored["right"],
        "slowest_answer_seconds": round(slowest[0], 2),
        "server_MB": [round(mb, 1) for life in server.lives for mb in life],
        "ended_by_sigterm": code == -signal.SIGTERM,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    result = fuzz(options.requests, options.clients, options.seed)
    print(json.dumps(result) if options.json else "\n".join(f"{name:34s} {value}" for name, value in result.items()))


if __name__ == "__main__":
    main()
