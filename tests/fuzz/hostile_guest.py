"""Millions of hostile cases against what a guest, or a client, can reach of a provider: rings, vhost-user, NBD.

`python tests/fuzz/hostile_guest.py --cases 10000000 [--seed N] [--kind ring|vhost|nbd]` prints how many cases it tried
and how they ended. A case is one hostile step: descriptors and an index in a ring, a vhost-user message with
descriptors, a piece of an NBD conversation. It may end in an answer, a broken ring or a closed connection; anything
else (another exception, a byte outside the disk, a descriptor that leaks) ends the run with the seed that repeats it.

pytest runs a few thousand cases of each kind (`test_hostile_guest.py`).
"""

from __future__ import annotations

import argparse
import collections
import gc
import itertools
import logging
import os
import random
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Final

from tests.framework.devices import MemoryDevice
from tests.framework.virtqueue import ALL_FEATURES, FlusherByHand, GranuleDisk, GuestSide

from mullion.provider.blk import BlkDevice
from mullion.provider.layers import Throttle
from mullion.provider.memory import GuestFault
from mullion.provider.space import SpaceGate
from mullion.provider.turnstile import Turnstile
from mullion.provider.vhost_export import VhostExport
from mullion.wire.nbd import Export, Handshake, NbdProtocolError
from mullion.wire.nbd.session import HandshakeState
from mullion.wire.nbd.transmission import BUFFER_BYTES, Transmission
from mullion.wire.vhost_user import ProtocolError, Session
from mullion.wire.vhost_user.client import GUEST_BASE, USER_BASE
from mullion.wire.vhost_user.driver import Segment
from mullion.wire.vhost_user.messages import HEADER_BYTES, Request
from mullion.wire.vhost_user.session import Reply

Outcomes = collections.Counter[str]

_MEMORY_BYTES: Final = 512 * 1024
_DISK_BYTES: Final = 200 * 1024
_QUEUE_SIZE: Final = 8
_U64: Final = (1 << 64) - 1
_EDGES: Final = (
    *(0, 1, 15, 16, 17, 511, 512, 513, 4095, 4096, 65535, 65536, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1),
    *(1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, _U64 - 4095, _U64),
    *(GUEST_BASE - 1, GUEST_BASE, GUEST_BASE + _MEMORY_BYTES - 1, GUEST_BASE + _MEMORY_BYTES),
    *(USER_BASE - 1, USER_BASE, USER_BASE + _MEMORY_BYTES - 1, USER_BASE + _MEMORY_BYTES),
)


class CheckedDisk(GranuleDisk):
    """Is never asked for anything outside of it, or the run ends."""

    def check(self) -> None:
        for _kind, offset, length in self.calls:
            assert 0 <= offset <= offset + length <= self.size_bytes, "the disk was asked for bytes outside of it"
        self.calls.clear()


def number(rng: random.Random, near: int, limit: int) -> int:
    """A number that is nearly right, on an edge, or anything up to a limit."""
    choice = rng.random()
    if choice < 0.6:
        return rng.randrange(near + 1)
    if choice < 0.9:
        return rng.choice(_EDGES) & limit
    return rng.randrange(limit + 1)


# -- rings -------------------------------------------------------------------------------------------------------------


class RingAttack:
    """A ring whose memory is written by whoever likes to; attached again when it has broken."""

    kind = "ring"
    LIFE = 2000

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._side: GuestSide | None = None
        self._age = 0

    def case(self) -> str:
        side = self._side if self._side is not None and self._age < self.LIFE else self._fresh()
        self._age += 1
        for _ in range(self._rng.randrange(1, 4)):
            self._write(side)
        try:
            if self._rng.random() < 0.3:
                self._flusher.end()
            drained = side.drain()
            outcome = drained.value
        except GuestFault:
            outcome = self._reattach(side)
        disk = side.disk
        assert isinstance(disk, CheckedDisk)
        disk.check()
        assert os.fstat(disk.fd).st_size <= _DISK_BYTES + (1 << disk.block_shift), "written past the end"
        return outcome

    def _fresh(self) -> GuestSide:
        self.close()
        self._age = 0
        self._flusher = FlusherByHand()
        rng = self._rng
        is_direct = rng.random() < 0.7
        self._side = GuestSide(
            CheckedDisk(_DISK_BYTES, is_direct=lambda granule: is_direct and granule != 1),
            features=rng.choice((0, 1 << 28, 1 << 29, ALL_FEATURES)),
            queue_size=_QUEUE_SIZE,
            start_index=rng.choice((0, 65534)),
            memory_bytes=_MEMORY_BYTES,
            flusher=self._flusher if rng.random() < 0.7 else None,
        )
        if rng.random() < 0.5:
            self._share(self._side.disk)
        return self._side

    def _share(self, disk: GranuleDisk) -> None:
        """The second granule is one that several files have in part, which are all the same file here."""
        place = (disk.fd, 1 << disk.block_shift)
        owners = bytes(self._rng.choices(range(4), k=16))
        disk.mixed_read[1] = ((owners, disk.block_shift - 4, (self._rng.choice((None, place)), *[place] * 3)),)
        disk.mixed_write_fd = self._rng.choice((-1, disk.fd))

    def _reattach(self, side: GuestSide) -> str:
        self._flusher.end()
        side.ring.come_to_rest(lambda: None)
        if (
            self._rng.random() < 0.9
        ):  # as a driver that has reset the device does; else it attaches to whatever is there
            end = side.driver.place.used + 6 + 8 * _QUEUE_SIZE
            side.memory[:end] = bytes(end)
            side.driver.available_idx = side.driver.seen_idx = 0
        try:
            side.new_ring()
        except GuestFault:
            self._age = self.LIFE  # what is in the memory cannot be attached to: begin anew
        return "broken"

    def _write(self, side: GuestSide) -> None:
        rng, driver = self._rng, side.driver
        choice = rng.random()
        if choice < 0.45:
            table = rng.choice((0, 0, 0x1000, 0x2000))
            address = GUEST_BASE + rng.randrange(_MEMORY_BYTES) if rng.random() < 0.8 else number(rng, 64, _U64)
            fields = (
                address,
                number(rng, 8192, 0xFFFFFFFF),
                rng.choice((0, 1, 2, 3, 4, 5, 6, 7, rng.randrange(65536))),
                number(rng, _QUEUE_SIZE, 65535),
            )
            driver.write_descriptor(table, rng.randrange(_QUEUE_SIZE), fields)
        elif choice < 0.7:
            kind, sector = number(rng, 14, 0xFFFFFFFF), number(rng, 450, _U64)
            struct.pack_into("<IIQ", side.memory, 0x10000 + 16 * rng.randrange(4), kind, 0, sector)
            driver.make_available(number(rng, _QUEUE_SIZE, 65535))
        elif choice < 0.85:
            driver.submit(rng.randrange(2), rng.choice((0, 1, 4, 8, 11, 13)), number(rng, 450, _U64), answer_bytes=512)
        elif choice < 0.87:
            self._submit_in_pieces(side)
        elif choice < 0.92:
            at = driver.place.available + 2
            driver.available_idx = rng.randrange(65536)
            struct.pack_into("<H", side.memory, at, driver.available_idx)
        else:
            at = rng.randrange(_MEMORY_BYTES - 64)
            side.memory[at : at + 64] = rng.randbytes(64)

    def _submit_in_pieces(self, side: GuestSide) -> None:
        """What an honest driver asks for, mostly: whole sectors, to or from memory that is in many pieces."""
        rng = self._rng
        is_read, length = rng.random() < 0.5, 512 * rng.randrange(1, 40)
        cuts = sorted({0, length, *(rng.randrange(length) for _ in range(rng.randrange(6)))})
        pieces = [
            Segment(rng.randrange(0x20000, _MEMORY_BYTES - length), end - start, is_read)
            for start, end in itertools.pairwise(cuts)
        ]
        side.driver.submit(rng.randrange(2), 0 if is_read else 1, number(rng, 450, _U64), segments=pieces)

    def close(self) -> None:
        if self._side is not None:
            self._side.close()
            self._side = None


# -- vhost-user --------------------------------------------------------------------------------------------------------


class VhostAttack:
    """A front-end that says what it likes to a real export, with descriptors of every kind."""

    kind = "vhost"
    LIFE = 500

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._export: VhostExport | None = None
        self._session: Session | None = None
        self._disk: CheckedDisk | None = None
        self._script: list[tuple[int, bytes, int]] = []
        self._age = self.LIFE

    def case(self) -> str:
        if self._age >= self.LIFE:
            self._fresh()
        self._age += 1
        session, export, disk = self._session, self._export, self._disk
        assert session is not None
        assert export is not None
        assert disk is not None
        data, fds = self._message()
        replies: list[Reply] = []
        try:
            replies += session.receive(data[:HEADER_BYTES], fds)
            payload = data[HEADER_BYTES:]
            while payload and not replies:
                wanted = session.wanted_bytes
                replies += session.receive(payload[:wanted], ())
                payload = payload[wanted:]
        except (ProtocolError, GuestFault, OSError):
            self._age = self.LIFE
            return "refused"
        for reply in replies:
            assert len(reply.data) >= HEADER_BYTES
            for fd in reply.fds:
                os.close(fd)
        _drain_all(export)
        disk.check()
        return "answered" if replies else "taken"

    def _fresh(self) -> None:
        self.close()
        self._age = 0
        listener = socket.socket(socket.AF_UNIX)  # nobody connects: what one would say comes from us
        self._disk = CheckedDisk(_DISK_BYTES)
        blk = BlkDevice(self._disk, "disk", "SERIAL-1")
        self._export = VhostExport(
            listener, blk, SpaceGate(lambda *_: None), Turnstile("disk"), lambda *_: None, lane=Throttle().lane("disk")
        )
        self._session = Session(self._export)
        self._script = self._good_start() if self._rng.random() < 0.8 else []

    def _good_start(self) -> list[tuple[int, bytes, int]]:
        """What QEMU sends until ring 0 runs, last message first: (request, payload, descriptors)."""
        pair = struct.Struct("<II")
        region = struct.pack("<IIQQQQ", 1, 0, GUEST_BASE, _MEMORY_BYTES, USER_BASE, 0)
        address = struct.pack("<IIQQQQ", 0, 0, USER_BASE, USER_BASE + 0x400, USER_BASE + 0x200, 0)
        start = [
            (Request.SET_OWNER, b"", 0),
            (Request.SET_FEATURES, struct.pack("<Q", ALL_FEATURES | 1 << 30), 0),
            (Request.SET_MEM_TABLE, region, 1),
            (Request.SET_VRING_NUM, pair.pack(0, _QUEUE_SIZE), 0),
            (Request.SET_VRING_BASE, pair.pack(0, 0), 0),
            (Request.SET_VRING_ADDR, address, 0),
            (Request.SET_VRING_CALL, struct.pack("<Q", 0), 1),
            (Request.SET_VRING_KICK, struct.pack("<Q", 0), 1),
            (Request.SET_VRING_ENABLE, pair.pack(0, 1), 0),
        ]
        return [(int(request), payload, count) for request, payload, count in reversed(start)]

    def _good_fd(self, request: int) -> int:
        if request != Request.SET_MEM_TABLE:
            return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(fd, _MEMORY_BYTES)
        available = struct.pack("<HH", 0, self._rng.choice((0, 1, 3)))
        header = struct.pack("<IIQ", self._rng.choice((0, 1, 4, 8, 11, 13)), 0, number(self._rng, 450, _U64))
        os.pwrite(fd, self._rng.randbytes(128), 0)
        os.pwrite(fd, available, 0x200)
        os.pwrite(fd, header, 0x10000)
        return fd

    def _message(self) -> tuple[bytes, list[int]]:
        """The next message of a good start, or anything."""
        rng = self._rng
        if self._script and rng.random() < 0.9:
            request, payload, count = self._script.pop()
            return struct.pack("<III", request, 1, len(payload)) + payload, [
                self._good_fd(request) for _ in range(count)
            ]
        request = rng.choice(tuple(Request)).value if rng.random() < 0.95 else rng.randrange(1 << 32)
        payload = self._payload(request)
        flags = rng.choice((1, 1, 1, 9, rng.randrange(1 << 32)))
        size = len(payload) if rng.random() < 0.9 else number(rng, 300, 0xFFFFFFFF)
        fds = [self._descriptor() for _ in range(rng.choice((0, 0, 1, 1, 1, 2)))]
        return struct.pack("<III", request, flags, size) + payload, fds

    def _payload(self, request: int) -> bytes:
        rng = self._rng
        choice = rng.random()
        if choice < 0.1:
            return rng.randbytes(rng.randrange(64))
        match request:
            case Request.SET_MEM_TABLE:
                count = rng.choice((1, 1, 1, 0, 2, 8, number(rng, 8, 0xFFFFFFFF)))
                regions = b"".join(
                    struct.pack(
                        "<QQQQ",
                        rng.choice((GUEST_BASE, number(rng, 4096, _U64))),
                        rng.choice((_MEMORY_BYTES, number(rng, 65536, _U64))),
                        rng.choice((USER_BASE, number(rng, 4096, _U64))),
                        rng.choice((0, 0, number(rng, 4096, _U64))),
                    )
                    for _ in range(min(count, 9))
                )
                return struct.pack("<II", count, 0) + regions
            case Request.SET_VRING_ADDR:
                places = [
                    rng.choice((USER_BASE + offset, USER_BASE + rng.randrange(_MEMORY_BYTES), number(rng, 64, _U64)))
                    for offset in (0, 0x400, 0x200, 0)
                ]
                return struct.pack("<IIQQQQ", number(rng, 2, 300), rng.choice((0, 1)), *places)
            case Request.SET_VRING_NUM | Request.SET_VRING_BASE | Request.SET_VRING_ENABLE | Request.GET_VRING_BASE:
                return struct.pack("<II", number(rng, 2, 300), rng.choice((8, 0, 1, number(rng, 1024, 0xFFFFFFFF))))
            case Request.GET_CONFIG | Request.SET_CONFIG:
                size = rng.choice((8, 60, number(rng, 256, 0xFFFFFFFF)))
                return struct.pack("<III", number(rng, 64, 0xFFFFFFFF), size, 0) + rng.randbytes(min(size, 300))
            case Request.GET_INFLIGHT_FD | Request.SET_INFLIGHT_FD:
                size, offset = number(rng, 4096, _U64), rng.choice((0, number(rng, 4096, _U64)))
                return struct.pack("<QQHH4x", size, offset, number(rng, 4, 65535), number(rng, 256, 65535))
            case Request.SET_FEATURES | Request.SET_PROTOCOL_FEATURES:
                return struct.pack("<Q", rng.choice((ALL_FEATURES | 1 << 30, ALL_FEATURES, 0, rng.randrange(_U64))))
            case _:
                return struct.pack("<Q", rng.choice((0, 1, 256, 257, number(rng, 512, _U64))))

    def _descriptor(self) -> int:
        choice = self._rng.random()
        if choice < 0.5:
            fd = os.memfd_create("guest", os.MFD_CLOEXEC)
            os.ftruncate(fd, _MEMORY_BYTES if self._rng.random() < 0.8 else self._rng.randrange(1 << 20))
            if self._rng.random() < 0.5:
                os.pwrite(fd, self._rng.randbytes(2048), 0)
            return fd
        if choice < 0.9:
            return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
        if self._export is not None:
            _close_export(self._export)
        if self._disk is not None:
            self._disk.close()
        self._session = self._export = self._disk = None


def _drain_all(export: VhostExport) -> None:
    """What the export's thread does after a message, without the thread."""
    for index in tuple(export._busy):
        if not export._drain(index):
            export._busy.discard(index)


def _close_export(export: VhostExport) -> None:
    export._kept.close()
    export._flusher.stop()
    export._epoll.close()
    os.close(export._wake_fd)
    export._listener.close()


# -- NBD ---------------------------------------------------------------------------------------------------------------


class NbdAttack:
    """A client that negotiates and asks what it likes."""

    kind = "nbd"
    SIZE_BYTES = 1 << 20

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._device = MemoryDevice(self.SIZE_BYTES)
        self._buffer = memoryview(bytearray(BUFFER_BYTES))

    def case(self) -> str:
        return self._negotiate() if self._rng.random() < 0.3 else self._ask()

    def _negotiate(self) -> str:
        rng = self._rng
        handshake = Handshake([Export("disk", self._device)])
        stream = struct.pack(">I", rng.choice((3, 1, rng.randrange(1 << 32))))
        for _ in range(rng.randrange(1, 5)):
            data = rng.choice((b"", struct.pack(">I", 4) + b"disk" + bytes(2), rng.randbytes(rng.randrange(60))))
            size = len(data) if rng.random() < 0.9 else number(rng, 100, 0xFFFFFFFF)
            stream += struct.pack(">QII", 0x49484156454F5054, number(rng, 12, 0xFFFFFFFF), size) + data
        try:
            while handshake.state not in (HandshakeState.READY, HandshakeState.CLOSED):
                if len(stream) < handshake.wanted:
                    return "waits"
                piece, stream = stream[: handshake.wanted], stream[handshake.wanted :]
                assert len(handshake.receive(piece)) < 64 * 1024
        except NbdProtocolError:
            return "refused"
        return "negotiated"

    def _ask(self) -> str:
        rng = self._rng
        sent: list[int] = []
        export = Export("disk", self._device, rng.random() < 0.2)
        transmission = Transmission(
            export,
            is_structured=rng.random() < 0.5,
            contexts=list(enumerate(export.contexts, 1)) if rng.random() < 0.5 else [],
            send=lambda data: sent.append(len(data)),
            wake=lambda: None,
        )
        stream = bytearray()
        for _ in range(rng.randrange(1, 4)):
            magic = 0x25609513 if rng.random() < 0.97 else rng.randrange(1 << 32)
            kind = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, rng.randrange(65536)))
            length = number(rng, 4096, 0xFFFFFFFF)
            offset = number(rng, self.SIZE_BYTES, _U64)
            flags = rng.choice((0, 0, 1, 2, 4, 8, rng.randrange(65536)))
            stream += struct.pack(">IHHQQI", magic, flags, kind, rng.randrange(_U64), offset, length)
            if kind == 1:
                stream += rng.randbytes(min(length, 8192))
        at = end = 0
        try:
            end = min(len(stream), BUFFER_BYTES)
            self._buffer[:end] = stream[:end]
            while not transmission.is_closed and end - at >= transmission.wanted:
                at = transmission.feed(self._buffer, at, end)
                transmission.answer_flushes(is_last=rng.random() < 0.3)
                transmission.send_replies()
        except NbdProtocolError:
            return "refused"
        finally:
            transmission.close()
        return "closed" if transmission.is_closed else "answered"

    def close(self) -> None:
        """Nothing is open."""


ATTACKS: Final[dict[str, Callable[[random.Random], RingAttack | VhostAttack | NbdAttack]]] = {
    "ring": RingAttack,
    "vhost": VhostAttack,
    "nbd": NbdAttack,
}


def attack(kind: str, cases: int, seed: int, *, tell_every: int = 0) -> Outcomes:
    """Try so many cases; how they ended. Raises: whatever a case must not end in, with a note of how to repeat it."""
    outcomes: Outcomes = collections.Counter()
    attacker = ATTACKS[kind](random.Random(seed))
    open_before = len(os.listdir("/proc/self/fd"))
    begun_s = time.monotonic()
    try:
        for done in range(1, cases + 1):
            try:
                outcomes[attacker.case()] += 1
            except BaseException as error:
                error.add_note(f"case {done} of {kind}, seed {seed}")
                raise
            if tell_every and done % tell_every == 0:
                rate = done / (time.monotonic() - begun_s)
                print(f"{kind}: {done} cases, {rate:.0f}/s, {dict(outcomes)}", flush=True)
    finally:
        attacker.close()
    del attacker
    gc.collect()  # mappings keep descriptors of their own until they are collected
    left = len(os.listdir("/proc/self/fd")) - open_before
    assert left <= 0, f"{left} descriptors were not closed; seed {seed} of {kind}"
    return outcomes


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="hostile_guest")
    parser.add_argument("--cases", type=int, default=100_000, help="in all, over the chosen kinds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=(*ATTACKS, "all"), default="all")
    given = parser.parse_args(argv)
    logging.disable(logging.ERROR)  # a line for every broken ring would be most of the work
    kinds = tuple(ATTACKS) if given.kind == "all" else (given.kind,)
    for kind in kinds:
        cases = given.cases // len(kinds)
        print(f"{kind}: {cases} cases: {dict(attack(kind, cases, given.seed, tell_every=250_000))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
