"""The client of a reward on another machine, which `progrpo serve-reward` serves."""

from __future__ import annotations

import base64
import json
import math
import os
import random
import ssl
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import Final, NotRequired, Self, TypedDict

import httpx2
import numpy as np
from PIL import Image

from progrpo.environment import on_the_way, proxy_for
from progrpo.prompts.pictures import IMAGE_COLUMN, open_pictures
from progrpo.rewards.base import Refusal, Reward, Score, WrongAnswer, require_columns
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

PROTOCOL: Final = 1
"""The version of requests and answers. A server of another version is refused."""
TOKEN = "PROGRPO_REWARD_TOKEN"
"""The environment variable with the bearer token, for the server and its clients."""

_AT_ONCE = 4  # requests under way: the server scores one while the next ones are encoded and sent
_PATIENCE = 60.0  # seconds
_FIRST_WAIT = 0.25
_LONGEST_WAIT = 8.0
_LARGEST = 2**24  # bytes of an answer


class RemoteReward(Reward):
    """The reward `name` of a server. Pictures are sent as PNG, `batch_size` in a request, a few requests at a time.

    A request is repeated, after growing waits, where no server answers in time or the server is in trouble (408, 429,
    5xx). So a server may be restarted under a run. After `patience` seconds without any answer, the scores of the
    request are missing. Where a retry would not help, it is a Refusal: a server of another reward, a wrong token, too
    many pictures, prompts that the reward cannot work with.

    Each picture is in one request, and the first complete answer counts. A server that was killed may score pictures
    twice; they count once here.
    """

    def __init__(self, name: str, client: httpx2.Client, batch_size: int = 16, patience: float = _PATIENCE) -> None:
        """`client` has the server's URL as its base."""
        self._name = name
        self._client = client
        self._batch_size = batch_size
        self._patience = patience
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix=f"reward-{name}")
        self._lock = threading.Lock()
        self._met = False
        self._closed = threading.Event()
        self._server = f"{client.base_url}{on_the_way(str(client.base_url))}"

    @classmethod
    def make(cls, term: RewardTerm) -> Self:
        name = term.name
        if not _is_http(term.url):
            raise Refusal(
                f"reward {name!r}: its server's url is {term.url!r}, and must be such as http://127.0.0.1:8000"
            )
        token = token_of_environment()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        client = make_client(name, term.url, term.answer_timeout, _AT_ONCE, headers)
        return cls(name, client, term.network_batch_size)

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        if not len(prompts):
            return []
        self._meet()
        # a reward sees which columns there are: a request must not lack one because its own prompts do
        names = sorted({name for prompt in prompts for name in prompt.columns} - {IMAGE_COLUMN})
        columns = [{name: p.columns.get(name) for name in names} for p in prompts]
        batches = [slice(i, i + self._batch_size) for i in range(0, len(prompts), self._batch_size)]
        outage = _Outage()  # shared, so that many requests wait for a server that is down no longer than one
        requests = [
            self._pool.submit(self._request, pictures_NHWC[batch], prompts[batch], columns[batch], outage)
            for batch in batches
        ]
        try:
            return [score for request in requests for score in request.result()]
        except BaseException:  # refused or interrupted: the rest need not be sent
            for request in requests:
                request.cancel()
            raise

    def check(self, prompts: Sequence[Prompt]) -> None:
        self._meet()
        require_columns(repr(self._name), self.needed, prompts)

    def close(self) -> None:
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    # --- requests -----------------------------------------------------------------------------------------------------

    def _meet(self) -> None:
        """Refuse a URL at which no server of this reward answers. The server is asked once."""
        with self._lock:
            if self._met:
                return
            try:
                health = _object(self._send("GET", "/health", outage=_Outage()))
            except _NoAnswer as error:
                raise Refusal(
                    f"reward {self._name!r}: no server answers at {self._server} ({error});"
                    f" start one: progrpo serve-reward {self._name}"
                ) from None
            if "protocol" not in health:
                raise Refusal(f"reward {self._name!r}: what answers at {self._server} is no reward server")
            if health["protocol"] != PROTOCOL:
                raise Refusal(
                    f"reward {self._name!r}: the server at {self._server} speaks protocol {health['protocol']}"
                    f" and this progrpo protocol {PROTOCOL}; install the same version on both"
                )
            if health.get("reward") != self._name:
                raise Refusal(f"reward {self._name!r}: the server at {self._server} gives {health.get('reward')!r}")
            columns = health.get("columns")  # which servers of earlier versions do not send
            self.needed = [str(name) for name in columns] if isinstance(columns, list) else []
            self._met = True

    def _request(
        self,
        pictures_NHWC: np.ndarray,
        prompts: Sequence[Prompt],
        columns: Sequence[dict[str, object]],
        outage: _Outage,
    ) -> list[Score]:
        items = [
            _Item(id=i, png=_png(picture), prompt=prompt.text, columns=values)
            for i, (picture, prompt, values) in enumerate(zip(pictures_NHWC, prompts, columns, strict=True))
        ]
        if any(IMAGE_COLUMN in prompt.columns for prompt in prompts):
            sources = open_pictures([prompt.columns.get(IMAGE_COLUMN) for prompt in prompts])
            for item, source in zip(items, sources, strict=True):
                item["image"] = None if source is None else _png(np.asarray(source))
        try:
            response = self._send("POST", "/v1/score", self._json(items), outage=outage)
            return _scores(response, len(items))
        except WrongAnswer as error:
            raise WrongAnswer(f"reward {self._name!r}: the server at {self._server} {error}") from None
        except _NoAnswer as error:
            return [Score(None, error=f"reward server at {self._server}: {error}")] * len(items)

    def _json(self, items: list[_Item]) -> bytes:
        try:
            return json.dumps({"version": PROTOCOL, "reward": self._name, "items": items}, allow_nan=False).encode()
        except (TypeError, ValueError):
            columns = [column for item in items for column in item["columns"].items()]
            name, value = next((name, value) for name, value in columns if not _is_json(value))
            raise Refusal(
                f"reward {self._name!r}: the column {name!r} cannot be sent to a server, for {value!r:.60} is not JSON"
            ) from None

    def _send(self, method: str, path: str, body: bytes | None = None, *, outage: _Outage) -> httpx2.Response:
        """Send a request until its answer has status 200. _NoAnswer after `patience`, Refusal where a retry cannot
        help.
        """
        headers = {"Content-Type": "application/json"} if body else None
        deadline = math.inf
        wait = _FIRST_WAIT
        while True:
            retry_after = 0.0
            try:
                response = send(self._client, method, path, body, headers)
            except httpx2.RequestError as error:
                trouble = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    outage.since = math.inf
                    return response
                trouble = f"{response.status_code} {_detail(response)}"
                if response.status_code < 500 and response.status_code not in (408, 429):
                    raise Refusal(f"reward {self._name!r}: the server at {self._server} says {trouble}")
                retry_after = _retry_after(response)
            now = time.monotonic()
            outage.since = min(outage.since, now)
            deadline = min(deadline, outage.since + self._patience)
            pause = max(wait * random.uniform(0.5, 1), retry_after)
            if now + pause > deadline or self._closed.wait(pause):
                raise _NoAnswer(trouble)
            wait = min(2 * wait, _LONGEST_WAIT)


@dataclass
class _Outage:
    """The time since when no request of one call of `score` was answered."""

    since: float = math.inf


class _NoAnswer(Exception):
    """The trouble for which a request has no answer."""


class _Item(TypedDict):
    """A picture of a request, as JSON."""

    id: int
    png: str
    prompt: str
    columns: dict[str, object]
    image: NotRequired[str | None]


def make_client(reward: str, url: str, timeout: float, connections: int, headers: Mapping[str, str]) -> httpx2.Client:
    """Make a client whose connections stay open. Refusal where the environment does not let it reach the server.

    A server on this machine is asked without a proxy, and one without TLS needs no certificates.
    """
    base = httpx2.URL(url)
    proxy = proxy_for(url)
    verify = True if base.scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    try:
        transport = httpx2.HTTPTransport(verify=verify, limits=limits, proxy=None if proxy is None else proxy.url)
    except (ImportError, OSError, ValueError, httpx2.InvalidURL) as error:
        reason = " ".join(str(error).split())
        raise Refusal(f"reward {reward!r}: {url}{on_the_way(url)} cannot be asked: {reason}") from error
    return httpx2.Client(base_url=base, headers=headers, timeout=timeout, transport=transport)


def send(
    client: httpx2.Client, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> httpx2.Response:
    """Send a request and read its answer whole. httpx2's errors also where the answer is too long, or does not end."""
    with client.stream(method, path, content=body, headers=headers) as response:
        deadline = time.monotonic() + (client.timeout.read or math.inf)
        content = bytearray()
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > _LARGEST:
                raise httpx2.ReadError(f"an answer of more than {_LARGEST >> 20} MB")
            if time.monotonic() > deadline:
                raise httpx2.ReadTimeout("an answer that does not end")
    kept = [(name, value) for name, value in response.headers.raw if name.lower() in (b"content-type", b"retry-after")]
    return httpx2.Response(response.status_code, headers=kept, content=bytes(content))


# --- requests and answers ---------------------------------------------------------------------------------------------


def token_of_environment() -> str:
    """The token of the environment, empty where there is none. Refusal where no header can hold it."""
    token = os.environ.get(TOKEN, "").strip()
    if not (token.isascii() and token.isprintable()):
        raise Refusal(f"{TOKEN} has characters that no token has; set it anew")
    return token


def _is_http(url: str) -> bool:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)


def _png(picture_HWC: np.ndarray) -> str:
    file = BytesIO()
    Image.fromarray(picture_HWC).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _object(response: httpx2.Response) -> dict[str, object]:
    """The JSON object of an answer, empty where it is none."""
    try:
        value = response.json()
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _detail(response: httpx2.Response) -> str:
    """The `detail` of an answer, or the start of its text, as one line."""
    detail = str(_object(response).get("detail") or response.text[:200] or response.reason_phrase)
    line = " ".join(detail.split())[:1000]
    return line if line.isprintable() else ascii(line)[1:-1]


def _retry_after(response: httpx2.Response) -> float:
    seconds = response.headers.get("Retry-After", "")
    return float(seconds) if seconds.isascii() and seconds.isdigit() else 0.0


def _scores(response: httpx2.Response, count: int) -> list[Score]:
    """The scores of `count` items, in order.

    _NoAnswer where the answer is no JSON, as a broken connection leaves it. WrongAnswer for other JSON.
    """
    try:
        data = response.json()
    except (ValueError, RecursionError):
        raise _NoAnswer("its answer is no JSON") from None
    answers = data.get("scores") if isinstance(data, dict) else None
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise WrongAnswer('answers without scores; it must give {"scores": [{"id": 0, "value": 0.5}, ...]}')
    if [answer.get("id") for answer in answers] != list(range(count)):
        raise WrongAnswer(
            f"gives {len(answers)} scores for {count} pictures; it must give one each, in their order, with the id of"
            " each"
        )
    return [_score(answer) for answer in answers]


def _score(answer: Mapping[str, object]) -> Score:
    value = answer.get("value")
    passed = answer.get("passed")
    error = answer.get("error")
    if not isinstance(value, int | float | None) or isinstance(value, bool):
        raise WrongAnswer(f"gives {value!r:.60} for a score; it must give a number, or null and an error")
    number = float(value) if value is not None and abs(value) <= sys.float_info.max else None
    if number is None and not error:
        error = f"the server gave {value!r:.60} for a score"
    return Score(number, passed if isinstance(passed, bool) else None, None if error is None else str(error))
