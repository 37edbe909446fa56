"""What every request passes before the routes: who calls, how much it may send, and the last net for errors.

A body over 1 MiB is refused by its Content-Length, or as soon as that much of a chunked body has come. What the client
goes on sending is dropped piece by piece by uvicorn, because closing the connection under a sender would cost it the
answer.

A websocket that is refused before it was accepted gets the same error as a request would, in place of its handshake;
one that fails later is closed with 4000 + the error's status, and its message as the reason.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Final

from mullion.base.errors import InvalidError, TooLargeError
from mullion.base.units import MIB, format_size
from mullion.parent.api.asgi import App, Message, Receive, Scope, Send
from mullion.parent.api.auth import Authority
from mullion.parent.api.errors import RefusedError, send_error, status_of
from mullion.parent.faults import error_view

log = logging.getLogger(__name__)
BODY_LIMIT_BYTES: Final = MIB
_QUIET_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class Gate:
    """The outermost ASGI layer."""

    def __init__(self, app: App, authority: Authority, body_limit_bytes: int = BODY_LIMIT_BYTES) -> None:
        self._app = app
        self._authority = authority
        self._limit_bytes = body_limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return
        websocket = scope["type"] == "websocket"
        state: dict[str, Any] = scope.setdefault("state", {})
        headers = {name.lower(): value for name, value in scope["headers"]}
        started = False
        status = 0
        begun_s = time.monotonic()

        async def sending(message: Message) -> None:
            nonlocal started, status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "websocket.close" and "exception" in state:
                error = state.pop("exception")
                if not started:
                    await send_error(send, error, websocket=True)
                    started = True
                    return
                view = error_view(error)
                message = {"type": "websocket.close", "code": 4000 + status_of(error), "reason": view.message[:100]}
            started = True
            await send(message)

        try:
            caller = self._authority.check(state.pop("peer", None), headers)
            state["caller"] = caller
            if websocket:
                await self._app(scope, receive, sending)
                return
            state["body"] = body = Body(receive, self._limit_bytes)
            body.check_length(headers)
            await self._app(scope, body.receive, sending)
        except Exception as error:
            if started:
                raise  # too late for an answer: uvicorn closes the connection and logs it
            if websocket:
                await receive()  # websocket.connect
                await send_error(sending, error, websocket=True)
                return
            await send_error(sending, error, close=b"expect" in headers)  # then the body never comes
        if not websocket and scope["method"] not in _QUIET_METHODS:
            who = getattr(state.get("caller"), "name", "nobody known")
            log.info(
                "%s %s: %d for %s, %.3f s", scope["method"], scope["path"], status, who, time.monotonic() - begun_s
            )


class Body:
    """A request's body, counted while it comes, and kept to explain what is wrong with it."""

    def __init__(self, receive: Receive, limit_bytes: int) -> None:
        self._receive = receive
        self._limit_bytes = limit_bytes
        self._seen_bytes = 0
        self._parts: list[bytes] = []
        self._complete = False

    @property
    def content(self) -> bytes:
        """What has come so far."""
        return b"".join(self._parts)

    def check_length(self, headers: dict[bytes, bytes]) -> None:
        """Raises: TooLargeError when the client says beforehand that it sends too much; InvalidError."""
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            raise InvalidError(f"Content-Length is {length!r}", remedy="Send a number.", field="Content-Length")
        if int(length) > self._limit_bytes:
            raise self._too_large()

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._seen_bytes += len(message["body"])
            if self._seen_bytes > self._limit_bytes:
                raise self._too_large()
            self._parts.append(message["body"])
            self._complete = not message["more_body"]
        elif not self._complete:
            raise RefusedError("the client left before its request was complete")
        return message

    def _too_large(self) -> TooLargeError:
        return TooLargeError(
            f"the request's body is larger than {format_size(self._limit_bytes)}",
            remedy=f"Send less than {format_size(self._limit_bytes)}; disks are named by path, never sent.",
            limit_bytes=self._limit_bytes,
        )
