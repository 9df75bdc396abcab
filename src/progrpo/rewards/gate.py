"""The gate of a reward server: the token, and the bytes that requests may hold."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import HTTPException, Request
from fastapi.exception_handlers import http_exception_handler
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from progrpo.rewards.remote import TOKEN

_STALLED = 60.0  # seconds without a byte of a body that has begun


class Room:
    """The bytes that all requests under way may hold together. For one event loop."""

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
    """The middleware that lets requests in: those with the token, while there is room, with a body up to `max_bytes`.

    The body's size is checked before it is read, and while it is read.
    """

    def __init__(self, app: ASGIApp, token: str, room: Room, max_bytes: int) -> None:
        self._app = app
        self._secret = token.encode()
        self._room = room
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._authorise(headers)
            with self._room.held(self._body_size(headers)):
                await self._app(scope, self._limited(receive), send)
        except HTTPException as refused:
            response = await http_exception_handler(Request(scope), refused)
            await response(scope, receive, send)

    def _authorise(self, headers: Headers) -> None:
        scheme, _, secret = headers.get("Authorization", "").partition(" ")
        known = hmac.compare_digest(secret.strip().encode("latin-1"), self._secret)
        if self._secret and not (known and scheme.lower() == "bearer"):
            raise HTTPException(401, f"the token is missing or wrong; set {TOKEN}", {"WWW-Authenticate": "Bearer"})

    def _body_size(self, headers: Headers) -> int:
        """The most bytes that the body can have."""
        declared = headers.get("Content-Length")
        size = self._max_bytes if declared is None else int(declared)
        if size > self._max_bytes:
            raise self._too_large()
        return size if declared or "Transfer-Encoding" in headers else 0

    def _limited(self, receive: Receive) -> Receive:
        read = 0
        complete = False

        async def limited() -> Message:
            nonlocal read, complete
            try:
                async with asyncio.timeout(None if complete else _STALLED):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"no byte of the body for {_STALLED:g} s") from None
            read += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if read > self._max_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"a request of more than {self._max_bytes >> 20} MB; send fewer pictures at a time")
