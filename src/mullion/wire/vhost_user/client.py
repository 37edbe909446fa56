"""A vhost-user front-end: connects to a back-end as QEMU does, shares memory with it and hands it rings.

Spec: as `messages`. Blocking, with a deadline on every answer; for tests, measurements and the zygote's rehearsal.
Invariants: user addresses differ from guest addresses, so that a back-end that mixes them up is found out.
Not handled: what `messages` does not; a second memory region is possible through `set_memory`.
"""

from __future__ import annotations

import array
import mmap
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from mullion.wire.vhost_user.messages import (
    HEADER_BYTES,
    MAX_FDS,
    U64,
    VERSION,
    VRING_LOG,
    Config,
    DeviceFeature,
    Flag,
    Header,
    Inflight,
    Log,
    MemoryRegion,
    MemoryTable,
    ProtocolError,
    ProtocolFeature,
    Request,
    VringAddress,
    VringState,
)

GUEST_BASE: Final = 0x10_0000
USER_BASE: Final = 0x7F00_0000_0000
ANSWER_DEADLINE_S: Final = 30.0
_FD: Final = array.array("i").itemsize


@dataclass(frozen=True, slots=True)
class VringPlace:
    """Offsets of the parts of a vring in the shared memory, and its descriptors."""

    index: int
    size: int
    descriptor: int
    available: int
    used: int
    kick_fd: int
    call_fd: int


class FrontEnd:
    """A connection to a back-end, with memory of its own."""

    def __init__(self, path: str, *, memory_bytes: int = 4 * 1024 * 1024, memory_fd: int | None = None) -> None:
        """Connect; `memory_fd` is the guest's memory of an earlier connection. Raises: OSError."""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(ANSWER_DEADLINE_S)
        self.socket.connect(path)
        if memory_fd is None:
            memory_fd = os.memfd_create("guest", os.MFD_CLOEXEC)
            os.ftruncate(memory_fd, memory_bytes)
        self.memory_fd = memory_fd
        self._map = mmap.mmap(memory_fd, memory_bytes)
        self.memory = memoryview(self._map)
        self.features = 0
        self.protocol_features = ProtocolFeature(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up and give the memory back, unless it is still looked at."""
        self.socket.close()
        with suppress(BufferError):
            self.memory.release()
            self._map.close()
        os.close(self.memory_fd)

    def negotiate(self, wanted: int) -> int:
        """Agree on features, as many of the wanted ones as the back-end has; returns them."""
        offered = self.ask_number(Request.GET_FEATURES)
        self.send(Request.SET_OWNER)
        if offered & DeviceFeature.PROTOCOL_FEATURES:
            protocol = self.ask_number(Request.GET_PROTOCOL_FEATURES)
            self.protocol_features = ProtocolFeature(protocol)
            self.send(Request.SET_PROTOCOL_FEATURES, U64(protocol).pack())
        self.features = offered & (wanted | DeviceFeature.PROTOCOL_FEATURES)
        self.tell(Request.SET_FEATURES, U64(self.features).pack())
        return self.features

    def set_memory(self, regions: Sequence[MemoryRegion] | None = None) -> None:
        """Share the memory: as one region at GUEST_BASE, or in the given regions of it."""
        if regions is None:
            regions = (MemoryRegion(GUEST_BASE, len(self.memory), USER_BASE, 0),)
        table = MemoryTable(tuple(regions))
        self.tell(Request.SET_MEM_TABLE, table.pack(), [self.memory_fd] * len(regions))

    def config(self, size: int) -> bytes:
        """The first bytes of the configuration space."""
        payload, _fds = self.ask(Request.GET_CONFIG, Config(0, size, 0, bytes(size)).pack())
        return Config.unpack(payload).content

    def get_inflight(self, queues: int, queue_size: int) -> tuple[Inflight, int]:
        """A fresh inflight region; the caller closes the descriptor."""
        payload, fds = self.ask(Request.GET_INFLIGHT_FD, Inflight(0, 0, queues, queue_size).pack())
        if len(fds) != 1:
            raise ProtocolError(f"an inflight region with {len(fds)} descriptors")
        return Inflight.unpack(payload), fds[0]

    def set_inflight(self, inflight: Inflight, fd: int) -> None:
        self.tell(Request.SET_INFLIGHT_FD, inflight.pack(), (fd,))

    def start_log(self, places: Sequence[VringPlace]) -> memoryview:
        """Have all writes to the memory marked from now on, as a migration does; the log, one bit a page."""
        size = (GUEST_BASE + len(self.memory) + 0x7FFF) >> 15
        fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        log = memoryview(mmap.mmap(fd, size))
        answer, _fds = self.ask(Request.SET_LOG_BASE, Log(size, 0).pack(), (fd,))
        os.close(fd)
        U64.unpack(answer)
        self.tell(Request.SET_FEATURES, U64(self.features | DeviceFeature.LOG_ALL).pack())
        for place in places:
            self._place_vring(place, VRING_LOG)
        return log

    def _place_vring(self, place: VringPlace, flags: int) -> None:
        user = (USER_BASE + place.descriptor, USER_BASE + place.used, USER_BASE + place.available)
        self.tell(Request.SET_VRING_ADDR, VringAddress(place.index, flags, *user, GUEST_BASE + place.used).pack())

    def hear(self) -> socket.socket:
        """The socket on which the back end may send messages of its own."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.tell(Request.SET_BACKEND_REQ_FD, b"", (theirs.fileno(),))
        ours.settimeout(ANSWER_DEADLINE_S)
        return ours

    def start_vring(self, place: VringPlace, base: int = 0) -> None:
        """Hand over a ring and enable it."""
        index = place.index
        self.tell(Request.SET_VRING_NUM, VringState(index, place.size).pack())
        self.tell(Request.SET_VRING_BASE, VringState(index, base).pack())
        self._place_vring(place, 0)
        self.tell(Request.SET_VRING_CALL, U64(index).pack(), (place.call_fd,))
        self.tell(Request.SET_VRING_KICK, U64(index).pack(), (place.kick_fd,))
        self.tell(Request.SET_VRING_ENABLE, VringState(index, 1).pack())

    def stop_vring(self, index: int) -> int:
        """Take a ring back; the available index that comes next."""
        payload, _fds = self.ask(Request.GET_VRING_BASE, VringState(index, 0).pack())
        return VringState.unpack(payload).num

    # Messages.

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> None:
        """Send a message and wait for nothing."""
        data = Header(request, VERSION | flags, len(payload)).pack() + payload
        socket.send_fds(self.socket, [data], list(fds))

    def tell(self, request: int, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message and have it acknowledged, where that was agreed on. Raises: ProtocolError when refused."""
        if ProtocolFeature.REPLY_ACK not in self.protocol_features:
            self.send(request, payload, fds)
            return
        self.send(request, payload, fds, Flag.NEED_REPLY)
        answer, _fds = self._receive(request)
        if U64.unpack(answer).value:
            raise ProtocolError(f"message {request} was refused")

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> tuple[bytes, list[int]]:
        """Send a message that has a reply: its payload and descriptors."""
        self.send(request, payload, fds)
        return self._receive(request)

    def ask_number(self, request: int) -> int:
        payload, _fds = self.ask(request)
        return U64.unpack(payload).value

    def _receive(self, request: int) -> tuple[bytes, list[int]]:
        data, ancillary, _flags, _address = self.socket.recvmsg(HEADER_BYTES, socket.CMSG_SPACE(MAX_FDS * _FD))
        fds = array.array("i")
        for _level, _kind, content in ancillary:
            fds.frombytes(content)
        header = Header.unpack(data + self._receive_exactly(HEADER_BYTES - len(data)))
        if header.request != request or not header.flags & Flag.REPLY:
            raise ProtocolError(f"message {header.request} instead of a reply to {request}")
        return self._receive_exactly(header.size), fds.tolist()

    def _receive_exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise ConnectionResetError("the back-end has closed the connection")
            data += more
        return data
