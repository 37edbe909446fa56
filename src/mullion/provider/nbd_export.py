"""A disk of a partition as an NBD export on a unix socket: for emulated disks, and for anyone else who asks.

Invariants: the socket is there, and only for our own user, from before `start` returns; what another living server
listens on is never taken away; `stop` leaves no thread, no socket, and no file that we made.
Durability: as of the device; see `mullion.wire.nbd.transmission`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from mullion.base.block import BlockDevice
from mullion.base.errors import AlreadyExistsError, InvalidError
from mullion.base.paths import SOCKET_PATH_LIMIT
from mullion.wire.nbd import Counters, Export, NbdServer, SpaceGate


class NbdExport:
    """Serves one device, under its name and under the default (empty) name.

    `listener` is an already listening socket (of a parent that keeps it open across our death); without it `start`
    binds `socket_path`. `gate` is asked when the storage is full: the request waits in it and is repeated.
    """

    def __init__(
        self,
        socket_path: str,
        device: BlockDevice,
        *,
        name: str,
        read_only: bool,
        gate: SpaceGate | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        self.path = socket_path
        self._export = Export(name, device, read_only, gate)
        self._listener = listener
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
            listener = _listen(self.path)
            self._bound = _file_identity(self.path)
        self._server = NbdServer(listener, (self._export,))
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

    @property
    def counters(self) -> Counters:
        """Connections, requests, bytes and errors since the start."""
        return self._past if self._server is None else self._server.counters


def _listen(path: str) -> socket.socket:
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
        raise InvalidError(
            f"the socket's path is longer than {SOCKET_PATH_LIMIT} bytes: {path}",
            remedy="Choose a shorter run folder (setting run_dir).",
            path=path,
        )
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)  # nobody can connect before listen
        listener.listen(16)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise _in_use(path) from error
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Remove a socket that a dead server left. Raises: AlreadyExistsError when it is not that."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise AlreadyExistsError(f"{path} is there and is not a socket", remedy="Move the file away.", path=path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        except FileNotFoundError:
            return
        except (TimeoutError, BlockingIOError) as error:  # its backlog is full: it lives
            raise _in_use(path) from error
    raise _in_use(path)


def _in_use(path: str) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"another server listens on {path}", remedy="End the other provider of this partition first.", path=path
    )


def _file_identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
