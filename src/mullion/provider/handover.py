"""A running provider's work, from its process to a newer one: the guest's requests wait for milliseconds.

    successor   connects to the control socket, says `hand-over`, and gives one end of a socket pair along
    present     flushes ahead; then serves nothing any more: nothing is in flight, files are closed cleanly. The offer:
                listeners, files, the front-ends' connections with their memory and rings (`front_end`)
    successor   opens all of it, and serves nothing yet ─► `take`
    present     touches nothing from here on ─► `gone`, and ends
    successor   serves

Invariants: at no instant do both serve. The successor serves only after `gone`, which the present one says only after
`take`; when that does not come in time, or the successor hangs up, the present one takes its own offer and goes on. One
that is merely slow is killed before that, and its end is waited for: both have the files open, and share the locks.
Killed, either of them leaves what a kill of a provider always leaves. Listeners never close: who connects meanwhile
waits for the next who accepts. NBD's clients are hung up on, and come back at once.

On the socket pair, both ways: u32 length, u32 count of descriptors (little-endian), JSON, and the descriptors, as many
with each byte that follows as the kernel takes at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from mullion.base.errors import ConflictError, InvalidError, MullionError, OperationFailedError
from mullion.base.peer import peer_of
from mullion.provider.control import close_all
from mullion.provider.control_client import FDS_LIMIT, LineDecoder, descriptors_of, encode
from mullion.provider.front_end import FrontEnd

log = logging.getLogger(__name__)

VERSION: Final = 1
OFFER_S: Final = 100.0
"""The present one flushes ahead, on a storage that may be slow; nobody waits for that."""
TAKE_S: Final = 10.0
"""The guest waits."""
_HEAD: Final = struct.Struct("<II")
_JSON_LIMIT_BYTES: Final = 16 * 1024 * 1024
_FDS_LIMIT: Final = 64 * 1024


class HandOverError(ConflictError):
    """A provider cannot hand its work over now."""

    code = "hand-over"
    default_remedy = "Try again later, or replace the provider, for which requests wait about a second."


@dataclass(slots=True)
class OfferedDisk:
    """A disk: its files, top first, and who listens and talks to whom."""

    id: str
    chain: tuple[str, ...]
    files: list[int]
    vhost_user: int | None = None
    """The listening socket."""
    front_end: FrontEnd | None = None
    nbd: int | None = None


@dataclass(slots=True)
class Offer:
    """All that a provider serves, as descriptors; they are the offer's until somebody takes them."""

    control: int
    disks: list[OfferedDisk] = field(default_factory=list)
    begun_s: float = field(default_factory=time.monotonic)
    """Since when requests wait, by the monotonic clock, which all processes of the host share."""

    def close(self) -> None:
        """Whoever has taken it has descriptors of his own."""
        close_all(self.fds())

    def fds(self) -> list[int]:
        """In the order of `to_wire`."""
        return [self.control, *(fd for disk in self.disks for fd in _fds_of(disk))]

    def to_wire(self) -> dict[str, object]:
        """All but the descriptors, as JSON's values."""
        disks = [_disk_to_wire(disk) for disk in self.disks]
        return {"version": VERSION, "begun_s": self.begun_s, "disks": disks}

    @classmethod
    def from_wire(cls, fields: Mapping[str, object], fds: Sequence[int]) -> Self:
        """Raises: HandOverError for what no provider of this version offers."""
        if fields.get("version") != VERSION:
            raise HandOverError(f"the provider offers version {fields.get('version')}, and {VERSION} is understood")
        left = iter(fds)
        try:
            disks = fields["disks"]
            assert isinstance(disks, list)
            begun_s = float(str(fields["begun_s"]))
            offer = cls(next(left), [_disk_from_wire(disk, left) for disk in disks], begun_s)
        except (KeyError, TypeError, ValueError, AssertionError, StopIteration, RuntimeError) as error:
            raise HandOverError(f"the provider's offer cannot be read: {error!r}") from error
        if next(left, None) is not None:
            raise HandOverError("the provider's offer has more descriptors than it says")
        return offer


def _fds_of(disk: OfferedDisk) -> Iterator[int]:
    yield from disk.files
    if disk.vhost_user is not None:
        yield disk.vhost_user
    if disk.front_end is not None:
        yield from disk.front_end.fds
    if disk.nbd is not None:
        yield disk.nbd


def _disk_to_wire(disk: OfferedDisk) -> dict[str, object]:
    return {
        "id": disk.id,
        "chain": list(disk.chain),
        "vhost_user": disk.vhost_user is not None,
        "front_end": None if disk.front_end is None else disk.front_end.to_wire(),
        "nbd": disk.nbd is not None,
    }


def _disk_from_wire(fields: Mapping[str, object], left: Iterator[int]) -> OfferedDisk:
    chain, said = fields["chain"], fields["front_end"]
    assert isinstance(chain, list)
    files = [next(left) for _ in chain]
    vhost_user = next(left) if fields["vhost_user"] else None
    front_end = None if said is None else FrontEnd.from_wire(said, left)
    nbd = next(left) if fields["nbd"] else None
    return OfferedDisk(str(fields["id"]), tuple(map(str, chain)), files, vhost_user, front_end, nbd)


# ---------------------------------------------------------------------- the present provider


def give(channel: socket.socket, offer: Offer) -> bool:
    """Offer it to whoever has the other end; True when it was taken, and nothing of it may be touched any more.

    Otherwise the other one touches nothing of it any more: it has hung up, or was ended.
    """
    if _is_taken(channel, offer):
        with contextlib.suppress(OSError):  # it was killed, and nobody serves: the parent starts the next one
            _send(channel, {"gone": True})
        return True
    _end_other(channel)
    return False


def _is_taken(channel: socket.socket, offer: Offer) -> bool:
    channel.settimeout(TAKE_S)
    try:
        _send(channel, offer.to_wire(), offer.fds())
        answer, fds = _receive(channel)
    except (OSError, HandOverError):  # too slow, or gone
        return False
    close_all(fds)
    return answer.get("take") is True


def _end_other(channel: socket.socket) -> None:
    """Wait until the successor has hung up, which it does when it has closed its files; if it has not, end it."""
    with contextlib.suppress(OSError):  # it has gone
        channel.shutdown(socket.SHUT_WR)
    poller = select.poll()
    poller.register(channel, 0)  # nothing but the hang-up
    if poller.poll(0):
        return
    pid = peer_of(channel).pid
    with contextlib.suppress(OSError):  # it has ended meanwhile, or is not ours to end: then it ends by itself
        pidfd = os.pidfd_open(pid)
        try:
            if not poller.poll(0):  # so it lives, and the pid is its own
                log.error("the new provider (pid %d) does not take over, nor hang up: it is killed", pid)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)
    poller.poll()


# ---------------------------------------------------------------------- its successor


class TakeOver:
    """The way from a running provider to us; a context manager. Left before `take`, the other one goes on."""

    def __init__(self, control_path: str) -> None:
        """Raises: OSError when nobody listens there."""
        ours, theirs = socket.socketpair()
        self._channel = ours
        self._control = socket.socket(socket.AF_UNIX)
        try:
            with theirs:
                self._control.settimeout(OFFER_S)
                self._control.connect(control_path)
                socket.send_fds(self._control, [encode({"command": "hand-over", "fds": 1})], [theirs.fileno()])
        except BaseException:
            self.close()
            raise

    def offer(self) -> Offer:
        """Wait for what it offers; its requests wait from here on. Raises: its refusal; HandOverError; OSError."""
        self._channel.settimeout(OFFER_S)
        try:
            fields, fds = _receive(self._channel)
        except HandOverError:
            raise self._refusal() from None
        try:
            return Offer.from_wire(fields, fds)
        except HandOverError:
            close_all(fds)
            raise

    def _refusal(self) -> MullionError:
        """What the other one says on its control socket, after it has closed the channel."""
        decoder = LineDecoder()
        while data := self._control.recv(64 * 1024):
            for answer in decoder.feed(data):
                if isinstance(error := answer.get("error"), dict):
                    refusal = MullionError.from_wire(error)
                    if refusal.code == InvalidError.code:  # its code is older than this command
                        return HandOverError(refusal.message)
                    return refusal
        return HandOverError("the provider ended, or refused without a word")

    def take(self) -> None:
        """From here on it is ours, and the other one is gone. Raises: HandOverError, OSError: then it is not."""
        self._channel.settimeout(TAKE_S)
        _send(self._channel, {"take": True})
        answer, _ = _receive(self._channel)
        if answer.get("gone") is not True:
            raise HandOverError("the provider did not let go")

    def close(self) -> None:
        self._channel.close()
        self._control.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ---------------------------------------------------------------------- the channel


def _send(channel: socket.socket, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
    data = json.dumps(message).encode()
    channel.sendall(_HEAD.pack(len(data), len(fds)) + data)
    for start in range(0, len(fds), FDS_LIMIT):
        socket.send_fds(channel, [b"\0"], list(fds[start : start + FDS_LIMIT]))


def _receive(channel: socket.socket) -> tuple[Mapping[str, object], list[int]]:
    """Raises: HandOverError when the other end closes or says nonsense; OSError, TimeoutError."""
    length, count = _HEAD.unpack(_exactly(channel, _HEAD.size))
    if length > _JSON_LIMIT_BYTES or count > _FDS_LIMIT:
        raise HandOverError(f"an offer of {length} bytes and {count} descriptors is not possible")
    try:
        message = json.loads(_exactly(channel, length))
    except ValueError as error:
        raise HandOverError(f"what came is not JSON: {error}") from error
    fds: list[int] = []
    try:
        while len(fds) < count:
            data, ancillary, flags, _ = channel.recvmsg(1, socket.CMSG_SPACE(FDS_LIMIT * 4), socket.MSG_CMSG_CLOEXEC)
            came = descriptors_of(ancillary)
            fds += came
            if not data or not came or flags & socket.MSG_CTRUNC:
                raise HandOverError("descriptors are missing: is the limit of open files too low?")
        if not isinstance(message, dict):
            raise HandOverError("what came is not an object")
    except BaseException:
        close_all(fds)
        raise
    return message, fds


def _exactly(channel: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = channel.recv(min(count - len(data), 1 << 16))
        if not piece:
            raise HandOverError("the other end has closed")
        data += piece
    return bytes(data)


def not_taken() -> OperationFailedError:
    """The successor was offered all, and did not take it."""
    return OperationFailedError(
        "the new provider did not take over: the present one goes on", remedy="Read the partition's provider.log."
    )
