"""A front-end's connection as another process can have it: the socket, and the messages that set it up, said again.

Whoever takes a connection over feeds the messages to a session of its own, as if the front-end had just sent them: they
are checked once more, and rings start where the used ring and the in-flight region say. The front-end notices nothing.
The descriptors that came with the messages are kept for that as long as the connection lasts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mullion.provider.control import close_all
from mullion.wire.vhost_user import Inflight, Log, MemoryRegion, Session
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
    """A connection between two messages; its rings are at rest."""

    connection: int
    messages: list[SetupMessage]

    @property
    def fds(self) -> list[int]:
        """All descriptors, in the order that `handover` sends them."""
        return [self.connection, *(fd for message in self.messages for fd in message.fds)]


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

    def take(self) -> Iterator[SetupMessage]:
        """All that is kept, whose descriptors are the caller's from now on, in an order that a session accepts."""
        kept, self._kept = self._kept, {}
        for request in (Request.SET_MEM_TABLE, Request.SET_LOG_BASE, Request.SET_INFLIGHT_FD):
            if request in kept:
                yield kept[request]


def setup_of(
    session: Session,
    kept: KeptSetup,
    *,
    calls: Mapping[int, int],
    errors: Mapping[int, int],
    backend_fd: int | None,
) -> list[SetupMessage]:
    """What a front-end would have to say again; all descriptors are the list's from now on."""
    messages = [
        SetupMessage(Request.SET_FEATURES, U64(session.features).pack()),
        SetupMessage(Request.SET_PROTOCOL_FEATURES, U64(session.protocol_features).pack()),
    ]
    if backend_fd is not None:
        messages.append(SetupMessage(Request.SET_BACKEND_REQ_FD, b"", (backend_fd,)))
    messages += kept.take()
    for vring in session.vrings:
        index = vring.index
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
