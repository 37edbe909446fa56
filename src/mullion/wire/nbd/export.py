"""A disk as an NBD export on a unix socket of its own: for QEMU, and for anyone else who asks.

Invariants: the socket is there, and only for our own user, from before `start` returns; what another living server
listens on is never taken away; `stop` leaves no thread, no socket, and no file that we made.
Durability: as of the device; see `mullion.wire.nbd.transmission`.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable

from mullion.base.block import BlockDevice
from mullion.base.listener import bind_listener
from mullion.wire.nbd.server import MAX_CONNECTIONS, Counters, NbdServer
from mullion.wire.nbd.session import Export, Gate


class NbdExport:
    """Serves one device, under its name and under the default (empty) name.

    `listener` is an already listening socket (of a parent that keeps it open across our death); without it `start`
    binds `socket_path`.
    """

    def __init__(
        self,
        socket_path: str,
        device: BlockDevice,
        *,
        name: str,
        read_only: bool,
        listener: socket.socket | None = None,
        max_connections: int = MAX_CONNECTIONS,
        new_gate: Callable[[], Gate] | None = None,
    ) -> None:
        self.path = socket_path
        self._export = Export(name, device, read_only, new_gate)
        self._listener = listener
        self._max_connections = max_connections
        self._bound: tuple[int, int] | None = None
        self._server: NbdServer | None = None
        self._past = Counters()

    def start(self) -> None:
        """Bind (unless a listener was given) and serve.

        Raises: AlreadyExistsError when somebody listens there; InvalidError for a path too long; OSError.
        """
        assert self._server is None
        listener = self._listener
        if listener is None:
            listener = bind_listener(self.path)
            self._bound = _file_identity(self.path)
        self._server = NbdServer(listener, (self._export,), max_connections=self._max_connections)
        self._server.start()

    def stop(self) -> None:
        """Finish what was asked for, close every connection, join the threads, remove the socket we bound.

        Raises: DeadlineError when the device does not let go of a request.
        """
        if self._server is None:
            return
        # Unlink first: from now on a client finds nobody, instead of a socket that will not answer.
        if self._bound is not None and _file_identity(self.path) == self._bound:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        server, self._server = self._server, None
        try:
            server.stop()
        finally:
            self._past = server.counters

    def hand_over(self) -> int:
        """As `stop`, but the socket lives on: a descriptor of it, the caller's. Clients are hung up on; whoever comes
        back waits for the next who accepts. Raises: as `stop`.
        """
        assert self._server is not None, "started before it is handed over"
        listener = self._server.share_listener()
        self._bound = None
        try:
            self.stop()
        except BaseException:
            os.close(listener)
            raise
        return listener

    def use(self, device: BlockDevice) -> None:
        """Serve this one from now on, of the same size; requests that are under way end on the other."""
        self._export.device = device

    def hang_up(self) -> None:
        """Close every connection when it has answered what it has read; clients come back and find the new size."""
        if self._server is not None:
            self._server.hang_up()

    @property
    def counters(self) -> Counters:
        """Connections, requests, bytes and errors since the start."""
        return self._past if self._server is None else self._server.counters


def _file_identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
