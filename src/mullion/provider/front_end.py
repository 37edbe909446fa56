"""A front-end's connection as another process can have it: the socket, and the messages that set it up, said again.

Whoever takes a connection over feeds the messages to a session of its own, as if the front-end had just sent them: they
are checked once more, and rings start where the used ring and the in-flight region say. The front-end notices nothing.
The descriptors that came with the messages are kept for that as long as the connection lasts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from mullion.provider.control import close_all
from mullion.wire.vhost_user import Inflight, Log, MemoryRegion, Session, Vring
from mullion.wire.vhost_user.messages import (
    U64,
    VERSION,
    VRING_NO_FD,
    Header,
    MemoryTable,
    Request,
    VringState,
)


class SetupMessage(NamedTuple):
    """A message of the front-end, with the descriptors that came along."""

    request: int
    payload: bytes
    fds: tuple[int, ...] = ()


@dataclass(slots=True)
class FrontEnd:
    """A connection between two messages."""

    connection: int
    messages: list[SetupMessage]

    @property
    def fds(self) -> list[int]:
        """All descriptors, in the order in which `from_wire` takes them."""
        return [self.connection, *(fd for message in self.messages for fd in message.fds)]

    def to_wire(self) -> list[list[object]]:
        """All but the descriptors, as JSON's values: of each message its number, payload and count of descriptors."""
        return [[message.request, message.payload.hex(), len(message.fds)] for message in self.messages]

    @classmethod
    def from_wire(cls, said: object, left: Iterator[int]) -> Self:
        """With descriptors from `left`.

        Raises: ValueError, TypeError, StopIteration or RuntimeError for what `to_wire` does not say.
        """
        if not isinstance(said, list):
            raise TypeError("a connection is a list of messages")
        connection = next(left)
        messages = []
        for request, payload, count in said:
            if type(request) is not int or not 0 <= request < 1 << 32:
                raise ValueError(f"message {request!r}")
            messages.append(SetupMessage(request, bytes.fromhex(payload), tuple(next(left) for _ in range(count))))
        return cls(connection, messages)

    def copy(self) -> FrontEnd:
        """The same with descriptors of its own. Raises: OSError."""
        with contextlib.ExitStack() as made:

            def dup(fd: int) -> int:
                new = os.dup(fd)
                made.callback(os.close, new)
                return new

            connection = dup(self.connection)
            messages = [message._replace(fds=tuple(map(dup, message.fds))) for message in self.messages]
            made.pop_all()
        return FrontEnd(connection, messages)


class KeptSetup:
    """What a front-end has handed over by descriptor: its memory, the in-flight region, the dirty log."""

    def __init__(self) -> None:
        self._kept: dict[Request, SetupMessage] = {}

    def keep_memory(self, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> None:
        """The descriptors are ours from now on; those of an earlier table are closed. The same of the others."""
        self._keep(SetupMessage(Request.SET_MEM_TABLE, MemoryTable(tuple(regions)).pack(), tuple(fds)))

    def keep_inflight(self, inflight: Inflight, fd: int) -> None:
        self._keep(SetupMessage(Request.SET_INFLIGHT_FD, inflight.pack(), (fd,)))

    def keep_log(self, log: Log, fd: int) -> None:
        self._keep(SetupMessage(Request.SET_LOG_BASE, log.pack(), (fd,)))

    def _keep(self, message: SetupMessage) -> None:
        self.drop(Request(message.request))
        self._kept[Request(message.request)] = message

    def drop(self, request: Request) -> None:
        """What came with such a message is not used any more."""
        old = self._kept.pop(request, None)
        if old is not None:
            close_all(old.fds)

    def close(self) -> None:
        """The connection has ended."""
        for request in tuple(self._kept):
            self.drop(request)

    def messages(self) -> list[SetupMessage]:
        """All that is kept, in an order that a session accepts."""
        order = (Request.SET_MEM_TABLE, Request.SET_LOG_BASE, Request.SET_INFLIGHT_FD)
        return [self._kept[request] for request in order if request in self._kept]

    def forget(self) -> None:
        """The descriptors are somebody else's from now on."""
        self._kept = {}


def setup_of(
    session: Session,
    kept: KeptSetup,
    *,
    calls: Mapping[int, int],
    errors: Mapping[int, int],
    backend_fd: int | None,
) -> list[SetupMessage]:
    """What a front-end would have to say again, with the descriptors that are in use."""
    messages = [
        SetupMessage(Request.SET_FEATURES, U64(session.features).pack()),
        SetupMessage(Request.SET_PROTOCOL_FEATURES, U64(session.protocol_features).pack()),
    ]
    if backend_fd is not None:
        messages.append(SetupMessage(Request.SET_BACKEND_REQ_FD, b"", (backend_fd,)))
    messages += kept.messages()
    for vring in session.vrings:
        index = vring.index
        if vring == Vring(index) and index not in calls and index not in errors:
            continue  # nothing was said of it
        if vring.size:
            messages.append(SetupMessage(Request.SET_VRING_NUM, VringState(index, vring.size).pack()))
        if vring.address is not None:
            messages.append(SetupMessage(Request.SET_VRING_ADDR, vring.address.pack()))
        messages.append(SetupMessage(Request.SET_VRING_BASE, VringState(index, vring.base).pack()))
        for request, table in ((Request.SET_VRING_CALL, calls), (Request.SET_VRING_ERR, errors)):
            fds = (table[index],) if index in table else ()
            messages.append(SetupMessage(request, U64(index if fds else index | VRING_NO_FD).pack(), fds))
        if vring.kick_fd is not None:
            messages.append(SetupMessage(Request.SET_VRING_KICK, U64(index).pack(), (vring.kick_fd,)))
        if vring.enabled:
            messages.append(SetupMessage(Request.SET_VRING_ENABLE, VringState(index, 1).pack()))
    return messages


def say_again(session: Session, messages: Sequence[SetupMessage]) -> None:
    """Bring a new session to where another one was. The descriptors are the session's from now on, also when it raises.

    Raises: ProtocolError.
    """
    for number, message in enumerate(messages):
        head = Header(message.request, VERSION, len(message.payload)).pack()
        try:
            replies = session.receive(head, message.fds)
            if message.payload:
                replies += session.receive(message.payload, ())
        except BaseException:
            for later in messages[number + 1 :]:
                close_all(later.fds)
            raise
        for reply in replies:  # the front-end has had its answer
            close_all(reply.fds)
