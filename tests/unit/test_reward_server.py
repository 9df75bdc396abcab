"""The reward server in this process: what it answers, and what it lets in. Its process is met in tests/e2e."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import re
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import httpx2
import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

import progrpo
from progrpo.cli import main
from progrpo.environment import is_loopback, listening_socket
from progrpo.rewards import batching, gate, server
from progrpo.rewards.base import Refusal, Reward, Score
from progrpo.rewards.server import Limits, make_app
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

SEVEN: Any = "seven"
RNG = np.random.default_rng(0)


def picture(height: int = 6, width: int = 5) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(picture_HWC: np.ndarray, form: str = "PNG") -> bytes:
    file = BytesIO()
    Image.fromarray(picture_HWC).save(file, form)
    return file.getvalue()


def item(drawn: np.ndarray | bytes, prompt: str = "a", **more: Any) -> dict[str, Any]:
    data = drawn if isinstance(drawn, bytes) else png(drawn)
    return {"png": base64.b64encode(data).decode(), "prompt": prompt, **more}


def question(*items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"version": 1, "items": list(items), **more}


class Recorded(Reward):
    """Sums of pixels; what `judge` gives for a prompt, raised or returned, in their place. Remembers its calls."""

    def __init__(self, judge: Callable[[Prompt, float], Any] = lambda prompt, value: value) -> None:
        self.judge, self.calls = judge, list[list[str]]()
        self.free, self.busy, self.closed = threading.Event(), threading.Event(), False
        self.free.set()

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        assert pictures_NHWC.dtype == np.uint8 and pictures_NHWC.ndim == 4
        self.calls.append([p.text for p in prompts])
        self.busy.set()
        assert self.free.wait(20)
        judged = [self.judge(p, float(picture.sum())) for p, picture in zip(prompts, pictures_NHWC, strict=True)]
        for one in judged:
            if isinstance(one, BaseException):
                raise one
        return [one if isinstance(one, Score) else Score(one) for one in judged]

    def close(self) -> None:
        self.closed = True


@contextmanager
def served(reward: Any = None, token: str = "", batch_size: int | None = None, **limits: int) -> Iterator[TestClient]:
    term = RewardTerm("sum", batch_size=batch_size)
    with TestClient(make_app(term, reward or Recorded(), token, Limits(**limits))) as client:
        yield client


def scores(client: httpx2.Client, *items: dict[str, Any]) -> list[dict[str, Any]]:
    body = json.dumps(question(*items))
    response = client.post("/v1/score", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert (answer["version"], answer["reward"]) == (1, "sum")
    return answer["scores"]


def values(answers: list[dict[str, Any]]) -> list[float | None]:
    return [score["value"] for score in answers]


def detail(response: httpx2.Response, status: int) -> str:
    """The sentence of a request that was refused."""
    assert response.status_code == status, response.text
    text = response.json()["detail"]
    assert isinstance(text, str) and "\n" not in text and 0 < len(text) <= 1000
    return text


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_in_order_of_pictures_of_several_sizes():
    drawn = [picture(*size) for size in ((4, 4), (8, 3), (4, 4), (3, 8), (8, 3))]
    reward = Recorded()
    with served(reward) as client:
        answers = scores(client, *(item(p, f"{i}", id=10 - i) for i, p in enumerate(drawn)))
    assert values(answers) == [float(p.sum()) for p in drawn]
    assert [score["id"] for score in answers] == [10, 9, 8, 7, 6]
    assert sorted(reward.calls) == [["0", "2"], ["1", "4"], ["3"]]


def test_no_pictures_no_scores():
    with served() as client:
        assert scores(client) == []


def test_prompts_and_columns_reach_the_reward():
    text = "кот 🐈 \ud800 \0"  # half a surrogate pair is a text to Python and JSON
    with served(Recorded(lambda prompt, value: prompt.text == text)) as client:
        assert values(scores(client, item(picture(), text))) == [1.0]
    with served(Recorded(lambda prompt, value: prompt.columns["target"]["x"][1])) as client:
        assert values(scores(client, item(picture(), columns={"target": {"x": [1, 2.5]}}))) == [2.5]


def test_a_source_picture_is_checked_as_the_other_one(monkeypatch):
    monkeypatch.setattr(server, "_LARGEST", 100)
    shown = picture(3, 2)
    source, large = (base64.b64encode(png(drawn)).decode() for drawn in (shown, picture(11, 10)))
    with served(Recorded(lambda prompt, value: float(np.asarray(prompt.columns["image"]).sum()))) as client:
        good, bad, huge = scores(
            client,
            item(picture(), image=source),
            item(picture(), image="no PNG"),
            item(picture(), image=large),
        )
    assert good["value"] == float(shown.sum())
    assert bad["value"] is None and "no PNG in base64" in bad["error"]
    assert huge["value"] is None and "pixels" in huge["error"]


def test_a_picture_that_is_transparent_is_a_missing_score():
    """The pixels under a transparent colour are not what anybody sees."""
    files: dict[str, BytesIO] = {}
    for mode, options in (("RGB", {"transparency": (9, 9, 9)}), ("RGBA", {})):
        Image.new(mode, (3, 2), (9, 9, 9)).save(files.setdefault(mode, BytesIO()), "PNG", **options)
    with served(Recorded(lambda prompt, value: value)) as client:
        keyed, alpha = scores(client, *(item(file.getvalue()) for file in files.values()))
    assert keyed["value"] is None and "transparent colour" in keyed["error"]
    assert alpha["value"] is None and "must be RGB" in alpha["error"]


def test_no_request_names_a_file_of_the_servers_machine(tmp_path):
    (tmp_path / "own.png").write_bytes(png(picture()))
    body = question(item(picture(), columns={"image": str(tmp_path / "own.png")}))
    reward = Recorded()
    with served(reward) as client:
        message = detail(client.post("/v1/score", json=body), 422)
    assert "a source picture is sent as `image` beside the columns" in message and reward.calls == []


@pytest.mark.parametrize("wrong", [None, float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_null_with_an_error(wrong):
    with served(Recorded(lambda prompt, value: wrong if prompt.text == "bad" else value)) as client:
        good, bad = scores(client, item(picture()), item(picture(), "bad"))
    assert good["value"] > 0 and good["error"] is None
    assert bad == {"id": None, "value": None, "passed": None, "error": f"the reward gave {wrong}"}


def test_verdicts_errors_and_numpys_numbers_are_passed_on():
    given = {
        "verdict": Score(0.25, np.bool_(True)),  # type: ignore[arg-type]
        "small": Score(np.float32(0.5), 2),  # type: ignore[arg-type]
        "missing": Score(None, error="a\nmodel \ud800 was lost"),
        "doubtful": Score(2, False, "truncated"),
    }
    with served(Recorded(lambda prompt, value: given[prompt.text])) as client:
        answers = scores(client, *(item(picture(), name) for name in given))
    assert [(s["value"], s["passed"], s["error"]) for s in answers] == [
        (0.25, True, None),
        (0.5, True, None),
        (None, None, "a model \\ud800 was lost"),
        (2.0, False, "truncated"),
    ]


@pytest.mark.parametrize("error", [KeyError("k"), SystemExit(3), StopIteration(), Score(SEVEN)], ids=str)
def test_what_the_reward_fails_at_is_missing_and_no_other(error):
    reward = Recorded(lambda prompt, value: error if prompt.text == "bad" else value)
    with served(reward) as client:
        for _ in range(2):
            answers = scores(client, item(picture(), "1"), item(picture(), "bad"), item(picture(), "2"))
            assert [v is None for v in values(answers)] == [False, True, False]
            assert (type(error).__name__ if isinstance(error, BaseException) else "ValueError") in answers[1]["error"]
        assert client.get("/health").json()["failures"] == 2


def test_a_reward_that_loses_count_is_refused_and_not_asked_again():
    class Short(Recorded):
        asked = 0

        def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
            self.asked += 1
            return [Score(1.0)]

    reward = Short()
    with served(reward) as client:
        answer = client.post("/v1/score", json=question(item(picture()), item(picture())))
    assert (answer.status_code, reward.asked) == (422, 1)
    assert answer.json()["detail"] == "the reward gave 1 scores for 2 pictures; return one each"


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_faults_cost_exactly_the_pictures_that_they_hit(share):
    drawn = [picture() for _ in range(60)]
    hit = [zlib.crc32(p.tobytes()) % 1000 < 1000 * share for p in drawn]
    reward = Recorded(lambda prompt, value: RuntimeError("a fault") if hit[int(prompt.text)] else value)
    with served(reward) as client:
        answers = scores(client, *(item(p, f"{i}") for i, p in enumerate(drawn)))
    assert any(hit) and values(answers) == [None if h else float(p.sum()) for h, p in zip(hit, drawn, strict=True)]
    assert all(s["error"] == "RuntimeError: a fault" for s, h in zip(answers, hit, strict=True) if h)


def test_a_refusal_is_422_with_its_sentence():
    with served(Recorded(lambda prompt, value: Refusal("there is no column 'x'"))) as client:
        response = client.post("/v1/score", json=question(item(picture()), item(b"none")))
        assert detail(response, 422) == "there is no column 'x'"
        assert client.get("/health").json()["pictures"] == 0


# --- batches ----------------------------------------------------------------------------------------------------------


@contextmanager
def busy(reward: Recorded, client: httpx2.Client) -> Iterator[ThreadPoolExecutor]:
    """While the reward is kept busy with one picture; at the end it is let go."""
    with ThreadPoolExecutor(16) as pool:
        reward.free.clear()
        first = pool.submit(scores, client, item(picture(), "first"))
        assert reward.busy.wait(20)
        try:
            yield pool
        finally:
            reward.free.set()
        assert len(first.result(20)) == 1


def waiting(client: httpx2.Client, count: int) -> None:
    """Until so many pictures wait."""
    deadline = time.monotonic() + 20
    while client.get("/health").json()["waiting"] != count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_comes_while_the_reward_is_busy_is_merged_and_each_gets_its_own():
    reward, drawn = Recorded(), [picture() for _ in range(7)]
    with served(reward, batch_size=4) as client:
        with busy(reward, client) as pool:
            asked = [pool.submit(scores, client, item(p, f"{i}", id=i)) for i, p in enumerate(drawn)]
            waiting(client, 7)
        assert [values(a.result(20)) for a in asked] == [[float(p.sum())] for p in drawn]
        assert [[s["id"] for s in a.result()] for a in asked] == [[i] for i in range(7)]
    assert [len(call) for call in reward.calls] == [1, 4, 3]


def test_a_request_has_nothing_to_do_with_anothers_refusal():
    reward = Recorded(lambda prompt, value: Refusal("not this") if prompt.text == "bad" else value)
    with served(reward) as client:
        with busy(reward, client) as pool:
            bad = pool.submit(client.post, "/v1/score", json=question(item(picture(), "bad")))
            good = pool.submit(scores, client, item(picture(), "good"))
            waiting(client, 2)
        assert detail(bad.result(20), 422) == "not this"
        assert values(good.result(20))[0] is not None
    assert sorted(reward.calls[1]) == ["bad", "good"]


def test_prompts_of_other_columns_are_not_merged():
    reward = Recorded()
    with served(reward) as client:
        with busy(reward, client) as pool:
            columns: list[dict[str, Any]] = [{"x": 1}, {}, {"x": 2}, {"y": 1}]
            asked = [pool.submit(scores, client, item(picture(), f"{sorted(c)}", columns=c)) for c in columns]
            waiting(client, 4)
        assert all(a.result(20) for a in asked)
    assert sorted(reward.calls[1:]) == [["['x']", "['x']"], ["['y']"], ["[]"]]


def test_where_there_is_no_more_room_a_client_is_asked_to_wait():
    reward, large = Recorded(), item(np.zeros((770, 770, 3), np.uint8))  # 4.15 MB each, of 16.8
    with served(reward, max_megabytes=1) as client:
        for _ in range(2):  # the second time shows that the room came back
            with busy(reward, client) as pool:
                asked: list[Any] = [pool.submit(scores, client, large) for _ in range(4)]
                waiting(client, 4)
                response = client.post("/v1/score", json=question(large))
                assert "too much to do" in detail(response, 503) and response.headers["Retry-After"] == "1"
                small, kind = json.dumps(question(item(picture()))).encode(), {"Content-Type": "application/json"}
                unknown = client.post("/v1/score", content=iter([small]), headers=kind)  # might be of 1 MB
                assert detail(unknown, 503)
                asked.append(pool.submit(client.post, "/v1/score", content=small, headers=kind))
                waiting(client, 5)
            assert asked.pop().result(20).status_code == 200
            assert [values(a.result(20)) for a in asked] == [[0.0]] * 4
            reward.busy.clear()


def test_a_reward_that_fails_in_its_close_is_said_in_a_sentence(capsys):
    class Unclosed(Recorded):
        def close(self) -> None:
            raise OSError("still busy")

    with served(Unclosed()) as client:
        assert client.get("/health").status_code == 200
    assert re.search(
        r"^progrpo: reward .*: its close\(\) failed: .*OSError: still busy$", capsys.readouterr().err, re.MULTILINE
    )


def test_what_waits_is_scored_before_the_end_and_the_reward_is_closed():
    reward = Recorded()
    batches = batching.Batches(reward, 2)
    reward.free.clear()
    answers = batches.submit([picture() for _ in range(5)], [Prompt("a")] * 5)
    threading.Timer(0.05, reward.free.set).start()
    batches.close()
    assert all(a.done() for a in answers) and [len(call) for call in reward.calls] == [2, 2, 1]
    with served(reward) as client:
        assert not reward.closed and client.get("/health").status_code == 200
    assert reward.closed and "reward" not in {thread.name for thread in threading.enumerate()}


# --- who is let in ----------------------------------------------------------------------------------------------------


def test_a_token_is_asked_for_everywhere():
    body = question(item(picture()))
    with served(token="s3cret") as client:
        for path in ("/health", "/v1/score", "/openapi.json", "/nowhere"):
            for wrong in ("", "s3cret", "Basic s3cret", "Bearer", "Bearer s3cre", "Bearer s3crett", "Bearer é"):
                headers = [(b"Authorization", wrong.encode("latin-1"))] if wrong else []
                response = client.request("POST" if "score" in path else "GET", path, headers=headers)
                assert "PROGRPO_REWARD_TOKEN" in detail(response, 401)
                assert response.headers["WWW-Authenticate"] == "Bearer"
        for right in ("Bearer s3cret", "bearer s3cret"):
            assert client.post("/v1/score", json=body, headers={"Authorization": right}).status_code == 200


def test_without_a_token_any_is_let_in():
    with served() as client:
        assert client.get("/health", headers={"Authorization": "Bearer whatever"}).status_code == 200


@pytest.mark.parametrize(("token", "length", "status"), [("s3cret", 9, 401), ("", 2**26 + 1, 413)])
def test_a_body_that_is_refused_by_its_head_is_not_read(token, length, status):
    sent = []

    async def receive() -> Any:
        raise AssertionError("read")

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-length", str(length).encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/score", "headers": headers}
    asyncio.run(make_app(RewardTerm("sum"), Recorded(), token)(scope, receive, send))
    assert sent[0]["status"] == status


# --- limits -----------------------------------------------------------------------------------------------------------


def test_health_says_what_was_done():
    with served() as client:
        before = client.get("/health").json()
        scores(client, item(picture()), item(b"no picture"))
        client.post("/v1/score", content=b"{")
        after = client.get("/health").json()
    assert {k: before[k] for k in ("requests", "pictures", "failures")} == {"requests": 0, "pictures": 0, "failures": 0}
    uptime = after.pop("uptime")
    assert 0 <= before["uptime"] <= uptime < 60
    assert after == {
        "status": "ok",
        "reward": "sum",
        "version": progrpo.__version__,
        "protocol": 1,
        "requests": 1,
        "pictures": 2,
        "failures": 1,
        "columns": [],
        "waiting": 0,
    }


def test_its_schema_is_served():
    with served() as client:
        schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert set(schemas["Item"]["properties"]) == {"id", "png", "prompt", "columns", "image"}
    assert set(schemas["Answer"]["properties"]) == {"id", "value", "passed", "error"}
    assert "8-bit RGB PNG" in schemas["Item"]["properties"]["png"]["description"]


def test_another_reward_and_another_version_are_refused():
    with served() as client:
        asked = question(item(picture()), reward="other")
        assert detail(client.post("/v1/score", json=asked), 422) == "this server gives the reward 'sum', not 'other'"
        assert client.post("/v1/score", json=asked | {"reward": "sum"}).status_code == 200
        assert "version" in detail(client.post("/v1/score", json=asked | {"version": 2}), 422)


def test_too_many_pictures_are_refused():
    reward = Recorded()
    with served(reward, max_pictures=3) as client:
        assert len(scores(client, *[item(picture())] * 3)) == 3
        response = client.post("/v1/score", json=question(*[item(picture())] * 4))
        assert detail(response, 413) == "4 pictures in one request; this server takes 3 at most"
    assert len(reward.calls) == 1


def test_a_body_may_be_so_large_and_no_larger():
    body = json.dumps(question(item(picture()))).encode()
    with served(max_megabytes=1) as client:
        for size, status in ((2**20, 200), (2**20 + 1, 413)):
            padded = body + b" " * (size - len(body))
            pieces = [padded[i : i + 9999] for i in range(0, size, 9999)]
            for content in (padded, iter(pieces)):  # of a declared length, and in chunks
                kind = {"Content-Type": "application/json"}
                response = client.post("/v1/score", content=content, headers=kind)
                assert response.status_code == status
        assert "more than 1 MB" in detail(response, 413)


def test_pictures_that_fill_the_memory_are_refused_before_they_are_decoded():
    large = item(np.zeros((600, 600, 3), np.uint8))
    with served(max_megabytes=1) as client:
        assert values(scores(client, large)) == [0.0]
        assert "that need 4 MB" in detail(client.post("/v1/score", json=question(large, large)), 413)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


WHOLE = png(RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8))
UNREADABLE: dict[str, str | bytes] = {
    "base64": "§§§",
    "half base64": base64.b64encode(WHOLE).decode()[:-3],
    "more than base64": "!" + base64.b64encode(WHOLE).decode(),
    "nothing": "",
    "random": RNG.bytes(300),
    "truncated": WHOLE[: len(WHOLE) // 2],
    "header alone": WHOLE[:33],
    "flipped": WHOLE[:60] + bytes([WHOLE[60] ^ 255]) + WHOLE[61:],
    "jpeg": png(picture(), "JPEG"),
    "gif": png(picture(), "GIF"),
    "grey": png(picture()[..., 0]),
    "alpha": png(RNG.integers(0, 256, (4, 4, 4), dtype=np.uint8)),
    "16 bits": png(RNG.integers(0, 9999, (4, 4)).astype(np.uint16)),
    "bomb": bomb(4097, 4096),
    "larger bomb": bomb(100_000, 100_000),
    "no width": bomb(0, 100),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", UNREADABLE)
def test_a_picture_that_cannot_be_read_costs_no_other(name):
    data, reward = UNREADABLE[name], Recorded()
    bad = {"png": data, "prompt": "bad"} if isinstance(data, str) else item(data, "bad")
    with served(reward) as client:
        first, second = picture(), picture()
        answers = scores(client, item(first), bad, item(second))
    assert values(answers) == [first.sum(), None, second.sum()]
    assert answers[1]["error"].startswith("the picture ") and "\n" not in answers[1]["error"]
    assert reward.calls == [["a", "a"]]
    assert ("16777216 are allowed" in answers[1]["error"]) == (name == "bomb")


def test_the_largest_picture_that_is_allowed_is_decoded():
    data = bomb(4096, 4096)  # it is truncated: decoding finds that, the limit does not
    with served() as client:
        assert "damaged" in scores(client, item(data))[0]["error"]


GOOD = item(picture())
BODIES = {
    "nothing": b"",
    "random": RNG.bytes(5000),
    "no JSON": b'{"version": 1, "items": [',
    "null": b"null",
    "a list": b"[]",
    "a number": b"1" * 10_000,
    "latin-1": '{"version": 1, "items": [], "reward": "é"}'.encode("latin-1"),
    "utf-16": json.dumps(question(GOOD)).encode("utf-16")[:-1],
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep columns": json.dumps(question(GOOD | {"columns": 1})).replace("1}", "[" * 400 + "]" * 400 + "}").encode(),
    "no items": b'{"version": 1}',
    "items of no kind": json.dumps(question({})).encode(),
    "items that are texts": b'{"version": 1, "items": "abc"}',
    "a prompt that is none": json.dumps(question(GOOD | {"prompt": None})).encode(),
    "columns that are none": json.dumps(question(GOOD | {"columns": [1]})).encode(),
    "an id that is none": json.dumps(question(GOOD | {"id": "x"})).encode(),
    "a huge wrong field": json.dumps(question(GOOD | {"prompt": ["x" * 500_000]})).encode(),
    "a pickle": b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94",
}


@pytest.fixture(scope="module")
def one_server() -> Iterator[TestClient]:
    with served() as client:
        yield client


@pytest.mark.parametrize("name", BODIES)
def test_a_body_of_nonsense_is_refused_in_one_sentence(one_server, name):
    response = one_server.post("/v1/score", content=BODIES[name], headers={"Content-Type": "application/json"})
    assert detail(response, response.status_code) and response.status_code in (400, 422)
    assert values(scores(one_server, GOOD))[0] is not None


def test_mutated_bodies_never_break_the_server(one_server):
    whole, generator = bytearray(json.dumps(question(GOOD, GOOD), indent=1).encode()), np.random.default_rng(1)
    for _ in range(150):
        body = bytearray(whole)
        for _ in range(generator.integers(1, 4)):
            at = int(generator.integers(len(body)))
            body[at : at + int(generator.integers(0, 3))] = generator.bytes(int(generator.integers(0, 3)))
        kind = {"Content-Type": "application/json"}
        response = one_server.post("/v1/score", content=bytes(body), headers=kind)
        assert response.status_code in (200, 400, 422)
    assert None not in values(scores(one_server, GOOD))


def test_what_is_not_said_to_be_json_is_refused(one_server):
    body = json.dumps(question(GOOD)).encode()  # what a web page can send from a browser without asking
    assert detail(one_server.post("/v1/score", content=body, headers={"Content-Type": "text/plain"}), 422)
    assert detail(one_server.get("/v1/score"), 405) and detail(one_server.get("/docs"), 404)


# --- on a socket ------------------------------------------------------------------------------------------------------


@contextmanager
def running(app: Any) -> Iterator[str]:
    with listening_socket("127.0.0.1", 0) as listener:
        process = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        thread = threading.Thread(target=process.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            process.should_exit = True
            thread.join(20)


def test_pictures_of_a_client_that_is_gone_are_not_scored(caplog):
    reward = Recorded()
    with running(make_app(RewardTerm("sum"), reward)) as url, httpx2.Client(base_url=url, timeout=20) as client:
        with busy(reward, client) as pool:
            with pytest.raises(httpx2.ReadTimeout):
                client.post("/v1/score", json=question(item(picture(), "abandoned")), timeout=0.3)
            other = pool.submit(scores, client, item(picture(), "other"))
            waiting(client, 2)
            time.sleep(0.2)  # for the server to see that the connection is closed
        assert other.result(20)[0]["value"] is not None
    assert reward.calls == [["first"], ["other"]]
    gc.collect()
    assert caplog.text == ""  # nor does asyncio tell of it


def test_a_reward_that_hangs_does_not_keep_the_server_from_ending(monkeypatch):
    monkeypatch.setattr(batching, "_HANGING", 0.1)
    reward = Recorded()
    reward.free.clear()
    batches = batching.Batches(reward, 1)
    batches.submit([picture()], [Prompt("a")])
    assert reward.busy.wait(20)
    started = time.monotonic()
    batches.close()
    assert time.monotonic() - started < 5
    reward.free.set()


def test_a_body_that_stalls_is_given_up_but_no_slow_reward(monkeypatch):
    monkeypatch.setattr(gate, "_STALLED", 0.1)

    def body() -> Iterator[bytes]:
        yield b"{"
        time.sleep(0.5)
        yield b"}"

    reward = Recorded()
    with running(make_app(RewardTerm("sum"), reward)) as url, httpx2.Client(base_url=url) as client:
        reward.free.clear()
        threading.Timer(0.4, reward.free.set).start()
        assert values(scores(client, item(picture())))[0] is not None
        response = client.post("/v1/score", content=body(), headers={"Content-Type": "application/json"})
        assert "no byte" in detail(response, 408)


# --- the command ------------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["serve-reward", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err.removeprefix("progrpo: error: ").strip()


def test_it_is_open_to_other_machines_only_with_a_token(capsys, monkeypatch):
    monkeypatch.delenv("PROGRPO_REWARD_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org", "127.0.0.1.example.org"):
        assert "set PROGRPO_REWARD_TOKEN" in refusal(capsys, "shapes", "--host", host)
    monkeypatch.setenv("PROGRPO_REWARD_TOKEN", " \n")
    assert "set PROGRPO_REWARD_TOKEN" in refusal(capsys, "shapes", "--host", "0.0.0.0")
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost"))


def test_what_cannot_be_served_is_refused_in_one_sentence(capsys, tmp_path, monkeypatch):
    (tmp_path / "ranks_of_mine.py").write_text("def rank(images, prompts): return []\nrank.groupwise = True\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "pictures of a group" in refusal(capsys, "ranks_of_mine:rank")
    (tmp_path / "moves_of_mine.py").write_text("def move(images, prompts): return []\nmove.video = True\n")
    assert "scores whole videos, and a server is sent pictures" in refusal(capsys, "moves_of_mine:move")
    assert "neither built in" in refusal(capsys, "absent")
    assert "--max-pictures must be between 1 and 100,000, not 0" in refusal(capsys, "shapes", "--max-pictures", "0")
    with listening_socket("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen at 127.0.0.1, port {port}" in refusal(capsys, "shapes", "--port", port)
    assert "--port must be between 0 and 65,535, not 70000" in refusal(capsys, "shapes", "--port", "70000")


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr("progrpo.cli.other_commands.find_spec", lambda name: None)
    assert "pip install 'progrpo[server]'" in refusal(capsys, "shapes")
