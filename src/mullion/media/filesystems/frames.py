"""An answer about files as it comes over a connection: frames of `media.confined.channel`, turned into pieces again."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator

from mullion.base.errors import MullionError
from mullion.media.confined import channel
from mullion.media.errors import ReaderDiedError
from mullion.media.filesystems.entries import Hole, Piece, unpack_entry


def read_pieces(read_exactly: Callable[[int], bytes]) -> Generator[Piece, None, None]:
    """The entries and the content of an answer, to its end.

    Raises: the error that the answer ends with; ReaderDiedError for what is no answer; what `read_exactly` raises.
    """
    while True:
        kind, length = channel.HEAD.unpack(read_exactly(channel.HEAD.size))
        if length > channel.FRAME_LIMIT_BYTES:
            raise ReaderDiedError(f"a frame of {length} bytes is larger than any can be")
        payload = read_exactly(length) if length else b""
        try:
            if kind == channel.CONTENT:
                yield payload
            elif kind == channel.ENTRY:
                yield unpack_entry(payload)
            elif kind == channel.HOLE and length == channel.HOLE_BYTES.size:
                yield Hole(channel.HOLE_BYTES.unpack(payload)[0])
            elif kind == channel.END:
                if length:
                    raise MullionError.from_wire(json.loads(payload))
                return
            else:
                raise ValueError(f"a frame {kind!r} of {length} bytes")
        except ValueError as error:
            raise ReaderDiedError(f"what came is no answer: {error}") from error
