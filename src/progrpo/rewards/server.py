"""The server of a reward for other machines, over HTTP. Its client is RemoteReward.

    POST /v1/score     {"version": 1, "reward": NAME, "items": [
                           {"id": 0, "png": BASE64, "prompt": TEXT, "columns": {}, "image": BASE64}, ...]}
        answers        {"version": 1, "reward": NAME, "scores": [
                           {"id": 0, "value": 0.5, "passed": null, "error": null}, ...]}
    GET /health        {"status": "ok", "reward": NAME, "version": ..., "protocol": 1, "requests": ..., ...}
    GET /openapi.json  the schema of both

A server keeps nothing of a request that it has answered.
"""

from __future__ import annotations

import asyncio
import base64
import math
import sys
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, JsonValue, field_validator

from progrpo import __version__
from progrpo.environment import is_loopback, listening_socket
from progrpo.messages import raised
from progrpo.prompts.pictures import IMAGE_COLUMN
from progrpo.rewards.base import Refusal, Reward, Score
from progrpo.rewards.batching import Batches, Result
from progrpo.rewards.gate import Gate, Room
from progrpo.rewards.load import load_reward
from progrpo.rewards.remote import PROTOCOL, TOKEN, token_of_environment
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

_LARGEST = 4096 * 4096  # pixels of a picture
_BYTES_PER_PIXEL = 7  # 4 in Pillow and 3 in the array


@dataclass(frozen=True)
class Limits:
    """The size of a request. Requests under way hold 16 times `max_megabytes` together at most."""

    max_pictures: int = 64
    max_megabytes: int = 64


def serve(term: RewardTerm, host: str, port: int, limits: Limits) -> None:
    """Serve a reward until the process is asked to end. What is being scored then is still answered.

    The reward's weights are loaded before the port opens. ValueError, one sentence, where the server cannot start.
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
    with listening_socket(host, port) as listener:
        where = f"[{host}]" if ":" in host else host
        secret = "with a token" if token else "no token"
        print(f"reward {term.name} at http://{where}:{listener.getsockname()[1]} ({secret})", flush=True)
        uvicorn.Server(config).run(sockets=[listener])


# --- requests and answers ---------------------------------------------------------------------------------------------


class Item(BaseModel, use_attribute_docstrings=True):
    png: str
    """Base64 of an 8-bit RGB PNG."""
    prompt: str
    columns: dict[str, JsonValue] = {}
    image: str | None = None
    """The prompt's source picture in the same form, where it has one. The reward finds it in the column `image`."""
    id: int | None = None
    """A number that comes back with the score."""

    @field_validator("columns")
    @classmethod
    def _refuse_path(cls, columns: dict[str, JsonValue]) -> dict[str, JsonValue]:
        # in a column it would be a path, and this machine would open its own file of that name
        if IMAGE_COLUMN in columns:
            raise ValueError(f"a source picture is sent as `{IMAGE_COLUMN}` beside the columns")
        return columns


class Question(BaseModel, use_attribute_docstrings=True):
    version: Literal[1]
    reward: str | None = None
    """The reward that is asked for. Another one than the server's is refused."""
    items: list[Item]


class Answer(BaseModel, use_attribute_docstrings=True):
    id: int | None = None
    value: float | None = None
    """The score; null where it is missing, with an `error`."""
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
    """The columns that every prompt must have."""
    requests: int = 0
    """The number of requests answered with scores."""
    pictures: int = 0
    """The number of pictures in these requests."""
    failures: int = 0
    """The number of pictures without a score."""
    waiting: int = 0
    """The number of pictures that wait now."""
    uptime: float = 0.0
    """The time since the start, in seconds."""


def make_app(term: RewardTerm, reward: Reward, token: str = "", limits: Limits = Limits()) -> FastAPI:
    """The server of one reward. Where there is no room for a request, the client is asked to wait."""
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
        opened = await run_in_threadpool(lambda: [_open_both(item) for item in items])
        images = [image for pair in opened if not isinstance(pair, Score) for image in pair if image is not None]
        size = sum(_BYTES_PER_PIXEL * image.width * image.height for image in images)
        if size > 4 * max_bytes:
            raise HTTPException(413, f"pictures that need {size >> 20} MB in one request; send fewer at a time")
        with room.held(size):
            decoded = await run_in_threadpool(lambda: list(map(_decode, items, opened)))
            readable = [pair for pair in decoded if not isinstance(pair, Score)]
            futures = batches.submit([picture for picture, _ in readable], [prompt for _, prompt in readable])
            answers = iter(await _unless_gone(futures, request))
        results = [pair if isinstance(pair, Score) else next(answers) for pair in decoded]
        refusal = next((result for result in results if isinstance(result, Refusal)), None)
        if refusal is not None:
            raise HTTPException(422, _one_line(refusal))
        scores = [_answer(item, s) for item, s in zip(items, results, strict=True) if isinstance(s, Score)]
        counts.requests += 1
        counts.pictures += len(scores)
        counts.failures += sum(s.value is None for s in scores)
        return Answers(reward=name, scores=scores)

    return app


async def _in_one_sentence(request: Request, error: Exception) -> JSONResponse:
    """The answer to a body that is not valid. FastAPI's own would repeat the body."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return JSONResponse({"detail": _one_line(f"{where}: {first['msg']}")}, 422)


def _answer(item: Item, score: Score) -> Answer:
    number = score.number()
    if math.isnan(number):  # JSON has none
        return Answer(id=item.id, passed=score.passed, error=_one_line(score.error or f"the reward gave {score.value}"))
    return Answer(id=item.id, value=number, passed=score.passed, error=score.error and _one_line(score.error))


def _one_line(value: object) -> str:
    """A text as one line that JSON can hold."""
    return " ".join(str(value).encode(errors="backslashreplace").decode().split())[:1000]


async def _unless_gone(futures: Sequence[Future[Result]], request: Request) -> list[Result]:
    """Wait for the results. If the client goes away first, what waits is not scored."""
    answers = asyncio.gather(*map(asyncio.wrap_future, futures))
    gone = asyncio.create_task(_gone(request))
    first: set[asyncio.Future[list[Result]] | asyncio.Future[None]] = {answers, gone}
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
"""A picture and its prompt's source, or the missing score where one of them cannot be read."""


def _open_both(item: Item) -> _Opened:
    """Open the pictures of an item. No more than their headers are read."""
    image = _open(item.png)
    if isinstance(image, Score):
        return image
    if item.image is None:
        return image, None
    source = _open(item.image)
    return source if isinstance(source, Score) else (image, source)


def _open(png: str) -> Image.Image | Score:
    try:
        image = Image.open(BytesIO(base64.b64decode(png, validate=True)), formats=["PNG"])
    except Exception as error:  # Pillow raises many kinds
        return Score(None, error=f"the picture is no PNG in base64: {error}")
    if image.mode != "RGB":
        return Score(None, error=f"the picture is {image.mode} and must be RGB of 8 bits")
    if image.has_transparency_data:
        return Score(None, error="the picture has a transparent colour and must be RGB without one")
    if image.width * image.height > _LARGEST:
        return Score(None, error=f"the picture has {image.width} x {image.height} pixels; {_LARGEST} are allowed")
    return image


def _decode(item: Item, opened: _Opened) -> tuple[np.ndarray, Prompt] | Score:
    if isinstance(opened, Score):
        return opened
    image, source = opened
    try:
        pixels = np.asarray(image)
        if source is not None:
            source.load()
    except Exception as error:
        return Score(None, error=f"the picture is damaged: {error}")
    sources = {IMAGE_COLUMN: source} if IMAGE_COLUMN in item.model_fields_set else {}
    return pixels, Prompt(item.prompt, {**item.columns, **sources})
