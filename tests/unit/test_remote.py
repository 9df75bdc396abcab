"""The client of a reward server: against the server itself, and against servers that fail in every way."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from progrpo.rewards.base import Refusal, Reward, Score, WrongAnswer
from progrpo.rewards.function import FunctionReward
from progrpo.rewards.load import load_reward
from progrpo.rewards.remote import RemoteReward
from progrpo.rewards.retrying import RetryingReward
from progrpo.rewards.server import Limits, make_app, serve
from progrpo.rewards.settings import RewardTerm
from progrpo.rewards.shapes import ShapesReward
from progrpo.types import Prompt
from progrpo.zoo.shapes.world import examples

PICTURES = np.random.default_rng(0).integers(0, 256, (10, 7, 5, 3), dtype=np.uint8)
PROMPTS = [Prompt(f"{i}", {"row": i}) for i in range(10)]
SUMS = [float(p.sum()) for p in PICTURES]
HEALTH = {"protocol": 1, "reward": "sum"}


class Sums(Reward):
    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        return [Score(float(p.sum())) for p in pictures_NHWC]


@contextmanager
def served(reward: Any, token: str = "", **settings: Any) -> Iterator[RemoteReward]:
    """The client of the real server."""
    with TestClient(make_app(RewardTerm("sum"), reward, token)) as client:
        yield RemoteReward("sum", client, **settings)


Answer = httpx2.Response | Exception | None


class Faulty:
    """A server whose answer to its n-th question is `fault(n, items)`, or sums of pixels where that is None."""

    def __init__(self, fault: Callable[[int, list[dict[str, Any]]], Answer] = lambda n, items: None) -> None:
        self.fault, self.asked, self.health = fault, list[list[str]](), list[Answer]()
        self._one = threading.Lock()

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/health":
            answer = self.health.pop(0) if self.health else None
            return answered(answer, HEALTH)
        items = json.loads(request.content)["items"]
        with self._one:
            self.asked.append([item["prompt"] for item in items])
            number = len(self.asked)
        return answered(self.fault(number, items), {"scores": [scored(item) for item in items]})


def answered(answer: Answer, otherwise: Any) -> httpx2.Response:
    if isinstance(answer, Exception):
        raise answer
    return answer if answer is not None else httpx2.Response(200, json=otherwise)


def scored(item: dict[str, Any]) -> dict[str, Any]:
    pixels = np.asarray(Image.open(BytesIO(base64.b64decode(item["png"]))))
    return {"id": item["id"], "value": float(pixels.sum()), "passed": None, "error": None}


def asks(server: Callable[[httpx2.Request], httpx2.Response], **settings: Any) -> RemoteReward:
    client = httpx2.Client(transport=httpx2.MockTransport(server), base_url="http://server:8000")
    return RemoteReward("sum", client, **{"patience": 20.0} | settings)


def values(scores: Sequence[Score]) -> list[float | None]:
    return [s.value for s in scores]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("progrpo.rewards.remote._FIRST_WAIT", 0.002)


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 10, 16])
def test_scores_are_the_rewards_own_in_order(batch_size):
    with served(Sums(), batch_size=batch_size) as reward:
        assert reward.score(PICTURES, PROMPTS) == [Score(value) for value in SUMS]


def test_source_pictures_reach_a_reward_elsewhere(tmp_path):
    def likeness(images: Any, prompts: Any, image: Any) -> list[float]:
        pairs = zip(images, image, strict=True)
        return [-1.0 if b is None else float(np.abs(np.asarray(a, int) - np.asarray(b)).sum()) for a, b in pairs]

    Image.fromarray(PICTURES[1]).save(tmp_path / "source.png")
    sources = [Image.fromarray(PICTURES[0]), str(tmp_path / "source.png"), None, Image.fromarray(PICTURES[9])]
    prompts = [Prompt(f"{i}", {"image": source}) for i, source in enumerate(sources)]
    with served(FunctionReward(likeness), batch_size=4) as reward:
        scores = values(reward.score(PICTURES[:4], prompts))
    assert scores == values(FunctionReward(likeness).score(PICTURES[:4], prompts))
    assert scores[:3] == [0.0, 0.0, -1.0] and scores[3] not in (0.0, -1.0)


def test_scores_of_a_built_in_reward_are_those_of_here():
    prompts, pictures_NHWC = examples("test", 20, seed=0)
    pictures_NHWC = np.concatenate([pictures_NHWC[:10], pictures_NHWC[:9:-1]])  # so that some are wrong
    own = ShapesReward().score(pictures_NHWC, prompts)
    assert len({s.value for s in own}) > 3 and {s.passed for s in own} == {True, False}
    with served(ShapesReward()) as reward:
        assert reward.score(pictures_NHWC, prompts) == own


def test_pictures_of_any_memory_arrive_unchanged_and_stay_so():
    whole = np.random.default_rng(1).integers(0, 256, (6, 8, 9, 3), dtype=np.uint8)
    before = whole.copy()
    views = (whole[::2], whole[:, ::-1, ::3], whole.transpose(0, 2, 1, 3), whole[..., ::-1], whole[:, :1, :1])
    with served(Sums()) as reward:
        for view in views:
            view.flags.writeable = False
            assert values(reward.score(view, PROMPTS[: len(view)])) == [float(p.sum()) for p in view]
    assert (whole == before).all()


def test_no_pictures_no_request():
    def never(request: httpx2.Request) -> httpx2.Response:
        raise AssertionError("asked")

    assert asks(never).score(PICTURES[:0], []) == []


def test_the_servers_word_on_a_picture_is_passed_on_and_the_others_keep_their_scores():
    class Bad(Sums):
        def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
            if any(p.text in ("3", "7") for p in prompts):
                raise ZeroDivisionError("of my own making")
            return [Score(s.value, True, "doubtful") for s in super().score(pictures_NHWC, prompts)]

    with served(Bad(), batch_size=4) as reward:
        scores = reward.score(PICTURES, PROMPTS)
    missing = Score(None, error="ZeroDivisionError: of my own making")
    assert scores == [missing if i in (3, 7) else Score(SUMS[i], True, "doubtful") for i in range(10)]


def test_at_most_four_requests_at_once():
    now, most, one = 0, 0, threading.Lock()

    def slow(number: int, items: list[dict[str, Any]]) -> None:
        nonlocal now, most
        with one:
            now, most = now + 1, max(most, now + 1)
        time.sleep(0.02)
        with one:
            now -= 1

    assert values(asks(Faulty(slow), batch_size=1).score(PICTURES, PROMPTS)) == SUMS
    assert most == 4


def test_many_may_ask_at_once_and_the_server_is_met_once():
    meetings = []

    def server(request: httpx2.Request) -> httpx2.Response:
        meetings.extend([1] if request.url.path == "/health" else [])
        return answers(request)

    answers = Faulty()
    reward = asks(server, batch_size=2)
    values_by_thread: list[list[float | None]] = []
    threads = [
        threading.Thread(target=lambda: values_by_thread.append(values(reward.score(PICTURES, PROMPTS))))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert values_by_thread == [SUMS] * 5 and len(meetings) == 1


def drips() -> Iterator[bytes]:
    while True:
        time.sleep(0.02)
        yield b" "


def floods() -> Iterator[bytes]:
    while True:
        yield b" " * 2**20


ENDLESS: dict[str, tuple[Callable[[], httpx2.Response], str]] = {
    "drips": (lambda: httpx2.Response(200, content=drips()), "an answer that does not end"),
    "floods": (lambda: httpx2.Response(200, content=floods()), "an answer of more than 16 MB"),
    "no gzip": (
        lambda: httpx2.Response(200, content=iter([b"none"]), headers={"Content-Encoding": "gzip"}),
        "DecodingError",
    ),
    "nested": (lambda: httpx2.Response(200, content=b"[" * 100_000), "its answer is no JSON"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_answer_that_does_not_end_or_cannot_be_read_is_a_missing_score(name):
    answer, problem = ENDLESS[name]
    client = httpx2.Client(
        transport=httpx2.MockTransport(Faulty(lambda number, items: answer())), base_url="http://server", timeout=0.2
    )
    started = time.monotonic()
    (score,) = RemoteReward("sum", client, patience=0.0).score(PICTURES[:1], PROMPTS[:1])
    assert score.value is None and problem in (score.error or "") and time.monotonic() - started < 5


def test_what_drips_for_ever_is_no_server():
    server = Faulty()
    server.health = [httpx2.Response(200, content=drips())]
    client = httpx2.Client(transport=httpx2.MockTransport(server), base_url="http://server", timeout=0.2)
    with pytest.raises(Refusal, match="no server answers at http://server"):
        RemoteReward("sum", client, patience=0.0).check([])


# --- a server in trouble ----------------------------------------------------------------------------------------------


def text(status: int, **headers: str) -> httpx2.Response:
    return httpx2.Response(status, text="<html>trouble</html>", headers=headers)


TROUBLES: dict[str, Callable[[], Answer]] = {
    "refused": lambda: httpx2.ConnectError("connection refused"),
    "slow": lambda: httpx2.ReadTimeout("timed out"),
    "killed": lambda: httpx2.RemoteProtocolError("peer closed connection"),
    "reset": lambda: httpx2.WriteError("reset"),
    "500": lambda: text(500),
    "502": lambda: text(502),
    "503": lambda: text(503),
    "408": lambda: text(408),
    "429": lambda: text(429),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_a_request_that_meets_trouble_is_sent_again(name):
    server = Faulty(lambda number, items: TROUBLES[name]() if number in (1, 3, 4) else None)
    server.health = [TROUBLES[name](), TROUBLES[name]()]
    assert asks(server, batch_size=4).score(PICTURES, PROMPTS) == [Score(value) for value in SUMS]
    assert len(server.asked) == 3 + 3 and {tuple(a) for a in server.asked} == {
        tuple("0123"),
        tuple("4567"),
        tuple("89"),
    }


def test_an_answer_that_was_lost_is_asked_for_again_and_counted_once():
    class Lossy(Faulty):
        def __call__(self, request: httpx2.Request) -> httpx2.Response:
            answer = super().__call__(request)
            if len(self.asked) in (1, 2):  # it was scored, and the connection broke
                raise httpx2.ReadError("broken")
            return answer

    server = Lossy()
    assert values(asks(server).score(PICTURES, PROMPTS)) == SUMS
    assert len(server.asked) == 3


def test_trouble_that_stays_costs_the_pictures_of_its_request_alone():
    def fault(number: int, items: list[dict[str, Any]]) -> Answer:
        return httpx2.Response(500, json={"detail": "no memory\nleft"}) if items[0]["prompt"] == "4" else None

    scores = asks(Faulty(fault), batch_size=4, patience=0.1).score(PICTURES, PROMPTS)
    assert values(scores) == [None if 4 <= i < 8 else SUMS[i] for i in range(10)]
    assert scores[4].error == "reward server at http://server:8000: 500 no memory left" and scores[0].error is None


def test_trouble_that_stays_is_given_up_while_others_are_answered(monkeypatch):
    monkeypatch.setattr("progrpo.rewards.remote._LONGEST_WAIT", 0.01)
    times: list[float] = []

    def fault(number: int, items: list[dict[str, Any]]) -> Answer:
        if items[0]["prompt"] == "0":
            times.append(time.monotonic())
            return text(500)
        time.sleep(0.05)
        return None

    many = np.tile(PICTURES, (3, 1, 1, 1))
    scores = asks(Faulty(fault), batch_size=1, patience=0.1).score(many, [Prompt(f"{i}") for i in range(30)])
    assert values(scores) == [None, *SUMS[1:], *SUMS, *SUMS]
    assert times[-1] - times[0] < 0.3  # the others took 0.5 s


def test_a_server_that_dies_costs_all_pictures_but_no_more_time_than_one_request():
    server, many = Faulty(lambda number, items: httpx2.ConnectError("connection refused")), [Prompt("a")] * 60
    reward = asks(server, batch_size=1, patience=0.2)
    start = time.monotonic()
    scores = reward.score(np.tile(PICTURES, (6, 1, 1, 1)), many)
    assert 0.05 < time.monotonic() - start < 0.7  # and not 15 times as long
    assert {s.error for s in scores} == {"reward server at http://server:8000: ConnectError: connection refused"}
    server.fault = lambda number, items: None
    assert values(reward.score(PICTURES, PROMPTS)) == SUMS


def test_patience_begins_anew_when_the_server_is_back():
    failed: set[str] = set()

    def fault(number: int, items: list[dict[str, Any]]) -> Answer:
        prompt = items[0]["prompt"]
        if prompt in ("0", "9") and prompt not in failed:
            failed.add(prompt)
            return text(500)
        time.sleep(0.1)
        return None

    start = time.monotonic()
    assert values(asks(Faulty(fault), batch_size=1, patience=0.15).score(PICTURES, PROMPTS)) == SUMS
    assert time.monotonic() - start > 0.25  # "9" failed when "0" was long answered


def test_waiting_grows_and_heeds_what_the_server_says():
    times: list[float] = []

    def fault(number: int, items: list[dict[str, Any]]) -> Answer:
        times.append(time.monotonic())
        return text(503, **{"Retry-After": "1"}) if number == 1 else text(503) if number < 9 else None

    assert values(asks(Faulty(fault)).score(PICTURES, PROMPTS)) == SUMS
    pauses = np.diff(times)
    assert pauses[0] >= 1
    assert all(0.001 * 2**n <= pause for n, pause in enumerate(pauses)) and pauses[1] < 0.1


@pytest.mark.parametrize("wrong", ["soon", "-5", "1e9", "²", "Wed, 21 Oct 2099 07:28:00 GMT"])
def test_a_wait_that_is_no_number_of_seconds_is_not_heeded(wrong):
    server = Faulty(lambda number, items: text(503, **{"Retry-After": wrong.encode()}) if number == 1 else None)
    assert values(asks(server, patience=5.0).score(PICTURES, PROMPTS)) == SUMS


def test_a_wait_beyond_its_patience_is_not_begun():
    server = Faulty(lambda number, items: text(503, **{"Retry-After": "3600"}))
    start = time.monotonic()
    assert values(asks(server).score(PICTURES, PROMPTS)) == [None] * 10
    assert time.monotonic() - start < 5


def test_closing_ends_the_wait():
    reward = asks(Faulty(lambda number, items: text(503, **{"Retry-After": "15"})))
    scores: list[Score] = []
    asking = threading.Thread(target=lambda: scores.extend(reward.score(PICTURES, PROMPTS)))
    asking.start()
    time.sleep(0.1)
    start = time.monotonic()
    reward.close()
    asking.join(5)
    assert time.monotonic() - start < 4 and not asking.is_alive() and values(scores) == [None] * 10
    assert reward._client.is_closed


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(server: Callable[[httpx2.Request], httpx2.Response], prompts: Sequence[Prompt] = PROMPTS) -> str:
    with pytest.raises(Refusal) as error:
        asks(server, batch_size=4, patience=0.05).score(PICTURES, prompts)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 302])
def test_what_asking_again_cannot_mend_is_refused_with_the_servers_sentence(status):
    response = httpx2.Response(status, json={"detail": "because\nof this"})
    server = Faulty(lambda number, items: response)
    assert refused(server) == f"reward 'sum': the server at http://server:8000 says {status} because of this"
    assert len(server.asked) <= 3
    server = Faulty()
    server.health = [response]
    assert f"says {status} because of this" in refused(server) and not server.asked


def health(**fields: Any) -> Faulty:
    server = Faulty()
    server.health = [httpx2.Response(200, json=fields)]
    return server


def test_what_a_server_says_is_a_short_line_that_drives_no_terminal():
    server = Faulty(lambda number, items: httpx2.Response(422, json={"detail": "\x1b[31mred\n" + "x" * 10**6}))
    with pytest.raises(Refusal, match=r"says 422 \\x1b\[31mred x+$") as refused:
        asks(server).score(PICTURES, PROMPTS)
    assert len(str(refused.value)) < 1200


def test_a_server_of_something_else_is_refused_before_any_picture_is_sent():
    assert "gives 'other'" in refused(health(protocol=1, reward="other"))
    assert "speaks protocol 2 and this progrpo protocol 1" in refused(health(protocol=2, reward="sum"))
    assert "is no reward server" in refused(health(status="fine"))
    server = Faulty()
    server.health = [text(200), httpx2.Response(200, json=[1])]
    assert "is no reward server" in refused(server) and "is no reward server" in refused(server)
    assert not server.asked


def test_no_server_is_refused_with_the_command_that_starts_one():
    server = Faulty()
    server.health = [httpx2.ConnectError("connection refused")] * 1000
    message = refused(server)
    assert message == (
        "reward 'sum': no server answers at http://server:8000 (ConnectError: connection refused);"
        " start one: progrpo serve-reward sum"
    )


def test_a_refusal_of_the_reward_is_one_here():
    class Picky(Sums):
        def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
            raise Refusal("these prompts have no column 'x'")

    with served(Picky()) as reward, pytest.raises(Refusal, match="says 422 these prompts have no column 'x'"):
        reward.score(PICTURES, PROMPTS)


def test_the_token_of_the_environment_is_sent(monkeypatch):
    seen = []

    def server(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.headers.get("Authorization"))
        return httpx2.Response(200, json=HEALTH)

    for token, header in (("s3cret\n", "Bearer s3cret"), ("", None)):
        monkeypatch.setenv("PROGRPO_REWARD_TOKEN", token)
        reward = RemoteReward.make(RewardTerm("sum", url="http://server:8000"))
        reward._client._transport = httpx2.MockTransport(server)
        reward._meet()
        assert seen.pop() == header


@pytest.mark.parametrize("token", ["geheim-ä", "two\nlines", "bell\a"])
def test_a_token_that_no_header_holds_is_refused_on_both_sides(token, monkeypatch):
    monkeypatch.setenv("PROGRPO_REWARD_TOKEN", token)
    with pytest.raises(Refusal, match=r"^PROGRPO_REWARD_TOKEN has characters that no token has; set it anew$"):
        RemoteReward.make(RewardTerm("sum", url="http://server:8000"))
    with pytest.raises(Refusal, match="PROGRPO_REWARD_TOKEN has characters that no token has"):
        serve(RewardTerm("jpeg_compressibility"), "127.0.0.1", 0, Limits())


def test_settings_reach_the_client():
    reward = RemoteReward.make(RewardTerm("sum", url="https://server/base", timeout=7, batch_size=5))
    assert (reward._batch_size, reward._client.timeout) == (5, httpx2.Timeout(7))
    assert str(reward._client.base_url).startswith("https://server/base")
    plain = RemoteReward.make(RewardTerm("sum", url="http://server"))
    assert (plain._batch_size, plain._client.timeout) == (16, httpx2.Timeout(60))


@pytest.mark.parametrize(
    ("option", "term"),
    [
        ("model", RewardTerm("sum", url="http://server", model="other")),
        ("device", RewardTerm("sum", url="http://server", device="cuda:1")),
        ("dtype", RewardTerm("sum", url="http://server", dtype="float16")),
        ("processes", RewardTerm("sum", url="http://server", processes=2)),
    ],
)
def test_what_the_server_decides_is_refused_here(option, term):
    with pytest.raises(Refusal, match=f"^reward 'sum': its server scores, so {option} would change nothing here"):
        load_reward(term)


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "server", "ftp://server", "http://", "http://server:port", "//x"]
)
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(Refusal, match="must be such as http://127"):
        RemoteReward.make(RewardTerm("sum", url=url))


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [object(), {1, 2}, np.float32(1), float("nan"), [{"x": b"y"}]], ids=lambda value: type(value).__name__
)
def test_a_column_that_is_no_json_is_refused_by_its_name(wrong):
    prompts = [Prompt("a", {"fine": 1, "mine": wrong if i == 6 else None}) for i in range(10)]
    assert "reward 'sum': the column 'mine' cannot be sent to a server" in refused(Faulty(), prompts)


def test_every_request_names_its_reward_and_protocol():
    def server(request: httpx2.Request) -> httpx2.Response:
        if request.url.path != "/health":
            body = json.loads(request.content)
            assert (body["version"], body["reward"]) == (1, "sum")
        return answers(request)

    answers = Faulty()
    assert values(asks(server).score(PICTURES, PROMPTS)) == SUMS


def test_a_column_that_a_prompt_lacks_is_said_before_a_picture_is_sent():
    def takes_row(images: Any, prompts: Any, row: Any, note: Any = None) -> list[float]:
        return row

    with served(FunctionReward(takes_row)) as reward:
        reward.check(PROMPTS)
        with pytest.raises(Refusal, match="reward 'sum' takes 'row', but the prompt 'bare' has no column of that name"):
            reward.check([*PROMPTS, Prompt("bare")])
    early = Faulty()
    early.health.append(httpx2.Response(200, json=HEALTH | {"columns": 3}))
    asks(early).check([Prompt("bare")])


def test_every_request_has_every_column():
    seen: list[dict[str, Any]] = []

    def fault(number: int, items: list[dict[str, Any]]) -> None:
        seen.extend(item["columns"] for item in items)

    prompts = [Prompt("a", {"x": 1} if i == 0 else {"y": [i]} if i == 9 else {}) for i in range(10)]
    asks(Faulty(fault), batch_size=1).score(PICTURES, prompts)
    assert sorted(seen, key=str) == sorted(
        ({"x": 1 if i == 0 else None, "y": [9] if i == 9 else None} for i in range(10)), key=str
    )


# --- answers that are none --------------------------------------------------------------------------------------------


def replies(change: Callable[[list[dict[str, Any]]], Any]) -> list[Score]:
    """The scores of the second request where its answer is changed so."""

    def fault(number: int, items: list[dict[str, Any]]) -> Answer:
        if items[0]["prompt"] != "5":
            return None
        return httpx2.Response(200, content=json.dumps(change([scored(item) for item in items])).encode())

    scores = asks(Faulty(fault), batch_size=5).score(PICTURES, PROMPTS)
    assert values(scores[:5]) == SUMS[:5]
    return scores[5:]


WRONG: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "too few": lambda scores: {"scores": scores[:-1]},
    "too many": lambda scores: {"scores": [*scores, scores[0]]},
    "none": lambda scores: {"scores": []},
    "another order": lambda scores: {"scores": scores[::-1]},
    "one twice": lambda scores: {"scores": [*scores[:4], scores[0]]},
    "no ids": lambda scores: {"scores": [{"value": 1.0}] * 5},
    "no scores": lambda scores: {"answer": 1},
    "numbers": lambda scores: {"scores": [1.0] * 5},
    "a list": lambda scores: scores,
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_of_another_length_order_or_kind_is_refused_at_once(name):
    with pytest.raises(WrongAnswer, match=r"^reward 'sum': the server at http://server:8000 .*must give ") as refused:
        replies(WRONG[name])
    assert "\n" not in str(refused.value)


def changed(value: Any) -> list[Score]:
    """The scores of a request where one score has that value."""
    return replies(lambda scores: {"scores": [s | {"value": value} if s["id"] == 2 else s for s in scores]})


@pytest.mark.parametrize("value", ["0.5", True, [1.0], {}], ids=str)
def test_a_value_of_another_type_is_refused_at_once(value):
    with pytest.raises(WrongAnswer, match=r"gives .* for a score; it must give a number, or null and an error$"):
        changed(value)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), 10**400], ids=str)
def test_a_value_that_is_no_number_is_missing(value):
    scores = changed(value)
    assert values(scores) == [None if i == 2 else SUMS[5 + i] for i in range(5)]
    assert scores[2].error is not None and scores[2].error.startswith("the server gave ")


@pytest.mark.parametrize("answer", [[1.0], [[0.5], [0.5]], "0.5", 0.5, {"score": 0.5}])
def test_a_served_function_that_answers_wrongly_is_refused_here_and_asked_once(answer):
    asked = []

    def wrong(images: Any, prompts: Any) -> Any:
        asked.append(len(images))
        return answer

    with (
        served(FunctionReward(wrong), batch_size=2) as reward,
        pytest.raises(Refusal, match=r"wrong returned .*; return"),
    ):
        RetryingReward(reward, sleep=lambda seconds: None).score(PICTURES[:2], PROMPTS[:2])
    assert asked == [2]


def test_a_verdict_that_is_none_is_left_out():
    replied = replies(
        lambda scores: {"scores": [s | {"passed": p} for s, p in zip(scores, [1, "x", True, False, None], strict=True)]}
    )
    assert [s.passed for s in replied] == [None, None, True, False, None]
