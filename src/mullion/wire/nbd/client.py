"""An NBD client that is a block device.

Spec: "The NBD protocol"; fixed newstyle, structured replies and `base:allocation` where the server has them.

Invariants: one request at a time, under a lock, so that threads may share a client; data is received straight into the
caller's buffer; what a server sends is checked before it is believed. A connection on which something unexpected came,
or that was silent for longer than the deadline, is closed, because its next bytes cannot be trusted.
Durability: `flush` is NBD_CMD_FLUSH; a server without it has nothing to flush, as the specification says.
Not handled: TLS, servers that insist on a block size, reconnecting.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Iterator
from typing import Final, NoReturn

from mullion.base.block import Buffer, Extent, ExtentKind, WritableBuffer
from mullion.base.errors import DeadlineError, DeniedError, InvalidError, NotFoundError, UnavailableError
from mullion.base.units import MIB
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


class NbdClient:
    """A connection to one export of an NBD server on a unix socket; a `BlockDevice`.

    `read_only` refuses writes here, whatever the server allows. `timeout_s` bounds each wait for the server.
    Raises: UnavailableError when nobody listens; NotFoundError for an unknown export; NbdProtocolError; DeadlineError.
    """

    def __init__(self, path: str, export: str = "", *, read_only: bool = False, timeout_s: float = TIMEOUT_S) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._cookie = 0
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
        for start in range(0, len(view), PAYLOAD_LIMIT_BYTES):
            piece = view[start : start + PAYLOAD_LIMIT_BYTES]
            self._request(Command.READ, offset + start, len(piece), into=piece)

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

    def _request(
        self, command: Command, offset: int, length: int, *, payload: Buffer = b"", into: memoryview | None = None
    ) -> bytes:
        """One request and its whole reply; the payload of a BLOCK_STATUS chunk is returned.

        Raises: OSError with the server's error; UnavailableError, DeadlineError or NbdProtocolError: the connection is
        dead.
        """
        with self._lock:
            self._cookie += 1
            try:
                self._send(REQUEST.pack(REQUEST_MAGIC, 0, command, self._cookie, offset, length), payload)
                if self._is_structured:
                    return self._receive_chunks(offset, into)
                return self._receive_simple(into)
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

    def _receive_simple(self, into: memoryview | None) -> bytes:
        magic, error, cookie = SIMPLE_REPLY.unpack(self._receive(SIMPLE_REPLY.size))
        self._check_reply(magic, SIMPLE_REPLY_MAGIC, cookie)
        if error:
            self._raise_error(error)
        if into is not None:
            self._receive_into(into)
        return b""

    def _receive_chunks(self, offset: int, into: memoryview | None) -> bytes:
        status = b""
        error = received_bytes = 0
        message = ""
        done = False
        while not done:
            head = self._receive(SIMPLE_REPLY.size)
            if U32.unpack_from(head)[0] == SIMPLE_REPLY_MAGIC:  # allowed for all but a READ with data
                magic, error, cookie = SIMPLE_REPLY.unpack(head)
                self._check_reply(magic, SIMPLE_REPLY_MAGIC, cookie)
                if into is not None and not error:
                    raise NbdProtocolError("a simple reply to a READ after structured replies were agreed")
                break
            head += self._receive(CHUNK.size - len(head))
            magic, flags, kind, cookie, length = CHUNK.unpack(head)
            self._check_reply(magic, CHUNK_MAGIC, cookie)
            done = bool(flags & ChunkFlag.DONE)
            if kind == Chunk.OFFSET_DATA and into is not None and length > U64.size:
                position = U64.unpack(self._receive(U64.size))[0] - offset
                self._receive_into(_part(into, position, length - U64.size))
                received_bytes += length - U64.size
            elif kind == Chunk.OFFSET_HOLE and into is not None and length == CHUNK_HOLE.size:
                hole_offset, hole_bytes = CHUNK_HOLE.unpack(self._receive(length))
                _part(into, hole_offset - offset, hole_bytes)[:] = bytes(hole_bytes)
                received_bytes += hole_bytes
            elif length > OPTION_LIMIT_BYTES:
                raise NbdProtocolError(f"a chunk of type {kind} announced {length} bytes")
            else:
                payload = self._receive(length)
                if kind >= Chunk.ERROR and length >= CHUNK_ERROR.size:
                    error, message_bytes = CHUNK_ERROR.unpack_from(payload)
                    message = payload[CHUNK_ERROR.size :][:message_bytes].decode(errors="replace")
                elif kind == Chunk.BLOCK_STATUS:
                    status = payload
                elif kind != Chunk.NONE or length:
                    raise NbdProtocolError(f"an unexpected chunk of type {kind} and {length} bytes")
        if error:
            self._raise_error(error, message)
        if into is not None and received_bytes != len(into):  # chunks may not overlap, so the sum says enough
            raise NbdProtocolError(f"a READ of {len(into)} bytes was answered with {received_bytes}")
        return status

    def _check_reply(self, magic: int, expected: int, cookie: int) -> None:
        if magic != expected or cookie != self._cookie:
            raise NbdProtocolError(
                f"a reply began with {magic:#010x} and cookie {cookie:#x}; the request's cookie is other"
            )

    def _raise_error(self, number: int, message: str = "") -> NoReturn:
        # An unknown number counts as EINVAL (section "Error values").
        code = _ERRNOS.get(NbdError(number), errno.EINVAL) if number in set(NbdError) else errno.EINVAL
        raise OSError(code, f"{os.strerror(code)}{': ' if message else ''}{message}", self._path)

    def _block_status(self, offset: int, length: int) -> list[Extent]:
        payload = self._request(Command.BLOCK_STATUS, offset, length)
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
        connection = self._connected()
        if not payload:
            connection.sendall(head)
            return
        sent = connection.sendmsg([head, payload])
        if sent < len(head):
            connection.sendall(head[sent:])
            sent = len(head)
        if sent < len(head) + len(payload):
            connection.sendall(memoryview(payload)[sent - len(head) :])

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


def _part(view: memoryview, position: int, length: int) -> memoryview:
    if position < 0 or position + length > len(view):
        raise NbdProtocolError(f"a server sent {length} bytes at {position} of a READ of {len(view)}")
    return view[position : position + length]


def _pieces(offset: int, length: int) -> Iterator[tuple[int, int]]:
    for start in range(offset, offset + length, _RANGE_LIMIT_BYTES):
        yield start, min(_RANGE_LIMIT_BYTES, offset + length - start)
