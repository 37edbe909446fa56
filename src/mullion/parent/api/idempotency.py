"""Idempotency-Key: a POST that is repeated after a lost answer gets that answer, and is not done again.

A record is in the store before the request is done: (who, key) → digest of method, address and body. With the answer
it becomes complete, and is kept for 24 hours. The same key with the same request gets the same answer; with another
request a conflict. An answer that refuses (status 400 and above) did nothing, so it is not kept.

If the service dies between the two, nobody knows whether the request was done: a repetition is then refused, and says
so.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import Final

import msgspec

from mullion.base.errors import ConflictError, InvalidError, PreconditionError
from mullion.parent.api.asgi import App, Message, Receive, Scope, Send
from mullion.parent.store import Condition, Delete, Entry, Put, Store

KEPT_S: Final = 24 * 3600
_PREFIX: Final = "idempotency/"
_MAX_KEY: Final = 200
_SWEEP_S: Final = 3600.0
_KEPT_HEADERS: Final = frozenset({b"content-type", b"location", b"etag"})


class _Record(msgspec.Struct):
    digest: str
    at: float
    status: int = 0
    headers: list[tuple[str, str]] = []
    body: bytes = b""


class Idempotency:
    """The ASGI layer that remembers answers to POSTs."""

    def __init__(self, app: App, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._app = app
        self._store = store
        self._clock = clock
        self._running: set[str] = set()
        self._swept = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = _key_of(scope) if scope["type"] == "http" and scope["method"] == "POST" else None
        if key is None:
            await self._app(scope, receive, send)
            return
        body = await _read(receive)
        record = _Record(_digest(scope, body), self._clock())
        known = await self._begin(key, record)
        if known is not None:
            await _replay(send, known)
            return
        self._running.add(key)
        try:
            await self._do(scope, _Replayed(body, receive), send, key, record)
        finally:
            self._running.discard(key)

    async def _begin(self, key: str, record: _Record) -> _Record | None:
        """Claim the key, or give the answer that it stands for. Raises: ConflictError."""
        await self._sweep()
        entry = await self._store.get(key)
        if entry is not None and not self._is_old(entry):
            return self._check_same(key, msgspec.json.decode(entry.value, type=_Record), record)
        try:
            revision = entry.revision if entry is not None else 0
            await self._store.transact([Condition(key, revision)], [Put(key, msgspec.json.encode(record))])
        except PreconditionError:
            raise _going_on() from None
        return None

    def _check_same(self, key: str, known: _Record, record: _Record) -> _Record:
        if known.digest != record.digest:
            raise ConflictError(
                "this Idempotency-Key was used for another request", remedy="Use a new key for each new request."
            )
        if known.status:
            return known
        if key in self._running:
            raise _going_on()
        raise ConflictError(
            "the service ended while it was doing this request: whether it was done is unknown",
            remedy="Look whether it was done (list what exists); if it was not, send it again with a new key.",
        )

    async def _do(self, scope: Scope, body: _Replayed, send: Send, key: str, record: _Record) -> None:
        answer: list[Message] = []

        async def hold(message: Message) -> None:
            answer.append(message)

        try:
            await self._app(scope, body.receive, hold)
        finally:
            await asyncio.shield(self._finish(key, record, answer))
        for message in answer:
            await send(message)

    async def _finish(self, key: str, record: _Record, answer: list[Message]) -> None:
        for message in answer:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                record.headers = [
                    (name.decode("latin-1"), value.decode("latin-1"))
                    for name, value in message["headers"]
                    if name.lower() in _KEPT_HEADERS
                ]
            elif message["type"] == "http.response.body":
                record.body += message["body"]
        done = 0 < record.status < 400
        await self._store.transact((), [Put(key, msgspec.json.encode(record)) if done else Delete(key)])

    async def _sweep(self) -> None:
        """Forget old records, once an hour."""
        now = self._clock()
        if now - self._swept < _SWEEP_S:
            return
        self._swept = now
        old = [entry.key for entry in await self._store.list(_PREFIX) if self._is_old(entry)]
        if old:
            await self._store.transact((), [Delete(key) for key in old])

    def _is_old(self, entry: Entry) -> bool:
        return msgspec.json.decode(entry.value, type=_Record).at < self._clock() - KEPT_S


class _Replayed:
    """A body that was read already, given once more to the routes."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def receive(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


def _key_of(scope: Scope) -> str | None:
    """The store's key for the request, or None when it has no Idempotency-Key. Raises: InvalidError."""
    given = next((value for name, value in scope["headers"] if name == b"idempotency-key"), None)
    if given is None:
        return None
    if not 1 <= len(given) <= _MAX_KEY:
        raise InvalidError(
            f"Idempotency-Key has {len(given)} characters",
            remedy=f"Use 1 to {_MAX_KEY} characters; a UUID is usual.",
            field="Idempotency-Key",
        )
    caller = scope["state"].get("caller")
    who = getattr(caller, "uid", None)
    digest = hashlib.sha256(given).hexdigest()[:32]
    return f"{_PREFIX}{'token' if who is None else who}/{digest}"


async def _read(receive: Receive) -> bytes:
    """The whole body; the gate raises when the client leaves before."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message["body"])
        if not message["more_body"]:
            return b"".join(parts)


def _digest(scope: Scope, body: bytes) -> str:
    digest = hashlib.sha256()
    for part in (scope["method"].encode(), scope["path"].encode(), scope["query_string"], body):
        digest.update(b"%d:" % len(part) + part)
    return digest.hexdigest()


async def _replay(send: Send, record: _Record) -> None:
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in record.headers]
    headers += [(b"content-length", b"%d" % len(record.body)), (b"idempotency-replayed", b"true")]
    await send({"type": "http.response.start", "status": record.status, "headers": headers})
    await send({"type": "http.response.body", "body": record.body, "more_body": False})


def _going_on() -> ConflictError:
    return ConflictError(
        "a request with this Idempotency-Key is being done at this moment", remedy="Wait a moment and repeat it."
    )
