"""The API's listeners: a unix socket for local administrators and loopback TCP for holders of the token.

uvicorn serves both in the service's own event loop, from sockets that are bound here; it takes no signal handlers and
wakes for nothing while idle. The unix socket is made under another name, given its rights (0660, group `mullion` where
there is one) and renamed into place, so that it is never there with wider rights, and one left by a crash is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import socket
from collections.abc import Iterator

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mullion.base.errors import ConflictError, InvalidError, UnavailableError
from mullion.base.files import replace_file
from mullion.base.paths import HostPaths
from mullion.base.peer import peer_of
from mullion.parent.api.asgi import App
from mullion.parent.api.auth import group_id
from mullion.parent.api.errors import RefusedError
from mullion.parent.api.gate import BODY_LIMIT_BYTES
from mullion.parent.faults import error_view

log = logging.getLogger(__name__)
_BACKLOG = 256
_UVICORN_LOG = logging.getLogger("uvicorn.error")
_UVICORN_LOG.setLevel(logging.WARNING)  # its info lines say what ours say
# uvicorn 0.54 says this of every websocket that is refused with an answer of its own, after it has sent that answer.
_UVICORN_LOG.addFilter(lambda record: "without completing handshake" not in record.getMessage())
_GRACE_S = 5


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, which tells the routes who is at the other end of a unix socket."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection.family == socket.AF_UNIX:
            self.app_state = {**self.app_state, "peer": peer_of(connection)}

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, in the shape of all errors."""
        import msgspec

        body = msgspec.json.encode(error_view(RefusedError(msg, remedy="Speak HTTP/1.1 with headers below 64 KiB.")))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        events = (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers and without its ten wake-ups a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.accepting = asyncio.Event()
        self.ending = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.accepting.set()

    async def main_loop(self) -> None:
        await self.ending.wait()


class ApiServer:
    """Serves one app on both listeners. `closing` is set first when it ends: long polls and streams watch it."""

    def __init__(self, app: App, paths: HostPaths, listen: str, closing: asyncio.Event) -> None:
        self._app = app
        self._paths = paths
        self._listen = listen
        self._closing = closing
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None
        self.url = ""
        """Of the TCP listener, once started; empty when there is none."""

    async def start(self) -> None:
        """Bind both listeners and serve; returns when requests are accepted.

        Raises: ConflictError when another program has the address or another service the socket; InvalidError for an
        address that is not of this host alone; UnavailableError.
        """
        sockets = [bind_unix(self._paths.api_socket)]
        try:
            if self._listen != "none":
                listener = bind_tcp(self._listen)
                sockets.append(listener)
                host, port = listener.getsockname()[:2]
                self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
                replace_file(self._paths.api_url_file, f"{self.url}\n".encode(), durable=False, mode=0o644)
        except BaseException:
            for bound in sockets:
                bound.close()
            os.unlink(self._paths.api_socket)
            raise
        self._server = _Server(_config(self._app))
        self._task = asyncio.create_task(self._server.serve(sockets), name="api")
        accepting = asyncio.create_task(self._server.accepting.wait())
        await asyncio.wait([self._task, accepting], return_when=asyncio.FIRST_COMPLETED)
        accepting.cancel()
        if self._task.done():
            self._task.result()
        log.info("the API listens on %s%s", self._paths.api_socket, f" and {self.url}" if self.url else "")

    async def stop(self) -> None:
        """Take no more connections, let running requests end (5 s), and remove the socket. May be called again."""
        self._closing.set()
        server, task = self._server, self._task
        if server is None or task is None:
            return
        self._server = self._task = None
        server.should_exit = True
        server.ending.set()
        try:
            await task
        finally:
            for path in (self._paths.api_socket, self._paths.api_url_file):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)


def _config(app: App) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="websockets-sansio",
        ws_max_size=BODY_LIMIT_BYTES,
        ws_per_message_deflate=False,
        loop="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_GRACE_S,
        backlog=_BACKLOG,
    )


def bind_unix(path: str) -> socket.socket:
    """A listening unix socket, mode 0660. Raises: ConflictError when somebody answers on it; UnavailableError."""
    if _answers(path):
        raise ConflictError(
            f"another service answers on {path}",
            remedy="Stop it with `mullion stop`, or use another run_dir.",
            path=path,
        )
    temporary = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(temporary)
        group = group_id()
        if group is not None and os.geteuid() == 0:
            os.chown(temporary, -1, group)
        os.chmod(temporary, 0o660)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        os.rename(temporary, path)
    except OSError as error:
        listener.close()
        raise UnavailableError(
            f"the socket {path} cannot be made: {error.strerror or error}",
            remedy="Check that the run folder exists, is writable, and has a path below 100 characters.",
            path=path,
        ) from error
    return listener


def bind_tcp(listen: str) -> socket.socket:
    """A listening TCP socket of `address:port`; port 0 takes a free one. Raises: InvalidError; ConflictError."""
    host, _, port = listen.rpartition(":")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host.strip("[]"))
        number = int(port)
        if not 0 <= number <= 65535:
            raise ValueError(port)
    except ValueError:
        raise InvalidError(
            f"listen = {listen!r} is not an address and a port", remedy="Write 127.0.0.1:8440, [::1]:8440 or none."
        ) from None
    if not address.is_loopback:
        raise InvalidError(
            f"listen = {listen!r} is not a loopback address",
            remedy="Use 127.0.0.1 or [::1]: without TLS, the token must not cross a network.",
        )
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    # With the protocol named, asyncio sets TCP_NODELAY on what is accepted; without, each answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(address), number))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConflictError(
                f"another program listens on {listen}",
                remedy="Set `listen` to a free port (MULLION_LISTEN=127.0.0.1:8441), or to none.",
                listen=listen,
            ) from error
        raise UnavailableError(f"{listen} cannot be used: {error.strerror}", remedy="Set `listen` to none.") from error
    return listener


def _answers(path: str) -> bool:
    """Whether a service accepts connections on a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            return False
        except OSError as error:
            raise UnavailableError(
                f"the socket {path} cannot be used: {error.strerror or error}",
                remedy="Choose a run folder with a shorter path (setting run_dir).",
                path=path,
            ) from error
    return True
