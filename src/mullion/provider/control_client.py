"""The control protocol of a provider without its I/O: one JSON object a line, for both ends.

A request is `{"command": name, "id": anything}`; `id` may be left out and comes back with the answer. An answer is an
object without `event`; it has `error` (`code`, `message`, `remedy`, `context`, `exit_code`) when the command failed.
An event, sent to those who subscribed, has `event` and `disk`. Answers come in the order of the requests.
Descriptors come with a request by SCM_RIGHTS, in the message that holds its first byte; `"fds": n` says how many.
"""

from __future__ import annotations

import array
import json
import socket
from collections.abc import Mapping, Sequence
from typing import Final

from mullion.base.errors import InvalidError, TooLargeError

LINE_LIMIT_BYTES: Final = 1024 * 1024
"""Room for the paths of a long chain."""
FDS_LIMIT: Final = 253
"""Descriptors that come with one request: as many as the kernel takes in one message (SCM_MAX_FD)."""
COMMANDS: Final = (
    "status",
    "flush",
    "retry",
    "switch",
    "resize",
    "throttle",
    "trace",
    "fault",
    "hand-over",
    "keep",
    "adopt",
    "subscribe",
    "quit",
)


def encode(message: Mapping[str, object]) -> bytes:
    """A message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def descriptors_of(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came with a message; they are the caller's to close."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


class LineDecoder:
    """Cuts what arrives into lines and lines into objects. After an error the connection is to be closed."""

    def __init__(self, limit_bytes: int = LINE_LIMIT_BYTES) -> None:
        self._buffer = bytearray()
        self._limit_bytes = limit_bytes

    @property
    def is_within_line(self) -> bool:
        """Has a line begun that is not complete?"""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[dict[str, object]]:
        """The objects that are complete now. Raises: TooLargeError for a line too long, InvalidError for another."""
        self._buffer += data
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = rest
        if max(map(len, (*lines, rest))) > self._limit_bytes:
            raise TooLargeError(f"a line of more than {self._limit_bytes} bytes")
        return [_decode(bytes(line)) for line in lines if line.strip()]


def _decode(line: bytes) -> dict[str, object]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidError(f"a line is not JSON: {error}", remedy="Send one JSON object a line.") from error
    if not isinstance(message, dict):
        raise InvalidError("a line is not a JSON object", remedy="Send one JSON object a line.")
    return message
