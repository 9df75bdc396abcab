"""Async rewards: one event loop for all their calls, in which they are also loaded and closed."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx2
import numpy as np
import pytest
import torch

from progrpo.rewards import loop
from progrpo.rewards.base import Refusal, Score
from progrpo.rewards.function import FunctionReward
from progrpo.rewards.mixture import Component, RewardMixture
from progrpo.rewards.retrying import RetryingReward
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

PICTURES = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1).repeat(3, axis=3)
PROMPTS = [Prompt(f"{i}") for i in range(6)]


def number_of(image: Any) -> float:
    return float(np.asarray(image)[0, 0, 0])


def numbers(reward: Any, times: int = 1) -> list[list[float | None]]:
    return [[s.value for s in reward.score(PICTURES, PROMPTS)] for _ in range(times)]


class Counted:
    """An async reward with one semaphore for all its calls, made before any loop runs; it counts its calls."""

    def __init__(self) -> None:
        self.semaphore, self.calls = asyncio.Semaphore(2), 0

    async def score(self, images: Any, prompts: Any) -> list[float]:
        self.calls += 1

        async def one(image: Any) -> float:
            async with self.semaphore:
                await asyncio.sleep(0.001)
                return number_of(image)

        return await asyncio.gather(*map(one, images))


def test_a_semaphore_made_once_holds_over_calls_rewards_and_their_threads():
    counted = Counted()
    patient = [RetryingReward(FunctionReward(counted), retries=0) for _ in range(2)]
    values: list[list[float | None]] = []
    threads = [threading.Thread(target=lambda r=r: values.extend(numbers(r, 3))) for r in patient]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert values == [[0, 1, 2, 3, 4, 5]] * 6 and counted.calls == 6


def test_a_client_of_open_connections_serves_every_call_and_reward_of_a_mixture():
    accepted = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(1)
        while head := await reader.readuntil(b"\r\n\r\n"):
            body = head.split()[1].rpartition(b"/")[2]
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))

    async def listens() -> Any:
        return await asyncio.start_server(answer, "127.0.0.1", 0)

    server = loop.finished(listens())
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    client = httpx2.AsyncClient(base_url=url, trust_env=False, limits=httpx2.Limits(max_connections=2))

    async def asks(images: Any, prompts: Any) -> list[float]:
        answers = await asyncio.gather(*(client.get(f"/{number_of(image):.0f}") for image in images))
        return [float(a.text) for a in answers]

    terms = [
        Component(RewardTerm(name), RetryingReward(FunctionReward(asks), retries=0)) for name in ("first", "second")
    ]
    mixture = RewardMixture(terms)
    for _ in range(3):
        assert mixture.score(PICTURES, PROMPTS, torch.zeros(6, dtype=torch.int64)).value_N.tolist() == [
            0,
            2,
            4,
            6,
            8,
            10,
        ]
    assert len(accepted) <= 2
    loop.finished(client.aclose())
    server.close()


class Whole:
    """Loaded, asked and closed in one loop, which a task of its own needs."""

    def __init__(self) -> None:
        self.events: list[str] = []

    async def load(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.task = asyncio.create_task(self.work())
        self.events.append("load")

    async def work(self) -> None:
        while True:
            number, answer = await self.queue.get()
            answer.set_result(2 * number)

    async def score(self, images: Any, prompts: Any) -> list[float]:
        answers = [self.loop.create_future() for _ in images]
        for image, answer in zip(images, answers, strict=True):
            await self.queue.put((number_of(image), answer))
        return await asyncio.gather(*answers)

    async def close(self) -> None:
        assert asyncio.get_running_loop() is self.loop
        self.task.cancel()
        self.events.append("close")


def test_load_and_close_are_awaited_in_the_loop_of_the_calls():
    whole = Whole()
    reward = FunctionReward(whole)
    reward.check(PROMPTS)
    assert whole.events == ["load"] and numbers(reward, 2) == [[0, 2, 4, 6, 8, 10]] * 2
    reward.close()
    assert whole.events == ["load", "close"]


@pytest.mark.parametrize("kind", [OSError, SystemExit, asyncio.CancelledError])
def test_what_an_async_load_raises_is_a_refusal(kind):
    class Fails:
        async def load(self) -> None:
            raise kind("no weights")

        async def score(self, images: Any, prompts: Any) -> list[float]:
            return [0.0] * len(images)

    with pytest.raises(
        Refusal, match=rf"its load\(\) failed: .*CancelledError|its load\(\) failed: .*{kind.__name__}: no weights"
    ):
        FunctionReward(Fails()).check(PROMPTS)


def test_a_function_may_return_anything_that_can_be_awaited():
    async def later(images: Any) -> list[float]:
        return [number_of(image) for image in images]

    class Waits:
        def __init__(self, images: Any) -> None:
            self.images = images

        def __await__(self) -> Any:
            return later(self.images).__await__()

    assert numbers(FunctionReward(lambda images, prompts: Waits(images))) == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("kind", [asyncio.CancelledError, SystemExit, OSError])
def test_a_request_that_is_cancelled_or_ends_python_is_a_failed_call_and_the_next_is_answered(kind):
    troubles = [kind("gone")]

    async def flaky(images: Any, prompts: Any) -> list[float]:
        async def one(image: Any) -> float:
            if number_of(image) == 3 and troubles:
                raise troubles.pop()
            await asyncio.sleep(0.001)
            return number_of(image)

        return await asyncio.gather(*map(one, images))

    waited: list[float] = []
    assert numbers(RetryingReward(FunctionReward(flaky), retries=1, sleep=waited.append), 2) == [[0, 1, 2, 3, 4, 5]] * 2
    assert len(waited) == 1


def test_a_call_that_takes_too_long_is_cancelled_and_the_next_has_what_it_held():
    lock, cancelled, calls = asyncio.Lock(), threading.Event(), []

    async def slow(images: Any, prompts: Any) -> list[float]:
        calls.append(len(images))
        async with lock:
            try:
                await asyncio.sleep(100 if len(calls) == 1 else 0)
            except asyncio.CancelledError:
                cancelled.set()
                raise
        return [number_of(image) for image in images]

    reward = FunctionReward(slow, timeout=0.1)
    with pytest.raises(TimeoutError, match=r"^no answer in time$"):
        reward.score(PICTURES, PROMPTS)
    assert cancelled.wait(10) and numbers(reward) == [[0, 1, 2, 3, 4, 5]]


def test_a_call_that_blocks_the_loop_for_good_costs_no_later_one(monkeypatch):
    monkeypatch.setattr(loop, "_STUCK", 0.1)
    blocked, release = [True], threading.Event()

    async def blocks(images: Any, prompts: Any) -> list[float]:
        if blocked:
            blocked.pop()
            release.wait(30)
        return [number_of(image) for image in images]

    reward = FunctionReward(blocks, timeout=0.05)
    with pytest.raises(TimeoutError):
        reward.score(PICTURES, PROMPTS)
    assert numbers(FunctionReward(blocks, timeout=20)) == [[0, 1, 2, 3, 4, 5]]
    release.set()


def test_an_async_reward_may_ask_another_one():
    inner = FunctionReward(Counted().score)

    async def outer(images: Any, prompts: Any) -> list[Score]:
        return inner.score(PICTURES, PROMPTS)

    assert numbers(FunctionReward(outer)) == [[0, 1, 2, 3, 4, 5]]


def test_calls_of_one_loop_go_on_side_by_side():
    meeting, values = asyncio.Barrier(8), []

    async def meets(images: Any, prompts: Any) -> list[float]:
        await meeting.wait()
        return [number_of(image) for image in images]

    threads = [threading.Thread(target=lambda: values.extend(numbers(FunctionReward(meets)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert values == [[0, 1, 2, 3, 4, 5]] * 8
