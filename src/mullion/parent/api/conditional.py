"""Conditional requests: an ETag on every read, If-Match on writes.

Spec: RFC 9110 sections 8.8.3, 13.1.1 and 13.1.2. A route may set a strong ETag of its own (a definition's); every other
JSON answer to a GET gets one from its content, and `If-None-Match` is answered with 304 where it matches.
"""

from __future__ import annotations

import hashlib

from mullion.base.errors import PreconditionError
from mullion.parent.api.asgi import App, Message, Receive, Scope, Send
from mullion.parent.api.errors import PreconditionRequiredError


def check_match(if_match: str | None, etag: str, what: str) -> None:
    """Check a write's If-Match against the present ETag (without its quotes) of the thing that it changes.

    Raises: PreconditionRequiredError without If-Match; PreconditionError when the thing has changed.
    """
    if if_match is None:
        raise PreconditionRequiredError(f"the change of {what} carries no If-Match")
    if not matches(if_match, etag):
        raise PreconditionError(f"{what} was changed since it was read", etag=etag)


def matches(header: str, etag: str) -> bool:
    """Whether an If-Match or If-None-Match header names this ETag."""
    named = [part.strip().removeprefix("W/").strip('"') for part in header.split(",")]
    return "*" in named or etag.strip('"') in named


class Conditional:
    """The ASGI layer that gives reads their ETag."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET":
            await self._app(scope, receive, send)
            return
        wanted = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"if-none-match"), None)
        held: Message | None = None

        async def sending(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start" and message["status"] == 200 and _is_json(message):
                held = message
                return
            if held is not None:
                start, held = held, None
                if message["type"] == "http.response.body" and not message.get("more_body", False):
                    etag = _tag(start, message["body"])
                    if wanted is not None and matches(wanted, etag):
                        message = {"type": "http.response.body", "body": b"", "more_body": False}
                        start["status"] = 304
                        start["headers"] = [(b"etag", f'"{etag}"'.encode())]
                await send(start)
            await send(message)

        await self._app(scope, receive, sending)


def _is_json(start: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"application/json") for name, value in start["headers"]
    )


def _tag(start: Message, body: bytes) -> str:
    """The answer's ETag: its own, or one made from its content and added to its headers."""
    headers = list(start["headers"])
    for name, value in headers:
        if name.lower() == b"etag":
            return str(value, "latin-1").strip('"')
    etag = hashlib.sha256(body).hexdigest()[:20]
    start["headers"] = [*headers, (b"etag", f'"{etag}"'.encode())]
    return etag
