"""The control socket of a provider: answers commands, tells subscribers what happens. Runs in the main thread.

Commands and their answers (`control_client` has the framing): `status` → partition, pid, uptime and every disk;
`flush` → every disk is durable; `retry` → writers that wait for space try again; `switch` → other files beneath disks
(`exchanging`); `resize` → a larger disk (`resizing`); `subscribe` → events from now on; `quit` → the provider flushes,
closes and ends, after the answer; `hand-over`, with one descriptor → another provider goes on (`handover`); `keep` and
`adopt`, with descriptors → the parent has a copy of front-ends' connections, and gives them back (`keeping`).
Events: `no_space`, `space`, `broken`, `connected`, `disconnected`, each with `disk`, and `reason` where there is one.

Limits: 16 clients, lines of 1 MiB, 253 descriptors with one; what no command asked for is closed at once. Who does not
read its answers is disconnected at 4 MiB.
"""

from __future__ import annotations

import array
import collections
import logging
import os
import select
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from mullion.base.errors import InvalidError, MullionError, TooLargeError
from mullion.provider.control_client import COMMANDS, FDS_LIMIT, LineDecoder, descriptors_of, encode

log = logging.getLogger(__name__)

MAX_CLIENTS: Final = 16
OUTPUT_LIMIT_BYTES: Final = 4 * 1024 * 1024
_READ_BYTES: Final = 16 * 1024
_FD_BYTES: Final = array.array("i").itemsize


@dataclass(frozen=True, slots=True)
class Command:
    """What a client asks: the fields of its line, and the descriptors that are the command's now."""

    fields: Mapping[str, object]
    fds: list[int]


Action = Callable[[Command], Mapping[str, object]]
"""Answers a command; it closes the descriptors, or keeps them. Raises: MullionError."""


class _Client:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.decoder = LineDecoder()
        self.fds: list[int] = []  # that came with the line which is not complete yet
        self.output = bytearray()
        self.is_subscribed = False
        self.is_ending = False  # closed as soon as the output is sent

    def take_fds(self, count: object) -> list[int]:
        """The descriptors of the line that says it has so many. Raises: InvalidError."""
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= len(self.fds):
            raise InvalidError(
                f"fds: {count!r}, and {len(self.fds)} descriptors came along",
                remedy="Send the descriptors in the message that has the first byte of the command's line.",
            )
        taken, self.fds = self.fds[:count], self.fds[count:]
        return taken

    def close_fds(self) -> None:
        """Close what came and no command wants."""
        close_all(self.fds)
        self.fds.clear()


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


class ControlServer:
    """Serves the control socket until it is told to quit."""

    def __init__(
        self,
        listener: socket.socket,
        actions: Mapping[str, Action],
        quit_fd: int,
    ) -> None:
        """`actions` answer what is not the socket's own; `run` returns when `quit_fd` becomes readable."""
        self._listener = listener
        self._actions = actions
        self._quit_fd = quit_fd
        self._clients: dict[int, _Client] = {}
        self._events: collections.deque[Mapping[str, object]] = collections.deque(maxlen=1024)
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._is_quitting = False
        for fd in (listener.fileno(), quit_fd, self._event_fd):
            self._epoll.register(fd, select.EPOLLIN)

    def share_listener(self) -> int:
        """Another descriptor of the listening socket."""
        return os.dup(self._listener.fileno())

    def use(self, actions: Mapping[str, Action]) -> None:
        """Answer with these from now on."""
        self._actions = actions

    def publish(self, event: Mapping[str, object]) -> None:
        """Tell all subscribers; may be called from any thread."""
        self._events.append(event)
        os.eventfd_write(self._event_fd, 1)

    def run(self) -> None:
        """Serve until `quit` or until the quit descriptor becomes readable."""
        while not self._is_quitting:
            for fd, events in self._epoll.poll():
                if fd == self._quit_fd:
                    self._is_quitting = True
                elif fd == self._event_fd:
                    self._push_events()
                elif fd == self._listener.fileno():
                    self._accept()
                else:
                    self._serve(fd, events)

    def close(self) -> None:
        """Say what is left to say, and close everything."""
        self._push_events()
        for client in tuple(self._clients.values()):
            self._drop(client)
        self._epoll.close()
        os.close(self._event_fd)
        self._listener.close()

    def _accept(self) -> None:
        try:
            connection, _address = self._listener.accept()
        except OSError as error:
            log.warning("control: a client could not be accepted: %s", error)
            return
        connection.setblocking(False)
        client = _Client(connection)
        self._clients[connection.fileno()] = client
        self._epoll.register(connection.fileno(), select.EPOLLIN)
        if len(self._clients) > MAX_CLIENTS:
            client.is_ending = True
            self._send(
                client,
                _failure(
                    InvalidError(
                        f"more than {MAX_CLIENTS} control connections", remedy="Close one of the others first."
                    )
                ),
            )

    def _serve(self, fd: int, events: int) -> None:
        client = self._clients.get(fd)
        if client is None:
            return
        if events & select.EPOLLOUT:
            self._flush_output(client)
        if not events & ~select.EPOLLOUT or client.is_ending:
            return
        try:
            data, ancillary, flags, _address = client.connection.recvmsg(
                _READ_BYTES, socket.CMSG_SPACE(FDS_LIMIT * _FD_BYTES), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            data, ancillary, flags = b"", [], 0  # reset by the peer: the same as the end
        client.fds += descriptors_of(ancillary)
        if not data:
            self._drop(client)
            return
        try:
            if flags & socket.MSG_CTRUNC or len(client.fds) > FDS_LIMIT:
                raise TooLargeError(f"more than {FDS_LIMIT} descriptors with one command")
            for message in client.decoder.feed(data):
                self._send(client, self._answer(client, message))
        except MullionError as error:
            client.is_ending = True
            self._send(client, _failure(error))
        if client.is_ending or not client.decoder.is_within_line:
            client.close_fds()

    def _answer(self, client: _Client, message: Mapping[str, object]) -> Mapping[str, object]:
        tag = {"id": message["id"]} if "id" in message else {}
        try:
            return tag | self._act(client, message)
        except MullionError as error:
            return tag | _failure(error)

    def _act(self, client: _Client, message: Mapping[str, object]) -> dict[str, object]:
        command = message.get("command")
        fds = client.take_fds(message.get("fds", 0))
        action = self._actions.get(command) if isinstance(command, str) else None
        if action is not None:
            return dict(action(Command(message, fds)))
        close_all(fds)
        if command == "subscribe":
            client.is_subscribed = True
            return {"subscribed": True}
        if command == "quit":
            self._is_quitting = True
            return {"quitting": True}
        raise InvalidError(f"{command!r} is not a command", remedy=f"Commands: {', '.join(COMMANDS)}.")

    def _push_events(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._event_fd)
        while self._events:
            event = self._events.popleft()
            for client in tuple(self._clients.values()):
                if client.is_subscribed:
                    self._send(client, event)

    def _send(self, client: _Client, message: Mapping[str, object]) -> None:
        client.output += encode(message)
        self._flush_output(client)

    def _flush_output(self, client: _Client) -> None:
        if client.connection.fileno() < 0:
            return
        try:
            while client.output:
                sent = client.connection.send(client.output)
                del client.output[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        if len(client.output) > OUTPUT_LIMIT_BYTES or (client.is_ending and not client.output):
            self._drop(client)
            return
        wanted = select.EPOLLIN | (select.EPOLLOUT if client.output else 0)
        self._epoll.modify(client.connection.fileno(), wanted)

    def _drop(self, client: _Client) -> None:
        fd = client.connection.fileno()
        if fd < 0:
            return
        self._epoll.unregister(fd)
        del self._clients[fd]
        client.close_fds()
        client.connection.close()


def _failure(error: MullionError) -> dict[str, object]:
    return {"error": error.to_wire()}
