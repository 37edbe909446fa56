"""A partition's serial console: a websocket whose binary messages are the line's bytes, both ways."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import msgspec

from mullion.base.errors import MullionError, UnavailableError
from mullion.model.views import ErrorView

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

    from mullion.client.transport import Transport


class Console:
    """Bytes from the guest by iteration, bytes to the guest by `send`. One thread may iterate while another sends."""

    def __init__(self, connection: ClientConnection, stack: ExitStack) -> None:
        self._connection = connection
        self._stack = stack

    @classmethod
    def open(cls, transport: Transport, path: str, timeout_s: float) -> Console:
        """Connect. Raises: what the service refuses, such as a partition that does not run."""
        from websockets.exceptions import InvalidHandshake, InvalidStatus
        from websockets.sync.client import connect

        sock = transport.connect(timeout_s)
        host = "localhost" if transport.socket_path else transport.url.partition("://")[2].rstrip("/")
        stack = ExitStack()
        try:
            connection = stack.enter_context(
                connect(
                    f"ws://{host}{path}",
                    sock=sock,
                    additional_headers=transport.authorization(),
                    compression=None,
                    open_timeout=timeout_s,
                    proxy=None,
                )
            )
        except InvalidStatus as error:
            sock.close()
            raise _refusal(error.response.body, error.response.status_code) from error
        except (InvalidHandshake, OSError, EOFError) as error:
            sock.close()
            raise UnavailableError(f"the console cannot be opened: {error}") from error
        sock.settimeout(None)
        return cls(connection, stack)

    def __iter__(self) -> Iterator[bytes]:
        """What the guest writes, until the console ends or is closed."""
        from websockets.exceptions import ConnectionClosed

        while True:
            try:
                message = self._connection.recv()
            except ConnectionClosed as error:
                received = error.rcvd
                if received is not None and received.code not in (1000, 1001, 1005):
                    raise UnavailableError(f"the console ended: {received.reason or received.code}") from error
                return
            yield message.encode() if isinstance(message, str) else message

    def send(self, data: bytes) -> None:
        """Bytes to the guest. Raises: UnavailableError when the console has ended."""
        from websockets.exceptions import ConnectionClosed

        try:
            self._connection.send(data)
        except ConnectionClosed as error:
            raise UnavailableError("the console has ended", remedy="Open it again.") from error

    def close(self) -> None:
        """May be called again, and from another thread than the one that iterates."""
        self._stack.close()
        self._connection.close()


def _refusal(body: bytes | bytearray | None, status: int) -> MullionError:
    try:
        view = msgspec.json.decode(body or b"", type=ErrorView)
    except msgspec.MsgspecError:
        return UnavailableError(f"the console is refused with status {status}")
    return MullionError.from_wire(msgspec.to_builtins(view))
