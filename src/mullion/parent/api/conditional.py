"""Conditional requests: an ETag on every read, If-Match on writes.

Spec: RFC 9110 sections 8.8.3, 13.1.1 and 13.1.2. Every JSON answer to a GET gets a strong ETag from its content (or the
one that its route set), and `If-None-Match` is answered with 304 where it matches.

A view with a field `etag` (a definition's revision) is two things at once: what is wanted, which writes change, and
what is, which changes by itself. Its ETag is therefore `REVISION.CONTENT`; a write compares the revision only, and
takes it with or without the rest.
"""

from __future__ import annotations

import hashlib

import msgspec

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
    wanted = etag.strip('"')
    return any(one in ("*", wanted) or one.startswith(f"{wanted}.") for one in named)


class _HasEtag(msgspec.Struct):
    etag: str


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


def _revision(body: bytes) -> str:
    """The revision in a view, with its dot; empty when it has none."""
    try:
        etag = msgspec.json.decode(body, type=_HasEtag).etag.strip('"')
    except msgspec.MsgspecError:  # a list, or something else without a field `etag`
        return ""
    return f"{etag}."


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
    etag = _revision(body) + hashlib.sha256(body).hexdigest()[:20]
    start["headers"] = [*headers, (b"etag", f'"{etag}"'.encode())]
    return etag
