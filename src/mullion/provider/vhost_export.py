"""A disk offered as a vhost-user-blk back end on a unix socket: one thread, one front-end at a time.

The thread sleeps in epoll over the listening socket, the connection, the kick descriptors of the running rings and a
wake-up descriptor. Kicks are edge-triggered and never read: a write to an eventfd is an event even if its counter was
not zero, and the ring's own index says what there is to do.

The parent keeps a copy of the connection (`keeping`): a number says whether it is of now.

The thread passes the disk's turnstile before it serves what has come, and is held there while files are exchanged.

Flushes have a thread of their own, which wakes this one. A ring that ends for any reason waits for its flushes.

Invariants: everything but the counters and the state belongs to the thread. A ring that breaks stops, alone; the
process, the connection and the other rings go on. The state stays `broken` until a front-end starts that ring anew.
"""

from __future__ import annotations

import array
import enum
import functools
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

from mullion.base.closer import Closer
from mullion.base.flusher import Flusher
from mullion.provider.blk import BlkDevice
from mullion.provider.control import close_all
from mullion.provider.control_client import descriptors_of
from mullion.provider.dirty_log import DirtyLog
from mullion.provider.front_end import FrontEnd, KeptSetup, SetupMessage, say_again, setup_of
from mullion.provider.hot_loop import EVENTS
from mullion.provider.inflight import InflightRegion, create_inflight
from mullion.provider.keeping import Keeping, hang_up
from mullion.provider.layers.throttle import Lane
from mullion.provider.memory import GuestFault, GuestMemory
from mullion.provider.ring import Call, Drained, Ring
from mullion.provider.space import RETRY_INTERVAL_S, SpaceGate
from mullion.provider.turnstile import Turnstile
from mullion.wire.vhost_user import Inflight, Log, MemoryRegion, ProtocolError, Session, Vring
from mullion.wire.vhost_user.messages import MAX_FDS, VERSION, BackendRequest, DeviceFeature, Header, Request
from mullion.wire.vhost_user.virtio_blk import MAX_QUEUES, SECTOR_BYTES, BlkFeature, ConfigSpace

log = logging.getLogger(__name__)

_FEATURES: Final = int(
    BlkFeature.SEG_MAX
    | BlkFeature.BLK_SIZE
    | BlkFeature.FLUSH
    | BlkFeature.TOPOLOGY
    | BlkFeature.MQ
    | DeviceFeature.LOG_ALL
    | DeviceFeature.RING_INDIRECT_DESC
    | DeviceFeature.RING_EVENT_IDX
    | DeviceFeature.VERSION_1
)
_WRITABLE_FEATURES: Final = int(BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES)
_READ_ONLY_FEATURE: Final = int(BlkFeature.RO)
_LOG_ALL: Final = int(DeviceFeature.LOG_ALL)
_FD: Final = array.array("i").itemsize
_EDGE: Final = select.EPOLLIN | select.EPOLLET
_ONCE_WRITABLE: Final = select.EPOLLOUT | select.EPOLLONESHOT
_SAY_AFTER_S: Final = 0.002
"""A front-end says much at a time, and waits for answers: the parent hears what has become of it all."""


class Served(enum.Enum):
    """How a disk's rings are."""

    OK = "ok"
    NO_SPACE = "no_space"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Counters:
    """What the front-ends have asked for since the process began."""

    requests: int
    bytes: int


class VhostExport:
    """One disk on one listening socket."""

    def __init__(
        self,
        listener: socket.socket,
        blk: BlkDevice,
        gate: SpaceGate,
        turnstile: Turnstile,
        notify: Callable[[str, str, str], None],
        *,
        lane: Lane,
    ) -> None:
        """`notify(event, disk, reason)` hears of `connected`, `disconnected` and `broken`, from the thread."""
        self._listener = listener
        self._blk = blk
        self._gate = gate
        self._lane = lane
        self._turnstile = turnstile
        self._seat = turnstile.seat()
        self._notify = notify
        self._flusher = Flusher(blk.flush_aside, self.wake, name=f"flush-{blk.disk_id}")
        self._rings: dict[int, Ring] = {}
        self._kicks: dict[int, int] = {}  # descriptor → index of the running ring
        self._calls: dict[int, int] = {}
        self._errors: dict[int, int] = {}
        self._memory: GuestMemory | None = None
        self._inflight: InflightRegion | None = None
        self._log: DirtyLog | None = None
        self._kept = KeptSetup()
        self._keeping: Keeping | None = None
        self._say_at_s: float | None = None  # when the parent is to hear of what the front-end has said
        self._errands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._is_handing_over = False
        self._handed: FrontEnd | None = None
        self._backend_fd: int | None = None
        self._has_changed_config = False
        self._connection: socket.socket | None = None
        self._session: Session | None = None
        self._broken: dict[int, str] = {}
        self._finished = Counters(0, 0)
        self._last_index: dict[int, int] = {}  # where a broken ring stood
        self._busy: set[int] = set()
        self._stalled: set[int] = set()
        self._retry_at_s = 0.0
        self._capped: dict[int, float] = {}  # rings whose next request has to wait, and until when
        self._is_stopping = False
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._barrier = threading.Lock()
        self._notifiers: dict[int, Callable[[], None]] = {}
        self._thread = threading.Thread(target=self._run, name=f"vhost-{blk.disk_id}", daemon=True)
        gate.add_waker(self.wake)

    # What the control may ask, from another thread.

    @property
    def is_connected(self) -> bool:
        return self._connection is not None

    @property
    def broken_reason(self) -> str | None:
        return next(iter(dict(self._broken).values()), None)

    @property
    def counters(self) -> Counters:
        rings = list(self._rings.values())
        return Counters(
            self._finished.requests + sum(ring.requests for ring in rings),
            self._finished.bytes + sum(ring.bytes for ring in rings),
        )

    def adopt(self, front_end: FrontEnd) -> None:
        """Go on with a connection that another process had; before `start`, which begins to serve it.

        Its descriptors are ours from now on. Raises: ProtocolError; OSError.
        """
        try:
            self._connection = socket.socket(fileno=front_end.connection)
        except OSError:
            close_all(front_end.fds)
            raise
        self._connection.setblocking(False)
        self._session = Session(self)
        self._epoll.register(front_end.connection, select.EPOLLIN)
        say_again(self._session, front_end.messages)

    def adopt_later(self, front_end: FrontEnd) -> None:
        """As `adopt`, of an export that serves; the connection is hung up where that fails, or there is another."""
        self._errands.put(functools.partial(self._take_up, front_end))
        self.wake()

    def keep(self, keeping: Keeping) -> None:
        """Say there from now on what becomes of the connection."""
        self._errands.put(functools.partial(self._use_keeping, keeping))
        self.wake()

    def start(self) -> None:
        """Begin to listen."""
        self._listener.setblocking(False)
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._thread.start()

    def wake(self) -> None:
        """Let the thread look around: a retry is due, or the end."""
        os.eventfd_write(self._wake_fd, 1)

    def announce_config(self) -> None:
        """The configuration space has changed, the size for instance: the front-end is told, and tells the driver."""
        self._has_changed_config = True
        self.wake()

    def stop(self) -> None:
        """Finish what is being served, answer it, and end the thread. What is still in a ring stays there."""
        self._is_stopping = True
        self.wake()
        self._thread.join()
        self._flusher.stop()
        self._epoll.close()
        os.close(self._wake_fd)
        self._listener.close()

    def hand_over(self) -> tuple[int, FrontEnd | None]:
        """As `stop`, but the listener and the connection live on: their descriptors are the caller's."""
        self._is_handing_over = True
        listener = os.dup(self._listener.fileno())
        self.stop()
        return listener, self._handed

    # The thread.

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                self._turn()
            except Exception:
                # A fault of ours: the front-end comes back in a second and everything in flight is served again.
                log.exception("disk %s: the connection is given up after an internal fault", self._blk.disk_id)
                self._disconnect("internal fault")
        if self._is_handing_over and self._session is not None and self._session.is_between_messages:
            try:
                self._handed = self._come_to_rest()
            except Exception:  # the front-end comes back, as after a kill
                log.exception("disk %s: its connection is not handed over", self._blk.disk_id)
        self._disconnect("the provider ends")
        while not self._errands.empty():  # there is nobody to adopt a connection
            self._errands.get()()
            self._disconnect("the provider ends")
        if self._keeping is not None and not self._is_handing_over:
            self._keeping.leave(self._blk.disk_id)

    def _come_to_rest(self) -> FrontEnd:
        """Finish what was begun; the connection as it is then, which is not ours any more."""
        connection, session = self._connection, self._session
        assert connection is not None
        assert session is not None
        self._changes()
        for index in tuple(self._rings):
            self._detach(index)
        messages = self._setup(session)
        self._kept.forget()
        self._epoll.unregister(connection.fileno())
        self._connection = self._session = self._memory = self._inflight = self._log = self._backend_fd = None
        self._calls, self._errors, self._notifiers = {}, {}, {}
        return FrontEnd(connection.detach(), messages)

    def _setup(self, session: Session) -> list[SetupMessage]:
        return setup_of(session, self._kept, calls=self._calls, errors=self._errors, backend_fd=self._backend_fd)

    # What the parent has of the connection.

    def _changes(self) -> None:
        if self._keeping is not None:
            self._keeping.changes(self._blk.disk_id)

    def _is_now_soon(self) -> None:
        if self._keeping is not None:
            self._say_at_s = time.monotonic() + _SAY_AFTER_S

    def _is_now(self) -> None:
        self._say_at_s = None
        keeping, connection, session = self._keeping, self._connection, self._session
        if keeping is None:
            return
        front_end = None
        if connection is not None and session is not None:
            if not session.is_between_messages:
                return
            front_end = FrontEnd(connection.fileno(), self._setup(session))
        if keeping.is_now(self._blk.disk_id, front_end):
            return
        try:
            self._epoll.register(keeping.channel, _ONCE_WRITABLE)
        except FileExistsError:
            self._epoll.modify(keeping.channel, _ONCE_WRITABLE)

    def _use_keeping(self, keeping: Keeping) -> None:
        if self._keeping is not None:
            self._keeping.leave(self._blk.disk_id)
        self._keeping = keeping
        if self._connection is not None:
            self._is_now()

    def _take_up(self, front_end: FrontEnd) -> None:
        if self._connection is not None:
            log.warning(
                "disk %s: a kept connection is hung up, since its front-end has come by itself", self._blk.disk_id
            )
            hang_up(front_end, Closer())
            return
        self._changes()
        try:
            self.adopt(front_end)
        except (ProtocolError, GuestFault, OSError) as error:
            log.warning("disk %s: a kept connection is hung up: %s", self._blk.disk_id, error)
            self._disconnect(str(error))
            return
        self._is_now()
        self._notify("connected", self._blk.disk_id, "")

    def _turn(self) -> None:
        """Wait for something to do, and do it."""
        timeout_s: float = 0 if self._busy else -1 if not self._stalled else RETRY_INTERVAL_S
        due_s = [*self._capped.values(), *(() if self._say_at_s is None else (self._say_at_s,))]
        if due_s and timeout_s:
            until_s = max(min(due_s) - time.monotonic(), 0.0)
            timeout_s = until_s if timeout_s < 0 else min(timeout_s, until_s)
        events = self._attend() if timeout_s < 0 and len(self._rings) == 1 else self._epoll.poll(timeout_s, EVENTS)
        if self._turnstile.is_held:
            self._turnstile.give_way()
        with self._seat:
            self._serve(events)

    def _attend(self) -> Sequence[tuple[int, int]]:
        """Wait, with nothing to do but for the one ring there is: it serves its kicks by itself."""
        ((index, ring),) = self._rings.items()
        kick = next(fd for fd, owner in self._kicks.items() if owner == index)
        try:
            return ring.attend(self._notifiers.get(index, _no_call), self._seat, self._epoll, kick)
        except (GuestFault, OSError) as error:
            with self._seat:
                self._break_ring(index, str(error))
            return ()

    def _serve(self, events: Sequence[tuple[int, int]]) -> None:
        kicks, stalled = self._kicks, self._stalled
        for fd, _event in events:
            index = kicks.get(fd)
            if index is not None:
                if index not in stalled and self._drain(index):
                    self._busy.add(index)
            elif fd == self._wake_fd:
                with suppress(BlockingIOError):
                    os.eventfd_read(fd)
                while not self._errands.empty():
                    self._errands.get()()
                self._busy |= stalled
                self._busy.update(self._capped)
                self._busy.update(index for index, ring in self._rings.items() if ring.has_outcome)
                if self._has_changed_config:
                    self._has_changed_config = False
                    self._send_config_change()
            elif fd == self._listener.fileno():
                self._accept()
            elif self._keeping is not None and fd == self._keeping.channel:
                self._is_now()
            else:
                self._receive()
        if stalled and time.monotonic() >= self._retry_at_s:
            self._retry_at_s = time.monotonic() + RETRY_INTERVAL_S
            self._busy |= stalled
        if self._capped:
            now_s = time.monotonic()
            self._busy.update(index for index, until_s in self._capped.items() if until_s <= now_s)
        if self._say_at_s is not None and time.monotonic() >= self._say_at_s:
            self._is_now()
        for index in tuple(self._busy):
            if not self._drain(index):
                self._busy.discard(index)

    def _drain(self, index: int) -> bool:
        """Serve a ring; whether there is more to do at once."""
        ring = self._rings.get(index)
        if ring is None:
            return False
        served = ring.requests
        try:
            drained = ring.drain(self._notifiers.get(index, _no_call))
        except (GuestFault, OSError) as error:
            self._break_ring(index, str(error))
            return False
        if drained is Drained.CAPPED:
            self._capped[index] = time.monotonic() + ring.wait_s
        elif self._capped:
            self._capped.pop(index, None)
        if drained is Drained.IDLE and not self._stalled:
            return False
        if drained is Drained.STALLED:
            assert ring.stall is not None, "a stalled ring says why"
            if not self._stalled:
                self._retry_at_s = time.monotonic() + RETRY_INTERVAL_S
            self._stalled.add(index)
            self._gate.report(ring.stall, self._blk.disk_id)
            return False
        if index in self._stalled and ring.requests != served:
            self._stalled.discard(index)
            if not self._stalled:
                self._gate.recovered(self._blk.disk_id)
        return drained is Drained.BUSY

    def _send_config_change(self) -> None:
        if self._backend_fd is None:
            return
        message = Header(BackendRequest.CONFIG_CHANGE, VERSION, 0).pack()
        try:
            os.write(self._backend_fd, message)
        except OSError as error:  # it has more to read than it can take, or has gone: it reads the size when it comes
            log.warning("disk %s: the front-end was not told of the new size: %s", self._blk.disk_id, error)

    def _break_ring(self, index: int, reason: str) -> None:
        log.error("disk %s: ring %d is broken: %s", self._blk.disk_id, index, reason)
        self._broken[index] = reason
        ring = self._detach(index)
        self._last_index[index] = 0 if ring is None else ring.next_index
        if (error_fd := self._errors.get(index)) is not None:
            Call(error_fd)()
        self._notify("broken", self._blk.disk_id, reason)

    def _accept(self) -> None:
        try:
            connection, _address = self._listener.accept()
        except OSError as error:  # the peer has gone again, or no descriptor is free: it will come back
            log.warning("disk %s: a front-end could not be accepted: %s", self._blk.disk_id, error)
            return
        self._receive()  # the end of an earlier connection may not have been seen yet
        if self._connection is not None:
            log.warning("disk %s: a second front-end was turned away", self._blk.disk_id)
            connection.close()
            return
        connection.setblocking(False)
        self._connection = connection
        self._session = Session(self)
        self._epoll.register(connection.fileno(), select.EPOLLIN)
        self._is_now_soon()
        log.debug("disk %s: front-end connected", self._blk.disk_id)
        self._notify("connected", self._blk.disk_id, "")

    def _receive(self) -> None:
        connection, session = self._connection, self._session
        if connection is None or session is None:
            return
        self._changes()
        while True:
            try:
                data, ancillary, flags, _address = connection.recvmsg(
                    session.wanted_bytes, socket.CMSG_SPACE(MAX_FDS * _FD), socket.MSG_CMSG_CLOEXEC
                )
                fds = descriptors_of(ancillary)
                if not data:
                    self._disconnect("the front-end has closed the connection")
                    return
                replies = session.receive(data, fds)
                if flags & socket.MSG_CTRUNC:
                    raise ProtocolError("more descriptors than a message may have")
                for reply in replies:
                    _send(connection, reply.data, reply.fds)
            except BlockingIOError:
                self._is_now_soon()
                return
            except (ProtocolError, GuestFault, OSError) as error:
                self._disconnect(str(error))
                return

    def _disconnect(self, reason: str) -> None:
        connection, session = self._connection, self._session
        if connection is None or session is None:
            return
        log.debug("disk %s: front-end disconnected: %s", self._blk.disk_id, reason)
        session.close()
        self._epoll.unregister(connection.fileno())
        self._changes()
        with suppress(OSError):  # the front-end has gone
            connection.shutdown(socket.SHUT_RDWR)  # the parent has a copy
        connection.close()
        self._kept.close()
        self._connection = self._session = None
        self._memory = None
        self._inflight = None
        self._log = None
        self._busy.clear()
        if self._stalled:  # nobody waits any more
            self._stalled.clear()
            self._gate.recovered(self._blk.disk_id)
        self._is_now()
        self._notify("disconnected", self._blk.disk_id, reason)

    def _detach(self, index: int) -> Ring | None:
        ring = self._rings.pop(index, None)
        if ring is not None:
            kick = next(fd for fd, owner in self._kicks.items() if owner == index)
            del self._kicks[kick]
            self._epoll.unregister(kick)
            self._capped.pop(index, None)
            ring.leave()
            try:
                ring.come_to_rest(self._notifiers.get(index, _no_call))
            except OSError as error:  # all is answered, by a ring that nobody is called for
                log.warning("disk %s: the driver of ring %d cannot be called: %s", self._blk.disk_id, index, error)
            self._finished = Counters(self._finished.requests + ring.requests, self._finished.bytes + ring.bytes)
        return ring

    # What the session calls (`Backend`).

    @property
    def device_features(self) -> int:
        read_only = self._blk.device.read_only
        return _FEATURES | (_READ_ONLY_FEATURE if read_only else _WRITABLE_FEATURES)

    @property
    def queue_count(self) -> int:
        return MAX_QUEUES

    def config_space(self) -> bytes:
        return ConfigSpace(self._blk.device.size_bytes // SECTOR_BYTES, MAX_QUEUES).pack()

    def map_memory(self, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> None:
        self._memory = None
        self._kept.keep_memory(regions, fds)
        try:
            self._memory = GuestMemory(regions, fds)
        except GuestFault as fault:
            self._kept.drop(Request.SET_MEM_TABLE)
            raise ProtocolError(str(fault)) from fault

    def start_vring(self, vring: Vring, features: int) -> None:
        assert self._memory is not None, "the session starts rings only in known memory"
        assert vring.address is not None, "and at a known place"
        assert vring.kick_fd is not None, "and with a kick descriptor"
        try:
            inflight = None if self._inflight is None else self._inflight.queue(vring.index, vring.size)
            ring = Ring(
                self._blk,
                self._memory,
                vring.address,
                vring.size,
                features=features,
                inflight=inflight,
                barrier=self._barrier,
                turn=self._lane.turn(),
                turnstile=self._turnstile,
                log=self._log if features & _LOG_ALL else None,
                flusher=None if self._blk.device.read_only else self._flusher,
            )
        except GuestFault as fault:
            raise ProtocolError(str(fault)) from fault
        self._epoll.register(vring.kick_fd, _EDGE)
        self._broken.pop(vring.index, None)
        self._rings[vring.index] = ring
        self._kicks[vring.kick_fd] = vring.index
        self._busy.add(vring.index)  # what was made available while nobody listened has no kick any more
        try:
            self._call_anyway(vring.index)
        except OSError:  # it was not started, for all that the session knows
            self._detach(vring.index)
            raise

    def stop_vring(self, index: int) -> int:
        ring = self._detach(index)
        if ring is None:
            return self._last_index.pop(index, 0)
        return ring.next_index

    def set_call_fd(self, index: int, fd: int | None) -> None:
        _replace_fd(self._calls, index, fd)
        self._notifiers[index] = _no_call if fd is None else Call(fd)
        if index in self._rings:
            self._call_anyway(index)

    def _call_anyway(self, index: int) -> None:
        """Call the driver without being asked: it looks, and finds what it may have missed.

        A provider that died between the publication of an answer and its call, or a call that went to a descriptor
        which nobody reads any more, would leave the driver waiting for ever. One call too many does no harm (2.7.7.1).
        """
        self._notifiers.get(index, _no_call)()

    def set_error_fd(self, index: int, fd: int | None) -> None:
        _replace_fd(self._errors, index, fd)

    def create_inflight(self, queues: int, queue_size: int) -> tuple[Inflight, int]:
        return create_inflight(queues, queue_size)

    def use_inflight(self, inflight: Inflight, fd: int) -> None:
        self._kept.keep_inflight(inflight, fd)
        try:
            self._inflight = InflightRegion(inflight, fd)
        except GuestFault as fault:
            self._kept.drop(Request.SET_INFLIGHT_FD)
            raise ProtocolError(str(fault)) from fault

    def use_log(self, log: Log, fd: int) -> None:
        self._log = None
        self._kept.keep_log(log, fd)
        try:
            self._log = DirtyLog(log, fd)
        except GuestFault as fault:
            self._kept.drop(Request.SET_LOG_BASE)
            raise ProtocolError(str(fault)) from fault

    def set_backend_fd(self, fd: int | None) -> None:
        old, self._backend_fd = self._backend_fd, fd
        if fd is not None:
            os.set_blocking(fd, False)
        if old is not None:
            os.close(old)

    def close_fd(self, fd: int) -> None:
        os.close(fd)


def _no_call() -> None:
    """The driver polls."""


def _replace_fd(table: dict[int, int], index: int, fd: int | None) -> None:
    old = table.pop(index, None)
    if old is not None:
        os.close(old)
    if fd is not None:
        table[index] = fd


def _send(connection: socket.socket, data: bytes, fds: tuple[int, ...]) -> None:
    """Send a reply whole; a front-end that does not read its few bytes is not waited for."""
    try:
        sent = socket.send_fds(connection, [data], list(fds)) if fds else connection.send(data)
    finally:
        for fd in fds:
            os.close(fd)
    if sent != len(data):
        raise ProtocolError("the front-end does not read its replies")
