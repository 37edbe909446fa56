"""One HTTP connection to the service: over its unix socket, or over TCP with a token.

`http.client` is imported at the first request, so that `mullion --help` does not pay for it. A connection is kept; when
the service has closed it meanwhile (a restart), a request that may be repeated is sent once more on a new one: reads,
and writes with an Idempotency-Key.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import urlsplit

from mullion.base.errors import DeadlineError, DeniedError, InvalidError, UnavailableError

if TYPE_CHECKING:
    from http.client import HTTPConnection, HTTPResponse

_LINE_LIMIT_BYTES: Final = 4 * 1024 * 1024
_SMALL_BYTES: Final = 16 * 1024


class Answer(NamedTuple):
    """What came back: status, headers with lower-case names, body."""

    status: int
    headers: dict[str, str]
    body: bytes


class Transport:
    """Requests one after another; not for several threads at once.

    Raises: UnavailableError when nobody answers, DeniedError when the socket is closed to us, DeadlineError.
    """

    def __init__(self, *, socket_path: str | None = None, url: str = "", token: str = "") -> None:
        self.socket_path = socket_path
        self.url = url
        self.token = token
        self._connection: HTTPConnection | None = None
        if socket_path is None:
            parts = urlsplit(url)
            try:
                self._host, self._port = parts.hostname, parts.port or 80
            except ValueError as error:
                raise InvalidError(f"{url!r} is not a URL: {error}", remedy="Write http://127.0.0.1:8440.") from error
            if parts.scheme != "http" or not self._host:
                raise InvalidError(f"{url!r} is not an http URL", remedy="Write http://127.0.0.1:8440.")

    @property
    def where(self) -> str:
        return self.socket_path or self.url

    def request(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> Answer:
        """Send a request and read its answer whole."""
        repeatable = method == "GET" or "Idempotency-Key" in headers
        while True:
            fresh = self._connection is None
            with self._translated(timeout_s):
                try:
                    response = self._send(method, path, body, headers, timeout_s)
                    content = response.read()
                except ConnectionRefusedError:
                    raise
                except ConnectionError as error:
                    self.close()
                    if fresh or not repeatable:
                        raise UnavailableError(
                            f"the service at {self.where} ended the connection without an answer",
                            remedy="Look whether it runs (`mullion status`) and what its log says; then try again.",
                        ) from error
                    continue
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, content)

    def lines(self, path: str, headers: Mapping[str, str], timeout_s: float) -> Iterator[bytes] | Answer:
        """The lines of an answer that is a stream, on a connection of its own; or an answer that is not one (an error).

        `timeout_s` is how long the service may be silent.
        """
        opened = self.stream(path, headers, timeout_s)
        return opened if isinstance(opened, Answer) else opened.lines()

    def stream(self, path: str, headers: Mapping[str, str], timeout_s: float) -> Body | Answer:
        """The body of an answer that is a stream, as `lines`; close it."""
        own = Transport(socket_path=self.socket_path, url=self.url, token=self.token)
        try:
            with own._translated(timeout_s):
                response = own._send("GET", path, None, headers, timeout_s)
                if response.status != 200:
                    answer = Answer(response.status, {}, response.read())
                    own.close()
                    return answer
        except BaseException:
            own.close()
            raise
        return Body(own, response, timeout_s)

    def connect(self, timeout_s: float) -> socket.socket:
        """A connected socket, for the console's websocket."""
        with self._translated(timeout_s):
            if self.socket_path is None:
                return socket.create_connection((self._host, self._port), timeout_s)
            return _connect_unix(self.socket_path, timeout_s)

    def authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _send(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> HTTPResponse:
        connection = self._connected(timeout_s)
        try:
            connection.request(method, path, body, {**self.authorization(), **headers})
        except (BrokenPipeError, ConnectionResetError):
            if body is None:
                raise
            # The service may have answered, and refused, before it read all of the body: then the answer is there.
        return connection.getresponse()

    def _connected(self, timeout_s: float) -> HTTPConnection:
        if self._connection is None:
            from http.client import HTTPConnection

            connection = HTTPConnection(self._host or "localhost", self._port) if self.socket_path is None else None
            self._connection = connection or HTTPConnection("localhost")
            try:
                self._connection.sock = self.connect(timeout_s)
            except BaseException:
                self._connection = None
                raise
        self._connection.sock.settimeout(timeout_s)
        return self._connection

    @contextlib.contextmanager
    def _translated(self, timeout_s: float) -> Iterator[None]:
        """Turn what sockets and HTTP raise into what a person can act on; the connection is given up."""
        from http.client import HTTPException, RemoteDisconnected

        try:
            yield
            return
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
            ours: Exception = UnavailableError(
                f"the service is not running: nobody answers at {self.where}",
                remedy="Start it with `mullion serve --detach`, then try again.",
            )
            cause: Exception = error
        except PermissionError as error:
            ours = DeniedError(
                f"user id {os.geteuid()} may not use {self.where}",
                remedy="Run the command as root, or add the user to the group: usermod -aG mullion USER",
            )
            cause = error
        except TimeoutError as error:
            ours = DeadlineError(
                f"the service at {self.where} did not answer within {timeout_s:g} s",
                remedy="Look at its log, and try again.",
            )
            cause = error
        except RemoteDisconnected:
            raise
        except (HTTPException, OSError) as error:
            if isinstance(error, ConnectionError):
                raise
            ours = UnavailableError(f"the service at {self.where} cannot be asked: {error}")
            cause = error
        self.close()
        raise ours from cause


class Body:
    """An answer that comes bit by bit, on a connection of its own."""

    def __init__(self, connection: Transport, response: HTTPResponse, timeout_s: float) -> None:
        self._connection = connection
        self._response = response
        self._timeout_s = timeout_s
        self._waiting = b""
        """What came with what was asked for: small things come together."""

    def header(self, name: str) -> str | None:
        return self._response.getheader(name)

    def lines(self) -> Iterator[bytes]:
        """Lines that are not empty, until the service ends the answer or the connection."""
        try:
            while True:
                with self._connection._translated(self._timeout_s):
                    try:
                        line = self._response.readline(_LINE_LIMIT_BYTES)
                    except ConnectionError:
                        return
                if not line:
                    return
                if line.strip():
                    yield line
        finally:
            self.close()

    def read_exactly(self, count: int) -> bytes:
        """So many bytes. Raises: UnavailableError when the answer ends before."""
        with self._connection._translated(self._timeout_s), contextlib.suppress(ConnectionError):
            while len(self._waiting) < count <= _SMALL_BYTES and (part := self._response.read1(_SMALL_BYTES)):
                self._waiting += part
            if len(self._waiting) < count:
                self._waiting += self._response.read(count - len(self._waiting))
        if len(self._waiting) < count:
            raise UnavailableError(
                f"the service at {self._connection.where} ended the answer before it was whole",
                remedy="Look whether it runs (`mullion status`) and what its log says; then try again.",
            )
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken

    def close(self) -> None:
        self._response.close()
        self._connection.close()


def _connect_unix(path: str, timeout_s: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection
