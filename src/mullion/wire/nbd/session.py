"""The server's side of the negotiation, without I/O: bytes in, bytes out.

Spec: "The NBD protocol", sections "Negotiation phase" and "Option types" (fixed newstyle).

The owner sends `greeting`, then reads exactly `wanted` bytes, gives them to `receive` and sends what it returns, until
`state` is READY (go on with `Transmission`) or CLOSED (hang up).

    state     wants                         then
    FLAGS     client flags (4 bytes)        HEADER
    HEADER    option header (16 bytes)      DATA, or as below when the option has no data
    DATA      the option's data             HEADER; READY after GO or EXPORT_NAME; CLOSED after ABORT; TLS
                                            after STARTTLS
    TLS       `tls_started`, when the       HEADER; what was agreed before is forgotten
              owner has sent the reply
              and done TLS's handshake

Invariants: what a client makes us keep is bounded by OPTION_LIMIT_BYTES; a wrong magic, an unknown client flag and a
too long option raise, every other mistake is answered with an error reply and the negotiation goes on.
With `requires_tls` nothing but STARTTLS and ABORT is answered before TLS: neither names nor sizes leave unencrypted.
Not handled: extended headers (answered "unsupported", as the specification asks).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from mullion.base.block import BlockDevice, LostDataError, raised_again
from mullion.wire.nbd.contexts import Context, DirtyBitmap, contexts_of, matching
from mullion.wire.nbd.messages import (
    CLIENT_FLAGS,
    EXPORT_NAME_PADDING,
    EXPORT_NAME_REPLY,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    NAME_LIMIT_BYTES,
    NBD_MAGIC,
    OPTION,
    OPTION_LIMIT_BYTES,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    PAYLOAD_LIMIT_BYTES,
    PREFERRED_BLOCK_BYTES,
    U16,
    U32,
    HandshakeFlag,
    Info,
    NbdProtocolError,
    Option,
    OptionReply,
    TransmissionFlag,
)

_SERVER_FLAGS: Final = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES


class Gate(Protocol):
    """Who is asked, by one connection, before it takes a request that reads or changes data."""

    @property
    def is_limited(self) -> bool:
        """Whether it has to be asked at all."""
        ...

    def ask(self, is_write: bool, size_bytes: int) -> float:
        """0.0 to go ahead, else the seconds that it will take at most."""
        ...

    def wait(self, is_write: bool, size_bytes: int, is_gone: Callable[[], bool]) -> bool:
        """Sleep until that request may go ahead; False when `is_gone` said so meanwhile."""
        ...

    def leave(self) -> None:
        """The connection has ended."""
        ...


@dataclass(slots=True)
class Export:
    """A block device under a name. The empty name, the protocol's default export, means the first one of a server."""

    name: str
    device: BlockDevice
    read_only: bool = False
    new_gate: Callable[[], Gate] | None = None
    """Makes the gate of a connection; `device` may be replaced by one of the same size at any time."""
    bitmaps: Mapping[str, DirtyBitmap] = field(default_factory=dict)
    """What `qemu:dirty-bitmap:NAME` tells, by NAME."""
    description: str = ""
    """For people, when a client asks for it."""
    _lost: LostDataError | None = field(default=None, init=False)

    def flush(self) -> None:
        """Flush the device; once it has lost something this fails for ever.

        A client may keep an error to itself, stop whoever wrote, and repeat the request until it succeeds: so does
        QEMU (`werror=stop`), whose guest would be told that all is there. Raises: OSError, MullionError.
        """
        if self._lost is not None:
            raise raised_again(self._lost) from self._lost
        try:
            self.device.flush()
        except LostDataError as error:
            self._lost = error
            raise

    @property
    def contexts(self) -> tuple[Context, ...]:
        """What BLOCK_STATUS can tell; the id of a context is its place here, from 1."""
        return contexts_of(lambda: self.device, self.bitmaps)

    @property
    def is_read_only(self) -> bool:
        return self.read_only or self.device.read_only

    @property
    def flags(self) -> TransmissionFlag:
        flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_DF
        # One flush covers the writes of every connection, because they share one device: the condition of multi-conn.
        flags |= TransmissionFlag.CAN_MULTI_CONN
        if self.is_read_only:
            return flags | TransmissionFlag.READ_ONLY
        return flags | TransmissionFlag.SEND_FUA | TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES


class HandshakeState(enum.Enum):
    FLAGS = "flags"
    HEADER = "header"
    DATA = "data"
    TLS = "tls"
    READY = "ready"
    CLOSED = "closed"


class _RefusedError(Exception):
    """An option that is answered with an error reply; the negotiation goes on."""

    def __init__(self, reply: OptionReply, message: str) -> None:
        super().__init__(message)
        self.reply = reply


class Handshake:
    """One client's negotiation."""

    def __init__(self, exports: Sequence[Export], *, offers_tls: bool = False, requires_tls: bool = False) -> None:
        assert offers_tls or not requires_tls
        self._offers_tls = offers_tls
        self._requires_tls = requires_tls
        self._is_encrypted = False
        self._exports = tuple(exports)
        self._by_name = {export.name: export for export in reversed(self._exports)}
        self._option = 0
        self._flags = HandshakeFlag(0)
        self._context_export: Export | None = None
        self._contexts: tuple[tuple[int, Context], ...] = ()
        self.state = HandshakeState.FLAGS
        self.wanted = CLIENT_FLAGS.size
        self.export: Export | None = None
        """What the client chose; set when READY."""
        self.is_structured = False
        """The client asked for structured replies."""

    @property
    def greeting(self) -> bytes:
        return GREETING.pack(NBD_MAGIC, OPTION_MAGIC, _SERVER_FLAGS)

    @property
    def contexts(self) -> tuple[tuple[int, Context], ...]:
        """The contexts that the client chose of the export that it opened, each with its id."""
        return self._contexts if self.export is not None and self._context_export is self.export else ()

    def tls_started(self) -> None:
        """The connection is encrypted from here on; the client has to agree on everything anew (section "STARTTLS")."""
        assert self.state is HandshakeState.TLS
        self._is_encrypted = True
        self.is_structured = False
        self._context_export, self._contexts = None, ()
        self._expect_header()

    def receive(self, data: bytes) -> bytes:
        """Take exactly `wanted` bytes and return the reply, often empty.

        Raises: NbdProtocolError when the connection must be closed.
        """
        assert len(data) == self.wanted
        if self.state is HandshakeState.FLAGS:
            return self._receive_flags(data)
        if self.state is HandshakeState.HEADER:
            return self._receive_header(data)
        assert self.state is HandshakeState.DATA
        return self._receive_option(data)

    def _receive_flags(self, data: bytes) -> bytes:
        flags = CLIENT_FLAGS.unpack(data)[0]
        if flags & ~int(_SERVER_FLAGS):  # of an IntFlag, ~ would keep to the bits that have names
            raise NbdProtocolError(f"the client answered with unknown flags {flags:#x}")
        self._flags = HandshakeFlag(flags)
        self._expect_header()
        return b""

    def _receive_header(self, data: bytes) -> bytes:
        magic, self._option, length = OPTION.unpack(data)
        if magic != OPTION_MAGIC:
            raise NbdProtocolError(f"an option began with {magic:#018x}")
        if length > OPTION_LIMIT_BYTES:
            raise NbdProtocolError(f"option {self._option} announced {length} bytes; {OPTION_LIMIT_BYTES} are allowed")
        if length == 0:
            return self._receive_option(b"")
        self.state = HandshakeState.DATA
        self.wanted = length
        return b""

    def _expect_header(self) -> None:
        self.state = HandshakeState.HEADER
        self.wanted = OPTION.size

    def _receive_option(self, data: bytes) -> bytes:
        self._expect_header()
        is_locked = self._requires_tls and not self._is_encrypted
        if self._option == Option.EXPORT_NAME:  # the one option without an option reply
            if is_locked:
                raise NbdProtocolError("the client wants an export without TLS", remedy="Use the client's TLS options.")
            return self._export_name(data)
        if HandshakeFlag.FIXED_NEWSTYLE not in self._flags:
            raise NbdProtocolError(f"option {self._option} from a client that does not speak fixed newstyle")
        handler = self._HANDLERS.get(self._option)
        try:
            if handler is None:
                raise _RefusedError(OptionReply.ERR_UNSUP, "unsupported option")
            if is_locked and self._option not in (Option.STARTTLS, Option.ABORT):
                raise _RefusedError(OptionReply.ERR_TLS_REQD, "TLS comes first")
            return handler(self, data)
        except _RefusedError as refused:
            return self._reply(refused.reply, str(refused).encode())

    def _reply(self, kind: OptionReply, data: bytes = b"") -> bytes:
        return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, self._option, kind, len(data)) + data

    def _find(self, name: bytes) -> Export | None:
        if not name:
            return self._exports[0] if self._exports else None
        try:
            return self._by_name.get(name.decode())
        except UnicodeDecodeError:
            return None

    def _open(self, export: Export) -> None:
        self.export = export
        self.state = HandshakeState.READY
        self.wanted = 0

    def _export_name(self, data: bytes) -> bytes:
        export = self._find(data)
        if export is None:  # the option has no error reply: the specification says to hang up
            raise NbdProtocolError("the client asked for an export that is not here", remedy="Use the export's name.")
        self._open(export)
        reply = EXPORT_NAME_REPLY.pack(export.device.size_bytes, export.flags)
        return reply if HandshakeFlag.NO_ZEROES in self._flags else reply + EXPORT_NAME_PADDING

    def _abort(self, _data: bytes) -> bytes:
        self.state = HandshakeState.CLOSED
        self.wanted = 0
        return self._reply(OptionReply.ACK)

    def _list(self, data: bytes) -> bytes:
        if data:
            raise _RefusedError(OptionReply.ERR_INVALID, "LIST takes no data")
        names = [export.name.encode() for export in self._exports]
        replies = [self._reply(OptionReply.SERVER, U32.pack(len(name)) + name) for name in names]
        return b"".join([*replies, self._reply(OptionReply.ACK)])

    def _info(self, data: bytes) -> bytes:
        name, position = _take_name(data)
        wishes = _take_info_requests(data, position)
        export = self._find(name)
        if export is None:
            raise _RefusedError(OptionReply.ERR_UNKNOWN, "no such export")
        replies = [self._reply(OptionReply.INFO, INFO_EXPORT.pack(Info.EXPORT, export.device.size_bytes, export.flags))]
        if Info.NAME in wishes:
            replies.append(self._reply(OptionReply.INFO, U16.pack(Info.NAME) + export.name.encode()))
        if Info.DESCRIPTION in wishes and export.description:
            replies.append(self._reply(OptionReply.INFO, U16.pack(Info.DESCRIPTION) + export.description.encode()))
        if Info.BLOCK_SIZE in wishes:
            sizes = INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, 1, PREFERRED_BLOCK_BYTES, PAYLOAD_LIMIT_BYTES)
            replies.append(self._reply(OptionReply.INFO, sizes))
        replies.append(self._reply(OptionReply.ACK))
        if self._option == Option.GO:
            self._open(export)
        return b"".join(replies)

    def _structured_reply(self, data: bytes) -> bytes:
        if data:
            raise _RefusedError(OptionReply.ERR_INVALID, "STRUCTURED_REPLY takes no data")
        self.is_structured = True
        return self._reply(OptionReply.ACK)

    def _meta_context(self, data: bytes) -> bytes:
        choosing = self._option == Option.SET_META_CONTEXT
        if choosing:
            self._context_export, self._contexts = None, ()  # a refused choice leaves nothing chosen
        if not self.is_structured:
            raise _RefusedError(OptionReply.ERR_INVALID, "structured replies come first")
        name, position = _take_name(data)
        queries = _take_queries(data, position)
        export = self._find(name)
        if export is None:
            raise _RefusedError(OptionReply.ERR_UNKNOWN, "no such export")
        contexts = export.contexts
        places = matching(contexts, queries, may_use_wildcards=not choosing)
        if choosing and places:
            self._context_export = export
            self._contexts = tuple((place + 1, contexts[place]) for place in places)
        # The specification wants 0 as the id of a context that is only listed.
        replies = [
            self._reply(
                OptionReply.META_CONTEXT, U32.pack(place + 1 if choosing else 0) + contexts[place].name.encode()
            )
            for place in places
        ]
        return b"".join([*replies, self._reply(OptionReply.ACK)])

    def _start_tls(self, data: bytes) -> bytes:
        if not self._offers_tls:
            raise _RefusedError(OptionReply.ERR_UNSUP, "no TLS here")
        if data or self._is_encrypted:
            raise _RefusedError(OptionReply.ERR_INVALID, "STARTTLS takes no data, and comes once")
        self.state = HandshakeState.TLS
        self.wanted = 0
        return self._reply(OptionReply.ACK)

    _HANDLERS: Final[Mapping[int, Callable[[Handshake, bytes], bytes]]] = {
        Option.ABORT: _abort,
        Option.LIST: _list,
        Option.STARTTLS: _start_tls,
        Option.INFO: _info,
        Option.GO: _info,
        Option.STRUCTURED_REPLY: _structured_reply,
        Option.LIST_META_CONTEXT: _meta_context,
        Option.SET_META_CONTEXT: _meta_context,
    }


def _take(structure: struct.Struct, data: bytes, position: int) -> int:
    try:
        value: int = structure.unpack_from(data, position)[0]
    except struct.error:
        raise _RefusedError(OptionReply.ERR_INVALID, "the option's data is too short") from None
    return value


def _take_name(data: bytes) -> tuple[bytes, int]:
    """The export name that opens an option's data, and where the rest begins."""
    length = _take(U32, data, 0)
    if length > NAME_LIMIT_BYTES:
        raise _RefusedError(OptionReply.ERR_INVALID, f"the export's name is longer than {NAME_LIMIT_BYTES} bytes")
    end = U32.size + length
    if end > len(data):
        raise _RefusedError(OptionReply.ERR_INVALID, "the option's data is too short")
    return data[U32.size : end], end


def _take_info_requests(data: bytes, position: int) -> set[int]:
    count = _take(U16, data, position)
    if len(data) != position + U16.size * (1 + count):
        raise _RefusedError(OptionReply.ERR_INVALID, "the option's length does not fit its information requests")
    return {U16.unpack_from(data, position + U16.size * (1 + index))[0] for index in range(count)}


def _take_queries(data: bytes, position: int) -> set[bytes]:
    count = _take(U32, data, position)
    position += U32.size
    queries = set()
    for _ in range(count):  # ends at the latest with the data, which is bounded
        length = _take(U32, data, position)
        position += U32.size
        if length > len(data) - position:
            raise _RefusedError(OptionReply.ERR_INVALID, "a query is longer than the option's data")
        queries.add(data[position : position + length])
        position += length
    if position != len(data):
        raise _RefusedError(OptionReply.ERR_INVALID, "data after the last query")
    return queries
