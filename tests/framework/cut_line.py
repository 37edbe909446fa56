"""A network between a client and a server on loopback that is cut after so many bytes, and mended."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class CutLine:
    """What connects to `port` is connected with the server. `cut_after` bytes in either direction everything breaks."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._left: int | None = None
        self._is_closed = False
        self.port = int(self._listener.getsockname()[1])
        self.carried_bytes = 0
        self.cuts = 0
        self._begin(self._accept)

    def cut_after(self, count: int | None) -> None:
        """From now on so many bytes get through, and then nothing; None mends it."""
        with self._lock:
            self._left = count

    def close(self) -> None:
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._break()
        for thread in self._threads:
            thread.join()

    def _begin(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._left is not None and self._left <= 0:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._server_port))
            with self._lock:
                self._open |= {client, server}
            self._begin(self._carry, client, server)
            self._begin(self._carry, server, client)

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16 * 1024):
                allowed = self._allow(len(data))
                target.sendall(data[:allowed])
                if allowed < len(data):
                    self._break()
                    return
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _allow(self, count: int) -> int:
        with self._lock:
            self.carried_bytes += count
            if self._left is None:
                return count
            allowed = min(count, max(0, self._left))
            if self._left > 0 and allowed < count:
                self.cuts += 1
            self._left -= count
            return allowed

    def _break(self) -> None:
        with self._lock:
            broken, self._open = self._open, set()
        for one in broken:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@contextlib.contextmanager
def cut_line(server_port: int) -> Iterator[CutLine]:
    """A line to a server, whole at first."""
    line = CutLine(server_port)
    try:
        yield line
    finally:
        line.close()
