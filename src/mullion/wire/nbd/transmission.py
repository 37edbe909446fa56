"""The server's side of the transmission phase, without sockets: request bytes in, calls to the device, reply bytes out.

Spec: "The NBD protocol", sections "Transmission phase", "Structured reply chunk types" and "Metadata querying".

The owner reads into one buffer of `BUFFER_BYTES` and calls `feed` with what is there; requests are parsed in place, one
`unpack_from` each and no object; the payload of a WRITE goes to the device straight from that buffer, the data of a
READ straight into the reply buffer, where replies collect until the input runs dry or `SEND_AT_BYTES` are there. Long
READs go past it, from the page cache to the socket, where both can do that (`pages`).

    feed sees                               and asks for (`wanted`, counted from where it stopped)
    part of a header                        a header
    a WRITE whose payload is not all here   the header and the payload, or PIECE_BYTES of a longer payload

Invariants:
- `wanted` is never more than BUFFER_BYTES; a READ or WRITE over PAYLOAD_LIMIT_BYTES never touches the device.
- Replies are in the order of requests, but for those that wait for a flush: requests behind them are served meanwhile,
  and answered. FLUSH_LIMIT of them may wait; one more is flushed for while the client waits.
- Nothing is held back: who writes to a full storage is told so, ENOSPC.
- A request outside the device is refused whole. A payload is consumed whatever becomes of its request.
Durability: FLUSH and FUA return after `Export.flush`; with several connections one flush covers all, as promised by
CAN_MULTI_CONN. A connection that dies within the payload of a long WRITE leaves any part of it written, none promised.
Not handled: CACHE, RESIZE, FAST_ZERO (not advertised, answered EINVAL); NO_HOLE is accepted and left to the device.
"""

from __future__ import annotations

import errno
import logging
import mmap
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Final

from mullion.base.errors import InvalidError, MullionError, NoSpaceError
from mullion.base.flusher import Flusher, Outcomes
from mullion.base.units import KIB, MIB
from mullion.wire.nbd.contexts import Context, longest_runs
from mullion.wire.nbd.messages import (
    CHUNK,
    CHUNK_ERROR,
    CHUNK_MAGIC,
    OFFSET_CHUNK,
    PAYLOAD_LIMIT_BYTES,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    U32,
    U64,
    Chunk,
    ChunkFlag,
    Command,
    CommandFlag,
    NbdError,
    NbdProtocolError,
)
from mullion.wire.nbd.pages import PAGED_BYTES, PagedDevice, PagePipe
from mullion.wire.nbd.session import Export

log = logging.getLogger(__name__)

PIECE_BYTES: Final = MIB
"""A payload up to this length reaches the device in one call; a longer one in pieces of it. With pieces of 256 KiB a
WRITE of 1 MiB takes half as long again: the client fills its socket's buffer at each of them, and has to be woken."""
BUFFER_BYTES: Final = REQUEST.size + PIECE_BYTES
SEND_AT_BYTES: Final = 128 * KIB
_REPLY_BUFFER_BYTES: Final = 512 * KIB
_READ_CHUNK_BYTES: Final = 256 * KIB
_EXTENTS_PER_REPLY: Final = 4096
FLUSH_LIMIT: Final = 64

_NBD_ERRORS: Final = {
    errno.EPERM: NbdError.EPERM,
    errno.EROFS: NbdError.EPERM,
    errno.ENOMEM: NbdError.ENOMEM,
    errno.ENOSPC: NbdError.ENOSPC,
    errno.EDQUOT: NbdError.ENOSPC,
    errno.EFBIG: NbdError.ENOSPC,
}

# Plain ints: comparing with a member of an IntEnum costs a look-up in the class each time.
_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_DISC: Final = int(Command.DISC)
_FLUSH: Final = int(Command.FLUSH)
_TRIM: Final = int(Command.TRIM)
_WRITE_ZEROES: Final = int(Command.WRITE_ZEROES)
_BLOCK_STATUS: Final = int(Command.BLOCK_STATUS)
_CAPPED: Final = frozenset({_READ, _WRITE, _TRIM, _WRITE_ZEROES})
_FUA: Final = int(CommandFlag.FUA)
_DF: Final = int(CommandFlag.DF)
_REQ_ONE: Final = int(CommandFlag.REQ_ONE)
_DONE: Final = int(ChunkFlag.DONE)
_OFFSET_DATA: Final = int(Chunk.OFFSET_DATA)
_ALLOWED_FLAGS: Final = {
    _READ: _FUA | _DF,
    _WRITE: _FUA,
    _FLUSH: _FUA,
    _TRIM: _FUA,
    _WRITE_ZEROES: _FUA | int(CommandFlag.NO_HOLE),
    _BLOCK_STATUS: _FUA | _REQ_ONE,
}


def untouched(size_bytes: int) -> memoryview:
    """A buffer of zeros that takes no memory until it is written to; `bytearray` writes all of it at once."""
    return memoryview(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class Transmission:
    """One connection's requests. `send` writes all of a buffer to the client, and may raise OSError."""

    def __init__(
        self,
        export: Export,
        *,
        is_structured: bool,
        contexts: Sequence[tuple[int, Context]],
        send: Callable[[memoryview], None],
        is_gone: Callable[[], bool] = lambda: False,
        wake: Callable[[], None] | None = None,
        pages: PagePipe | None = None,
    ) -> None:
        """`wake`, called by another thread, makes the owner call `answer_flushes`; without it flushes are waited for.

        `is_gone` says whether the client went away; it is asked when a request has to wait for long.

        `pages` leads to the same client as `send`; `close` closes it.
        """
        self._export = export
        self._gate = None if export.new_gate is None else export.new_gate()
        self._is_gone = is_gone
        self._device = export.device
        self._size_bytes = export.device.size_bytes
        self._is_read_only = export.is_read_only
        self._is_structured = is_structured
        self._contexts = contexts
        self._send = send
        self._pages = pages
        self._copied_bytes = _READ_CHUNK_BYTES if pages is None else PAGED_BYTES - 1
        self._reply = untouched(_REPLY_BUFFER_BYTES)
        self._reply_view = self._reply
        self._reply_used = 0
        self._flusher: Flusher[OSError | MullionError | None] | None = None
        if wake is not None and not export.is_read_only:
            self._flusher = Flusher(self._flush_aside, wake, name="nbd-flush")
        self._outcomes: Outcomes[OSError | MullionError | None] = SimpleQueue()
        self.flushes = 0
        """How many requests wait for a flush."""
        self._has_logged = False
        # The WRITE whose payload is coming in pieces; None of it matters while nothing is left.
        self._payload_left = 0
        self._payload_offset = 0
        self._payload_cookie = 0
        self._payload_flags = 0
        self._payload_error = 0

        self.wanted = REQUEST.size
        self.is_closed = False
        """The client said goodbye."""
        self.requests = 0
        self.errors = 0
        self.bytes_read = 0
        self.bytes_written = 0

    def feed(self, view: memoryview, start: int, end: int) -> int:
        """Do the requests that lie in `view[start:end]`, and return where the unfinished rest begins.

        Raises: NbdProtocolError when the connection must be closed; OSError from `send`.
        """
        unpack_request = REQUEST.unpack_from
        pack_chunk = OFFSET_CHUNK.pack_into
        reply, reply_view = self._reply, self._reply_view
        self._device = self._export.device
        pread, size_bytes, is_structured = self._device.pread, self._size_bytes, self._is_structured
        copied_bytes, gate = self._copied_bytes, self._gate
        is_limited = gate is not None and gate.is_limited
        if self._payload_left:
            start = self._take_payload(view, start, end)
        while end - start >= 28 and not self._payload_left:
            magic, flags, command, cookie, offset, length = unpack_request(view, start)
            if magic != REQUEST_MAGIC:
                raise NbdProtocolError(f"a request began with {magic:#010x}")
            if is_limited and (command != _WRITE or length > PIECE_BYTES or start + 28 + length <= end):
                self._admit(command, length)
            if (
                command == _READ
                and is_structured
                and 0 < length <= copied_bytes
                and not flags
                and offset + length <= size_bytes
            ):
                start += 28
                self.requests += 1
                used = self._reply_used
                if used + 28 + length > _REPLY_BUFFER_BYTES:
                    self.send_replies()
                    used = 0
                filled = used + 28 + length
                try:
                    pread(offset, reply_view[used + 28 : filled])
                except (OSError, MullionError) as error:
                    self._finish(cookie, self._failed(error, "read", offset))
                    continue
                pack_chunk(reply, used, CHUNK_MAGIC, _DONE, _OFFSET_DATA, cookie, length + 8, offset)
                self._reply_used = filled
                self.bytes_read += length
            elif command == _WRITE:
                if length > PAYLOAD_LIMIT_BYTES:
                    raise NbdProtocolError(f"a WRITE of {length} bytes; {PAYLOAD_LIMIT_BYTES} are allowed")
                payload_end = start + 28 + length
                if payload_end > end and length <= PIECE_BYTES:
                    break
                start += 28
                self.requests += 1
                refusal = self._check(command, flags, offset, length)
                if payload_end > end:
                    self._payload_left, self._payload_offset, self._payload_cookie = length, offset, cookie
                    self._payload_flags, self._payload_error = flags, refusal
                    start = self._take_payload(view, start, end)
                    continue
                if not refusal and length:
                    refusal = self._attempt("write", offset, self._device.pwrite, offset, view[start:payload_end])
                start = payload_end
                self._finish_write(cookie, flags, refusal, length)
            else:
                start += 28
                self.requests += 1
                if command == _DISC:
                    self.is_closed = True
                    return start
                self._do(flags, command, cookie, offset, length)
            if self._reply_used >= SEND_AT_BYTES:
                self.send_replies()
        self.wanted = self._next_wanted(view, start, end)
        return start

    def _admit(self, command: int, length: int) -> None:
        """Wait until the request may go ahead. Raises: ConnectionError when the client went away meanwhile."""
        gate, is_write = self._gate, command != _READ
        if gate is None or command not in _CAPPED:
            return
        size_bytes = min(length, PAYLOAD_LIMIT_BYTES) if command in (_READ, _WRITE) else 0
        if gate.ask(is_write, size_bytes) > 0.0:
            self.send_replies()  # what is finished does not wait for it
            if not gate.wait(is_write, size_bytes, self._is_gone):
                raise ConnectionResetError("the client went away while its request waited for the disk's cap")

    def answer_flushes(self, *, is_last: bool = False) -> None:
        """Prepare the replies of requests whose flush is done; with `is_last` wait for all of them."""
        while self.flushes and (is_last or not self._outcomes.empty()):
            cookie, error = self._outcomes.get()
            self.flushes -= 1
            self._finish(cookie, 0 if error is None else self._failed(error, "flush", 0))

    def close(self) -> None:
        """The connection has ended. Waits for a flush that runs."""
        if self._flusher is not None:
            self._flusher.stop()
        if self._gate is not None:
            self._gate.leave()
        if self._pages is not None:
            self._pages.close()

    def send_replies(self) -> None:
        """Send what is ready. The owner calls it before it waits for more input."""
        if self._reply_used:
            used, self._reply_used = self._reply_used, 0
            self._send(self._reply_view[:used])

    def _next_wanted(self, view: memoryview, start: int, end: int) -> int:
        if self._payload_left:
            return min(self._payload_left, PIECE_BYTES)
        if end - start < REQUEST.size:
            return REQUEST.size
        length: int = U32.unpack_from(view, start + 24)[0]  # only a WRITE is left with a whole header
        return REQUEST.size + length

    def _take_payload(self, view: memoryview, start: int, end: int) -> int:
        """Write the pieces of a long payload that are complete."""
        while self._payload_left:
            piece_bytes = min(self._payload_left, PIECE_BYTES)
            if end - start < piece_bytes:
                return start
            if not self._payload_error:
                offset = self._payload_offset
                piece = view[start : start + piece_bytes]
                self._payload_error = self._attempt("write", offset, self._device.pwrite, offset, piece)
            self._payload_offset += piece_bytes
            self._payload_left -= piece_bytes
            start += piece_bytes
            if self._payload_left == 0:
                length = piece_bytes if not self._payload_error else 0
                self._finish_write(self._payload_cookie, self._payload_flags, self._payload_error, length)
            elif not self._payload_error:
                self.bytes_written += piece_bytes
        return start

    def _finish_write(self, cookie: int, flags: int, error: int, length: int) -> None:
        if not error:
            self.bytes_written += length
        self._finish_change(cookie, flags, error)

    def _finish_change(self, cookie: int, flags: int, error: int) -> None:
        if error or not flags & _FUA:
            self._finish(cookie, error)
        else:
            self._flush(cookie)

    def _do(self, flags: int, command: int, cookie: int, offset: int, length: int) -> None:
        """The commands that are not worth a fast path."""
        device = self._device
        error = self._check(command, flags, offset, length)
        if error:
            self._finish(cookie, error)
        elif command == _READ:
            self._read(flags, cookie, offset, length)
        elif command == _BLOCK_STATUS:
            self._block_status(flags, cookie, offset, length)
        else:
            if command == _FLUSH:
                self._flush(cookie)
                return
            if command == _TRIM:
                error = self._attempt("discard", offset, device.discard, offset, length) if length else 0
            else:
                error = self._attempt("write zeroes", offset, device.write_zeroes, offset, length) if length else 0
            self._finish_change(cookie, flags, error)

    def _check(self, command: int, flags: int, offset: int, length: int) -> int:
        """What is wrong with a request, as the specification's error numbers; 0 for nothing."""
        allowed = _ALLOWED_FLAGS.get(command)
        if allowed is None or flags & ~allowed:
            error = NbdError.EINVAL
        elif command == _FLUSH:
            return 0  # offset and length mean nothing here
        elif self._is_read_only and command in (_WRITE, _TRIM, _WRITE_ZEROES):
            error = NbdError.EPERM
        elif offset + length > self._size_bytes:
            error = NbdError.ENOSPC if command in (_WRITE, _WRITE_ZEROES) else NbdError.EINVAL
        elif (command == _READ and length > PAYLOAD_LIMIT_BYTES) or (
            command == _BLOCK_STATUS and not (self._contexts and length)
        ):
            error = NbdError.EINVAL
        else:
            return 0
        self.errors += 1
        return int(error)

    def _read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if self._is_structured and not flags & _DF and length:
            self._read_in_chunks(cookie, offset, length)
            return
        # One reply in one piece, known to be good before its header leaves: it needs a buffer of its own.
        data = bytearray(length)
        error = self._attempt("read", offset, self._device.pread, offset, data) if length else 0
        if error or not length:
            self._finish(cookie, error)
            return
        self.send_replies()
        if self._is_structured:
            head = OFFSET_CHUNK.pack(CHUNK_MAGIC, _DONE, _OFFSET_DATA, cookie, length + 8, offset)
        else:
            head = SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)
        self._put(head)
        self.send_replies()
        self._send(memoryview(data))
        self.bytes_read += length

    def _read_in_chunks(self, cookie: int, offset: int, length: int) -> None:
        end = offset + length
        pages, device = self._pages, self._device
        while offset < end:
            piece_bytes = min(end - offset, _READ_CHUNK_BYTES)
            done = _DONE if offset + piece_bytes == end else 0
            if pages is not None and piece_bytes >= PAGED_BYTES and isinstance(device, PagedDevice):
                head = OFFSET_CHUNK.pack(CHUNK_MAGIC, done, _OFFSET_DATA, cookie, piece_bytes + 8, offset)
                self.send_replies()  # replies are in order
                if pages.send(head, device, offset, piece_bytes):
                    self.bytes_read += piece_bytes
                    offset += piece_bytes
                    continue
            if self._reply_used + OFFSET_CHUNK.size + piece_bytes > _REPLY_BUFFER_BYTES:
                self.send_replies()
            used = self._reply_used
            filled = used + OFFSET_CHUNK.size + piece_bytes
            piece = self._reply_view[used + OFFSET_CHUNK.size : filled]
            try:
                self._device.pread(offset, piece)
            except (OSError, MullionError) as error:
                self._finish(cookie, self._failed(error, "read", offset))
                return
            OFFSET_CHUNK.pack_into(self._reply, used, CHUNK_MAGIC, done, _OFFSET_DATA, cookie, piece_bytes + 8, offset)
            self._reply_used = filled
            self.bytes_read += piece_bytes
            offset += piece_bytes
            if filled >= SEND_AT_BYTES:
                self.send_replies()

    def _block_status(self, flags: int, cookie: int, offset: int, length: int) -> None:
        limit = 1 if flags & _REQ_ONE else _EXTENTS_PER_REPLY
        chunks: list[bytes] = []
        try:
            for number, context in self._contexts:
                runs = longest_runs(context, offset, length, limit)
                chunks.append(U32.pack(number) + b"".join([U64.pack(size << 32 | state) for size, state in runs]))
        except (OSError, MullionError) as error:
            self._finish(cookie, self._failed(error, "look up extents", offset))
            return
        for payload in chunks:
            done = _DONE if payload is chunks[-1] else 0
            self._put(CHUNK.pack(CHUNK_MAGIC, done, Chunk.BLOCK_STATUS, cookie, len(payload)) + payload)

    def _flush(self, cookie: int) -> None:
        """Flush, and answer: later, where that can be."""
        if self._flusher is not None and self.flushes < FLUSH_LIMIT and self._flusher.ask(self._outcomes, cookie):
            self.flushes += 1
            return
        self.send_replies()  # a flush takes long: what is finished does not wait for it
        self._finish(cookie, self._attempt("flush", 0, self._export.flush))

    def _flush_aside(self) -> OSError | MullionError | None:
        """In the flusher's thread."""
        try:
            self._export.flush()
        except (OSError, MullionError) as error:
            return error
        except Exception as error:  # the root of a thread's task: a fault of ours fails this request, and is not quiet
            log.exception("export %s: a flush failed because of a fault in the export", self._export.name)
            return OSError(errno.EIO, str(error))
        return None

    def _finish(self, cookie: int, error: int) -> None:
        """Answer a request that has no data to send, or that failed."""
        if not self._is_structured:
            self._put(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie))
        elif error:
            head = CHUNK.pack(CHUNK_MAGIC, _DONE, Chunk.ERROR, cookie, CHUNK_ERROR.size)
            self._put(head + CHUNK_ERROR.pack(error, 0))
        else:
            self._put(CHUNK.pack(CHUNK_MAGIC, _DONE, Chunk.NONE, cookie, 0))

    def _put(self, data: bytes) -> None:
        if self._reply_used + len(data) > _REPLY_BUFFER_BYTES:
            self.send_replies()
        used = self._reply_used
        self._reply_view[used : used + len(data)] = data
        self._reply_used = used + len(data)

    def _attempt(self, what: str, offset: int, operation: Callable[..., None], *arguments: object) -> int:
        """Call the device. Returns the error on the wire, 0 for none."""
        try:
            operation(*arguments)
        except (OSError, MullionError) as error:
            return self._failed(error, what, offset)
        return 0

    def _failed(self, error: OSError | MullionError, what: str, offset: int) -> int:
        """Count a request that the device refused and find its number on the wire."""
        self.errors += 1
        if not self._has_logged:  # the first of a connection says what is wrong, a broken disk must not fill the log
            self._has_logged = True
            log.warning("export %s: cannot %s at %d: %s", self._export.name, what, offset, error)
        if isinstance(error, InvalidError):
            return NbdError.EINVAL
        if isinstance(error, NoSpaceError):
            return NbdError.ENOSPC
        return _NBD_ERRORS.get(error.errno or 0, NbdError.EIO) if isinstance(error, OSError) else NbdError.EIO
