"""The sockets of an NBD server: one thread that accepts, one per connection.

Invariants:
- A flush holds up neither the requests behind it nor other connections, but over TLS.
- A client can hold up nobody but itself: each has its thread and its buffers (1.5 MiB, a pipe of 512 KiB, and 32 MiB
  while a long READ is answered in one piece), and MAX_CONNECTIONS bounds them; one over that is hung up on at once.
  A negotiation has a deadline as a whole.
- No thread outlives `stop`: requests that have arrived are finished and answered, then the connections close.
- With `tls` every client has to begin with STARTTLS and a certificate that the context accepts.
- A client's mistake or death ends its connection, and nothing else.
Without `tls` access is the business of the socket's mode and folder: a TCP listener is to have it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from mullion.base.errors import DeadlineError
from mullion.wire.nbd.messages import REQUEST, NbdProtocolError
from mullion.wire.nbd.pages import PagePipe
from mullion.wire.nbd.session import Export, Handshake, HandshakeState
from mullion.wire.nbd.transmission import BUFFER_BYTES, Transmission, untouched

if TYPE_CHECKING:
    import ssl

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 16
HANDSHAKE_TIMEOUT_S: Final = 30.0
_SOCKET_BUFFER_BYTES: Final = 1024 * 1024


class Counters(NamedTuple):
    """What a server has done since it started, and how many clients it has now."""

    connections: int = 0
    requests: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    errors: int = 0
    """Requests that were refused, or that the device failed."""
    protocol_errors: int = 0
    """Connections that were closed because the client did not keep to the protocol."""


class _Connection:
    """One client and its thread."""

    def __init__(self, server: NbdServer, client: socket.socket, number: int) -> None:
        self._server = server
        self._socket = client
        self._transmission: Transmission | None = None
        self._lock = threading.Lock()  # guards the socket's life: it is shut down by others, closed by the thread
        self._is_closed = False
        self._flushed_fd = -1  # readable when a flush was done; the thread's
        self.thread = threading.Thread(target=self._run, name=f"nbd-{number}", daemon=True)

    def stop(self, *, at_once: bool) -> None:
        """No more requests; with `at_once` no more replies either."""
        with self._lock:
            if not self._is_closed:
                with contextlib.suppress(OSError):  # the client may be gone
                    # Not the method of SSLSocket, which would turn the connection back to plain bytes.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR if at_once else socket.SHUT_RD)

    @property
    def transmission(self) -> Transmission | None:
        return self._transmission

    def _run(self) -> None:
        try:
            self._flushed_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            export = self._negotiate()
            if export is not None and self._transmission is not None:
                self._transmit(self._transmission)
        except NbdProtocolError as error:
            log.warning("closed a client's connection: %s", error)
            self._server.count_protocol_error()
        except TimeoutError:
            log.warning("closed a client's connection: its negotiation took too long")
            self._server.count_protocol_error()
        except OSError as error:
            log.debug("a client's connection broke: %s", error)
        except Exception:  # the root of the thread: a fault of ours ends this connection only, and is not quiet
            log.exception("closed a client's connection because of a fault in the export")
            self._server.count_protocol_error()
        finally:
            if self._transmission is not None:
                self._transmission.close()
            if self._flushed_fd >= 0:
                os.close(self._flushed_fd)
            with self._lock:
                self._is_closed = True
                self._socket.close()
            self._server.forget(self)

    def _negotiate(self) -> Export | None:
        tls = self._server.tls
        client = self._socket
        deadline = time.monotonic() + self._server.handshake_timeout_s
        handshake = Handshake(self._server.exports, offers_tls=tls is not None, requires_tls=tls is not None)
        reply = handshake.greeting
        while True:
            if reply:
                client.settimeout(_time_left_s(deadline))
                client.sendall(reply)
            if handshake.state is HandshakeState.READY:
                break
            if handshake.state is HandshakeState.CLOSED:
                return None
            if handshake.state is HandshakeState.TLS:
                assert tls is not None, "offered"
                client = self._encrypt(tls, deadline)
                handshake.tls_started()
            data = bytearray()
            while len(data) < handshake.wanted:
                client.settimeout(_time_left_s(deadline))
                piece = client.recv(handshake.wanted - len(data))
                if not piece:
                    return None
                data += piece
            reply = handshake.receive(bytes(data))
        client.settimeout(None)
        assert handshake.export is not None
        with self._lock:
            self._transmission = Transmission(
                handshake.export,
                is_structured=handshake.is_structured,
                contexts=handshake.contexts,
                send=client.sendall,
                is_gone=self._is_gone,
                # Of what TLS has taken from the socket and not handed out `poll` knows nothing.
                wake=partial(os.eventfd_write, self._flushed_fd, 1) if tls is None else None,
                pages=PagePipe(client.fileno()) if client.family == socket.AF_UNIX and tls is None else None,
            )
        return handshake.export

    def _encrypt(self, tls: ssl.SSLContext, deadline: float) -> ssl.SSLSocket:
        """Raises: NbdProtocolError when the client has no certificate that is good enough; TimeoutError."""
        from ssl import SSLError  # here, because a provider, which needs none of it, would pay for it

        with self._lock:
            client = tls.wrap_socket(self._socket, server_side=True, do_handshake_on_connect=False)
            self._socket = client
        client.settimeout(_time_left_s(deadline))
        try:
            client.do_handshake()
        except SSLError as error:
            raise NbdProtocolError(f"TLS: {error}", remedy="Give the client a certificate of this server.") from error
        return client

    def _is_gone(self) -> bool:
        poller = select.poll()
        poller.register(self._socket, select.POLLRDHUP)
        return bool(poller.poll(0))

    def _transmit(self, transmission: Transmission) -> None:
        receive_into = self._socket.recv_into
        buffer = untouched(BUFFER_BYTES)
        start = end = 0
        while not transmission.is_closed:
            wanted = transmission.wanted
            if start == end:
                start = end = 0
            elif start + wanted > BUFFER_BYTES:
                buffer[: end - start] = buffer[start:end]
                start, end = 0, end - start
            # Between requests take whatever has come; within a payload no more than it, so that nothing needs moving.
            limit = BUFFER_BYTES if wanted == REQUEST.size else start + wanted
            if transmission.flushes:
                self._wait_and_answer(transmission)
            received = receive_into(buffer[end:limit])
            if received == 0:
                transmission.answer_flushes(is_last=True)
                transmission.send_replies()
                break
            end += received
            if end - start >= wanted:
                start = transmission.feed(buffer, start, end)
                transmission.send_replies()

    def _wait_and_answer(self, transmission: Transmission) -> None:
        """Wait until there is something to receive, and answer what was flushed meanwhile."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(self._flushed_fd, select.POLLIN)
        while True:
            ready = {fd for fd, _event in poller.poll()}
            if self._flushed_fd in ready:
                os.eventfd_read(self._flushed_fd)
                transmission.answer_flushes()
                transmission.send_replies()
                ready.discard(self._flushed_fd)
            if ready or not transmission.flushes:
                return


def _time_left_s(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


class NbdServer:
    """Serves exports on a listening stream socket, which it closes in the end but does not unlink."""

    def __init__(
        self,
        listener: socket.socket,
        exports: Sequence[Export],
        *,
        max_connections: int = MAX_CONNECTIONS,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.tls = tls
        self.exports = tuple(exports)
        self.handshake_timeout_s = handshake_timeout_s
        self._listener = listener
        self._max_connections = max_connections
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._served = 0
        self._past = Counters()
        self._is_stopping = False
        self._wake_fd = -1
        self._acceptor: threading.Thread | None = None

    def start(self) -> None:
        """Accept clients from now on."""
        assert self._acceptor is None
        self._listener.setblocking(False)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._acceptor = threading.Thread(target=self._accept, name="nbd-accept", daemon=True)
        self._acceptor.start()

    def share_listener(self) -> int:
        """Another descriptor of the listening socket."""
        return os.dup(self._listener.fileno())

    def stop(self, *, grace_s: float = 10.0) -> None:
        """Finish what has been asked for, close all connections and join all threads; may be called again.

        Raises: DeadlineError when a request still hangs in the device after `grace_s` and a second more.
        """
        if self._acceptor is None:
            self._listener.close()
            return
        with self._lock:
            self._is_stopping = True
        os.eventfd_write(self._wake_fd, 1)
        self._acceptor.join()
        os.close(self._wake_fd)
        self._acceptor = None
        self._listener.close()
        remaining = self._end_connections(at_once=False, grace_s=grace_s)
        if remaining:
            remaining = self._end_connections(at_once=True, grace_s=1.0)
        if remaining:
            raise DeadlineError(
                f"{remaining} requests to {self.exports[0].name} did not end within {grace_s:g} s",
                remedy="The storage below the disk hangs: end the provider and look into the host's kernel log.",
            )

    def hang_up(self) -> None:
        """Close every connection when it has answered what it has read; new ones are welcome."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.stop(at_once=False)

    def _end_connections(self, *, at_once: bool, grace_s: float) -> int:
        """How many threads are left."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.stop(at_once=at_once)
        deadline = time.monotonic() + grace_s
        for connection in connections:
            connection.thread.join(max(0.0, deadline - time.monotonic()))
        return sum(connection.thread.is_alive() for connection in connections)

    def _accept(self) -> None:
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        poller.register(self._wake_fd, select.POLLIN)
        while True:
            poller.poll()
            with self._lock:
                if self._is_stopping:
                    return
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:
                continue  # the client went away again, or another process took it
            except OSError as error:
                # Out of descriptors or memory: the client waits in the backlog; look again, but do not spin.
                log.warning("cannot accept a client: %s", error)
                pause = select.poll()  # not `select`: the descriptor may be above its 1024
                pause.register(self._wake_fd, select.POLLIN)
                pause.poll(100)
                continue
            self._welcome(client)

    def _welcome(self, client: socket.socket) -> None:
        with self._lock:
            if len(self._connections) >= self._max_connections:
                log.warning("hung up on a client: %d are connected, as many as are allowed", self._max_connections)
                client.close()
                return
            self._served += 1
            connection = _Connection(self, client, self._served)
            self._connections.add(connection)
        if client.family == socket.AF_UNIX:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        else:  # the kernel sizes TCP's own buffers better, and short replies are not to wait for company
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        try:
            connection.thread.start()
        except RuntimeError as error:  # the host allows no more threads
            log.warning("hung up on a client: %s", error)
            client.close()
            self.forget(connection)

    def forget(self, connection: _Connection) -> None:
        """A connection's thread is about to end: keep what it counted."""
        with self._lock:
            self._connections.discard(connection)
            self._past = _sum(self._past, connection.transmission)

    def count_protocol_error(self) -> None:
        with self._lock:
            self._past = self._past._replace(protocol_errors=self._past.protocol_errors + 1)

    @property
    def counters(self) -> Counters:
        with self._lock:
            total = self._past
            for connection in self._connections:
                total = _sum(total, connection.transmission)
            return total._replace(connections=len(self._connections))


def _sum(counters: Counters, transmission: Transmission | None) -> Counters:
    if transmission is None:
        return counters
    return counters._replace(
        requests=counters.requests + transmission.requests,
        errors=counters.errors + transmission.errors,
        bytes_read=counters.bytes_read + transmission.bytes_read,
        bytes_written=counters.bytes_written + transmission.bytes_written,
    )
