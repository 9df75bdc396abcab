"""A reward for other machines, over HTTP: pictures as PNG in JSON, a score for each back. Its client is RemoteReward.

    POST /v1/score  {"version": 1, "reward": NAME, "items": [{"id": 0, "png": BASE64, "prompt": TEXT, "columns": {}, "image": BASE64}, ...]}
                    {"version": 1, "reward": NAME, "scores": [{"id": 0, "value": 0.5, "passed": null, "error": null}, ...]}
    GET /health     {"status": "ok", "reward": NAME, "version": ..., "protocol": 1, "requests": ..., ...}
    GET /openapi.json, their schema

A server keeps nothing of a request that it has answered.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import math
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, JsonValue, field_validator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from progrpo import __version__
from progrpo.environment import is_loopback
from progrpo.messages import raised
from progrpo.prompts.pictures import COLUMN
from progrpo.rewards.base import Refusal, Reward, Score, WrongAnswer
from progrpo.rewards.load import load_reward
from progrpo.rewards.remote import PROTOCOL, TOKEN, token_of_environment
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

_LARGEST = 4096 * 4096  # pixels of a picture
_BYTES_A_PIXEL = 7  # 4 of Pillow's and 3 of the array
_STALLED = 60.0  # seconds without a byte of a body that has begun
_HANGING = 10.0  # seconds that the reward has for its last batches when the server ends


@dataclass(frozen=True)
class Limits:
    """The size of a request. Requests under way hold 16 times `max_megabytes` together at most."""

    max_pictures: int = 64
    max_megabytes: int = 64


def serve(term: RewardTerm, host: str, port: int, limits: Limits) -> None:
    """Serve a reward until the process is told to end; what is being scored then is still answered.

    ValueError, one sentence, where it cannot start. The reward's weights are loaded before the port opens.
    """
    token = token_of_environment()
    if not token and not is_loopback(host):
        raise ValueError(f"{host} can be reached from other machines: set {TOKEN} to a secret that clients must know")
    reward = load_reward(term)
    if reward.groupwise:
        raise ValueError(
            f"reward {term.name!r} compares the pictures of a group, and a server does not know which these are"
        )
    if reward.video:
        raise ValueError(f"reward {term.name!r} scores whole videos, and a server is sent pictures")
    reward.score(np.zeros((0, 8, 8, 3), np.uint8), [])
    app = make_app(term, reward, token, limits)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=75, ws="none", lifespan="on")
    with _listening(host, port) as listener:
        where = f"[{host}]" if ":" in host else host
        secret = "with a token" if token else "no token"
        print(f"reward {term.name} at http://{where}:{listener.getsockname()[1]} ({secret})", flush=True)
        uvicorn.Server(config).run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen at {host}, port {port}: {error}") from None


# --- what is sent and answered ----------------------------------------------------------------------------------------


class Item(BaseModel, use_attribute_docstrings=True):
    png: str
    """Base64 of an 8-bit RGB PNG."""
    prompt: str
    columns: dict[str, JsonValue] = {}
    image: str | None = None
    """The prompt's source picture likewise, where it has one; the reward finds it in the column of that name."""
    id: int | None = None
    """Comes back with the score."""

    @field_validator("columns")
    @classmethod
    def _names_no_file(cls, columns: dict[str, JsonValue]) -> dict[str, JsonValue]:
        # there it would be a path, and the file of that name be opened on this machine
        if COLUMN in columns:
            raise ValueError(f"a source picture is sent as `{COLUMN}` beside the columns")
        return columns


class Question(BaseModel, use_attribute_docstrings=True):
    version: Literal[1]
    reward: str | None = None
    """Refused if it is another than the server's."""
    items: list[Item]


class Answer(BaseModel, use_attribute_docstrings=True):
    id: int | None = None
    value: float | None = None
    """None where there is no score; `error` says why."""
    passed: bool | None = None
    error: str | None = None


class Answers(BaseModel):
    version: Literal[1] = PROTOCOL
    reward: str
    scores: list[Answer]


class Health(BaseModel, use_attribute_docstrings=True):
    status: Literal["ok"] = "ok"
    reward: str
    version: str = __version__
    protocol: Literal[1] = PROTOCOL
    columns: list[str] = []
    """That the reward needs of every prompt."""
    requests: int = 0
    """That were answered with scores."""
    pictures: int = 0
    """Of these requests."""
    failures: int = 0
    """Pictures without a score."""
    waiting: int = 0
    """Pictures now."""
    uptime: float = 0.0
    """Seconds."""


def make_app(term: RewardTerm, reward: Reward, token: str = "", limits: Limits = Limits()) -> FastAPI:
    """The server of one reward. A request for which there is no room is told to wait."""
    name, max_bytes = term.name, limits.max_megabytes * 2**20
    batches = Batches(reward, term.network_batch_size)
    room = Room(16 * max_bytes)
    started = time.monotonic()
    counts = Health(reward=name, columns=list(reward.needed))

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(batches.close)
        try:
            await run_in_threadpool(reward.close)
        except Exception as error:
            print(f"progrpo: reward {name}: its close() failed: {raised(error)}", file=sys.stderr)

    app = FastAPI(title="progrpo reward server", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, token=token, room=room, max_bytes=max_bytes)
    app.add_exception_handler(RequestValidationError, _in_one_sentence)

    @app.get("/health")
    async def health() -> Health:
        return counts.model_copy(update={"waiting": batches.waiting, "uptime": time.monotonic() - started})

    @app.post("/v1/score")
    async def score(question: Question, request: Request) -> Answers:
        items = question.items
        if question.reward not in (None, name):
            raise HTTPException(422, f"this server gives the reward {name!r}, not {question.reward!r}")
        if len(items) > limits.max_pictures:
            raise HTTPException(
                413, f"{len(items)} pictures in one request; this server takes {limits.max_pictures} at most"
            )
        opened = await run_in_threadpool(lambda: [_opened_both(item) for item in items])
        there = [image for both in opened if not isinstance(both, Score) for image in both if image is not None]
        size = sum(_BYTES_A_PIXEL * image.width * image.height for image in there)
        if size > 4 * max_bytes:
            raise HTTPException(413, f"pictures that need {size >> 20} MB in one request; send fewer at a time")
        with room.held(size):
            decoded = await run_in_threadpool(lambda: list(map(_decoded, items, opened)))
            readable = [both for both in decoded if not isinstance(both, Score)]
            asked = batches.ask([picture for picture, _ in readable], [prompt for _, prompt in readable])
            answers = iter(await _unless_gone(asked, request))
        found = [both if isinstance(both, Score) else next(answers) for both in decoded]
        refusal = next((f for f in found if isinstance(f, Refusal)), None)
        if refusal is not None:
            raise HTTPException(422, _in_words(refusal))
        scores = [_answer(item, f) for item, f in zip(items, found, strict=True) if isinstance(f, Score)]
        counts.requests += 1
        counts.pictures += len(scores)
        counts.failures += sum(s.value is None for s in scores)
        return Answers(reward=name, scores=scores)

    return app


async def _in_one_sentence(request: Request, error: Exception) -> JSONResponse:
    """Where a body is not what it should be; the usual answer would repeat the body."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return JSONResponse({"detail": _in_words(f"{where}: {first['msg']}")}, 422)


def _answer(item: Item, score: Score) -> Answer:
    number = score.number()
    if math.isnan(number):  # JSON has none
        return Answer(id=item.id, passed=score.passed, error=_in_words(score.error or f"the reward gave {score.value}"))
    return Answer(id=item.id, value=number, passed=score.passed, error=score.error and _in_words(score.error))


def _in_words(told: object) -> str:
    """One line that JSON can hold."""
    return " ".join(str(told).encode(errors="backslashreplace").decode().split())[:1000]


async def _unless_gone(asked: Sequence[Future[_Found]], request: Request) -> list[_Found]:
    """The answers; if the client goes away first, what waits is not scored."""
    answers = asyncio.gather(*map(asyncio.wrap_future, asked))
    gone = asyncio.create_task(_gone(request))
    first: set[asyncio.Future[Any]] = {answers, gone}
    await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if not answers.done():
        answers.cancel()
        with suppress(asyncio.CancelledError):  # which asyncio would report as an error that nobody saw
            await answers
        raise HTTPException(499, "the client is gone")
    return answers.result()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- pictures ---------------------------------------------------------------------------------------------------------


_Opened = tuple[Image.Image, Image.Image | None] | Score


def _opened_both(item: Item) -> _Opened:
    """A picture and its prompt's source, of which no more than the headers were read, or the score that is missing for them."""
    image = _opened(item.png)
    if isinstance(image, Score) or item.image is None:
        return image if isinstance(image, Score) else (image, None)
    source = _opened(item.image)
    return source if isinstance(source, Score) else (image, source)


def _opened(png: str) -> Image.Image | Score:
    try:
        image = Image.open(BytesIO(base64.b64decode(png, validate=True)), formats=["PNG"])
    except Exception as error:  # Pillow's are of many kinds
        return Score(None, error=f"the picture is no PNG in base64: {error}")
    if image.mode != "RGB":
        return Score(None, error=f"the picture is {image.mode} and must be RGB of 8 bits")
    if image.has_transparency_data:
        return Score(None, error="the picture has a transparent colour and must be RGB without one")
    if image.width * image.height > _LARGEST:
        return Score(None, error=f"the picture has {image.width} x {image.height} pixels; {_LARGEST} are allowed")
    return image


def _decoded(item: Item, opened: _Opened) -> tuple[np.ndarray, Prompt] | Score:
    if isinstance(opened, Score):
        return opened
    image, source = opened
    try:
        pixels = np.asarray(image)
        if source is not None:
            source.load()
    except Exception as error:
        return Score(None, error=f"the picture is damaged: {error}")
    given = {COLUMN: source} if COLUMN in item.model_fields_set else {}
    return pixels, Prompt(item.prompt, {**item.columns, **given})


# --- batches ----------------------------------------------------------------------------------------------------------


_Found = Score | Refusal


@dataclass(frozen=True, eq=False)
class _Asked:
    picture_HWC: np.ndarray
    prompt: Prompt
    answer: Future[_Found]


class Batches:
    """One thread that calls the reward, with up to `batch_size` of what has come in meanwhile, from whichever requests.

    A batch is of one picture size and one set of columns. If it fails, each of its pictures is asked about alone, so that
    no request has to do with another's mistake; but for a WrongAnswer, which is the reward's own.
    """

    def __init__(self, reward: Reward, batch_size: int) -> None:
        self._reward, self._batch_size = reward, batch_size
        self._waiting: dict[Hashable, deque[_Asked]] = {}
        self._news, self._open = threading.Condition(), True
        self._thread = threading.Thread(target=self._work, name="reward", daemon=True)
        self._thread.start()

    def ask(self, pictures: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> list[Future[_Found]]:
        asked = [_Asked(*both, Future()) for both in zip(pictures, prompts, strict=True)]
        with self._news:
            for one in asked:
                kind = (one.picture_HWC.shape, frozenset(one.prompt.columns))
                self._waiting.setdefault(kind, deque()).append(one)
            self._news.notify()
        return [one.answer for one in asked]

    @property
    def waiting(self) -> int:
        with self._news:
            return sum(map(len, self._waiting.values()))

    def close(self) -> None:
        """Score what waits, and end. A reward that hangs is left to itself: nobody waits for it any more."""
        with self._news:
            self._open = False
            self._news.notify()
        self._thread.join(_HANGING)

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            self._score(batch)

    def _next(self) -> list[_Asked] | None:
        """What to score now; None where nothing waits or will."""
        with self._news:
            self._news.wait_for(lambda: self._waiting or not self._open)
            if not self._waiting:
                return None
            kind = next(iter(self._waiting))
            queue, batch = self._waiting.pop(kind), list[_Asked]()
            while queue and len(batch) < self._batch_size:
                one = queue.popleft()
                if one.answer.set_running_or_notify_cancel():
                    batch.append(one)
            if queue:
                self._waiting[kind] = queue  # behind the other kinds
            return batch

    def _score(self, batch: list[_Asked]) -> None:
        if not batch:
            return
        try:
            pictures_NHWC = np.stack([one.picture_HWC for one in batch])
            scores = [s.plain() for s in self._reward.score(pictures_NHWC, [one.prompt for one in batch])]
            if len(scores) != len(batch):
                raise WrongAnswer(f"the reward gave {len(scores)} scores for {len(batch)} pictures; return one each")
        except BaseException as error:  # of SystemExit too: this thread must go on, or no request is ever answered
            if len(batch) > 1 and not isinstance(error, WrongAnswer):
                for one in batch:
                    self._score([one])
                return
            failed = error if isinstance(error, Refusal) else Score(None, error=f"{type(error).__name__}: {error}")
            for one in batch:
                one.answer.set_result(failed)
        else:
            for one, score in zip(batch, scores, strict=True):
                one.answer.set_result(score)


# --- who may ask, and how much ----------------------------------------------------------------------------------------


class Room:
    """Bytes that all requests under way may hold. For one event loop."""

    def __init__(self, size: int) -> None:
        self._free = size

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        if size > self._free:
            raise HTTPException(503, "the server has too much to do", {"Retry-After": "1"})
        self._free -= size
        try:
            yield
        finally:
            self._free += size


class Gate:
    """Lets requests in that have the token, while there is room, as far as a body may go: before and while it is read."""

    def __init__(self, app: ASGIApp, token: str, room: Room, max_bytes: int) -> None:
        self._app, self._room, self._max_bytes = app, room, max_bytes
        self._secret = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._authorise(headers)
            with self._room.held(self._size(headers)):
                await self._app(scope, self._limited(receive), send)
        except HTTPException as refused:
            response = await http_exception_handler(Request(scope), refused)
            await response(scope, receive, send)

    def _authorise(self, headers: Headers) -> None:
        scheme, _, secret = headers.get("Authorization", "").partition(" ")
        known = hmac.compare_digest(secret.strip().encode("latin-1"), self._secret)
        if self._secret and not (known and scheme.lower() == "bearer"):
            raise HTTPException(401, f"the token is missing or wrong; set {TOKEN}", {"WWW-Authenticate": "Bearer"})

    def _size(self, headers: Headers) -> int:
        """Of the body at most."""
        declared = headers.get("Content-Length")
        size = self._max_bytes if declared is None else int(declared)
        if size > self._max_bytes:
            raise self._too_large()
        return size if declared or "Transfer-Encoding" in headers else 0

    def _limited(self, receive: Receive) -> Receive:
        read, whole = 0, False

        async def limited() -> Message:
            nonlocal read, whole
            try:
                async with asyncio.timeout(None if whole else _STALLED):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"no byte of the body for {_STALLED:g} s") from None
            read, whole = read + len(message.get("body", b"")), not message.get("more_body", False)
            if read > self._max_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"a request of more than {self._max_bytes >> 20} MB; send fewer pictures at a time")
