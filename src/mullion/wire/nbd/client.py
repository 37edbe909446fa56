"""An NBD client that is a block device.

Spec: "The NBD protocol"; fixed newstyle, structured replies and `base:allocation` where the server has them.

A READ is asked for in pieces of PIECE_BYTES, up to MAX_IN_FLIGHT at once; replies may come in any order. Who reads one
range behind another is read ahead for: the next AHEAD_BYTES are asked for before the call returns, so that the server
works while the caller does. Their replies stay in the socket until the next call gives them a buffer.

Invariants: one caller at a time, under a lock, so that threads may share a client; data is received straight into the
caller's buffer; only a client that is read-only reads ahead, so that no write can come between; at most AHEAD_BYTES
are kept that nobody has asked for. What a server sends is checked before it is believed. A connection on which
something unexpected came, or that was silent for longer than the deadline, is closed, because its next bytes cannot be
trusted.
Durability: `flush` is NBD_CMD_FLUSH; a server without it has nothing to flush, as the specification says.
Not handled: TLS, servers that insist on a block size, reconnecting.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Final, NoReturn

from mullion.base.block import Buffer, Extent, ExtentKind, WritableBuffer
from mullion.base.errors import DeadlineError, DeniedError, InvalidError, NotFoundError, UnavailableError
from mullion.base.units import KIB, MIB
from mullion.wire.nbd.messages import (
    ALLOCATION_CONTEXT,
    CHUNK,
    CHUNK_ERROR,
    CHUNK_HOLE,
    CHUNK_MAGIC,
    CLIENT_FLAGS,
    EXPORT_NAME_PADDING,
    EXPORT_NAME_REPLY,
    GREETING,
    INFO_EXPORT,
    NBD_MAGIC,
    OPTION,
    OPTION_LIMIT_BYTES,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    PAYLOAD_LIMIT_BYTES,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    U16,
    U32,
    U64,
    BlockState,
    Chunk,
    ChunkFlag,
    Command,
    HandshakeFlag,
    Info,
    NbdError,
    NbdProtocolError,
    Option,
    OptionReply,
    TransmissionFlag,
)

TIMEOUT_S: Final = 60.0
PIECE_BYTES: Final = 512 * KIB
AHEAD_BYTES: Final = 2 * MIB
MAX_IN_FLIGHT: Final = 8
"""QEMU takes sixteen requests of one client at once."""
_RANGE_LIMIT_BYTES: Final = 1024 * MIB
"""Longest TRIM, WRITE_ZEROES and BLOCK_STATUS that is asked for: lengths on the wire have 32 bits."""
_ERRNOS: Final = {
    NbdError.EPERM: errno.EPERM,
    NbdError.EIO: errno.EIO,
    NbdError.ENOMEM: errno.ENOMEM,
    NbdError.EINVAL: errno.EINVAL,
    NbdError.ENOSPC: errno.ENOSPC,
    NbdError.EOVERFLOW: errno.EOVERFLOW,
    NbdError.ENOTSUP: errno.ENOTSUP,
    NbdError.ESHUTDOWN: errno.ESHUTDOWN,
}


class _Reply:
    """A request under way, and what has come of its reply."""

    __slots__ = ("command", "error", "is_done", "length", "message", "offset", "received_bytes", "status", "view")

    def __init__(self, command: Command, offset: int, length: int, view: memoryview | None) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.view = view
        """Where the data of a READ goes; None until somebody wants it."""
        self.received_bytes = 0
        self.error = 0
        self.message = ""
        self.status: list[bytes] = []
        """The payloads of BLOCK_STATUS chunks, one a context."""
        self.is_done = False

    @property
    def end(self) -> int:
        return self.offset + self.length

    def part(self, offset: int, length: int) -> memoryview:
        """Where that part of a READ's data goes. Raises: NbdProtocolError when it was not asked for."""
        position = offset - self.offset
        if self.command is not Command.READ or position < 0 or position + length > self.length:
            raise NbdProtocolError(f"a server sent {length} bytes at {offset} in reply to a {self.command.name}")
        if self.view is None:  # read ahead, and the server answers out of order
            self.view = memoryview(bytearray(self.length))
        self.received_bytes += length
        if self.received_bytes > self.length:
            raise NbdProtocolError(f"a READ of {self.length} bytes was answered with more")
        return self.view[position : position + length]


class NbdClient:
    """A connection to one export of an NBD server on a unix socket; a `BlockDevice`.

    `read_only` refuses writes here, whatever the server allows. `timeout_s` bounds each wait for the server.
    Raises: UnavailableError when nobody listens; NotFoundError for an unknown export; NbdProtocolError; DeadlineError.
    """

    def __init__(self, path: str, export: str = "", *, read_only: bool = False, timeout_s: float = TIMEOUT_S) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._cookie = 0
        self._in_flight: dict[int, _Reply] = {}
        self._ahead: list[_Reply] = []
        """READs that nobody has asked for yet, ascending and without gaps."""
        self._read_end = -1
        self._is_structured = False
        self._context_id: int | None = None
        self._size_bytes = 0
        self._flags = TransmissionFlag(0)
        self._socket: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(path)
            self._negotiate(export)
        except (TimeoutError, BlockingIOError) as error:
            self._disconnect()
            raise DeadlineError(f"the NBD server at {path} did not answer in time", path=path) from error
        except OSError as error:
            self._disconnect()
            raise UnavailableError(
                f"no NBD server answers at {path}: {error.strerror or error}",
                remedy="Start what serves the disk, then try again.",
                path=path,
            ) from error
        except BaseException:
            self._disconnect()
            raise
        self._read_only = read_only or TransmissionFlag.READ_ONLY in self._flags

    # -- what a block device does ------------------------------------------------------------------------------------

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def read_only(self) -> bool:
        return self._read_only

    @property
    def flags(self) -> TransmissionFlag:
        """What the server says that the export can do."""
        return self._flags

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        view = memoryview(buffer).cast("B")
        self._check_range(offset, len(view))
        with self._lock, self._trusted(Command.READ):
            self._read(offset, view)

    def pwrite(self, offset: int, buffer: Buffer) -> None:
        view = memoryview(buffer).cast("B")
        self._check_range(offset, len(view))
        self._check_writable()
        for start in range(0, len(view), PAYLOAD_LIMIT_BYTES):
            piece = view[start : start + PAYLOAD_LIMIT_BYTES]
            self._request(Command.WRITE, offset + start, len(piece), payload=piece)

    def flush(self) -> None:
        if TransmissionFlag.SEND_FLUSH in self._flags:
            self._request(Command.FLUSH, 0, 0)

    def discard(self, offset: int, length: int) -> None:
        self._check_range(offset, length)
        self._check_writable()
        if TransmissionFlag.SEND_TRIM in self._flags:
            for start, piece_bytes in _pieces(offset, length):
                self._request(Command.TRIM, start, piece_bytes)

    def write_zeroes(self, offset: int, length: int) -> None:
        self._check_range(offset, length)
        self._check_writable()
        if TransmissionFlag.SEND_WRITE_ZEROES in self._flags:
            for start, piece_bytes in _pieces(offset, length):
                self._request(Command.WRITE_ZEROES, start, piece_bytes)
            return
        zeroes = bytes(min(length, MIB))
        for start in range(offset, offset + length, MIB):
            self.pwrite(start, zeroes[: offset + length - start])

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        self._check_range(offset, length)
        end = offset + length
        while offset < end:
            if self._context_id is None:
                yield Extent(offset, end - offset, ExtentKind.DATA)
                return
            for extent in self._block_status(offset, min(end - offset, _RANGE_LIMIT_BYTES)):
                yield extent
                offset = extent.offset + extent.length

    def close(self) -> None:
        if self._socket is None:
            return
        try:
            if not self._read_only:
                self.flush()
            with self._lock, contextlib.suppress(ConnectionError):  # no need to say goodbye to one who has gone
                self._send(REQUEST.pack(REQUEST_MAGIC, 0, Command.DISC, self._cookie, 0, 0))
        finally:
            self._disconnect()

    def abort(self) -> None:
        """End the connection, from any thread: whoever waits for the server gets UnavailableError."""
        if (connection := self._socket) is not None:
            with contextlib.suppress(OSError):  # it ends just now
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self._size_bytes:
            raise InvalidError(
                f"{length} bytes at {offset} are outside the disk of {self._size_bytes} bytes",
                remedy="Ask for a range inside the disk.",
                path=self._path,
                offset=offset,
            )

    def _check_writable(self) -> None:
        if self._read_only:
            raise DeniedError(f"{self._path} is open for reading only", remedy="Open it for writing.", path=self._path)

    # -- transmission ------------------------------------------------------------------------------------------------

    def _request(self, command: Command, offset: int, length: int, *, payload: Buffer = b"") -> list[bytes]:
        """One request and its whole reply; the payloads of BLOCK_STATUS chunks are returned.

        Raises: OSError with the server's error; UnavailableError, DeadlineError or NbdProtocolError: the connection is
        dead.
        """
        with self._lock, self._trusted(command):
            reply = self._begin(command, offset, length, payload=payload)
            self._finish(reply)
            return reply.status

    @contextlib.contextmanager
    def _trusted(self, command: Command) -> Iterator[None]:
        """Whatever makes the next bytes of the connection doubtful ends it."""
        try:
            yield
        except TimeoutError as error:
            self._disconnect()
            raise DeadlineError(
                f"the NBD server at {self._path} did not answer {command.name} in time", path=self._path
            ) from error
        except (ConnectionError, _EndOfStreamError) as error:
            self._disconnect()
            raise UnavailableError(
                f"the NBD server at {self._path} closed the connection during {command.name}",
                remedy="Connect again; a write that was not answered may or may not be there.",
                path=self._path,
            ) from error
        except NbdProtocolError:
            self._disconnect()
            raise

    def _read(self, offset: int, view: memoryview) -> None:
        """Fill the view by several requests at once, the first of which may have been sent already."""
        is_sequential, self._read_end = offset == self._read_end, offset + len(view)
        try:
            wanted, here = self._claim_ahead(offset, view)
            pieces = _read_pieces(here, self._read_end)
            piece = next(pieces, None)
            while piece or wanted:
                while piece and len(self._in_flight) < MAX_IN_FLIGHT:
                    start, length = piece
                    wanted.append(self._begin(Command.READ, start, length, view=view[start - offset :][:length]))
                    piece = next(pieces, None)
                if not piece and is_sequential and self._read_only:
                    self._read_ahead()
                self._finish(wanted.pop(0))
        except OSError as error:
            if not isinstance(error, (TimeoutError, ConnectionError)):  # else the connection is dead
                self._settle()
            raise

    def _claim_ahead(self, offset: int, view: memoryview) -> tuple[list[_Reply], int]:
        """Take from what was read ahead; what is under way gets its place in the view. Where the rest of it begins.

        What was read ahead of another place is of no use: it is waited for and forgotten.
        """
        end, here = offset + len(view), offset
        claimed: list[_Reply] = []
        while here < end and self._ahead and self._ahead[0].offset <= here < self._ahead[0].end:
            reply = self._ahead[0]
            stop = min(end, reply.end)
            place = view[here - offset : stop - offset]
            if reply.view is None and (reply.offset, reply.end) == (here, stop):
                reply.view = place
                claimed.append(reply)
            else:  # it was answered out of order, or is wanted in parts
                self._finish(reply)
                assert reply.view is not None, "it is whole"
                place[:] = reply.view[here - reply.offset : stop - reply.offset]
            if reply.end <= end:
                self._ahead.pop(0)
            here = stop
        if here < end and self._ahead:
            self._settle(claimed)
        return claimed, here

    def _settle(self, kept: Sequence[_Reply] = ()) -> None:
        """Wait for every reply under way but the kept ones, and forget what was read ahead."""
        self._ahead.clear()
        while any(reply not in kept for reply in self._in_flight.values()):
            self._receive_reply()

    def _read_ahead(self) -> None:
        """Ask for what comes next, as far as the limits go."""
        start = self._ahead[-1].end if self._ahead else self._read_end
        for piece_start, length in _read_pieces(start, min(self._read_end + AHEAD_BYTES, self._size_bytes)):
            if len(self._in_flight) >= MAX_IN_FLIGHT:
                return
            self._ahead.append(self._begin(Command.READ, piece_start, length))

    def _begin(
        self, command: Command, offset: int, length: int, *, payload: Buffer = b"", view: memoryview | None = None
    ) -> _Reply:
        self._cookie += 1
        reply = _Reply(command, offset, length, view)
        self._in_flight[self._cookie] = reply
        self._send(REQUEST.pack(REQUEST_MAGIC, 0, command, self._cookie, offset, length), payload)
        return reply

    def _finish(self, reply: _Reply) -> None:
        """Receive until that reply is whole. Raises: OSError with the server's error; NbdProtocolError."""
        while not reply.is_done:
            self._receive_reply()
        if reply.error:
            self._raise_error(reply.error, reply.message)
        if reply.command is Command.READ and reply.received_bytes != reply.length:
            # Chunks may not overlap, so the sum says enough.
            raise NbdProtocolError(f"a READ of {reply.length} bytes was answered with {reply.received_bytes}")

    def _receive_reply(self) -> None:
        """Receive a simple reply or one chunk, of any request under way."""
        head = self._receive(SIMPLE_REPLY.size)
        if U32.unpack_from(head)[0] == SIMPLE_REPLY_MAGIC:
            _, error, cookie = SIMPLE_REPLY.unpack(head)
            reply = self._reply_to(cookie)
            if reply.command is Command.READ and not error:
                if self._is_structured:  # allowed for all but a READ with data
                    raise NbdProtocolError("a simple reply to a READ after structured replies were agreed")
                self._receive_into(reply.part(reply.offset, reply.length))
            reply.error = error
            self._end(cookie)
            return
        if not self._is_structured:
            raise NbdProtocolError(f"a reply began with {U32.unpack_from(head)[0]:#010x}")
        head += self._receive(CHUNK.size - len(head))
        magic, flags, kind, cookie, length = CHUNK.unpack(head)
        if magic != CHUNK_MAGIC:
            raise NbdProtocolError(f"a reply began with {magic:#010x}")
        self._receive_chunk(self._reply_to(cookie), kind, length)
        if flags & ChunkFlag.DONE:
            self._end(cookie)

    def _receive_chunk(self, reply: _Reply, kind: int, length: int) -> None:
        if kind == Chunk.OFFSET_DATA and length > U64.size:
            offset = U64.unpack(self._receive(U64.size))[0]
            self._receive_into(reply.part(offset, length - U64.size))
        elif kind == Chunk.OFFSET_HOLE and length == CHUNK_HOLE.size:
            offset, hole_bytes = CHUNK_HOLE.unpack(self._receive(length))
            place = reply.part(offset, hole_bytes)
            place[:] = bytes(hole_bytes)
        elif length > OPTION_LIMIT_BYTES:
            raise NbdProtocolError(f"a chunk of type {kind} announced {length} bytes")
        else:
            payload = self._receive(length)
            if kind >= Chunk.ERROR and length >= CHUNK_ERROR.size:
                reply.error, message_bytes = CHUNK_ERROR.unpack_from(payload)
                reply.message = payload[CHUNK_ERROR.size :][:message_bytes].decode(errors="replace")
            elif kind == Chunk.BLOCK_STATUS and reply.command is Command.BLOCK_STATUS and not reply.status:
                reply.status.append(payload)
            elif kind != Chunk.NONE or length:
                raise NbdProtocolError(f"an unexpected chunk of type {kind} and {length} bytes")

    def _reply_to(self, cookie: int) -> _Reply:
        reply = self._in_flight.get(cookie)
        if reply is None:
            raise NbdProtocolError(f"a reply has cookie {cookie:#x}; no request under way has it")
        return reply

    def _end(self, cookie: int) -> None:
        self._in_flight.pop(cookie).is_done = True

    def _raise_error(self, number: int, message: str = "") -> NoReturn:
        # An unknown number counts as EINVAL (section "Error values").
        code = _ERRNOS.get(NbdError(number), errno.EINVAL) if number in set(NbdError) else errno.EINVAL
        raise OSError(code, f"{os.strerror(code)}{': ' if message else ''}{message}", self._path)

    def _block_status(self, offset: int, length: int) -> list[Extent]:
        payload = b"".join(self._request(Command.BLOCK_STATUS, offset, length))
        if len(payload) < U32.size + U64.size or len(payload) % U64.size != U32.size:
            raise self._distrust(f"a BLOCK_STATUS of {length} bytes was answered with {len(payload)} bytes")
        if U32.unpack_from(payload)[0] != self._context_id:
            raise self._distrust("a BLOCK_STATUS was answered for another context")
        extents = []
        end = offset + length
        for (descriptor,) in U64.iter_unpack(payload[U32.size :]):
            run_bytes, state = min(descriptor >> 32, end - offset), descriptor & 0xFFFFFFFF
            if run_bytes == 0:
                if descriptor >> 32 == 0:
                    raise self._distrust("a BLOCK_STATUS was answered with an empty extent")
                break
            kind = ExtentKind.DATA
            if state & BlockState.ZERO:
                kind = ExtentKind.HOLE if state & BlockState.HOLE else ExtentKind.ZERO
            extents.append(Extent(offset, run_bytes, kind))
            offset += run_bytes
        return extents

    def _distrust(self, message: str) -> NbdProtocolError:
        self._disconnect()
        return NbdProtocolError(message)

    # -- negotiation -------------------------------------------------------------------------------------------------

    def _negotiate(self, export: str) -> None:
        try:
            magic, option_magic, flags = GREETING.unpack(self._receive(GREETING.size))
            if magic != NBD_MAGIC or option_magic != OPTION_MAGIC or not flags & HandshakeFlag.FIXED_NEWSTYLE:
                raise NbdProtocolError(f"{self._path} does not speak the fixed newstyle of NBD")
            self._send(CLIENT_FLAGS.pack(flags & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)))
            name = export.encode()
            named = U32.pack(len(name)) + name
            self._is_structured = self._ask(Option.STRUCTURED_REPLY, b"")[0] == OptionReply.ACK
            if self._is_structured:
                query = ALLOCATION_CONTEXT.encode()
                self._ask(Option.SET_META_CONTEXT, named + U32.pack(1) + U32.pack(len(query)) + query)
            reply, data = self._ask(Option.GO, named + U16.pack(0))
            if reply == OptionReply.ERR_UNSUP:
                self._open_by_name(name, flags)
            elif reply == OptionReply.ERR_UNKNOWN:
                raise NotFoundError(
                    f"the NBD server at {self._path} has no export {export!r}", remedy="List its exports with nbdinfo."
                )
            elif reply != OptionReply.ACK:
                said = data.decode(errors="replace")
                raise UnavailableError(
                    f"the NBD server at {self._path} refused export {export!r}: {said or hex(reply)}",
                    remedy="The server wants something that this client does not have, such as TLS or a block size.",
                )
            elif not self._flags:
                raise NbdProtocolError(f"{self._path} opened export {export!r} without saying its size")
        except _EndOfStreamError as error:
            raise UnavailableError(
                f"the NBD server at {self._path} hung up during the negotiation",
                remedy="It has as many clients as it allows, or it is stopping; try again.",
                path=self._path,
            ) from error

    def _open_by_name(self, name: bytes, flags: int) -> None:
        self._send(OPTION.pack(OPTION_MAGIC, Option.EXPORT_NAME, len(name)), name)
        self._size_bytes, bits = EXPORT_NAME_REPLY.unpack(self._receive(EXPORT_NAME_REPLY.size))
        if not flags & HandshakeFlag.NO_ZEROES:
            self._receive(len(EXPORT_NAME_PADDING))
        self._flags = TransmissionFlag(bits) | TransmissionFlag.HAS_FLAGS

    def _ask(self, option: Option, data: bytes) -> tuple[int, bytes]:
        """One option: the reply that ends it, and its data. What comes before is kept."""
        self._send(OPTION.pack(OPTION_MAGIC, option, len(data)), data)
        while True:
            magic, answered, kind, length = OPTION_REPLY.unpack(self._receive(OPTION_REPLY.size))
            if magic != OPTION_REPLY_MAGIC or answered != option or length > OPTION_LIMIT_BYTES:
                raise NbdProtocolError(
                    f"{self._path} answered {option.name} with {magic:#x}, {answered}, {length} bytes"
                )
            reply = self._receive(length)
            if kind == OptionReply.ACK or kind >= OptionReply.ERR_UNSUP:
                return kind, reply
            if kind == OptionReply.META_CONTEXT and reply[U32.size :] == ALLOCATION_CONTEXT.encode():
                self._context_id = U32.unpack_from(reply)[0]
            elif kind == OptionReply.INFO and length == INFO_EXPORT.size and U16.unpack_from(reply)[0] == Info.EXPORT:
                _, self._size_bytes, bits = INFO_EXPORT.unpack(reply)
                self._flags = TransmissionFlag(bits) | TransmissionFlag.HAS_FLAGS

    # -- the socket --------------------------------------------------------------------------------------------------

    def _disconnect(self) -> None:
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()

    def _connected(self) -> socket.socket:
        if self._socket is None:
            raise UnavailableError(
                f"the connection to the NBD server at {self._path} is closed", remedy="Connect again.", path=self._path
            )
        return self._socket

    def _send(self, head: bytes, payload: Buffer = b"") -> None:
        """A server that is gone is an error, also in a process that SIGPIPE would end."""
        connection = self._connected()
        if not payload:
            connection.sendall(head, socket.MSG_NOSIGNAL)
            return
        sent = connection.sendmsg([head, payload], (), socket.MSG_NOSIGNAL)
        if sent < len(head):
            connection.sendall(head[sent:], socket.MSG_NOSIGNAL)
            sent = len(head)
        if sent < len(head) + len(payload):
            connection.sendall(memoryview(payload)[sent - len(head) :], socket.MSG_NOSIGNAL)

    def _receive(self, length: int) -> bytes:
        buffer = bytearray(length)
        self._receive_into(memoryview(buffer))
        return bytes(buffer)

    def _receive_into(self, view: memoryview) -> None:
        connection = self._connected()
        while view:
            received = connection.recv_into(view)
            if received == 0:
                raise _EndOfStreamError
            view = view[received:]


class _EndOfStreamError(Exception):
    """The server closed the connection where it should have said something."""


def _read_pieces(start: int, end: int) -> Iterator[tuple[int, int]]:
    """A range cut at the multiples of PIECE_BYTES: (offset, length)."""
    while start < end:
        stop = min(end, (start // PIECE_BYTES + 1) * PIECE_BYTES)
        yield start, stop - start
        start = stop


def _pieces(offset: int, length: int) -> Iterator[tuple[int, int]]:
    for start in range(offset, offset + length, _RANGE_LIMIT_BYTES):
        yield start, min(_RANGE_LIMIT_BYTES, offset + length - start)
