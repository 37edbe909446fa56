"""Requests of the virtio block device, carried out on a disk: everything that the ring's fast path leaves over.

Spec: VIRTIO 1.2, section 5.2.6. A request comes as pieces of guest memory, framed in any way (2.7.4): header and data
to read from, data and status to write into.

Invariants: a request of the guest never raises beyond `GuestFault` and `OutOfSpace`. What the disk refuses, or the
storage fails at, is answered with IOERR and logged once a disk; what is not offered with UNSUPP.
Durability: FLUSH is answered after the disk's flush; a write is answered when the disk took it.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from typing import Final

from mullion.base.errors import MullionError
from mullion.provider.device import REQUEST_LIMIT_BYTES, DirectDevice
from mullion.provider.memory import GuestFault
from mullion.provider.space import is_no_space
from mullion.wire.vhost_user.virtio_blk import (
    MAX_RANGE_SECTORS,
    MAX_RANGE_SEGMENTS,
    SECTOR_BYTES,
    SERIAL_BYTES,
    BlkRequest,
    BlkStatus,
)

log = logging.getLogger(__name__)

_HEADER: Final = struct.Struct("<IIQ")
_RANGE: Final = struct.Struct("<QII")
_UNMAP: Final = 1
_LENGTH_LIMIT: Final = (1 << 32) - 1  # of what the used ring can tell; a longer answer is room for an identity only

Segments = list[memoryview]


class OutOfSpace(Exception):
    """The storage is full; the request has to be tried again."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class BlkDevice:
    """The disk as the guest's driver sees it."""

    def __init__(self, device: DirectDevice, disk_id: str, serial: str) -> None:
        self.device = device
        self.disk_id = disk_id
        self._serial = serial.encode("ascii", "replace")[:SERIAL_BYTES].ljust(SERIAL_BYTES, b"\0")
        self._has_logged_failure = False
        self._handlers: dict[int, Callable[[int, Segments, Segments], BlkStatus]] = {
            BlkRequest.IN: self._read,
            BlkRequest.OUT: self._write,
            BlkRequest.FLUSH: self._flush,
            BlkRequest.GET_ID: self._get_id,
            BlkRequest.DISCARD: self._discard,
            BlkRequest.WRITE_ZEROES: self._write_zeroes,
        }

    def flush(self) -> BlkStatus:
        """What a FLUSH does. Raises: OutOfSpace."""
        return self._attempt(self._flush, 0, [], [])

    def flush_aside(self) -> BlkStatus | OutOfSpace:
        """The same for a thread of its own: what to answer, or why it is to be tried again."""
        try:
            return self.flush()
        except OutOfSpace as shortage:
            return shortage
        except Exception:  # the root of a thread's task: a fault of ours fails this request, and is not quiet
            log.exception("disk %s: a flush failed because of a fault in the provider", self.disk_id)
            return BlkStatus.IOERR

    def serve(self, readable: Segments, writable: Segments) -> int:
        """Carry out one request; the number of bytes written into the guest's memory, status included.

        Raises: GuestFault when it is not a request at all; OutOfSpace when it has to wait.
        """
        header, payload = _split(readable, _HEADER.size)
        if sum(map(len, header)) != _HEADER.size:
            raise GuestFault("a request without a whole header")
        answer_bytes = sum(map(len, writable)) - 1
        if answer_bytes < 0:
            raise GuestFault("a request without room for its status")
        answer, status = _split(writable, answer_bytes)
        kind, _priority, sector = _HEADER.unpack(b"".join(header))
        handler = self._handlers.get(kind)
        code = BlkStatus.UNSUPP if handler is None else self._attempt(handler, sector * SECTOR_BYTES, payload, answer)
        status[0][0] = code
        return min(answer_bytes + 1, _LENGTH_LIMIT) if code is BlkStatus.OK else 1

    def _attempt(
        self,
        handler: Callable[[int, Segments, Segments], BlkStatus],
        offset: int,
        payload: Segments,
        answer: Segments,
    ) -> BlkStatus:
        try:
            return handler(offset, payload, answer)
        except OSError as error:
            if is_no_space(error):
                raise OutOfSpace(error) from error
            self._log_failure(error)
        except MullionError as error:
            self._log_failure(error)
        return BlkStatus.IOERR

    def _log_failure(self, error: Exception) -> None:
        if not self._has_logged_failure:
            self._has_logged_failure = True
            log.error("disk %s: a request failed, later failures are not logged: %s", self.disk_id, error)

    def _is_inside(self, offset: int, length: int) -> bool:
        return length % SECTOR_BYTES == 0 and length <= REQUEST_LIMIT_BYTES and self._has_range(offset, length)

    def _has_range(self, offset: int, length: int) -> bool:
        return offset + length <= self.device.size_bytes

    def _read(self, offset: int, _payload: Segments, answer: Segments) -> BlkStatus:
        if not self._is_inside(offset, sum(map(len, answer))):
            return BlkStatus.IOERR
        self.device.preadv(offset, answer)
        return BlkStatus.OK

    def _write(self, offset: int, payload: Segments, _answer: Segments) -> BlkStatus:
        if self.device.read_only or not self._is_inside(offset, sum(map(len, payload))):
            return BlkStatus.IOERR
        self.device.pwritev(offset, payload)
        return BlkStatus.OK

    def _flush(self, _offset: int, _payload: Segments, _answer: Segments) -> BlkStatus:
        if not self.device.read_only:
            self.device.flush()
        return BlkStatus.OK

    def _get_id(self, _offset: int, _payload: Segments, answer: Segments) -> BlkStatus:
        left = self._serial
        for piece in answer:
            part, left = left[: len(piece)], left[len(piece) :]
            piece[: len(part)] = part
        return BlkStatus.OK

    def _discard(self, _offset: int, payload: Segments, _answer: Segments) -> BlkStatus:
        return self._for_ranges(payload, 0, self.device.discard)

    def _write_zeroes(self, _offset: int, payload: Segments, _answer: Segments) -> BlkStatus:
        return self._for_ranges(payload, _UNMAP, self.device.write_zeroes)

    def _for_ranges(self, payload: Segments, allowed_flags: int, act: Callable[[int, int], None]) -> BlkStatus:
        if self.device.read_only:
            return BlkStatus.IOERR
        count, rest = divmod(sum(map(len, payload)), _RANGE.size)
        if rest or not 0 < count <= MAX_RANGE_SEGMENTS:
            return BlkStatus.IOERR
        ranges = list(_RANGE.iter_unpack(b"".join(payload)))
        # All of them are checked before any is carried out (5.2.6.2).
        for sector, sectors, flags in ranges:
            if flags & ~allowed_flags:
                return BlkStatus.UNSUPP
            if sectors > MAX_RANGE_SECTORS or not self._has_range(sector * SECTOR_BYTES, sectors * SECTOR_BYTES):
                return BlkStatus.IOERR
        for sector, sectors, _flags in ranges:
            if sectors:
                act(sector * SECTOR_BYTES, sectors * SECTOR_BYTES)
        return BlkStatus.OK


def room_of_flush(readable: Segments, writable: Segments) -> tuple[memoryview, int] | None:
    """Where a FLUSH is answered: its status, and the bytes written with it; None for what is none, or not well made."""
    header, _ = _split(readable, _HEADER.size)
    answer_bytes = sum(map(len, writable)) - 1
    if sum(map(len, header)) != _HEADER.size or answer_bytes < 0:
        return None
    if int.from_bytes(b"".join(header)[:4], "little") != BlkRequest.FLUSH:
        return None
    _, status = _split(writable, answer_bytes)
    return status[0], min(answer_bytes + 1, _LENGTH_LIMIT)


def cost_of(readable: Segments, writable: Segments) -> tuple[bool, int] | None:
    """What a request counts for where rates are capped: whether it changes data, and its bytes; None for nothing."""
    header, payload = _split(readable, _HEADER.size)
    kind = int.from_bytes(b"".join(header)[:4], "little")
    if kind == BlkRequest.IN:
        return False, max(sum(map(len, writable)) - 1, 0)
    if kind == BlkRequest.OUT:
        return True, sum(map(len, payload))
    return (True, 0) if kind in (BlkRequest.DISCARD, BlkRequest.WRITE_ZEROES) else None


def _split(segments: Segments, at: int) -> tuple[Segments, Segments]:
    """Pieces up to a byte count, and the rest."""
    before: Segments = []
    after: Segments = []
    for piece in segments:
        if at >= len(piece):
            before.append(piece)
            at -= len(piece)
        elif at > 0:
            before.append(piece[:at])
            after.append(piece[at:])
            at = 0
        else:
            after.append(piece)
    return before, after
